"""Other clients than ``openai``: libraries, curl, and requests as programs send them."""

import asyncio
import json
import shutil
import subprocess

import httpx
import pytest
from served import BLUE, EXAMPLES, data_uri, image_part, messages_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model(url):
    return httpx.get(f"{url}/v1/models").json()["data"][0]["id"]


def test_langchain_asks_and_streams(url, model):
    chat_models = pytest.importorskip("langchain_openai")
    chat = chat_models.ChatOpenAI(
        model=model, base_url=f"{url}/v1", api_key="any", stream_usage=True
    )
    answer = chat.invoke(messages_of(*BLUE))
    assert answer.content == "3" and answer.tool_calls == []
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream(messages_of(*BLUE)))
    assert "".join(chunk.content for chunk in chunks) == "3"
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["total_tokens"] == answer.usage_metadata["total_tokens"]
    assert asyncio.run(chat.ainvoke(messages_of(*BLUE))).content == "3"


def test_langchain_continues_a_response(url, model, embedded):
    chat_models = pytest.importorskip("langchain_openai")
    chat = chat_models.ChatOpenAI(
        model=model, base_url=f"{url}/v1", api_key="any", use_responses_api=True
    )
    first = chat.invoke(messages_of("How many are there?", "things.jpg"))
    python = embedded.chat(EXAMPLES / "things.jpg")
    assert first.text == python.ask("How many are there?").text
    following = chat.invoke(
        messages_of("Is there a green one?"),
        previous_response_id=first.response_metadata["id"],
    )
    assert following.text == python.ask("Is there a green one?").text


def test_litellm_asks_and_streams(url, model):
    litellm = pytest.importorskip("litellm")
    options = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "any"}
    answer = litellm.completion(messages=messages_of(*BLUE), **options)
    assert answer.choices[0].message.content == "3"
    assert "region" in answer.choices[0].message.reasoning_content
    assert answer.usage.completion_tokens > 0
    chunks = list(litellm.completion(messages=messages_of(*BLUE), stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "3"
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=messages_of(*BLUE), n=3, num_retries=0, **options)


def curl(*words):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_curl_asks_and_streams(url, model, tmp_path):
    file = tmp_path / "body.json"
    asked = ("-H", "Content-Type: application/json", "--data-binary", f"@{file}")
    asked += (f"{url}/v1/chat/completions",)
    file.write_text(json.dumps({"model": model, "messages": messages_of(*BLUE)}))
    assert json.loads(curl(*asked))["choices"][0]["message"]["content"] == "3"
    file.write_text(json.dumps({"model": model, "messages": messages_of(*BLUE), "stream": True}))
    assert curl("-N", *asked).rstrip().endswith("data: [DONE]")
    assert json.loads(curl(f"{url}/v1/models"))["data"][0]["id"] == model


def test_a_request_of_open_webui(url, model):
    """It reads the content type to tell a stream from an answer, and sends further fields."""
    body = {
        "stream": True,
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {
                "role": "user",
                "content": [{"type": "text", "text": BLUE[0]}, image_part("tags.jpg")],
            },
        ],
        "stream_options": {"include_usage": True},
    }
    headers = {
        "Authorization": "Bearer",
        "Content-Type": "application/json",
        "X-OpenWebUI-User-Name": "Zo%C3%AB",
        "X-OpenWebUI-Chat-Id": "1",
    }
    path = f"{url}/v1/chat/completions"
    with httpx.stream("POST", path, json=body, headers=headers) as response:
        assert "text/event-stream" in response.headers["content-type"]
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas)
    assert any(delta.get("reasoning_content") for delta in deltas)
    assert max(map(len, lines)) < 4 * 2**20
    bad = httpx.post(path, json={**body, "n": 2}, headers=headers)
    assert "text/event-stream" not in bad.headers["content-type"] and bad.json()["error"]


def test_a_request_of_vlmevalkit(url, model):
    """Everything in one user message, pictures as JPEG with detail low, the body as text."""
    image = {"url": data_uri(EXAMPLES / BLUE[1]), "detail": "low"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": BLUE[0]}]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    body |= {"n": 1, "temperature": 0, "max_tokens": 2048}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-any"}
    path = f"{url}/v1/chat/completions"
    response = httpx.post(path, content=json.dumps(body), headers=headers)
    assert 200 <= response.status_code < 300
    assert json.loads(response.text)["choices"][0]["message"]["content"].strip() == "3"


def test_a_request_of_lmms_eval(url, model):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    picture = {"type": "image_url", "image_url": {"url": data_uri(EXAMPLES / BLUE[1], "image/png")}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {"role": "user", "content": [picture, {"type": "text", "text": BLUE[0]}]},
    ]
    response = client.chat.completions.create(
        messages=messages, model=model, max_tokens=1024, temperature=0
    )
    assert response.choices[0].message.content
    assert response.usage.prompt_tokens and response.usage.completion_tokens

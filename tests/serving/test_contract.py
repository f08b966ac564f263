"""What clients of the OpenAI API rely on, with the ``openai`` package against a real url."""

import asyncio
import io
import json
import logging
import re

import httpx
import openai
import pytest
from PIL import Image
from served import BLUE, EXAMPLES, QUESTION, QUESTIONS, image_part, messages_of, serving, until


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture
def ask(client, model):
    """Ask a question about pictures; returns the completion."""

    def ask(question, *pictures, **options):
        messages = options.pop("messages", None) or messages_of(question, *pictures)
        return client.chat.completions.create(model=model, messages=messages, **options)

    return ask


# --- models ---------------------------------------------------------------------------------


def test_the_model_is_listed_with_its_length(client, model, embedded):
    card = client.models.retrieve(model)
    assert (card.id, card.object) == (model, "model")
    assert card.max_model_len == embedded.engine.cache.capacity
    assert [one.id for one in client.models.list()] == [model]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nonsense")
    assert caught.value.body["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nonsense", messages=messages_of("?"))


# --- answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("one", QUESTIONS, ids=lambda one: one["question"])
def test_the_answer_is_that_of_python(ask, embedded, one):
    here = embedded.ask(EXAMPLES / one["picture"], one["question"])
    there = ask(one["question"], one["picture"])
    (choice,) = there.choices
    assert choice.message.content == here.text == one["answer"]
    assert (choice.finish_reason, choice.index, choice.message.role) == ("stop", 0, "assistant")
    assert there.object == "chat.completion" and there.id.startswith("chatcmpl-")
    calls = choice.message.perception["calls"] if here.trace.calls else []
    found = [(c["branch"], c["image"], c["region"], c["box_xyxy_px"], c["tokens"]) for c in calls]
    assert found == [
        (c.branch, c.image, *(v and list(v) for v in (c.region, c.box_xyxy_px)), c.num_tokens)
        for c in here.trace.calls
    ]
    assert choice.message.tool_calls is None
    if one["question"] == QUESTION:
        words = "[looks again: region x 3, y 2 → box 112,56,280,224 of image 0, 16 tokens, "
        assert choice.message.reasoning.startswith(words)


def test_usage_counts_tokens_of_images_and_of_the_cache(ask, embedded):
    here = embedded.ask(EXAMPLES / BLUE[1], BLUE[0]).trace
    usage = ask(*BLUE).usage
    assert usage.completion_tokens == here.counts.generated_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.prompt_tokens_details.model_dump()
    assert 0 < details["cached_tokens"] <= usage.prompt_tokens
    assert details["image_tokens"] >= sum(image.num_tokens for image in here.images)
    assert details["image_tokens"] + details["text_tokens"] == usage.prompt_tokens


def test_a_token_limit_ends_as_length(ask):
    long = ask(*BLUE, max_tokens=2)
    assert (long.choices[0].finish_reason, long.usage.completion_tokens) == ("length", 2)
    both = ask(*BLUE, max_tokens=2, max_completion_tokens=3)
    assert both.usage.completion_tokens == 3


def test_the_limit_of_calls_ends_as_stop_and_says_so(ask):
    options = {"max_calls": 0, "constrain": False, "perception": "auto"}
    choice = ask(*BLUE, extra_body=options).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "max_calls")


def test_options_of_perception_are_honoured(ask):
    message = ask(*BLUE, extra_body={"perception": "none"}).choices[0].message
    assert not (getattr(message, "perception", None) or {}).get("calls")
    region = [3, 2, 3, 2]
    message = ask(*BLUE, extra_body={"region": region, "max_calls": 1}).choices[0].message
    assert [call["region"] for call in message.perception["calls"]] == [region]


def test_sampling_is_that_of_python(ask, embedded):
    options = {"temperature": 3.0, "top_p": 0.9, "seed": 5}
    for seed in (5, 6):
        options["seed"] = seed
        here = embedded.ask(EXAMPLES / BLUE[1], BLUE[0], **options, top_k=40)
        assert ask(*BLUE, **options, extra_body={"top_k": 40}).choices[0].message.content == (
            here.text
        )


def encoded(kind, **options):
    file = io.BytesIO()
    Image.open(EXAMPLES / "tags.jpg").save(file, kind, **options)
    return file.getvalue()


def two_frames():
    frames = [Image.open(EXAMPLES / name).convert("RGB") for name in ("things.jpg", "tags.jpg")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_images_of_each_kind_are_read(ask, kind):
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    assert ask(BLUE[0], encoded(kind, **options)).choices[0].message.content == "3"


def test_of_a_moving_gif_the_first_frame_counts(ask):
    assert ask("How many are there?", two_frames()).choices[0].message.content == "seven"


def test_images_of_history_and_several_images_are_seen(ask, embedded):
    history = [
        *messages_of("How many are there?", "things.jpg"),
        {"role": "assistant", "content": "seven"},
        *messages_of("Is there a green one?"),
    ]
    here = embedded.ask(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": str(EXAMPLES / "things.jpg")},
                    {"type": "text", "text": "How many are there?"},
                ],
            },
            {"role": "assistant", "content": "seven"},
            {"role": "user", "content": "Is there a green one?"},
        ]
    )
    assert ask("", messages=history).choices[0].message.content == here.text
    both = embedded.ask([EXAMPLES / "tags.jpg", EXAMPLES / "things.jpg"], BLUE[0])
    assert ask(BLUE[0], "tags.jpg", "things.jpg").choices[0].message.content == both.text


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original"])
def test_detail_changes_nothing(ask, detail):
    parts = [image_part(detail=detail), {"type": "text", "text": BLUE[0]}]
    message = ask("", messages=[{"role": "user", "content": parts}]).choices[0].message
    assert message.content == "3" and len(message.perception["calls"]) == 1


def test_detail_is_logged_once(embedded, caplog):
    parts = [image_part(detail="low"), {"type": "text", "text": BLUE[0]}]
    body = {"messages": [{"role": "user", "content": parts}]}
    with serving(embedded) as (url, _), caplog.at_level(logging.INFO, "vpt"):
        for _ in range(2):
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    assert caplog.text.count("the field `detail` of images has no effect") == 1


def test_the_names_of_ignored_fields_are_logged(ask, caplog):
    with caplog.at_level(logging.DEBUG, "vpt"):
        ask(*BLUE, extra_body={"nonsense": "a secret"})
    assert "ignored fields: ['nonsense']" in caplog.text and "a secret" not in caplog.text


def test_unknown_fields_are_ignored(ask):
    unknown = {"nonsense": {"a": 1}, "chat_id": "x", "metadata": {"a": "b"}, "user": "me"}
    assert ask(*BLUE, extra_body=unknown).choices[0].message.content == "3"
    harmless = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "tools": []}
    assert ask(*BLUE, extra_body={**harmless, "tool_choice": "none"}).choices[0].message.content


def test_fields_that_are_null_are_absent(ask):
    names = ("temperature", "top_p", "seed", "stop", "max_tokens", "max_completion_tokens", "n")
    names += ("stream_options", "tools", "tool_choice", "response_format", "perception", "region")
    assert ask(*BLUE, extra_body=dict.fromkeys(names)).choices[0].message.content == "3"


@pytest.mark.parametrize("stop", ["ev", ["zzz", "ev"], ["seven"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(ask, stop, stream):
    question = ("How many are there?", "things.jpg")
    if stream:
        chunks = [c for c in ask(*question, stop=stop, stream=True) if c.choices]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = ask(*question, stop=stop).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (
        "seven".partition(stop if isinstance(stop, str) else stop[-1])[0],
        "stop",
    )


def test_a_stop_string_never_cuts_inside_a_call(ask):
    plain = ask(*BLUE).choices[0].message
    for stop in ("<|region_token_start|>", "<|x_3|>", "region", "|"):
        message = ask(*BLUE, stop=[stop]).choices[0].message
        assert message.content == plain.content
        assert message.perception["calls"][0]["region"] == plain.perception["calls"][0]["region"]


# --- streams --------------------------------------------------------------------------------


def raw_stream(url, model, **body):
    body = {"model": model, "messages": messages_of(*BLUE), "stream": True, **body}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return [line for line in response.iter_lines() if line]


def test_a_stream_has_the_shape_that_clients_read(url, model):
    lines = raw_stream(url, model, stream_options={"include_usage": True})
    assert all(line.startswith(("data: ", ":")) for line in lines)
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(one) for one in data[:-1]]
    assert {one["object"] for one in chunks} == {"chat.completion.chunk"}
    assert len({(one["id"], one["created"], one["model"]) for one in chunks}) == 1
    first = chunks[0]["choices"][0]
    assert (first["delta"]["role"], first["delta"]["content"]) == ("assistant", "")
    assert first["finish_reason"] is None
    usage = chunks[-1]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    assert all(one.get("usage") is None for one in chunks[:-1])
    reasons = [one["choices"][0]["finish_reason"] for one in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    deltas = [one["choices"][0]["delta"] for one in chunks[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "3"
    assert not any("tool_calls" in delta and delta["tool_calls"] for delta in deltas)


def without_ms(text):
    return re.sub(r"\d+ ms", "ms", text)


def test_calls_are_streamed_as_they_happen(ask):
    plain = ask(*BLUE).choices[0].message
    deltas = [c.choices[0].delta for c in ask(*BLUE, stream=True) if c.choices]
    seen = [n for n, d in enumerate(deltas) if (getattr(d, "perception", None) or {}).get("calls")]
    words = [n for n, d in enumerate(deltas) if d.content]
    assert seen and words and seen[0] < words[0]
    calls = [call for n in seen for call in deltas[n].perception["calls"]]
    for streamed, whole in zip(calls, plain.perception["calls"], strict=True):
        assert {**streamed, "ms": 0} == {**whole, "ms": 0}
    for name in ("reasoning", "reasoning_content"):
        text = "".join(getattr(delta, name, None) or "" for delta in deltas)
        assert without_ms(text) == without_ms(getattr(plain, name))
        assert "112" in text and "region" in text  # the box, in words
    assert "base64" not in str(calls)


def test_usage_is_not_streamed_unasked(ask):
    assert not any(chunk.usage for chunk in ask(*BLUE, stream=True))


def test_an_async_client_gets_the_same(url, model):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            create = client.chat.completions.create
            options = {"model": model, "messages": messages_of(*BLUE)}
            whole, stream = await asyncio.gather(create(**options), create(**options, stream=True))
            parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            return whole.choices[0].message.content, "".join(parts)

    assert asyncio.run(both()) == ("3", "3")


def test_a_raw_response_has_headers(client, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages_of(*BLUE))
    assert raw.parse().choices[0].message.content == "3"
    assert raw.headers["content-type"] == "application/json"


# --- errors ---------------------------------------------------------------------------------

USER = messages_of("How many are there?", "things.jpg")


def image_url(link):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": link}}]}]


BAD = [
    ({"n": 2}, "n", "n is not supported"),
    ({"logprobs": True}, "logprobs", ""),
    ({"response_format": {"type": "json_object"}}, "response_format", ""),
    (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools",
        "tools is not supported",
    ),
    ({"tool_choice": "required"}, "tool_choice", ""),
    ({"temperature": -1}, "temperature", "at least 0, not -1"),
    ({"temperature": "warm"}, "temperature", ""),
    ({"top_p": 0}, "top_p", "top_p must be"),
    ({"top_k": -2}, "top_k", "top_k must be"),
    ({"seed": "x"}, "seed", "seed must be"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be a whole number"),
    ({"max_completion_tokens": "x"}, "max_completion_tokens", ""),
    ({"perception": "nonsense"}, "perception", "perception must be one of"),
    ({"max_calls": -1}, "max_calls", "max_calls must be"),
    ({"region": [5, 5, 1, 1]}, "region", "order the cells"),
    ({"region": [0, 0, 99, 99]}, "region", ""),
    ({"max_completion_tokens": 0, "max_tokens": 9}, "max_completion_tokens", "at least 1"),
    ({"look_at": 9}, "look_at", "index of no image"),
    ({"look_at": "last"}, "look_at", "look_at"),
    ({"constrain": "perhaps"}, "constrain", ""),
    ({"stop": ["x"] * 99}, "stop", "stop must be at most 16 texts"),
    ({"stop": 5}, "stop", ""),
    ({"stream": "perhaps"}, "stream", ""),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": None}, "messages", ""),
    ({"messages": "hi"}, "messages", ""),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", ""),
    ({"messages": [{"role": "user"}]}, "messages", ""),
    ({"messages": image_url("data:image/png;base64,AAAA")}, "messages", ""),
    ({"messages": image_url("/etc/passwd")}, "messages", "an image must be"),
    ({"messages": image_url("file:///etc/passwd")}, "messages", ""),
    ({"messages": image_url("http://example.org/a.png")}, "messages", "fetches no images"),
]


@pytest.mark.parametrize(("change", "param", "words"), BAD, ids=lambda one: str(one)[:50])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_a_400_that_names_the_field(url, model, change, param, words, stream):
    body = {"model": model, "messages": USER, "stream": stream, **change}
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"].split(".")[0]) == ("invalid_request_error", param)
    assert words in error["message"] != "" and "Traceback" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/nonsense", None, 404),
        ("GET", "/nonsense", None, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("DELETE", "/v1/models", None, 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b'{"model": NaN}', 400),
        ("POST", "/v1/chat/completions", b"", 400),
    ],
)
def test_every_error_has_the_body_of_openai(url, method, path, content, status):
    headers = {"content-type": "application/json"} if method == "POST" else {}
    response = httpx.request(method, url + path, content=content, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]


def test_a_prompt_that_is_too_long_is_a_400(url, model):
    body = {"model": model, "messages": messages_of("the " * 50_000)}
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")


# --- health and metrics ---------------------------------------------------------------------


def samples(url):
    text = httpx.get(f"{url}/metrics").text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def total(url, name):
    return sum(v for n, v in samples(url).items() if n == name or n.startswith(f"{name}{{"))


def test_health_is_open(url):
    assert httpx.get(f"{url}/health").status_code == 200


def test_metrics_count_what_happened(url, ask):
    names = ["vpt:prompt_tokens_total", "vpt:generation_tokens_total"]
    names += [f"vpt:{one}_count" for one in ("time_to_first_token_seconds",)]
    names += ["vpt:e2e_request_latency_seconds_count", "vpt:request_success_total"]
    before = [total(url, name) for name in names]
    usage = ask(*BLUE).usage
    until(lambda: total(url, names[-1]) == before[-1] + 1)
    after = [total(url, name) for name in names]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    assert differences == [usage.prompt_tokens, usage.completion_tokens, 1, 1, 1]
    assert total(url, "vpt:num_requests_running") == 0
    assert total(url, "vpt:num_requests_waiting") == 0

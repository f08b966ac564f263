"""Chat completions through a real client: what the model answers, and how it is sent."""

import openai
import pytest
from served import QUESTION, TAGS, ask

from vpt.boxes import GridBox


def test_the_answer_is_that_of_the_runtime_with_its_call(client, embedded):
    answer = embedded.ask(TAGS, QUESTION)
    done = client.chat.completions.create(model="embedded", messages=ask())
    message = done.choices[0].message
    assert message.content == answer.text == "3"
    assert done.choices[0].finish_reason == "stop"
    (call,) = message.perception["calls"]
    (look,) = answer.looks
    assert (call["branch"], call["box_xyxy_px"]) == ("crop", list(look.box_xyxy_px))
    assert GridBox(*call["region"]) == look.region
    assert message.reasoning.startswith("[looks again: region x 3, y 2 → box 112,56,280,224")
    usage, counts = done.usage, answer.trace.counts
    assert usage.prompt_tokens == counts.prompt_tokens + counts.appended_tokens
    assert usage.completion_tokens == counts.generated_tokens
    assert usage.prompt_tokens_details.image_tokens == 2 * look.num_tokens


def test_a_stream_has_the_role_first_then_the_call_the_text_the_end_and_the_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="embedded",
            messages=ask(),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    first, call, text, end, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert call.choices[0].delta.perception["calls"][0]["tokens"] == 16
    assert text.choices[0].delta.content == "3"
    assert end.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage.completion_tokens == 9


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 2}, "n", "n is not supported"),
        ({"temperature": -1}, "temperature", "at least 0, not -1"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be a whole number"),
        ({"max_completion_tokens": 0, "max_tokens": 9}, "max_completion_tokens", "at least 1"),
        ({"extra_body": {"perception": "x"}}, "perception", "perception must be one of"),
        ({"extra_body": {"region": [5, 5, 3, 3]}}, "region", "order the cells"),
        ({"extra_body": {"look_at": 9}}, "look_at", "index of no image"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": ask(url="/etc/passwd")}, "messages", "an image must be"),
        ({"messages": ask(url="http://127.0.0.1/a.png")}, "messages", "fetches no images"),
        ({"messages": ask(url="data:image/png;base64,AAAA")}, "messages", "image"),
    ],
)
def test_bad_input_is_400_and_names_the_field(client, fields, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "embedded", "messages": ask(), **fields})
    assert words in caught.value.body["message"]
    assert caught.value.body["param"] == param

"""The Responses API through a real client: items, events, and streams that are continued."""

from types import SimpleNamespace

import openai
import pytest
from served import QUESTION, TAGS, data_uri

from vpt.serving.schema import APIError
from vpt.serving.server import ResponseStore


def ask(question=QUESTION):
    image = {"type": "input_image", "image_url": data_uri()}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": question}]}]


def kinds(items):
    return [item.type for item in items]


def test_a_call_is_an_item_of_its_own_before_the_text(client):
    done = client.responses.create(model="embedded", input=ask())
    assert kinds(done.output) == ["perception_call", "message"]
    assert done.output[0].box_xyxy_px == [112, 56, 280, 224]
    assert (done.output_text, done.status) == ("3", "completed")
    assert done.usage.input_tokens_details.cached_tokens >= 0
    assert client.responses.retrieve(done.id).output_text == "3"


def test_a_stream_has_numbered_events_and_ends_with_the_whole_response(client):
    events = list(client.responses.create(model="embedded", input=ask(), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[-1].response.output_text == "3"


def test_a_follow_up_continues_the_stream_as_a_chat_does(client, embedded):
    follow_up = "What number is on the red one?"
    chat = embedded.chat(TAGS)
    chat.ask(QUESTION)
    expected = chat.ask(follow_up)
    first = client.responses.create(model="embedded", input=ask())
    for _ in range(2):  # a stored stream can be continued more than once
        second = client.responses.create(
            model="embedded", input=follow_up, previous_response_id=first.id
        )
        assert second.output_text == expected.text
        assert second.usage.input_tokens == (
            expected.trace.counts.prompt_tokens + expected.trace.counts.appended_tokens
        )
        assert second.usage.input_tokens_details.cached_tokens > 80


def test_items_of_an_answer_can_be_sent_back_as_input(client):
    first = client.responses.create(model="embedded", input=ask(), store=False)
    history = [*ask(), *(item.model_dump() for item in first.output)]
    second = client.responses.create(
        model="embedded", input=[*history, {"role": "user", "content": QUESTION}]
    )
    assert second.status == "completed"


def test_what_is_not_stored_or_was_deleted_cannot_be_continued(client):
    unstored = client.responses.create(model="embedded", input=ask(), store=False)
    deleted = client.responses.create(model="embedded", input=ask())
    client.responses.delete(deleted.id)
    for one in (unstored, deleted):
        with pytest.raises(openai.BadRequestError, match="there is no stored response") as caught:
            client.responses.create(model="embedded", input="?", previous_response_id=one.id)
        assert caught.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError, match="there is no stored response"):
            client.responses.retrieve(one.id)


def stored(store, key, side=1):
    images = [SimpleNamespace(size_wh=(side, side))]
    store.put(key, {}, [], SimpleNamespace(images=images))


def test_the_store_is_bounded_in_number_time_and_pixels():
    store = ResponseStore(2, ttl_s=60)
    for key in "abc":
        stored(store, key)
    assert store.get("b") and store.get("c")
    with pytest.raises(APIError, match="there is no stored response 'a'"):
        store.get("a")
    stored(store, "large", side=2**14)
    assert store.get("large")
    with pytest.raises(APIError, match="there is no stored response 'c'"):
        store.get("c")
    old = ResponseStore(2, ttl_s=0)
    stored(old, "a")
    with pytest.raises(APIError, match="there is no stored response 'a'"):
        old.get("a")


def test_a_cut_answer_is_incomplete(client):
    done = client.responses.create(model="embedded", input=ask(), max_output_tokens=1)
    assert done.status == "incomplete"
    assert done.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": [{"type": "file_search_call", "id": "x"}]}, "input", "not supported"),
        ({"text": {"format": {"type": "json_object"}}}, "text", "text.format is not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"input": 5}, "input", "input"),
    ],
)
def test_bad_input_names_the_field(client, fields, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.responses.create(**{"model": "embedded", "input": ask(), **fields})
    assert caught.value.param == param


def test_with_a_previous_response_one_message_is_expected(client):
    first = client.responses.create(model="embedded", input=ask())
    for fields, param in (
        ({"input": [*ask(), {"role": "assistant", "content": "3"}, *ask()]}, "input"),
        ({"input": "?", "instructions": "Be brief."}, "instructions"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="embedded", previous_response_id=first.id, **fields)
        assert caught.value.param == param

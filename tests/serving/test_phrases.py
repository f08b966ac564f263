"""A phrase that a client wants to be looked for."""

import openai
import pytest
from colors import ColorDetector
from drivers import SomewhereDetector
from served import QUESTION, messages_of, serving
from tiny_model import tiny_model

import vpt


def ask(url, **options):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return client.chat.completions.create(
            model="embedded", messages=messages_of(QUESTION, "tags.jpg"), extra_body=options
        )


def test_the_first_look_shows_what_was_found():
    runtime = vpt.load(device="cpu", detector=ColorDetector())
    with serving(runtime) as (url, *_):
        reply = ask(url, look_for="the blue tag", max_calls=1)
        assert reply.choices[0].message.content == "3"
        (call,) = reply.choices[0].message.perception["calls"]
        found = runtime.ask("examples/tags.jpg", QUESTION, look_for="the blue tag", max_calls=1)
        assert call["region"] == list(found.trace.calls[0].region)
        with pytest.raises(openai.BadRequestError, match="no colour in 'a shape'") as caught:
            ask(url, look_for="a shape")
        assert caught.value.param == "look_for"


def test_without_a_detector_the_request_is_refused():
    with serving(vpt.load(device="cpu", detector=None)) as (url, *_):
        with pytest.raises(openai.BadRequestError, match="look_for needs a detector"):
            ask(url, look_for="the blue tag")
        assert ask(url).choices[0].message.content == "3"


def test_a_phrase_that_the_model_names_is_sent_once():
    runtime = vpt.Runtime(
        *tiny_model(grounding=True), detector=SomewhereDetector(), name="embedded"
    )
    asked = {"perception": "grounding", "max_calls": 1, "temperature": 1}
    with serving(runtime) as (url, *_):
        outcomes = set()
        for seed in range(6):
            (call,) = ask(url, seed=seed, **asked).choices[0].message.perception["calls"]
            outcomes.add(call["outcome"])
            assert call["branch"] == "grounding" and isinstance(call["phrase"], str)
            assert (call["region"] is None) == (call["outcome"] == "not_found")
        assert outcomes == {"executed", "not_found"}


def test_objects_need_a_segmenter():
    with serving(vpt.load(device="cpu", detector=ColorDetector())) as (url, *_):
        with pytest.raises(openai.BadRequestError, match="mask needs a segmenter") as caught:
            ask(url, mask=True)
        assert caught.value.param == "mask"
        with pytest.raises(openai.BadRequestError, match="max_boxes"):
            ask(url, look_for="blue", max_boxes=9)

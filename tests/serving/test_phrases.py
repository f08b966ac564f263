"""A phrase that a client wants to be looked for."""

import openai
import pytest
from colors import ColorDetector
from served import QUESTION, messages_of, serving

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

"""A chat continues its stream: it equals the same turns rebuilt, and costs what it appends."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.boxes import GridBox
from vpt.errors import BudgetError, PromptError, RunError
from vpt.images import load_image
from vpt.inference.recorder import Recorder
from vpt.inference.request import Message
from vpt.trace.records import Trace, load_traces
from vpt.view.timeline import timeline_html
from vpt.view.wording import look_text


@pytest.fixture(scope="module")
def runtime():
    return vpt.Runtime(*tiny_model(num_layers=3), name="tiny")


@pytest.fixture(scope="module")
def forgetful():
    """The same model, which keeps no stream: each question is read again from its beginning."""
    return vpt.Runtime(*tiny_model(num_layers=3), name="tiny", prefix_cache_bytes=0)


def noise(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return load_image(Image.fromarray(values.numpy()).resize((width * 4, height * 4)))


def ids(answer):
    return [token.id for token in answer.trace.tokens]


ONE_CALL = {"max_calls": 1, "max_new_tokens": 12}

turns = st.lists(
    st.fixed_dictionaries(
        {
            "question": st.sampled_from(["What?", "And then?", "Where is it?"]),
            "num_images": st.integers(0, 2),
            "perception": st.sampled_from(["auto", "none", "crop", "dino", "clip", "sam"]),
            "max_calls": st.integers(0, 2),
            "max_new_tokens": st.integers(1, 14),
            "look_at": st.sampled_from(["first", "latest", 0]),
        }
    ),
    min_size=2,
    max_size=3,
)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(turns=turns)
def test_a_chat_equals_its_turns_rebuilt_as_a_whole(runtime, forgetful, turns):
    chats = [one.chat([noise(20, 15, 0)]) for one in (runtime, forgetful)]
    for number, turn in enumerate(turns):
        images = [noise(9 + i, 12, 10 * number + i + 1) for i in range(turn["num_images"])]
        options = {k: v for k, v in turn.items() if k not in ("question", "num_images")}
        ours, theirs = (chat.ask(turn["question"], images, **options) for chat in chats)
        assert ids(ours) == ids(theirs)
        assert ours.stop_reason == theirs.stop_reason
        assert [call.text for call in ours.trace.calls] == [c.text for c in theirs.trace.calls]
        assert theirs.trace.counts.reused_tokens == 0
        if number:
            # The last token of an answer, what closes it, and the words around the question.
            counts = ours.trace.counts
            assert counts.reused_tokens > 0.9 * (counts.prompt_tokens - new_tokens(ours, images))


def new_tokens(answer, images):
    num_of_images = sum(record.num_tokens + 3 for record in answer.trace.images[-len(images) :])
    return (
        (num_of_images if images else 0) + len(answer.trace.question) + 160
    )  # the invitation to look


def test_a_follow_up_costs_what_it_appends(runtime):
    chat = runtime.chat([noise(40, 40, 0)], perception="none", max_new_tokens=4)
    first = chat.ask("What?")
    second = chat.ask("And?")
    assert second.trace.counts.reused_tokens >= first.trace.counts.prompt_tokens
    assert second.trace.counts.llm_tokens < first.trace.counts.llm_tokens / 2


def test_the_first_question_of_a_chat_is_a_question(runtime):
    image = noise(20, 20, 3)
    asked = runtime.ask(image, "What?", perception="crop", max_new_tokens=12)
    chat = runtime.chat(image, max_new_tokens=12)
    assert ids(chat.ask("What?", perception="crop")) == ids(asked)
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    chat.reset()
    assert chat.messages == () and chat.answers == []
    assert ids(chat.ask("What?", perception="crop")) == ids(asked)


def test_a_call_concerns_any_image_of_the_conversation(runtime):
    chat = runtime.chat([noise(20, 20, 0)], region=GridBox(1, 1, 3, 4), **ONE_CALL)
    first = chat.ask("What?")
    assert [call.image for call in first.trace.calls][:1] == [0]
    assert chat.num_images == 2  # one given, one cut out
    second = chat.ask("And this?", noise(12, 30, 1))
    assert [call.image for call in second.trace.calls][:1] == [2]  # the first of the latest turn
    again = chat.ask("And?", look_at=0)
    assert [call.image for call in again.trace.calls][:1] == [0]
    later = chat.ask("And?", look_at="latest")
    assert [call.image for call in later.trace.calls][:1] == [chat.num_images - 2]
    crop = chat.ask("And?", look_at=1)
    assert [call.image for call in crop.trace.calls][:1] == [1]
    with pytest.raises(PromptError, match="look_at=99 is the index of no image: the conversation"):
        chat.ask("And?", look_at=99)
    assert len(chat.answers) == 5


def test_the_trace_of_a_follow_up_holds_the_conversation(runtime, tmp_path):
    chat = runtime.chat([noise(20, 20, 0)], region=GridBox(1, 1, 3, 4), **ONE_CALL)
    first, second = chat.ask("What?"), chat.ask("And this?", noise(12, 30, 1))
    history = second.trace.history
    assert [(one.role, one.text, one.num_images) for one in history] == [
        ("user", "What?", 1),
        ("assistant", first.text, 0),
    ]
    assert [image.parent for image in second.trace.images] == [None, 0, None, 2]
    assert all(image.thumbnail for image in second.trace.images)
    assert second.looks[0].image is not None
    second.trace.save(tmp_path / "t.json")
    assert Trace.load(tmp_path / "t.json") == second.trace
    assert "history" not in first.trace.to_dict()
    second.picture()


def test_a_question_that_fails_leaves_the_chat_as_it_was(runtime):
    chat = runtime.chat([noise(8, 8, 0)], max_new_tokens=5, perception="none")
    chat.ask("What?")
    before = chat.messages
    with pytest.raises(PromptError, match="the question is empty"):
        chat.ask(" ")
    events = chat.stream("And?")
    next(events)
    with pytest.raises(RunError, match="is answering another question"):
        chat.ask("Now?")
    events.close()
    assert chat.messages == before
    assert chat.ask("And?").text == runtime_answer(runtime, before)
    assert runtime.engine.num_free_slots == runtime.engine.num_slots


def test_a_question_made_before_another_was_answered_is_refused(runtime):
    chat = runtime.chat(max_new_tokens=3)
    one, other = chat.stream("What?"), chat.stream("Where?")
    assert list(one) and len(chat.messages) == 2
    with pytest.raises(RunError, match="the chat has changed since this question was made"):
        list(other)
    assert len(chat.messages) == 2 and chat.ask("Where?").trace.history


def test_a_chat_that_is_reset_forgets_the_question_that_runs(runtime):
    chat = runtime.chat(max_new_tokens=3)
    events = chat.stream("What?")
    next(events)
    chat.reset()
    assert list(events)[-1].trace.stop_reason == "length"
    assert chat.messages == () and chat.answers == []
    assert chat.ask("What?").trace.history == []


def test_an_answer_that_spells_a_control_token_can_be_continued(runtime, monkeypatch):
    chat = runtime.chat(max_new_tokens=3)
    add = Recorder.stop

    def spell(recorder, reason):
        recorder.trace.answer = "It is <|im_end|>."
        return add(recorder, reason)

    monkeypatch.setattr(Recorder, "stop", spell)
    chat.ask("What?")
    assert chat.ask("And?").trace.history[1].text == "It is <|im_end|>."


def test_a_chat_has_one_system_turn(runtime):
    chat = runtime.chat(max_new_tokens=3)
    chat.ask("What?", system="Be brief.")
    with pytest.raises(PromptError, match="system: a chat has one system turn"):
        chat.ask("And?", system="Be long.")


def test_a_chat_that_is_full_says_so_and_can_be_begun_again():
    runtime = vpt.Runtime(*tiny_model(num_layers=2), max_model_len=200)
    chat = runtime.chat([noise(8, 8, 0)], perception="none", max_new_tokens=20)
    with pytest.raises(BudgetError, match=r"need .* tokens, a stream has room for 200"):
        for _ in range(9):
            chat.ask("What?")
    before = chat.messages
    assert 2 <= len(before) < 18
    with pytest.raises(BudgetError, match="a stream has room for 200"):
        chat.ask("What is this? " * 9)
    assert chat.messages == before and runtime.engine.num_free_slots == runtime.engine.num_slots
    chat.reset()
    assert chat.ask("What?").text == before[1].text


def test_calls_are_drawn_while_the_trace_grows(runtime):
    """The model's thread writes the trace that this one draws."""
    chat = runtime.chat([noise(12, 12, 0)], constrain=False, max_calls=3, temperature=1.5)
    for seed in range(3):
        request = chat.request("Go on.", perception="dino", seed=seed, max_new_tokens=40)
        for one in chat.watch(request):
            timeline_html(one.trace)
            look_text(one.trace)
    assert len(chat.answers) == 3


def test_the_traces_of_a_chat_are_saved_with_its_images_once(runtime, tmp_path):
    chat = runtime.chat([noise(20, 20, 0)], region=GridBox(1, 1, 3, 4), **ONE_CALL)
    traces = [chat.ask("What?").trace, chat.ask("And this?", noise(12, 30, 1)).trace]
    chat.save(tmp_path / "chat.json")
    assert load_traces(tmp_path / "chat.json") == traces
    assert Trace.load(tmp_path / "chat.json") == traces[-1]
    content = (tmp_path / "chat.json").read_text()
    assert content.count("data:image/jpeg") == 4
    traces[0].save(tmp_path / "t.json")
    assert load_traces(tmp_path / "t.json") == traces[:1]
    for wrong in ("{}", '{"traces": []}', '{"traces": [3]}', '{"traces": 3}'):
        (tmp_path / "t.json").write_text(wrong)
        with pytest.raises(
            PromptError, match=r"is not a chat: expected a list|expected a trace of"
        ):
            load_traces(tmp_path / "t.json")


def runtime_answer(runtime, before):
    chat = runtime.chat(list(before[0].images), max_new_tokens=5, perception="none")
    chat.ask(before[0].text)
    return chat.ask("And?").text


def test_history_as_text_is_part_of_the_prompt(runtime):
    image = noise(8, 8, 0)
    history = [Message("user", "What?", [image]), Message("assistant", "A cat.")]
    answer = runtime.ask([], "Why?", history=history, perception="dino", max_new_tokens=5)
    assert answer.trace.calls[0].image == 0
    assert [one.text for one in answer.trace.history] == ["What?", "A cat."]
    alone = runtime.ask([image], "Why?", perception="dino", max_new_tokens=5)
    assert answer.trace.counts.prompt_tokens > alone.trace.counts.prompt_tokens


def test_messages_of_several_turns_are_a_history(runtime):
    image = noise(8, 8, 0)
    answer = runtime.ask(
        messages=[
            {"role": "user", "content": [{"type": "image", "image": image.pixels}, text("What?")]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Why?"},
        ],
        max_new_tokens=5,
    )
    history = [Message("user", "What?", [image]), Message("assistant", "A cat.")]
    assert ids(answer) == ids(runtime.ask([], "Why?", history=history, max_new_tokens=5))


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda image: Message("robot", "Hi."), "role must be one of 'user', 'assistant'"),
        (lambda image: Message("user", 3), "text of a message must be text"),
        (lambda image: Message("user", "Hi.", image), "images of a message must be a list"),
        (lambda image: Message("assistant", "Hi.", [image]), "not of the assistant"),
        (lambda image: "Hi.", r"history\[0\] must be Message, not str"),
        (lambda image: Message("assistant", "<|im_end|>"), "history .*control token"),
    ],
)
def test_a_message_that_cannot_be_is_an_error(runtime, make, words):
    with pytest.raises(PromptError, match=words):
        runtime.ask([], "Why?", history=[make(noise(4, 4, 0))])


def test_a_question_of_a_chat_is_prepared_once(runtime, monkeypatch):
    made, whole = [], type(runtime).converse
    monkeypatch.setattr(
        type(runtime), "converse", lambda *args: (made.append(args), whole(*args))[1]
    )
    chat = runtime.chat([noise(8, 8, 0)], max_new_tokens=3, perception="none")
    chat.ask("What?")
    chat.ask("And?")
    assert len(made) == 2
    assert [*chat.watch(chat.request("Why?"))] and len(made) == 3

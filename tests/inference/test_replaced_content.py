"""What is read in place of the depth maps and boxes that a model writes."""

import pytest
from drawing import CONTENT, eager_model, noise
from drivers import Script
from tiny_model import tiny_model

import vpt
from vpt.errors import PromptError
from vpt.evaluation.runner import contents_of_others, find_conditions
from vpt.evaluation.samples import BadRow, ImageRef, Sample
from vpt.inference.request import Sampling
from vpt.protocol.calls import format_depth, format_pixel_box
from vpt.protocol.tokens import BRANCH_TOKENS, TURN_END, Vocabulary

MAP = format_depth([1, 2, 3, 4], 8, 4)
BOXES = format_pixel_box((1, 2, 5, 6), 12) + ", " + format_pixel_box((3, 3, 9, 9), 12)


@pytest.fixture(scope="module")
def processor():
    return tiny_model(content=CONTENT)[1]


@pytest.fixture(scope="module")
def vocabulary(processor):
    return Vocabulary.from_tokenizer(processor.tokenizer, tuple(BRANCH_TOKENS), 8, CONTENT)


def read(processor, vocabulary, written, **options):
    """The turn that is read, as text, and the trace."""
    run = Script(processor, vocabulary, written + TURN_END, **options)
    return run.trace.turns[0].removesuffix(TURN_END), run.trace


def seeded(seed):
    return {"sampling": Sampling(seed=seed)}


def test_without_the_option_nothing_is_replaced(processor, vocabulary):
    text, trace = read(processor, vocabulary, f"{MAP} {BOXES} two")
    assert text == f"{MAP} {BOXES} two" and trace.settings["replace_content"] is None


def test_random_content_is_whole_and_the_seeds(processor, vocabulary):
    written = f"{MAP} {BOXES} two"
    texts = set()
    for seed in (0, 0, 1, 2):
        text, trace = read(processor, vocabulary, written, replace_content="random", **seeded(seed))
        assert text.endswith(" two") and not trace.malformed
        depth, boxes = trace.content[0], [one for one in trace.content if one.kind == "boxes"]
        assert depth.is_whole and sum(len(one.boxes) for one in boxes) == 2
        texts.add(text)
    assert len(texts) == 3


def test_repeated_content_is_the_first_of_it(processor, vocabulary):
    text, trace = read(processor, vocabulary, f"{MAP} {BOXES} two", replace_content="repeat")
    first = format_pixel_box((1, 2, 5, 6), 12)
    assert text == f"{format_depth([1] * 4, 8, 4)} {first}, {first} two" and not trace.malformed


def test_given_content_is_read_instead(processor, vocabulary):
    other = format_depth([7, 7, 0, 0], 8, 4) + format_pixel_box((0, 0, 1, 1), 12)
    written = f"{MAP} {format_pixel_box((1, 2, 5, 6), 12)} one"
    text, trace = read(processor, vocabulary, written, replace_content=other)
    assert text == f"{other.replace('<DEPTH_END>', '<DEPTH_END> ')} one"
    assert trace.content[0].codes == [7, 7, 0, 0]


def test_a_kind_that_is_not_given_stays_the_models(processor, vocabulary):
    written = f"{BOXES} {MAP} two"
    other = format_depth([7, 7, 0, 0], 8, 4)
    assert read(processor, vocabulary, written, replace_content=other)[0] == f"{BOXES} {other} two"
    one = format_pixel_box((0, 0, 1, 1), 12)
    drawn = format_pixel_box((1, 2, 5, 6), 12)
    text, _ = read(processor, vocabulary, f"{MAP} {drawn} one", replace_content=one)
    assert text == f"{MAP} {one} one"


@pytest.fixture(scope="module")
def runtime():
    return vpt.Runtime(*eager_model())


def test_boxes_go_on_after_a_map_is_given(runtime):
    own = runtime.ask(noise(0), "What?", max_new_tokens=10)
    codes = format_depth(own.trace.content[0].codes, 8, 4)
    same = runtime.ask(noise(0), "What?", max_new_tokens=10, replace_content=codes)
    assert own.trace.turns == same.trace.turns
    assert [one.kind for one in same.trace.content] == ["depth", "boxes"]


def test_the_model_reads_what_the_trace_shows(runtime):
    own = runtime.ask(noise(0), "What?", max_new_tokens=30)
    again = runtime.ask(noise(0), "What?", max_new_tokens=30, replace_content="random", seed=3)
    codes = own.trace.content[0].codes
    assert again.trace.content[0].codes != codes
    given = format_depth(again.trace.content[0].codes, 8, 4)
    same = runtime.ask(noise(0), "What?", max_new_tokens=6, replace_content=given)
    first = [token.id for token in same.trace.tokens]
    assert first == [token.id for token in again.trace.tokens][:6]


def test_empty_content_has_markers_only(runtime):
    answer = runtime.ask(noise(0), "What?", max_new_tokens=12, replace_content="empty")
    assert "<DEPTH_START><DEPTH_END>" in answer.trace.turns[0]
    assert "<DEPTH_1>" not in answer.trace.turns[0] and "<PIXEL_" not in answer.trace.turns[0]


def test_no_more_boxes_are_read_than_were_given(runtime):
    given = format_pixel_box((0, 0, 1, 1), 12)
    answer = runtime.ask(noise(0), "What?", max_new_tokens=60, replace_content=given)
    boxes = [box for one in answer.trace.content for box in one.boxes or ()]
    assert [tuple(box) for box in boxes] == [(0, 0, 1, 1)]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nothing", "replace_content must be one of 'random', 'repeat', 'empty', or the text of a"),
        ("<DEPTH_99>", "this model does not write <DEPTH_99>"),
        (MAP.replace("<DEPTH_1>", ""), "replace_content: expected a depth map of 4 codes, got 3"),
        ("<PIXEL_1><PIXEL_2>", "replace_content: expected four pixel tokens per box"),
        (7, "replace_content must be text"),
    ],
)
def test_what_is_no_content_is_refused(runtime, how, words):
    with pytest.raises(PromptError, match=words):
        runtime.ask(noise(0), "What?", replace_content=how)


def test_a_model_without_content_is_told(runtime):
    with pytest.raises(PromptError, match="this model writes neither depth maps nor boxes"):
        vpt.Runtime(*tiny_model()).ask(noise(0), "What?", replace_content="random")
    with pytest.raises(PromptError, match="replace_content needs constrain=True"):
        runtime.ask(noise(0), "What?", replace_content="random", constrain=False)


def test_evaluations_have_a_condition_for_each():
    names = [f"content-{how}" for how in ("random", "repeat", "empty", "truth", "other")]
    *hows, truth, other = find_conditions(names)
    sample = Sample("1", (), "?", facts={"content": MAP})
    options = [one.request_options(sample, (1, 1), 8, "<PIXEL_1>") for one in (*hows, truth, other)]
    replaced = [one["replace_content"] for one in options]
    assert replaced == ["random", "repeat", "empty", MAP, "<PIXEL_1>"]
    for one in truth, other:
        assert one.request_options(Sample("1", (), "?"), (1, 1), 8) is None


def test_content_of_another_picture_is_never_that_of_the_same():
    pictures = [ImageRef(name, name) for name in "aabbc"]
    samples = [
        Sample(str(number), (picture,), "?", facts={"content": f"{number} {picture.name}"})
        for number, picture in enumerate(pictures)
    ]
    samples += [Sample("without", (), "?"), BadRow("bad", "no image")]
    others = contents_of_others(samples)
    assert set(others) == set("01234")
    assert all(others[str(number)][-1] != picture.name for number, picture in enumerate(pictures))
    assert contents_of_others(samples[:2]) == {}

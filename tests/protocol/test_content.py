"""Depth maps and boxes in what a model writes: the grammar, what is found, what the trace keeps."""

import json
from dataclasses import replace

import pytest
import torch
from drivers import Script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import byte_tokenizer, tiny_model

from vpt.errors import CheckpointError, PromptError
from vpt.images import load_image
from vpt.inference.events import CallEvent, ContentEvent
from vpt.model.building import add_perception_tokens
from vpt.model.generation import PerceptionLogitsProcessor, apply_rule_
from vpt.protocol.calls import format_depth, format_pixel_box, parse_turn
from vpt.protocol.grammar import PerceptionGrammar, TurnState
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    NO_CONTENT,
    TURN_END,
    ContentTokens,
    Vocabulary,
    find_content,
)
from vpt.trace.content import parse_content, place_box
from vpt.trace.records import Trace

CONTENT = ContentTokens(("depth", "boxes"), num_codes=5, num_cells=3, num_pixels=6)
BRANCHES = ("reencode",)
KINDS = ("crop", *BRANCHES, *CONTENT.kinds)
IMAGE = load_image(Image.effect_noise((112, 84), 50).convert("RGB"))


def vocabulary_of(content, branches=BRANCHES):
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, branches, 8, content)
    return Vocabulary.from_tokenizer(tokenizer, branches, 8, content)


VOCABULARY = vocabulary_of(CONTENT)
IDS = VOCABULARY.ids
NUM_ROWS = VOCABULARY.size + 9


def depth(*codes):
    return format_depth(codes, CONTENT.num_codes, CONTENT.num_cells)


def box(*sides):
    return format_pixel_box(sides, CONTENT.num_pixels)


def symbols(text):
    """One string per token: those of content, and one for each run between them."""
    found, parts = find_content(text), []
    for token in found:
        before, text = text.split(token, 1)
        parts += [before] * bool(before) + [token]
    return parts + [text] * bool(text)


def permitted_ids(rule):
    return set(apply_rule_(rule, torch.zeros(NUM_ROWS)).isfinite().nonzero().flatten().tolist())


def tokens_of(ids):
    return {token for token, i in IDS.items() if i in ids}


def advance(grammar, tokens, state=None):
    state = state or TurnState()
    for token in tokens:
        state = grammar.advance(state, IDS.get(token, 72))
    return state


# --- the grammar ----------------------------------------------------------------------------


@given(
    random=st.randoms(use_true_random=False),
    permitted=st.sets(st.sampled_from(KINDS)).map(lambda s: tuple(sorted(s))),
)
@settings(deadline=None, max_examples=60)
def test_whatever_is_permitted_is_well_formed(random, permitted):
    grammar = PerceptionGrammar(VOCABULARY)
    state, ids, turn_end = TurnState(), [], IDS[TURN_END]
    while not ids or ids[-1] != turn_end:
        choices = sorted(permitted_ids(grammar.rule(state, permitted)))
        assert choices, f"nothing may follow in {state}"
        controls = [i for i in choices if i in IDS.values()]
        wanted = [turn_end] if len(ids) > 30 and turn_end in choices else controls
        ids.append(random.choice(wanted if wanted and random.random() < 0.8 else choices))
        state = grammar.advance(state, ids[-1])
    written = parse_content(VOCABULARY.symbols(ids), CONTENT)
    assert written.malformed == () == parse_turn(VOCABULARY.symbols(ids)).malformed
    assert all(span.is_whole for span in written.spans)
    assert {span.kind for span in written.spans} <= set(permitted)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<DEPTH_START>"], {f"<DEPTH_{code}>" for code in range(5)}),
        (["<DEPTH_START>", *["<DEPTH_4>"] * 2], {f"<DEPTH_{code}>" for code in range(5)}),
        (["<DEPTH_START>", *["<DEPTH_4>"] * 3], {"<DEPTH_END>"}),
        (["<PIXEL_3>"], {f"<PIXEL_{pixel}>" for pixel in range(6)}),
        (["<PIXEL_3>", "<PIXEL_1>"], {f"<PIXEL_{pixel}>" for pixel in range(3, 6)}),
        (["<PIXEL_3>", "<PIXEL_1>", "<PIXEL_5>"], {f"<PIXEL_{p}>" for p in range(1, 6)}),
    ],
)
def test_inside_content_only_what_completes_it_may_follow(tokens, expected):
    grammar = PerceptionGrammar(VOCABULARY)
    for permitted in (KINDS, ()):  # even if it were not permitted to begin
        rule = grammar.rule(advance(grammar, tokens), permitted)
        assert tokens_of(permitted_ids(rule)) == expected
        assert len(permitted_ids(rule)) == len(expected)


@pytest.mark.parametrize("text", [depth(0, 1, 2), box(0, 0, 5, 5), box(2, 3, 2, 3) * 2])
def test_behind_content_text_is_free_again(text):
    grammar = PerceptionGrammar(VOCABULARY)
    assert advance(grammar, symbols(text)) == TurnState()


@pytest.mark.parametrize(
    "tokens",
    [
        ["<DEPTH_1>"],
        ["<DEPTH_END>"],
        ["<DEPTH_START>", "<DEPTH_END>"],
        ["<DEPTH_START>", *["<DEPTH_1>"] * 4],
        ["<DEPTH_START>", "<DEPTH_1>", "x"],
        ["<PIXEL_3>", "<PIXEL_3>", "<PIXEL_2>"],
        ["<PIXEL_3>", "x"],
    ],
)
def test_what_breaks_content_leads_back_to_free_text(tokens):
    grammar = PerceptionGrammar(VOCABULARY)
    assert advance(grammar, tokens) == TurnState()


@given(st.sets(st.sampled_from(KINDS)))
@settings(deadline=None)
def test_content_that_is_not_permitted_cannot_begin(permitted):
    rule = PerceptionGrammar(VOCABULARY).rule(TurnState(), sorted(permitted))
    allowed = {t for t in tokens_of(permitted_ids(rule)) if t.startswith(("<DEPTH", "<PIXEL"))}
    expected = {"<DEPTH_START>"} if "depth" in permitted else set()
    expected |= {f"<PIXEL_{p}>" for p in range(6)} if "boxes" in permitted else set()
    assert allowed == expected


def test_content_is_no_call():
    grammar = PerceptionGrammar(VOCABULARY)
    rule = grammar.rule(TurnState(), KINDS, must_call=True)
    openers = {BRANCH_TOKENS["reencode"].start, "<|region_token_start|>"}
    assert tokens_of(permitted_ids(rule)) == openers
    free = grammar.rule(TurnState(), CONTENT.kinds, must_call=True)
    assert free == grammar.rule(TurnState(), CONTENT.kinds)


def test_tokens_of_content_that_the_model_does_not_write_are_banned():
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, (), 8, CONTENT)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, ())
    assert vocabulary.content == NO_CONTENT
    rule = PerceptionGrammar(vocabulary).rule(TurnState(), ("crop", "depth", "boxes"))
    allowed = permitted_ids(rule)
    assert not allowed & {vocabulary.ids[token] for token in CONTENT.tokens}


def test_rules_are_made_once():
    grammar = PerceptionGrammar(VOCABULARY)
    for tokens in ([], ["<DEPTH_START>"], ["<PIXEL_2>", "<PIXEL_2>"]):
        state = advance(grammar, tokens)
        assert grammar.rule(state, KINDS) is grammar.rule(state, KINDS)


def test_the_logits_processor_reads_each_token_once(monkeypatch):
    grammar, seen = PerceptionGrammar(VOCABULARY), []
    plain = grammar.advance
    monkeypatch.setattr(grammar, "advance", lambda s, t: seen.append(t) or plain(s, t))
    processor = PerceptionLogitsProcessor(grammar, 1)
    rows = [[1, IDS["<DEPTH_START>"], IDS["<DEPTH_2>"], IDS["<DEPTH_2>"]], [1, 72, 73, 74]]
    for length in range(1, 5):
        ids = torch.tensor(rows)[:, :length]
        out = processor(ids, torch.zeros(2, NUM_ROWS))
    assert len(seen) == 6
    codes = {IDS[f"<DEPTH_{code}>"] for code in range(5)}
    assert set(out[0].isfinite().nonzero().flatten().tolist()) == codes
    swapped = processor(torch.tensor(rows[::-1]), torch.zeros(2, NUM_ROWS))  # as beams are
    assert torch.equal(swapped, out.flip(0))
    assert torch.equal(processor(torch.tensor(rows), torch.zeros(2, NUM_ROWS)), out)
    shorter = processor(torch.tensor(rows)[:, :2], torch.zeros(2, NUM_ROWS))
    assert torch.equal(shorter[0], out[0]) and not torch.equal(shorter[1], out[0])


# --- what is found --------------------------------------------------------------------------


def test_content_is_found_where_it_stands():
    text = "see " + depth(1, 2, 3) + " and " + box(0, 1, 2, 3) + box(0, 0, 0, 0) + " so B"
    written = parse_content(symbols(text), CONTENT)
    first, second = written.spans
    assert (first.kind, first.start, first.end, first.codes) == ("depth", 1, 6, (1, 2, 3))
    assert (second.kind, second.start, second.end) == ("boxes", 7, 15)
    assert second.boxes == ((0, 1, 2, 3), (0, 0, 0, 0))
    assert first.is_whole and second.is_whole and not written.malformed
    assert written.answer_start == 6


@pytest.mark.parametrize(
    ("text", "kind", "held"),
    [
        ("<DEPTH_START>", "depth", ()),
        ("<DEPTH_START><DEPTH_4>", "depth", (4,)),
        ("<DEPTH_START><DEPTH_4><DEPTH_4><DEPTH_4>", "depth", (4, 4, 4)),
        ("<PIXEL_1>", "boxes", ()),
        (box(0, 1, 2, 3) + "<PIXEL_1><PIXEL_1><PIXEL_1>", "boxes", ((0, 1, 2, 3),)),
    ],
)
def test_what_the_end_cuts_off_is_kept_as_far_as_it_is_there(text, kind, held):
    written = parse_content(symbols("so " + text), CONTENT)
    (span,) = written.spans
    assert (span.kind, span.is_whole, written.answer_start) == (kind, False, 0)
    assert held == (span.codes if kind == "depth" else span.boxes)
    assert not written.malformed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<DEPTH_START><DEPTH_1><DEPTH_END>", "a depth map of 1 codes; expected 3"),
        ("<DEPTH_START><DEPTH_1> x", "depth map is not closed"),
        ("<DEPTH_START>" + "<DEPTH_1>" * 4, "depth map is not closed"),
        ("<DEPTH_START><DEPTH_1><DEPTH_9><DEPTH_1><DEPTH_END>", "unknown depth code 9; the code"),
        ("<DEPTH_1><DEPTH_END> x", "depth tokens outside a depth map"),
        ("<PIXEL_1><PIXEL_2> x", "2 pixels; a box takes four"),
        ("<PIXEL_3><PIXEL_0><PIXEL_2><PIXEL_0>", "left to right and top to bottom"),
        ("<PIXEL_3><PIXEL_0><PIXEL_3><PIXEL_9>", "expected a box within 0 to 5"),
    ],
)
def test_malformed_content_is_told(text, reason):
    written = parse_content(symbols(text), CONTENT)
    assert not written.spans and reason in written.malformed[0].reason
    assert "".join(symbols(text)).startswith(written.malformed[0].text)


def test_content_of_a_kind_the_model_does_not_write_is_malformed():
    written = parse_content(symbols(depth(1, 2, 3) + " " + box(0, 0, 1, 1)), NO_CONTENT)
    assert [bad.reason for bad in written.malformed] == [
        "no depth map is expected here",
        "no boxes are expected here",
    ]


@given(st.lists(st.sampled_from([*CONTENT.tokens, "text", ""]), max_size=40))
@settings(deadline=None)
def test_every_token_of_content_is_in_a_span_or_malformed(tokens):
    written = parse_content(tokens, CONTENT)
    places = sorted((one.start, one.end) for one in (*written.spans, *written.malformed))
    covered = [i for start, end in places for i in range(start, end)]
    assert covered == [i for i, token in enumerate(tokens) if token not in ("text", "")]


@given(
    st.lists(st.integers(0, 335), min_size=4, max_size=4),
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
)
def test_a_box_lies_in_the_image_and_is_never_empty(sides, size_wh):
    x0, x1 = sorted(sides[::2])
    y0, y1 = sorted(sides[1::2])
    left, top, right, bottom = place_box((x0, y0, x1, y1), 336, size_wh)
    assert 0 <= left < right <= size_wh[0] and 0 <= top < bottom <= size_wh[1]
    assert abs(left - x0 * size_wh[0] / 336) <= 1
    assert abs(right - (x1 + 1) * size_wh[0] / 336) <= 1.5


def test_the_whole_grid_is_the_whole_image():
    assert place_box((0, 0, 335, 335), 336, (640, 480)) == (0, 0, 640, 480)


# --- the vocabulary -------------------------------------------------------------------------


def test_kinds_come_in_table_order_and_unknown_ones_are_refused():
    assert ContentTokens(("boxes", "depth")).kinds == ("depth", "boxes")
    assert len(ContentTokens(("depth", "boxes")).tokens) == 130 + 336
    with pytest.raises(CheckpointError, match="unknown perception content 'dept'; available: dep"):
        ContentTokens(("dept",))
    with pytest.raises(CheckpointError, match="expected num_cells of at least 1, got 0"):
        ContentTokens(("depth",), num_cells=0)


def test_a_tokenizer_without_the_tokens_is_refused():
    with pytest.raises(CheckpointError, match=r"lacks <DEPTH_START>, <DEPTH_END>, .*, \.\.\.; add"):
        Vocabulary.from_tokenizer(byte_tokenizer(), (), 8, CONTENT)


# --- the loop -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return tiny_model(("clip",), content=CONTENT)[1]


@pytest.fixture(scope="module")
def vocabulary(processor):
    return Vocabulary.from_tokenizer(processor.tokenizer, BRANCHES, 8, CONTENT)


def test_the_model_goes_on_in_the_same_turn(processor, vocabulary):
    text = "Map: " + depth(4, 0, 1) + " The answer is " + box(1, 1, 3, 5) + "(B)."
    run = Script(processor, vocabulary, text + TURN_END)
    trace = run.trace
    assert trace.stop_reason == "stop" and len(trace.turns) == 1 and not trace.calls
    assert trace.answer == "The answer is (B)."
    first, second = trace.content
    assert (first.kind, first.codes, first.boxes, first.turn) == ("depth", [4, 0, 1], None, 0)
    assert [token.text for token in trace.tokens[first.start : first.end]] == symbols(
        depth(4, 0, 1)
    )
    assert first.ms == pytest.approx(sum(t.ms for t in trace.tokens[first.start : first.end]))
    assert second.boxes == [(1, 1, 3, 5)]
    assert second.boxes_xyxy_px == [place_box((1, 1, 3, 5), 6, (112, 84))]
    assert [event.content for event in run.of_type(ContentEvent)] == trace.content
    assert trace.settings["num_pixels"] == 6


def test_an_answer_before_the_map_is_not_lost(processor, vocabulary):
    run = Script(processor, vocabulary, "C " + depth(4, 0, 1) + TURN_END)
    assert run.trace.answer == "C"


def test_boxes_on_a_crop_are_placed_on_the_photo(processor, vocabulary):
    region = "<|region_token_start|><|x_2|><|y_1|><|x_5|><|y_4|><|region_token_end|>"
    run = Script(
        *(processor, vocabulary, region + TURN_END, box(0, 0, 5, 5) + "x" + TURN_END),
        look_at="latest",
    )
    (one,) = run.trace.content
    assert one.image == 1 and one.turn == 1
    assert one.boxes_xyxy_px == [run.trace.calls[0].box_xyxy_px]


def test_content_may_stand_before_a_call(processor, vocabulary):
    row = BRANCH_TOKENS["reencode"]
    run = Script(processor, vocabulary, depth(1, 1, 1) + row.start, f"Blue.{TURN_END}")
    kinds = [type(e) for e in run.events if isinstance(e, CallEvent | ContentEvent)]
    assert kinds == [ContentEvent, CallEvent] and run.trace.answer == "Blue."


def test_the_token_limit_cuts_a_map_and_the_trace_says_so(processor, vocabulary):
    run = Script(processor, vocabulary, "a" + depth(1, 2, 3), max_new_tokens=4)
    (one,) = run.trace.content
    assert (one.is_whole, one.codes, run.trace.stop_reason) == (False, [1, 2], "length")
    assert run.trace.answer == "a" and not run.trace.malformed


@pytest.mark.parametrize(
    ("options", "may"),
    [
        ({}, True),
        ({"perception": "region"}, True),
        ({"max_calls": 0}, True),
        ({"perception": "none"}, False),
        ({"images": []}, False),
    ],
)
def test_content_is_forbidden_where_perception_is(processor, vocabulary, options, may):
    words = (
        "x"
        if options.get("perception") != "region"
        else ("<|region_token_start|><|x_2|><|y_1|><|region_token_end|>" + TURN_END + "x")
    )
    run = Script(processor, vocabulary, words + TURN_END, **options)
    allowed = permitted_ids(run.rules[-1])
    for token in ("<DEPTH_START>", "<PIXEL_3>"):
        assert (vocabulary.ids[token] in allowed) == may
    assert vocabulary.ids["<DEPTH_3>"] not in allowed


def test_unconstrained_malformed_content_is_recorded_and_read_as_text(processor, vocabulary):
    text = "<DEPTH_1> well <DEPTH_START><DEPTH_1><DEPTH_END> B"
    run = Script(processor, vocabulary, text + TURN_END, constrain=False)
    assert [bad.reason for bad in run.trace.malformed] == [
        "depth tokens outside a depth map",
        "a depth map of 1 codes; expected 3",
    ]
    assert run.rules[0] is None and not run.trace.content
    assert run.trace.answer.split() == ["well", "B"]


def test_unconstrained_boxes_of_no_image_are_malformed(processor, vocabulary):
    run = Script(
        processor, vocabulary, box(0, 0, 1, 1) + "a" + TURN_END, constrain=False, images=[]
    )
    assert [bad.reason for bad in run.trace.malformed] == ["no boxes are expected here"]


def test_a_question_cannot_hold_tokens_of_content(processor):
    with pytest.raises(PromptError, match="the question holds the control token <DEPTH_3>"):
        processor.prompt("Is <DEPTH_3> near?", [])
    processor.prompt("Is <DEPTH_77> near?", [])  # text to this model


# --- the trace ------------------------------------------------------------------------------


@pytest.fixture
def trace(processor, vocabulary):
    text = depth(4, 0, 1) + " so " + box(1, 1, 3, 5) + box(0, 0, 5, 5)
    return Script(processor, vocabulary, text + TURN_END).trace


def test_a_trace_with_content_is_read_back(trace):
    trace.content[0].keep_depth_map(lambda codes: torch.rand(32, 32).numpy())
    assert trace.content[0].picture.startswith("data:image/png;base64,")
    assert Trace.from_dict(json.loads(trace.to_json())) == trace


def test_a_trace_of_before_content_is_read(trace):
    old = trace.to_dict()
    del old["content"]
    assert Trace.from_dict(old).content == []


def test_only_whole_depth_maps_are_decoded(trace):
    cut = replace(trace.content[0], is_whole=False)
    for one in (cut, trace.content[1]):
        one.keep_depth_map(lambda codes: pytest.fail("nothing to decode"))
        assert one.picture is None


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"image": 3}, r"content\[0\] names image 3 of 1"),
        (0, {"start": 4, "end": 4}, r"content\[0\] spans tokens 4 to 4 of"),
        (0, {"end": 999}, r"content\[0\] spans tokens 0 to 999 of"),
        (0, {"kind": "sketch"}, r"content\[0\] is of kind 'sketch'"),
        (0, {"codes": None}, r"content\[0\] is of kind 'depth', without what that holds"),
        (1, {"boxes_xyxy_px": []}, r"content\[1\] has 2 boxes at 0 places"),
        (1, {"boxes_xyxy_px": [[0, 0, 9, 9], [0, 0, 999, 9]]}, "box .* is not in an image of"),
        (0, {"turn": -1}, r"content\[0\].turn cannot be -1"),
        (0, {"codes": ["x"]}, r"content\[0\].codes\[0\] cannot be"),
    ],
)
def test_a_broken_trace_is_refused(trace, index, change, message):
    content = json.loads(trace.to_json())
    content["content"][index] |= change
    with pytest.raises(PromptError, match=message):
        Trace.from_dict(content)


def test_the_timeline_has_content_in_its_turn(trace):
    (turn,) = trace.timeline()
    assert [number for number, _ in turn.content] == [1, 2]

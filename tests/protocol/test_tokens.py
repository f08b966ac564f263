"""The perception vocabulary: what is a call, what is not, and nothing in between is guessed."""

import json
import re

import pytest
from golden_data import GOLDENS, VARIANTS
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tiny_model import byte_tokenizer

from vpt.boxes import GridBox
from vpt.errors import CheckpointError, PromptError, RegionError
from vpt.model.building import add_perception_tokens
from vpt.protocol.calls import format_region, parse_turn, split_symbols
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    INVITE_REENCODE,
    INVITE_REGION,
    PERCEPTION_MODES,
    REGION_END,
    REGION_START,
    BranchRow,
    Vocabulary,
    branches_named,
    branches_of_mode,
    canonical_mode,
    coordinate_tokens,
    find_branch,
    invite,
    perception_mode,
    perception_tokens,
    region_tokens,
)

TABLE = json.loads((GOLDENS / "goldens" / "region_table.json").read_text())
ENTRIES = {entry["name"]: entry for entry in TABLE["entries"]}
ALL_BRANCHES = tuple(BRANCH_TOKENS)
WRITTEN_TOKENS = perception_tokens(ALL_BRANCHES)[1]
BASE_TOKENS = 7  # <|endoftext|> ... <|video_pad|>, in front of the perception tokens


def tokenizer_with(branches=ALL_BRANCHES, grid_size=8):
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, branches, grid_size)
    return tokenizer


TOKENIZER = tokenizer_with()
VOCABULARY = Vocabulary.from_tokenizer(TOKENIZER, ALL_BRANCHES)


def regions(grid_size):
    cell = st.integers(0, grid_size - 1)
    corners = st.tuples(cell, cell, cell, cell)
    return corners.map(
        lambda c: GridBox(min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
    )


grids_and_regions = st.integers(1, 12).flatmap(
    lambda grid_size: st.tuples(st.just(grid_size), st.lists(regions(grid_size), max_size=4))
)
LURES = ("<|", "|>", "<|x_", "_1|>", "<|X_1|>", "x_1", "<x_1>", "<|x|>", "|", "<", "\n", "…")
plain_text = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(LURES)), max_size=4).map(
    "".join
)


def is_perception(symbol, grid_size=8):
    known = [*coordinate_tokens("x", grid_size), *coordinate_tokens("y", grid_size)]
    return symbol in known or symbol in WRITTEN_TOKENS


# --- against the released implementation ----------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_regions_are_those_the_released_parser_found(name):
    entry = ENTRIES[name]
    expected = [
        GridBox(*region["min"], *region["max"])
        for region in entry["regions"] or ()
        if "error" not in region
    ]
    parsed = parse_turn(entry["text"], TABLE["grid"])
    assert [call.region for call in parsed.calls if call.branch == "crop"] == expected


@pytest.mark.parametrize("name", ENTRIES)
def test_written_regions_that_make_no_call_are_reported_with_a_reason(name):
    entry = ENTRIES[name]
    parsed = parse_turn(entry["text"], TABLE["grid"])
    num_starts = entry["text"].count(REGION_START)
    num_crops = sum(call.branch == "crop" for call in parsed.calls)
    reported = [m for m in parsed.malformed if REGION_START in m.text]
    assert len(reported) == num_starts - num_crops
    assert all(malformed.reason for malformed in parsed.malformed)
    num_errors = sum("error" in region for region in entry["regions"] or ())
    assert len([m for m in parsed.malformed if "coordinate" in m.reason]) == num_errors


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("only_x", ["region has no y coordinate"]),
        ("one_x", ["region has no y coordinate"]),
        ("only_y", ["region has no x coordinate"]),
        ("empty", ["region names no cell"]),
        ("x_out_of_vocab", ["<|x_8|> lies outside the 8x8 grid"]),
        ("negative", ["region is not closed", "perception tokens outside a call"]),
        ("text_inside", ["region is not closed", "perception tokens outside a call"]),
        ("space_inside", ["region is not closed"] + ["perception tokens outside a call"] * 2),
        ("newline_inside", ["region is not closed", "perception tokens outside a call"]),
        ("no_end", ["region is not closed"]),
        ("no_start", ["perception tokens outside a call"]),
        ("bare_tokens", ["perception tokens outside a call"]),
        ("two_starts", ["region is not closed"]),
        ("two_ends", ["perception tokens outside a call"]),
        ("nested_start", ["region is not closed"]),
        ("upper_case", ["region is not closed", "perception tokens outside a call"]),
        ("valid_then_broken", ["region has no y coordinate"]),
        ("broken_then_valid", ["<|x_9|> lies outside the 8x8 grid"]),
        ("clip_action_without_start", ["perception tokens outside a call"]),
        ("no_tokens", []),
        ("empty_string", []),
        ("plain", []),
    ],
)
def test_each_mistake_is_named(name, reasons):
    parsed = parse_turn(ENTRIES[name]["text"], TABLE["grid"])
    assert [malformed.reason for malformed in parsed.malformed] == reasons


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("clip_only", ["reencode"]),
        ("clip_start_only", ["reencode"]),
        ("clip_action_without_start", []),
        ("dino_only", ["dino"]),
        ("sam_only", ["sam"]),
        ("dino_and_sam", ["dino", "sam"]),
        ("answer_after_action", ["reencode"]),
        ("region_and_clip", ["crop", "reencode"]),
    ],
)
def test_a_reencoding_is_called_by_its_start_token(name, branches):
    assert [call.branch for call in parse_turn(ENTRIES[name]["text"]).calls] == branches


def test_every_second_look_of_the_released_driver_is_a_call_of_ours():
    routed = [e for e in ENTRIES.values() if e["route"] == "second_round"]
    assert len(routed) > 20
    for entry in routed:
        calls = parse_turn(entry["text"]).calls
        row = entry["second_round_row"]
        for row_of, field in (("dino", "detection"), ("reencode", "clip"), ("sam", "seg")):
            wanted = bool(row[f"{field}_images"])
            assert wanted == any(call.branch == row_of for call in calls), entry["name"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_added_in_the_released_order(variant):
    ids = json.loads((GOLDENS / "checkpoints" / variant / "added_tokens.json").read_text())
    released = sorted(ids, key=ids.__getitem__)[BASE_TOKENS:]
    special, ordinary = perception_tokens(branches_named([variant]))
    assert special + ordinary == released


@pytest.mark.parametrize("branch", ALL_BRANCHES)
def test_placeholders_and_calls_are_spelled_as_released(branch):
    row = BRANCH_TOKENS[branch]
    (entry,) = [e for e in ENTRIES.values() if e["name"] == f"{row.encoder}_only"]
    assert row.call == entry["text"]
    assert row.placeholder == entry["second_round_row"]["messages"][2]["content"]


# --- round trips and spans ------------------------------------------------------------------


@given(grids_and_regions)
def test_what_is_formatted_is_parsed_again(grid_and_regions):
    grid_size, boxes = grid_and_regions
    text = "".join(format_region(box, grid_size) for box in boxes)
    parsed = parse_turn(text, grid_size)
    assert [call.region for call in parsed.calls] == boxes
    assert parsed.malformed == ()


def write(part):
    if isinstance(part, GridBox):
        return format_region(part)
    return part.call if isinstance(part, BranchRow) else part


@given(st.permutations([*coordinate_tokens("x"), *coordinate_tokens("y")]), st.integers(0, 16))
def test_a_region_spans_the_extremes_of_its_coordinates_in_any_order(symbols, num_tokens):
    symbols = symbols[:num_tokens]
    cells = {axis: [int(s[4]) for s in symbols if s[2] == axis] for axis in "xy"}
    parsed = parse_turn([REGION_START, *symbols, REGION_END])
    if not all(cells.values()):
        assert parsed.calls == ()
        return
    (call,) = parsed.calls
    x, y = cells["x"], cells["y"]
    assert call.region == GridBox(min(x), min(y), max(x), max(y))


@given(
    st.lists(
        st.one_of(plain_text, regions(8), st.sampled_from(list(BRANCH_TOKENS.values()))),
        min_size=1,
        max_size=7,
    )
)
@example(["<|", GridBox(0, 0, 0, 0), "|>"])
@example(["<|x_", BRANCH_TOKENS["sam"], "1|>"])
def test_calls_are_found_in_any_plain_text(parts):
    assume(not re.search(r"<\|[xy]_\d+\|>", "".join(p for p in parts if isinstance(p, str))))
    text = "".join(write(part) for part in parts)
    parsed = parse_turn(text)
    expected = [part for part in parts if not isinstance(part, str)]
    assert [call.region or BRANCH_TOKENS[call.branch] for call in parsed.calls] == expected
    assert parsed.malformed == ()
    assert "".join(split_symbols(text)) == text


@given(
    st.lists(
        st.one_of(st.sampled_from(WRITTEN_TOKENS), st.sampled_from(["", "a b", "<|x_9|>"])),
        max_size=12,
    )
)
def test_spans_account_for_every_perception_token_once(symbols):
    parsed = parse_turn(symbols)
    spans = sorted((s.start, s.end) for s in (*parsed.calls, *parsed.malformed))
    covered = [index for start, end in spans for index in range(start, end)]
    assert covered == sorted(set(covered))
    assert all(start < end for start, end in spans)
    outside = set(range(len(symbols))) - set(covered)
    assert not any(is_perception(symbols[index]) for index in outside)
    for malformed in parsed.malformed:
        assert malformed.text == "".join(symbols[malformed.start : malformed.end])


@given(st.lists(st.sampled_from([*WRITTEN_TOKENS, ""]), max_size=12))
def test_a_span_holds_the_whole_call_and_nothing_else(symbols):
    for call in parse_turn(symbols).calls:
        alone = parse_turn(symbols[call.start : call.end])
        assert [(c.branch, c.region) for c in alone.calls] == [(call.branch, call.region)]
        assert (alone.calls[0].start, alone.calls[0].end) == (0, call.end - call.start)
        assert alone.malformed == ()


@given(st.lists(st.sampled_from([*WRITTEN_TOKENS, "a", " the sign ", "é"]), max_size=10))
def test_token_ids_give_the_calls_of_their_text(parts):
    text = "".join(parts)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    from_ids, from_text = parse_turn(VOCABULARY.symbols(ids)), parse_turn(text)
    found = [[(c.branch, c.region) for c in p.calls] for p in (from_ids, from_text)]
    assert found[0] == found[1]
    reasons = [[(m.text, m.reason) for m in p.malformed] for p in (from_ids, from_text)]
    assert reasons[0] == reasons[1]
    for call in from_ids.calls:
        again = parse_turn(TOKENIZER.decode(ids[call.start : call.end]))
        assert [(c.branch, c.region) for c in again.calls] == [(call.branch, call.region)]


def test_only_the_exact_tokens_behind_a_start_belong_to_its_call():
    row, other = BRANCH_TOKENS["reencode"], BRANCH_TOKENS["sam"]
    assert [(c.start, c.end) for c in parse_turn([row.start, row.action, row.end]).calls] == [
        (0, 3)
    ]
    parsed = parse_turn([row.start, other.action, other.end])
    assert [(c.branch, c.start, c.end) for c in parsed.calls] == [("reencode", 0, 1)]
    assert [m.text for m in parsed.malformed] == [other.action + other.end]


@pytest.mark.parametrize("lookalike", ["<|x_03|>", "<|x_٣|>"])
def test_text_that_only_looks_like_a_coordinate_token_is_no_cell(lookalike):
    parsed = parse_turn(f"{REGION_START}{lookalike}<|y_1|>{REGION_END}")
    assert parsed.calls == ()


def test_a_region_beyond_the_grid_is_not_written():
    assert format_region(GridBox(0, 0, 3, 3), 4)
    with pytest.raises(RegionError, match="does not fit a 4x4 grid"):
        format_region(GridBox(0, 0, 4, 3), 4)
    with pytest.raises(RegionError, match="does not fit a 8x8 grid"):
        format_region(GridBox(0, 0, 0, 8))


def test_a_region_beyond_a_smaller_grid_is_malformed():
    (malformed,) = parse_turn(format_region(GridBox(0, 0, 5, 5)), grid_size=4).malformed
    assert malformed.reason == "<|x_5|> lies outside the 4x4 grid"


# --- asking ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PERCEPTION_MODES)
def test_the_invitation_follows_the_mode(mode):
    place = f" {INVITE_REGION}"
    known = {"auto": "", "none": "", "crop": place, "grounding": place}
    words = known.get(mode, f" {INVITE_REENCODE}")
    assert invite("What is it?", mode) == f"What is it?{words}"


def test_one_blank_stands_before_the_invitation():
    assert invite("What is it? \n", "crop") == f"What is it? {INVITE_REGION}"


def test_asking_in_an_unknown_mode_is_an_error():
    with pytest.raises(PromptError, match=r"unknown perception mode 'zoom'; available: auto, none"):
        invite("What is it?", "zoom")


@pytest.mark.parametrize("question", ["", "  \n"])
@pytest.mark.parametrize("mode", ["auto", "crop"])
def test_an_empty_question_is_an_error(question, mode):
    with pytest.raises(PromptError, match="the question is empty"):
        invite(question, mode)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", ("crop", "reencode", "sam")),
        ("none", ()),
        ("crop", ("crop",)),
        ("region", ("crop",)),
        ("reencode", ("reencode", "sam")),
        ("clip", ("reencode",)),
        ("seg", ("sam",)),
        ("sam", ("sam",)),
    ],
)
def test_a_mode_permits_the_branches_it_names(mode, expected):
    assert branches_of_mode(mode, ("crop", "reencode", "sam")) == expected
    assert branches_of_mode(mode, iter(("crop", "reencode", "sam"))) == expected


@pytest.mark.parametrize(
    ("mode", "available", "has"),
    [
        ("dino", ("crop", "reencode", "sam"), "crop, clip, sam"),
        ("crop", ("dino",), "dino"),
        ("reencode", ("crop",), "crop"),
        ("clip", (), "none"),
        ("grounding", ("crop",), r"crop\. A phrase needs its tokens and a detector"),
    ],
)
def test_a_mode_the_model_cannot_do_is_an_error(mode, available, has):
    with pytest.raises(PromptError, match=f"cannot do perception='{mode}'; it has: {has}$"):
        branches_of_mode(mode, available)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("region", "crop"), ("detection", "dino"), ("seg", "sam"), ("clip", "clip"), ("auto", "auto")],
)
def test_older_and_released_names_of_modes_are_accepted(name, mode):
    assert perception_mode(name) == canonical_mode(name) == mode
    assert mode in PERCEPTION_MODES
    assert invite("What?", name) == invite("What?", mode)


def test_modes_are_a_sequence_that_follows_the_table():
    modes = ["auto", "none", "crop", "grounding", "reencode", "clip", "dino", "sam"]
    assert list(PERCEPTION_MODES) == modes
    assert len(PERCEPTION_MODES) == 8 and PERCEPTION_MODES[-1] == "sam"


@pytest.mark.parametrize("row", BRANCH_TOKENS.values(), ids=lambda row: row.branch)
def test_a_branch_is_found_by_each_of_its_names(row):
    for name in (row.branch, row.encoder, row.released):
        assert find_branch(name) == row.branch
        assert branches_named([name]) == (row.branch,)


def test_a_model_without_branches_answers_in_auto_mode():
    assert branches_of_mode("auto", ()) == ()


# --- vocabulary -----------------------------------------------------------------------------


def test_the_vocabulary_holds_the_ids_of_the_tokenizer():
    assert VOCABULARY.branches == ("crop", *ALL_BRANCHES)
    assert VOCABULARY.size == len(TOKENIZER)
    for token in (*WRITTEN_TOKENS, "<|im_end|>", "<|image_pad|>", "<|video_pad|>"):
        assert VOCABULARY.ids[token] == TOKENIZER.convert_tokens_to_ids(token)


def test_symbols_name_control_tokens_only():
    ids = TOKENIZER("hi<|x_3|><|im_end|>", add_special_tokens=False)["input_ids"]
    assert VOCABULARY.symbols(ids) == ["", "", "<|x_3|>", "<|im_end|>"]
    assert VOCABULARY.symbols([10**9]) == [""]


def test_each_branch_has_its_opener():
    assert VOCABULARY.symbols([VOCABULARY.opener("crop")]) == [REGION_START]
    for branch, row in BRANCH_TOKENS.items():
        assert VOCABULARY.symbols([VOCABULARY.opener(branch)]) == [row.start]


def test_crop_is_permitted_only_if_the_region_tokens_are_there():
    tokenizer = byte_tokenizer()
    assert Vocabulary.from_tokenizer(tokenizer, ()).branches == ()
    tokenizer.add_tokens(region_tokens()[:-1])
    assert Vocabulary.from_tokenizer(tokenizer, ()).branches == ()
    tokenizer.add_tokens(region_tokens()[-1:])
    assert Vocabulary.from_tokenizer(tokenizer, ()).branches == ("crop",)
    assert Vocabulary.from_tokenizer(tokenizer, (), grid_size=9).branches == ()


def test_a_missing_token_of_a_branch_is_named():
    tokenizer = tokenizer_with(["reencode"])
    assert Vocabulary.from_tokenizer(tokenizer, ["reencode"]).branches == ("crop", "reencode")
    missing = "<|seg_action_start|>, <|seg_action|>, <|seg_action_end|>, <|seg_image_pad|>"
    with pytest.raises(CheckpointError, match=f"lacks {re.escape(missing)}; add them with"):
        Vocabulary.from_tokenizer(tokenizer, ["reencode", "sam"])


def test_the_vocabulary_knows_tokens_of_branches_the_model_lacks():
    vocabulary = Vocabulary.from_tokenizer(TOKENIZER, ["reencode"])
    assert BRANCH_TOKENS["sam"].start in vocabulary.ids
    assert "sam" not in vocabulary.branches


def test_pads_are_special_and_what_the_model_writes_is_not():
    for row in BRANCH_TOKENS.values():
        ids = TOKENIZER(row.pad + row.call, add_special_tokens=False)["input_ids"]
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == row.call

"""The loop, driven by plain lists of tokens: no model is needed to see what it does."""

import numpy as np
import pytest
from drivers import IMAGE, Script
from tiny_model import tiny_model

from vpt.errors import PromptError
from vpt.images import load_image
from vpt.inference.events import (
    CallEvent,
    ResultEvent,
    StopEvent,
    TokenEvent,
)
from vpt.inference.request import REPLACED_LOOKS
from vpt.model.processing import FeaturePiece, ImagePiece
from vpt.protocol.calls import format_region, parse_turn
from vpt.protocol.tokens import BRANCH_TOKENS, REGION_START, TURN_END, Vocabulary


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


@pytest.fixture(scope="module")
def vocabulary(processor):
    return Vocabulary.from_tokenizer(processor.tokenizer, tuple(BRANCH_TOKENS))


def region(*cells):
    from vpt.boxes import GridBox

    return format_region(GridBox(*cells))


def test_a_plain_answer_ends_with_stop(processor, vocabulary):
    run = Script(processor, vocabulary, f"A cat.{TURN_END}")
    assert run.trace.answer == "A cat."
    assert run.trace.stop_reason == "stop"
    assert "".join(event.text for event in run.of_type(TokenEvent)) == "A cat."
    assert run.trace.counts.generated_tokens == len(run.ids)


def test_a_region_is_cut_out_and_appended_as_an_image(processor, vocabulary):
    run = Script(processor, vocabulary, region(2, 1, 5, 4) + TURN_END, f"Stop.{TURN_END}")
    (call,) = run.trace.calls
    assert call.box_xyxy_px == (14, 0, 98, 63)  # as in the released table
    (crop,) = [p.image for p in run.appended[len(run.ids) - 5 - 1] if isinstance(p, ImagePiece)]
    assert crop.pixels.tobytes() == IMAGE.pixels.crop((14, 0, 98, 63)).tobytes()
    assert run.trace.answer == "Stop."
    assert [type(e) for e in run.events if not isinstance(e, TokenEvent)] == [
        CallEvent,
        ResultEvent,
        StopEvent,
    ]


def test_a_reencoding_call_is_complete_with_its_start_token(processor, vocabulary):
    row = BRANCH_TOKENS["dino"]
    run = Script(processor, vocabulary, row.start, f"Blue.{TURN_END}")
    reply = run.appended[1]
    ids = vocabulary.ids
    assert reply[0].ids == (ids[row.start], ids[row.action], ids[row.end], ids[TURN_END])
    assert [p for p in reply if isinstance(p, FeaturePiece)] == [FeaturePiece("dino", IMAGE)]
    assert run.trace.answer == "Blue."


def test_several_regions_in_one_turn_are_numbered(processor, vocabulary):
    turn = region(0, 0, 1, 1) + region(6, 6, 7, 7) + TURN_END
    run = Script(processor, vocabulary, turn, f"x{TURN_END}")
    reply = run.appended[len(processor.encode_text(turn).ids)]
    text = "".join("#" if isinstance(p, ImagePiece) else _text(processor, p) for p in reply)
    assert "user\nRegion 0: <|vision_start|>#<|vision_end|>\nRegion 1: <|vision_start|>#" in text
    assert len(run.trace.calls) == 2
    assert run.trace.images[2].box_xyxy_px == (70, 52, 112, 84)


def _text(processor, piece):
    return processor.decode(piece.ids, skip_special_tokens=False)


def test_a_crop_of_a_crop_is_placed_in_the_given_image(processor, vocabulary):
    run = Script(
        processor,
        vocabulary,
        region(2, 1, 5, 4) + TURN_END,
        region(0, 0, 0, 0) + TURN_END,
        f"x{TURN_END}",
        look_at="latest",
    )
    outer, inner = run.trace.calls
    assert (outer.image, inner.image) == (0, 1)
    assert inner.box_xyxy_px == (14, 0, 14 + 84 * 2 // 8, 63 * 2 // 8)


def test_look_at_first_always_cuts_from_the_given_image(processor, vocabulary):
    run = Script(
        processor,
        vocabulary,
        region(2, 1, 5, 4) + TURN_END,
        region(0, 0, 0, 0) + TURN_END,
        f"x{TURN_END}",
    )
    assert [call.image for call in run.trace.calls] == [0, 0]
    assert run.trace.calls[1].box_xyxy_px == (0, 0, 28, 21)


def test_running_out_of_tokens_ends_with_length(processor, vocabulary):
    run = Script(processor, vocabulary, "abcdef", max_new_tokens=4)
    assert (run.trace.answer, run.trace.stop_reason) == ("abcd", "length")


def test_the_grammar_forbids_calls_beyond_the_budget(processor, vocabulary):
    run = Script(processor, vocabulary, region(1, 1, 2, 2) + TURN_END, f"x{TURN_END}", max_calls=1)
    openers = {vocabulary.opener(branch) for branch in vocabulary.branches}
    assert openers.isdisjoint(run.rules[0].banned)
    assert openers <= set(run.rules[-1].banned)
    assert run.trace.stop_reason == "stop"


def test_an_unconstrained_call_beyond_the_budget_ends_the_run(processor, vocabulary):
    turn = region(1, 1, 2, 2) + TURN_END
    run = Script(processor, vocabulary, turn, turn, max_calls=1, constrain=False)
    assert run.trace.stop_reason == "max_calls"
    assert [call.outcome for call in run.trace.calls] == ["executed", "not_executed"]
    assert run.rules == [None] * len(run.rules)


def test_an_unconstrained_repeated_call_ends_the_run(processor, vocabulary):
    turn = region(1, 1, 2, 2) + TURN_END
    run = Script(processor, vocabulary, turn, turn, constrain=False)
    assert run.trace.stop_reason == "repeated_call"
    assert [call.outcome for call in run.trace.calls] == ["executed", "repeated"]


def test_after_a_repeated_call_the_constrained_model_must_answer(processor, vocabulary):
    turn = region(1, 1, 2, 2) + TURN_END
    run = Script(processor, vocabulary, turn, turn, f"x{TURN_END}")
    assert run.trace.answer == "x"
    assert run.trace.stop_reason == "repeated_call"
    assert vocabulary.opener("crop") in run.rules[-1].banned


def test_malformed_calls_are_recorded_and_the_turn_is_the_answer(processor, vocabulary):
    text = f"<|region_token_start|><|x_1|><|region_token_end|>hm{TURN_END}"
    run = Script(processor, vocabulary, text, constrain=False)
    (bad,) = run.trace.malformed
    assert bad.reason == "region has no y coordinate"
    assert bad.text == "<|region_token_start|><|x_1|><|region_token_end|>"
    assert (run.trace.answer, run.trace.stop_reason) == ("hm", "stop")


def test_well_formed_calls_beside_malformed_ones_are_executed(processor, vocabulary):
    text = f"<|x_1|>{region(1, 1, 2, 2)}{TURN_END}"
    run = Script(processor, vocabulary, text, f"x{TURN_END}", constrain=False)
    assert len(run.trace.malformed) == len(run.trace.calls) == 1


def test_a_token_that_must_come_first_is_read_with_the_prompt(processor, vocabulary):
    rest = region(1, 1, 2, 2).removeprefix(REGION_START)
    run = Script(processor, vocabulary, rest + TURN_END, f"x{TURN_END}", perception="region")
    *prompt, certain = run.appended[0]
    assert certain.ids == (vocabulary.ids[REGION_START],)
    assert run.rules[0].only == tuple(vocabulary.ids[f"<|x_{x}|>"] for x in range(8))
    assert "and then answer the question." in _text(processor, prompt[-1])
    assert run.trace.turns[0] == region(1, 1, 2, 2) + TURN_END
    first, second = run.of_type(TokenEvent)[:2]
    assert (first.token.text, second.token.text) == (REGION_START, "<|x_1|>")


@pytest.mark.parametrize("mode", ["clip", "dino", "sam", "reencode"])
def test_a_named_mode_makes_the_first_turn_call(processor, vocabulary, mode):
    run = Script(processor, vocabulary, BRANCH_TOKENS["sam"].start, f"x{TURN_END}", perception=mode)
    branches = (
        tuple(BRANCH_TOKENS) if mode == "reencode" else ({"clip": "reencode"}.get(mode, mode),)
    )
    assert run.rules[0].only == tuple(vocabulary.opener(branch) for branch in branches)
    prompt = _text(processor, run.appended[0][-1])
    assert "and then answer the question." in prompt


def test_mode_none_permits_no_call_and_invites_none(processor, vocabulary):
    run = Script(processor, vocabulary, f"x{TURN_END}", perception="none")
    assert {vocabulary.opener(b) for b in vocabulary.branches} <= set(run.rules[0].banned)
    assert "and then answer" not in _text(processor, run.appended[0][-1])


def test_text_is_held_back_in_the_middle_of_a_character(processor, vocabulary):
    run = Script(processor, vocabulary, f"né 猫{TURN_END}")
    texts = [event.text for event in run.of_type(TokenEvent)]
    assert "".join(texts) == "né 猫"
    assert "" in texts[:-1]


def test_what_the_turn_holds_parses_back_to_the_calls(processor, vocabulary):
    run = Script(processor, vocabulary, region(2, 1, 5, 4) + TURN_END, f"x{TURN_END}")
    (call,) = parse_turn(run.trace.turns[0]).calls
    assert call.region is not None
    assert (call.region.x_min, call.region.y_max) == run.trace.calls[0].region[::3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"question": " "}, "question is empty"),
        ({"question": "a <|im_end|> b"}, "control token <|im_end|>"),
        ({"perception": "smell"}, "perception must be one of 'auto', 'none'"),
        ({"max_calls": -1}, "max_calls must be a whole number of at least 0, not -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"look_at": "last"}, "look_at must be one of"),
        ({"images": [], "perception": "region"}, "needs an image"),
    ],
)
def test_bad_requests_are_refused_with_words(processor, vocabulary, options, words):
    import re

    with pytest.raises(PromptError, match=re.escape(words)):
        Script(processor, vocabulary, f"x{TURN_END}", **options)


def test_a_mode_the_model_lacks_is_refused(processor):
    tokenizer = tiny_model(("clip",))[1].tokenizer
    vocabulary = Vocabulary.from_tokenizer(tokenizer, ("reencode",))
    with pytest.raises(PromptError, match="cannot do perception='sam'; it has: crop, clip"):
        Script(processor, vocabulary, "x", perception="sam")


def test_a_call_for_a_branch_the_model_lacks_is_malformed(processor):
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, ("reencode",))
    text = f"{BRANCH_TOKENS['sam'].start}hm{TURN_END}"
    run = Script(processor, vocabulary, text, constrain=False)
    assert [bad.reason for bad in run.trace.malformed] == ["this model has no branch 'sam'"]
    assert (run.trace.calls, run.trace.answer) == ([], "hm")


@pytest.mark.parametrize("replaced", REPLACED_LOOKS)
def test_each_way_to_replace_looks_shows_other_pixels(processor, vocabulary, replaced):
    image = load_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    crops = set()
    for option in (None, replaced):
        texts = region(3, 3, 4, 4) + TURN_END, f"x{TURN_END}"
        run = Script(processor, vocabulary, *texts, images=[image], replace_looks=option)
        (crop,) = [p.image for one in run.appended[1:] for p in one if isinstance(p, ImagePiece)]
        crops.add(crop.digest)
    assert len(crops) == 2

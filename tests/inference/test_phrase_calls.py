"""The model's own call for a phrase: tokens, grammar, result, trace."""

import json
from types import SimpleNamespace

import pytest
import torch
from drivers import IMAGE, Script, SomewhereDetector
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

import vpt
from vpt.boxes import contains
from vpt.branches import Proposal
from vpt.cli import main
from vpt.errors import CheckpointError, PromptError
from vpt.inference.events import CallEvent, ResultEvent, StopEvent, TokenEvent
from vpt.model.generation import apply_rule_
from vpt.model.processing import ImagePiece, TokenPiece
from vpt.protocol.calls import NOT_FOUND, format_found, parse_turn
from vpt.protocol.grammar import MOST_PHRASE_TOKENS, PerceptionGrammar, TurnState
from vpt.protocol.tokens import BRANCH_TOKENS, GROUND_END, GROUND_START, TURN_END, Vocabulary
from vpt.trace.records import Trace
from vpt.view.wording import call_text

CALL = f"{GROUND_START}the blue tag{GROUND_END}"
BOX = (20, 10, 50, 40)


@pytest.fixture(scope="module")
def made():
    return tiny_model(grounding=True)


@pytest.fixture(scope="module")
def processor(made):
    return made[1]


@pytest.fixture(scope="module")
def vocabulary(processor):
    return Vocabulary.from_tokenizer(processor.tokenizer, tuple(BRANCH_TOKENS))


def finds(*boxes):
    return lambda image, phrase: [Proposal(box, 0.9 - 0.1 * i, "") for i, box in enumerate(boxes)]


# --- tokens and grammar ---------------------------------------------------------------------


def test_a_phrase_is_plain_text_between_its_tokens():
    (call,) = parse_turn(f"I look: {CALL}").calls
    assert (call.branch, call.start, call.end) == ("grounding", 1, 4)
    (call,) = parse_turn(["", GROUND_START, "", "", GROUND_END, TURN_END]).calls
    assert (call.start, call.end) == (1, 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{GROUND_START}a tag", "phrase is not closed"),
        (f"{GROUND_START}a <|x_1|> tag{GROUND_END}", "phrase is not closed"),
        (f"{GROUND_START}{GROUND_END}", "phrase is empty"),
        (f"a tag{GROUND_END}", "perception tokens outside a call"),
    ],
)
def test_what_is_no_phrase_is_malformed(text, reason):
    parsed = parse_turn(text)
    assert not parsed.calls and parsed.malformed[0].reason == reason


def permitted_ids(rule):
    return set(apply_rule_(rule, torch.zeros(400)).isfinite().nonzero().flatten().tolist())


@given(
    random=st.randoms(use_true_random=False),
    permitted=st.sets(st.sampled_from(["crop", "grounding", "dino"])).map(sorted),
)
@settings(max_examples=50)
def test_the_grammar_closes_every_phrase(vocabulary, random, permitted):
    grammar, ids, state = PerceptionGrammar(vocabulary), [], TurnState()
    start, end = vocabulary.ids[GROUND_START], vocabulary.ids[GROUND_END]
    while not ids or ids[-1] != vocabulary.ids[TURN_END]:
        choices = permitted_ids(grammar.rule(state, permitted))
        likely = choices & ({start} if len(ids) < 30 else {vocabulary.ids[TURN_END], end})
        ids.append(random.choice(sorted(likely or choices)))
        state = grammar.advance(state, ids[-1])
    parsed = parse_turn(vocabulary.symbols(ids))
    assert not parsed.malformed
    phrases = [call for call in parsed.calls if call.branch == "grounding"]
    assert all(call.end - call.start - 2 <= MOST_PHRASE_TOKENS for call in phrases)
    assert len(phrases) == ("grounding" in permitted)  # the turn ends after it
    assert start in ids if phrases else start not in ids


def test_a_phrase_has_at_least_one_token_and_no_control_token(vocabulary):
    grammar, ids = PerceptionGrammar(vocabulary), vocabulary.ids
    opened = grammar.advance(TurnState(), ids[GROUND_START])
    assert not permitted_ids(grammar.rule(opened, ["grounding"])) & set(ids.values())
    begun = grammar.advance(opened, 65)
    allowed = permitted_ids(grammar.rule(begun, ["grounding"]))
    assert allowed & set(ids.values()) == {ids[GROUND_END]}
    closed = grammar.advance(begun, ids[GROUND_END])
    assert permitted_ids(grammar.rule(closed, ["grounding"])) == {ids[TURN_END]}


def test_models_without_the_tokens_are_unchanged(vocabulary):
    plain = tiny_model()[1].tokenizer
    branches = Vocabulary.from_tokenizer(plain, tuple(BRANCH_TOKENS)).branches
    assert vocabulary.branches == ("crop", "grounding", *branches[1:])


# --- the result -----------------------------------------------------------------------------


def test_boxes_are_written_in_thousandths():
    boxes = [(0, 0, 400, 300), (100, 75, 101, 299)]
    assert format_found(boxes, (400, 300)) == "(0,0),(999,999) (250,250),(252,996)"
    assert format_found([], (400, 300)) == NOT_FOUND


def test_the_result_is_a_crop_and_its_boxes(processor, vocabulary):
    run = Script(
        processor,
        vocabulary,
        CALL + TURN_END,
        f"Stop.{TURN_END}",
        propose=finds(BOX, (0, 0, 9, 9)),
    )
    (call,), (crop,) = run.trace.calls, run.trace.images[1:]
    assert (call.branch, call.phrase, call.outcome) == ("grounding", "the blue tag", "executed")
    assert contains(call.box_xyxy_px, BOX) and crop.box_xyxy_px == call.box_xyxy_px
    assert (call.result_image, crop.parent) == (1, 0)
    assert [one.box_xyxy_px for one in run.trace.proposals] == [BOX, (0, 0, 9, 9)]
    (reply,) = [one for one in run.appended[1:] if any(isinstance(p, ImagePiece) for p in one)]
    after = processor.decode(reply[-1].ids, skip_special_tokens=False)
    boxes = format_found([BOX, (0, 0, 9, 9)], IMAGE.size_wh)
    assert after == f"<|vision_end|>{boxes}<|im_end|>\n<|im_start|>assistant\n"
    assert run.trace.answer == "Stop." and not run.trace.warnings
    kinds = [type(event) for event in run.events if not isinstance(event, TokenEvent)]
    assert kinds == [CallEvent, ResultEvent, StopEvent]
    assert call_text(call).startswith("phrase 'the blue tag', x ")
    assert Trace.from_dict(json.loads(run.trace.to_json())) == run.trace


def refuse(image, phrase):
    raise PromptError("the phrase is too long")


@pytest.mark.parametrize(("propose", "reason"), [(finds(), ""), (refuse, r" \(the phrase is too")])
def test_the_model_is_told_that_nothing_was_found(processor, vocabulary, propose, reason):
    turns = CALL + TURN_END, f"Stop.{TURN_END}"
    run = Script(processor, vocabulary, *turns, propose=propose)
    (call,) = run.trace.calls
    assert (call.outcome, call.region, call.result_image) == ("not_found", None, None)
    reply = run.appended[len(processor.encode_text(turns[0]).ids)]
    assert all(isinstance(piece, TokenPiece) for piece in reply)
    text = "".join(processor.decode(p.ids, skip_special_tokens=False) for p in reply)
    assert text.endswith(f"user\n{NOT_FOUND}<|im_end|>\n<|im_start|>assistant\n")
    (warning,) = run.trace.warnings
    assert warning.startswith("'the blue tag' was not found in image 0")
    assert (reason == "") == warning.endswith("image 0")
    assert call_text(call) == "phrase 'the blue tag'"
    assert Trace.from_dict(json.loads(run.trace.to_json())) == run.trace


def test_a_phrase_is_not_looked_for_a_third_time(processor, vocabulary):
    turns = [CALL + TURN_END] * 3
    run = Script(processor, vocabulary, *turns, propose=finds(BOX), constrain=False)
    assert [call.outcome for call in run.trace.calls] == ["executed", "repeated"]
    other = f"{GROUND_START}the red tag{GROUND_END}{TURN_END}"
    run = Script(processor, vocabulary, turns[0], other, f"x{TURN_END}", propose=finds(BOX))
    assert [call.outcome for call in run.trace.calls] == ["executed", "executed"]


# --- in a runtime ---------------------------------------------------------------------------


def test_a_demanded_call_is_answered_by_the_detector(made):
    runtime = vpt.Runtime(*made, detector=SomewhereDetector())
    answers = [
        runtime.ask(IMAGE, "Which?", perception="grounding", temperature=1, seed=seed, max_calls=1)
        for seed in range(6)
    ]
    outcomes = {answer.trace.calls[0].outcome for answer in answers}
    assert outcomes == {"executed", "not_found"}
    for answer in answers:
        (call,) = answer.trace.calls
        assert call.text == f"{GROUND_START}{call.phrase}{GROUND_END}" or "\ufffd" in call.text
        assert len(answer.looks) == (call.outcome == "executed")
        for look in answer.looks:
            assert look.crop.size == answer.trace.images[1].size_wh
        answer.picture()


def test_without_a_detector_the_call_is_not_permitted(made):
    runtime = vpt.Runtime(*made)
    assert "grounding" not in runtime.vocabulary.branches
    with pytest.raises(PromptError, match="A phrase needs its tokens and a detector"):
        runtime.ask(IMAGE, "Which?", perception="grounding")
    answer = runtime.ask(IMAGE, "Which?", max_new_tokens=1)
    assert answer.warnings == [
        "the model can call for phrases, but may not: it was loaded without a detector "
        "(detector=...)"
    ]


def test_a_model_without_regions_is_shown_the_place_as_a_second_image():
    model, processor = tiny_model()
    detector = SomewhereDetector()
    runtime = vpt.Runtime(model, processor, detector=detector)
    runtime.vocabulary = runtime.vocabulary.without("crop")
    answer = runtime.ask(IMAGE, "What?", look_for="a tag", max_new_tokens=4, max_calls=1)
    given, part = answer.trace.images[:2]
    assert (part.parent, given.parent) == (0, None)
    assert contains(part.box_xyxy_px, answer.trace.proposals[0].box_xyxy_px)
    assert part.num_tokens and part.seen_wh
    both = runtime.ask([IMAGE, IMAGE.pixels.crop(part.box_xyxy_px)], "What?", max_new_tokens=4)
    assert answer.trace.counts.prompt_tokens == both.trace.counts.prompt_tokens
    assert answer.text == both.text
    answer.picture()
    assert Trace.from_dict(json.loads(answer.trace.to_json())) == answer.trace


def test_tokens_of_a_phrase_are_added_once(tmp_path):
    from bases import save_base

    from vpt.model.building import add_tokens, build_from_base

    save_base(tmp_path / "base")
    model, processor = build_from_base(tmp_path / "base", ["clip"], grounding=True)
    made = Vocabulary.from_tokenizer(processor.tokenizer, model.config.branches)
    assert made.branches == ("crop", "grounding", "reencode")
    model, processor = build_from_base(tmp_path / "base", ["clip"])
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    model, processor = add_tokens(tmp_path / "plain", grounding=True)
    given = Vocabulary.from_tokenizer(processor.tokenizer, model.config.branches)
    assert given.branches == made.branches
    model.save_pretrained(tmp_path / "both")
    processor.save_pretrained(tmp_path / "both")
    with pytest.raises(CheckpointError, match="has the tokens of grounding already"):
        add_tokens(tmp_path / "both", grounding=True)


@pytest.mark.parametrize(("propose", "line"), [(finds(BOX), "looks again"), (finds(), "looks for")])
def test_the_command_line_shows_the_phrase(made, tmp_path, capsys, monkeypatch, propose, line):
    made[0].save_pretrained(tmp_path)
    made[1].save_pretrained(tmp_path)
    load, detector = vpt.load, SimpleNamespace(propose=propose)
    monkeypatch.setattr(
        "vpt.loading.load", lambda *args, **options: load(*args, **options | {"detector": detector})
    )
    words = ["--perception", "grounding", "--max-calls", "1", "--device", "cpu"]
    assert not main(["ask", "--model", str(tmp_path), "examples/tags.jpg", "What?", *words])
    (said,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("[look")]
    assert said.startswith(f"[{line}") and "phrase '" in said
    assert said.endswith("not found]") == (line == "looks for")

"""The grammar makes malformed calls impossible, and sampling is what its settings say."""

from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from drivers import generate_turns
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import byte_tokenizer, tiny_model

from vpt.errors import PromptError
from vpt.inference.request import Sampling
from vpt.inference.sampling import Choice, RuleTable, choose, pack
from vpt.model.building import add_perception_tokens
from vpt.model.generation import NOT_FINITE, PerceptionLogitsProcessor, apply_rule_, likeliest
from vpt.protocol.calls import parse_turn
from vpt.protocol.grammar import PerceptionGrammar, TokenRule, TurnState
from vpt.protocol.tokens import BRANCH_TOKENS, Vocabulary

ALL_BRANCHES = tuple(BRANCH_TOKENS)
OPENERS = ("crop", *ALL_BRANCHES)


def vocabulary_of(branches=ALL_BRANCHES, grid_size=8):
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, branches, grid_size)
    return Vocabulary.from_tokenizer(tokenizer, branches, grid_size)


VOCABULARY = vocabulary_of()
IDS = VOCABULARY.ids
TURN_END = IDS["<|im_end|>"]
START = IDS["<|region_token_start|>"]
END = IDS["<|region_token_end|>"]
X = {IDS[f"<|x_{cell}|>"] for cell in range(8)}
Y = {IDS[f"<|y_{cell}|>"] for cell in range(8)}
NUM_ROWS = 320  # of the head; ids from VOCABULARY.size on have no token


def permitted_ids(rule, num_rows=NUM_ROWS):
    """Ids that survive a rule; that it works on logits is what is tested."""
    logits = apply_rule_(rule, torch.zeros(num_rows))
    return set(logits.isfinite().nonzero().flatten().tolist())


def advance(grammar, tokens, state=None):
    state = state or TurnState()
    for token in tokens:
        state = grammar.advance(state, token if isinstance(token, int) else IDS[token])
    return state


# --- the grammar ----------------------------------------------------------------------------


@given(
    random=st.randoms(use_true_random=False),
    permitted=st.sets(st.sampled_from(OPENERS)).map(lambda s: tuple(sorted(s))),
    max_regions=st.integers(1, 4),
)
def test_whatever_is_permitted_parses_without_malformed_calls(random, permitted, max_regions):
    grammar = PerceptionGrammar(VOCABULARY, max_regions)
    state, ids = TurnState(), []
    openers = {VOCABULARY.opener(branch) for branch in permitted}
    while not ids or ids[-1] != TURN_END:
        choices = permitted_ids(grammar.rule(state, permitted))
        assert choices, f"nothing may follow in {state}"
        likely = sorted(choices & (openers | {END} if len(ids) < 12 else {TURN_END, END}))
        token = random.choice(likely if likely and random.random() < 0.6 else sorted(choices))
        ids.append(token)
        state = grammar.advance(state, token)
    parsed = parse_turn(VOCABULARY.symbols(ids))
    assert parsed.malformed == ()
    assert sum(call.branch == "crop" for call in parsed.calls) <= max_regions
    assert {call.branch for call in parsed.calls} <= set(permitted)
    if parsed.calls:  # a turn that calls ends with its call
        assert parsed.calls[-1].end == len(ids) - 1


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<|region_token_start|>"], X),
        (["<|region_token_start|>", "<|x_2|>"], Y),
        (["<|region_token_start|>", "<|x_2|>", "<|y_1|>"], X | {END}),
        (["<|region_token_start|>", "<|x_2|>", "<|y_1|>", "<|x_5|>"], Y),
        (["<|region_token_start|>", "<|x_2|>", "<|y_1|>", "<|x_5|>", "<|y_4|>"], {END}),
    ],
)
def test_a_region_is_one_or_two_corners(tokens, expected):
    grammar = PerceptionGrammar(VOCABULARY)
    for opened_in in (TurnState(), TurnState("after_region", 1)):
        rule = grammar.rule(advance(grammar, tokens, opened_in), OPENERS)
        assert permitted_ids(rule) == expected


@pytest.mark.parametrize("corners", [1, 2])
def test_behind_a_region_comes_a_further_one_or_the_end_of_the_turn(corners):
    grammar = PerceptionGrammar(VOCABULARY, max_regions=2)
    region = ["<|region_token_start|>", *["<|x_2|>", "<|y_1|>"] * corners, "<|region_token_end|>"]
    once = advance(grammar, region)
    assert permitted_ids(grammar.rule(once, OPENERS)) == {START, TURN_END}
    assert permitted_ids(grammar.rule(once, ALL_BRANCHES)) == {TURN_END}
    assert permitted_ids(grammar.rule(once, ())) == {TURN_END}
    twice = advance(grammar, region, once)
    assert permitted_ids(grammar.rule(twice, OPENERS)) == {TURN_END}


@pytest.mark.parametrize("branch", ALL_BRANCHES)
def test_a_branch_call_is_forced_to_its_end(branch):
    row, grammar, state = BRANCH_TOKENS[branch], PerceptionGrammar(VOCABULARY), TurnState()
    forced = [row.start, row.action, row.end, "<|im_end|>"]
    for token, following in pairwise(forced):
        state = grammar.advance(state, IDS[token])
        for permitted in (OPENERS, ()):  # even if the budget was spent meanwhile
            for must_call in (True, False):
                rule = grammar.rule(state, permitted, must_call)
                assert permitted_ids(rule) == {IDS[following]}


@given(st.sets(st.sampled_from(OPENERS)))
def test_free_text_holds_no_perception_token_but_permitted_openers(permitted):
    rule = PerceptionGrammar(VOCABULARY).rule(TurnState(), sorted(permitted))
    allowed = permitted_ids(rule)
    openers = {VOCABULARY.opener(branch) for branch in permitted}
    controls = set(IDS.values()) - {TURN_END, IDS["<|im_start|>"], IDS["<|endoftext|>"]}
    assert allowed & controls == openers
    assert allowed >= set(range(256)) | {TURN_END}


def test_ids_the_tokenizer_does_not_have_are_never_written():
    allowed = permitted_ids(PerceptionGrammar(VOCABULARY).rule(TurnState(), OPENERS))
    assert max(allowed) < VOCABULARY.size
    assert allowed & {VOCABULARY.size, NUM_ROWS - 1} == set()


def test_a_turn_that_must_call_begins_with_a_call():
    grammar = PerceptionGrammar(VOCABULARY)
    for permitted in (("crop",), ("dino", "sam"), OPENERS):
        rule = grammar.rule(TurnState(), permitted, must_call=True)
        assert permitted_ids(rule) == {VOCABULARY.opener(branch) for branch in permitted}


def test_a_turn_that_must_call_but_may_not_is_free():
    grammar = PerceptionGrammar(VOCABULARY)
    assert grammar.rule(TurnState(), (), must_call=True) == grammar.rule(TurnState(), ())


def test_text_before_a_call_keeps_the_turn_free():
    grammar = PerceptionGrammar(VOCABULARY)
    assert advance(grammar, [72, 105]) == TurnState()
    assert advance(grammar, [72, "<|region_token_start|>"]) == TurnState("x1")


@pytest.mark.parametrize(
    "tokens",
    [
        ["<|x_1|>"],
        ["<|region_token_end|>"],
        ["<|region_token_start|>", "<|y_1|>"],
        ["<|region_token_start|>", "<|region_token_end|>"],
        ["<|region_token_start|>", "<|x_1|>", "<|x_2|>"],
        ["<|region_token_start|>", "<|x_1|>", 72],
        ["<|region_token_start|>", *["<|x_1|>", "<|y_1|>"] * 3],
    ],
)
def test_what_breaks_the_grammar_leads_back_to_free_text(tokens):
    grammar = PerceptionGrammar(VOCABULARY)
    assert advance(grammar, tokens) == TurnState()


def test_a_model_without_region_tokens_has_a_grammar_too():
    tokenizer = byte_tokenizer()
    row = BRANCH_TOKENS["dino"]
    tokenizer.add_tokens([row.pad, row.start, row.action, row.end])
    vocabulary = Vocabulary.from_tokenizer(tokenizer, ["dino"])
    grammar = PerceptionGrammar(vocabulary)
    allowed = permitted_ids(grammar.rule(TurnState(), ("dino",)))
    assert vocabulary.ids[row.start] in allowed
    assert vocabulary.ids[row.action] not in allowed


@pytest.mark.parametrize("grid_size", [1, 3, 12])
def test_coordinates_are_those_of_the_grid(grid_size):
    vocabulary = vocabulary_of(("reencode",), grid_size)
    grammar = PerceptionGrammar(vocabulary)
    state = grammar.advance(TurnState(), vocabulary.opener("crop"))
    allowed = vocabulary.symbols(sorted(permitted_ids(grammar.rule(state, ("crop",)))))
    assert allowed == [f"<|x_{cell}|>" for cell in range(grid_size)]


@pytest.mark.parametrize(("branches", "grid_size"), [(("reencode",), 8), (ALL_BRANCHES, 4)])
def test_perception_tokens_of_the_tokenizer_that_the_model_does_not_use_are_banned(
    branches, grid_size
):
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, ALL_BRANCHES, 8)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, branches, grid_size)
    rule = PerceptionGrammar(vocabulary).rule(TurnState(), vocabulary.branches)
    allowed = set(tokenizer.convert_ids_to_tokens(sorted(permitted_ids(rule, len(tokenizer)))))
    assert "<|seg_action|>" not in allowed
    assert "<|x_7|>" not in allowed
    assert branches == ALL_BRANCHES or BRANCH_TOKENS["sam"].start not in allowed


def test_coordinates_are_banned_if_the_region_tokens_are_incomplete():
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, (), 8)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, (), grid_size=9)
    assert vocabulary.branches == ()
    allowed = permitted_ids(PerceptionGrammar(vocabulary).rule(TurnState(), ()))
    assert tokenizer.convert_tokens_to_ids("<|x_0|>") not in allowed


# --- rules on logits ------------------------------------------------------------------------


def test_a_rule_works_in_place_and_returns_its_logits():
    logits = torch.arange(6.0)
    assert apply_rule_(TokenRule(banned=(1, 3)), logits) is logits
    assert logits.isinf().tolist() == [False, True, False, True, False, False]
    assert apply_rule_(TokenRule(only=(2, 4)), logits) is logits
    assert logits.tolist() == [-torch.inf, -torch.inf, 2, -torch.inf, 4, -torch.inf]


def test_only_beats_banned():
    logits = apply_rule_(TokenRule(only=(1,), banned=(1,), vocabulary_end=0), torch.zeros(3))
    assert logits.isfinite().tolist() == [False, True, False]


def test_a_rule_without_limits_changes_nothing():
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_rule_(TokenRule(), logits.clone()), logits)


def test_the_end_of_the_vocabulary_is_banned():
    logits = apply_rule_(TokenRule(banned=(0,), vocabulary_end=3), torch.ones(5))
    assert logits.tolist() == [-torch.inf, 1, 1, -torch.inf, -torch.inf]


# --- transformers' own generate -------------------------------------------------------------


@pytest.mark.parametrize("permitted", [None, ("crop",), ("reencode", "sam"), ()])
def test_generate_of_transformers_writes_only_well_formed_turns(permitted):
    model, processor = tiny_model()
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, model.config.branches)
    everything = [i for t, i in vocabulary.ids.items() if "region" in t or "action" in t]
    everything += [i for t, i in vocabulary.ids.items() if t.startswith(("<|x_", "<|y_"))]
    grammar = PerceptionGrammar(vocabulary, max_regions=2)
    branches = []
    turns = generate_turns(model, processor, grammar, permitted, everything, num_rows=12)
    for generated in turns:
        parsed = parse_turn(vocabulary.symbols(generated))
        # A call that the length limit cut off is the last thing in its row.
        assert all(m.end == len(generated) for m in parsed.malformed)
        assert all(m.reason == "region is not closed" for m in parsed.malformed)
        assert sum(call.branch == "crop" for call in parsed.calls) <= 2
        branches += [call.branch for call in parsed.calls]
    assert set(branches) == set(vocabulary.branches if permitted is None else permitted)


def test_the_logits_processor_begins_behind_the_prompt_and_minds_each_row():
    grammar = PerceptionGrammar(VOCABULARY)
    opener = IDS[BRANCH_TOKENS["sam"].start]
    ids = torch.tensor([[opener, 72, START], [START, 72, opener], [START, START, 72]])
    scores = torch.zeros(3, NUM_ROWS)
    out = PerceptionLogitsProcessor(grammar, prompt_length=2)(ids, scores)
    allowed = [set(row.isfinite().nonzero().flatten().tolist()) for row in out]
    assert allowed[0] == X
    assert allowed[1] == {IDS[BRANCH_TOKENS["sam"].action]}
    assert allowed[2] == permitted_ids(grammar.rule(TurnState(), OPENERS))
    assert not scores.any()  # those of the caller


# --- sampling -------------------------------------------------------------------------------


def logits_of(seed, size=50):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def draw(sampling, logits, num):
    return chosen(logits.expand(num, -1), [Choice(None, sampling, i) for i in range(num)])


def chosen(logits, choices):
    table = RuleTable(logits.shape[-1], logits.device)
    return choose(logits, pack(choices, table), table).tolist()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        *(({"temperature": t}, "finite number of at least 0") for t in (-0.1, NAN, INF, "1", None)),
        *(({"temperature": t}, "finite number of at least 0") for t in (True, (1,), 10**400)),
        *(
            ({"top_p": p}, "finite number above 0 and at most 1")
            for p in (0.0, 1.1, NAN, "1", None)
        ),
        *(({"top_k": k}, "whole number of at least 0") for k in (-1, 1.0, "3", None, True, (2,))),
        *(
            ({"seed": s}, f"at least 0 and at most {2**64 - 1}")
            for s in (2**64, -1, 0.0, "0", None)
        ),
    ],
)
def test_impossible_settings_are_an_error_by_name(wrong, words):
    (name,) = wrong
    with pytest.raises(PromptError, match=f"^{name} must be a .*{words}"):
        Sampling(**wrong)


def test_numbers_of_numpy_are_settings_like_others():
    given = Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.uint64(2**64 - 1))
    assert given == Sampling(0.5, 3, 0.5, 2**64 - 1)
    assert [type(value) for value in astuple(given)] == [float, int, float, int]


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-30, 1e-9])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = apply_rule_(TokenRule(banned=(0,)), torch.tensor([9.0, 1.0, 3.0, -4.0]))
    assert set(draw(Sampling(temperature, top_p=1e-300, top_k=10**30), logits, 20)) == {2}


def test_an_extreme_temperature_draws_evenly_from_what_is_permitted():
    logits = apply_rule_(TokenRule(banned=(0,)), torch.tensor([9.0, 1.0, 3.0, -4.0]))
    assert set(draw(Sampling(1e300), logits, 200)) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("odd", [NAN, INF])
def test_logits_that_are_not_finite_choose_nothing(temperature, odd):
    logits = torch.tensor([1.0, odd, 3.0])
    assert draw(Sampling(temperature), logits, 1) == [NOT_FINITE]
    assert draw(Sampling(temperature), torch.full((3,), -INF), 1) == [NOT_FINITE]
    ruled = apply_rule_(TokenRule(only=(0, 2)), logits)
    assert draw(Sampling(temperature, top_k=1), ruled, 1) == [2]


def test_the_likeliest_of_many_rows_are_found_at_once():
    rows = torch.tensor([[1.0, 5.0, 5.0], [NAN, 1.0, 2.0], [0.0, -INF, 2.0]])
    assert likeliest(rows).tolist() == [1, NOT_FINITE, 2]


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_temperature_zero_takes_the_likeliest(seed):
    logits = logits_of(seed)
    assert draw(Sampling(), logits, 2) == [int(logits.argmax())] * 2


@given(seed=st.integers(0, 2**32), temperature=st.floats(0.05, 5))
@settings(max_examples=30)
def test_one_candidate_is_the_likeliest(seed, temperature):
    logits = logits_of(seed)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}):
        sampling = Sampling(temperature=temperature, seed=seed, **narrow)
        assert set(draw(sampling, logits, 5)) == {int(logits.argmax())}


def test_the_same_seed_draws_the_same_tokens():
    logits = logits_of(0)
    first, again, other = (draw(Sampling(1.0, seed=seed), logits, 20) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw(Sampling(1.0, seed=1), logits_of(0), 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_by_their_probability(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = draw(Sampling(temperature), logits, 3000)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 3000
    torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.04, rtol=0)


def test_top_k_keeps_so_many_of_the_likeliest():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert set(draw(Sampling(5.0, top_k=2), logits, 200)) == {1, 3}
    assert set(draw(Sampling(5.0, top_k=99), logits, 400)) == {0, 1, 2, 3}


def test_top_p_keeps_the_likeliest_that_hold_the_mass():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    assert set(draw(Sampling(1.0, top_p=0.45), logits, 200)) == {1}
    assert set(draw(Sampling(1.0, top_p=0.7), logits, 200)) == {1, 2}
    assert set(draw(Sampling(1.0, top_p=1.0), logits, 400)) == {0, 1, 2, 3}


def test_top_k_and_top_p_hold_together():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    assert set(draw(Sampling(1.0, top_k=3, top_p=0.7), logits, 200)) == {1, 2}
    assert set(draw(Sampling(1.0, top_k=1, top_p=0.99), logits, 200)) == {1}


def test_kept_tokens_keep_their_proportions():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    drawn = draw(Sampling(1.0, top_k=2), logits, 3000)
    assert drawn.count(1) / 3000 == pytest.approx(2 / 3, abs=0.04)


def test_what_a_rule_bans_is_never_drawn():
    logits = apply_rule_(TokenRule(banned=(0, 1, 2)), torch.tensor([9.0, 9.0, 9.0, -9.0, -9.5]))
    assert set(draw(Sampling(2.0), logits, 200)) == {3, 4}
    logits = apply_rule_(TokenRule(only=(4,)), logits)
    assert set(draw(Sampling(2.0, top_p=0.5), logits, 20)) == {4}


def test_low_precision_logits_are_drawn_like_float32_ones():
    logits = logits_of(5).bfloat16()
    assert draw(Sampling(1.0), logits, 20) == draw(Sampling(1.0), logits.float(), 20)


def test_a_token_depends_on_its_seed_and_index_but_not_on_its_batch():
    logits = torch.stack([logits_of(seed) for seed in range(12)])
    sampling = [Sampling(0.3 * (i % 4), top_k=i % 3 * 5, seed=i // 2) for i in range(12)]
    choices = [Choice(None, one, index) for index, one in enumerate(sampling)]
    together = chosen(logits, choices)
    assert together == [chosen(logits[i : i + 1], [choices[i]])[0] for i in range(12)]
    assert together[::-1] == chosen(logits.flip(0), choices[::-1])


def test_rules_are_rows_of_one_table_that_is_filled_again_when_full():
    table = RuleTable(6, torch.device("cpu"), num_rows=4)
    logits = torch.arange(6.0).expand(3, -1)
    for first in (1, 2, 3):
        rules = [TokenRule(only=(0, first)), TokenRule(only=(4,)), TokenRule(banned=(5, first))]
        packed = pack([Choice(rule) for rule in rules], table)
        assert choose(logits, packed, table).tolist() == [first, 4, 4]
    assert len(table.banned) == 4


@pytest.mark.parametrize("odd", [NAN, INF])
def test_a_forced_token_needs_a_finite_logit_of_its_own(odd):
    logits = torch.tensor([[1.0, odd, 3.0]])
    assert chosen(logits, [Choice(TokenRule(only=(0,)))]) == [0]
    assert chosen(logits, [Choice(TokenRule(only=(1,)))]) == [NOT_FINITE]

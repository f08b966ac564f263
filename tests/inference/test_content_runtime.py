"""Models that write depth maps and boxes: made, saved, asked alone and together."""

import json
import random
import shutil

import pytest
import torch
from bases import save_base
from drawing import CONTENT, SHAPE, eager_model, noise
from drivers import Script, generate_turns
from tiny_model import tiny_model

import vpt
from vpt.demo.runs import watch_live
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig
from vpt.errors import CheckpointError
from vpt.inference.events import TokenEvent
from vpt.model.building import add_tokens, build_from_base
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.protocol.calls import parse_turn
from vpt.protocol.grammar import PerceptionGrammar
from vpt.protocol.tokens import NO_CONTENT, TURN_END, ContentTokens, Vocabulary
from vpt.trace.content import parse_content
from vpt.trace.records import Trace

RELEASED = ContentTokens(("depth", "boxes"))


@pytest.fixture(scope="module")
def depth_tokenizer():
    return DepthTokenizer(SHAPE.build(3), SHAPE)


@pytest.fixture(scope="module")
def made():
    return eager_model()


@pytest.fixture(scope="module")
def runtime(made, depth_tokenizer):
    return vpt.Runtime(*made, name="eager", depth_tokenizer=depth_tokenizer)


def requests(**more):
    return [
        {"images": noise(seed), "question": question, "max_new_tokens": 60, **options, **more}
        for seed, question, options in [
            (0, "What?", {}),
            (1, "Which is nearer?", {"perception": "none"}),
            (2, "How many?", {"perception": "region"}),
            (3, "What?", {"perception": "clip", "max_calls": 1}),
            (4, "Is it?", {"temperature": 1.0, "seed": 7}),
        ]
    ]


# --- asking -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(runtime):
    return [runtime.ask_many([request], batch_size=1)[0] for request in requests()]


def test_the_model_writes_maps_and_boxes_by_itself(answers):
    kinds = {one.kind for answer in answers for one in answer.trace.content}
    assert kinds == {"depth", "boxes"}
    for answer in answers:
        assert not answer.trace.malformed
        for one in answer.trace.content:
            assert not one.is_whole or one.kind == "boxes" or len(one.codes) == 4
    assert not answers[1].trace.content  # perception: none
    assert not any("DEPTH" in token.text for token in answers[1].trace.tokens)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batched_streams_write_the_same_content(runtime, answers, batch_size):
    together = runtime.ask_many(requests(), batch_size=batch_size)
    for one, alone in zip(together, answers, strict=True):
        assert [t.id for t in one.trace.tokens] == [t.id for t in alone.trace.tokens]
        for got, expected in zip(one.trace.content, alone.trace.content, strict=True):
            assert (got.codes, got.boxes, got.start, got.picture) == (
                *(expected.codes, expected.boxes, expected.start, expected.picture),
            )


def test_whole_maps_are_decoded_and_cut_ones_are_not(runtime, answers):
    maps = [one for a in answers for one in a.trace.content if one.kind == "depth"]
    assert any(one.is_whole for one in maps)
    assert all((one.picture is not None) == one.is_whole for one in maps)
    index, first = next(
        (i, one)
        for i, a in enumerate(answers)
        for one in a.trace.content
        if one.kind == "depth" and one.is_whole
    )
    request = requests(max_new_tokens=first.start + 3)[index]
    cut = runtime.ask_many([request])[0].trace
    assert cut.stop_reason == "length" and not cut.content[-1].is_whole
    assert cut.content[-1].picture is None and cut.content[-1].codes == first.codes[:2]


def test_without_a_depth_tokenizer_codes_are_kept(made, answers):
    trace = vpt.Runtime(*made).ask_many([requests()[0]])[0].trace
    assert [one.codes for one in trace.content] == [one.codes for one in answers[0].trace.content]
    assert all(one.picture is None for one in trace.content)


def test_a_growing_trace_has_the_content_of_the_whole_one(runtime):
    request = runtime.request(noise(0), "What?", max_new_tokens=40)
    snapshots = list(watch_live(runtime.watch_many([request])))
    assert (
        snapshots[-1].trace.content and snapshots[-2].trace.content == snapshots[-1].trace.content
    )
    assert Trace.from_dict(json.loads(snapshots[-1].trace.to_json())) == snapshots[-1].trace


def test_a_depth_tokenizer_of_another_shape_is_refused(made):
    other = DepthTokenizerConfig()
    with pytest.raises(CheckpointError, match="makes 100 codes of 128; the model writes 4 of 8"):
        vpt.Runtime(*made, depth_tokenizer=DepthTokenizer(other.build(), other))


def test_a_depth_tokenizer_for_a_model_that_writes_no_maps_is_refused(depth_tokenizer):
    with pytest.raises(CheckpointError, match="this model writes no depth maps"):
        vpt.Runtime(*tiny_model(()), depth_tokenizer=depth_tokenizer)


# --- transformers' own generate ---------------------------------------------------------------


@pytest.mark.parametrize("permitted", [None, ("depth",), ("boxes", "crop"), ()])
def test_generate_of_transformers_writes_only_whole_content(permitted):
    model, processor = tiny_model(("clip",), content=CONTENT)
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, ("reencode",), 8, CONTENT)
    wanted = [i for t, i in vocabulary.ids.items() if t.startswith(("<DEPTH", "<PIXEL", "<|reg"))]
    grammar = PerceptionGrammar(vocabulary)
    kinds = set()
    for generated in generate_turns(model, processor, grammar, permitted, wanted, num_rows=8):
        written = parse_content(vocabulary.symbols(generated), CONTENT)
        assert not written.malformed
        assert all(span.is_whole or span.end == len(generated) for span in written.spans)
        calls = parse_turn(vocabulary.symbols(generated)).calls
        kinds |= {span.kind for span in written.spans} | {call.branch for call in calls}
    everything = {"depth", "boxes", "crop", "reencode"}
    assert kinds <= set(everything if permitted is None else permitted)
    assert bool(kinds) == (permitted != ())


# --- folders ----------------------------------------------------------------------------------


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain(base):
    """A VPT model without content."""
    return build_from_base(base, ["clip"], seed=4)


def test_a_model_is_loaded_with_its_content_and_its_depth_tokenizer(
    tmp_path, made, depth_tokenizer, answers
):
    folder = save(tmp_path, *made)
    assert vpt.load(folder, device="cpu").depth_tokenizer is None
    depth_tokenizer.save(tmp_path / "depth_tokenizer")
    loaded = vpt.load(folder, device="cpu")
    assert loaded.vocabulary.content == CONTENT
    trace = loaded.ask_many([requests()[0]])[0].trace
    assert [t.id for t in trace.tokens] == [t.id for t in answers[0].trace.tokens]
    assert [one.picture for one in trace.content] == [
        one.picture for one in answers[0].trace.content
    ]
    shutil.move(tmp_path / "depth_tokenizer", tmp_path / "elsewhere")
    moved = vpt.load(folder, device="cpu", depth_tokenizer=tmp_path / "elsewhere")
    assert moved.depth_tokenizer is not None
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["depth_tokenizer"] = "elsewhere"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert vpt.load(folder, device="cpu").depth_tokenizer is not None


def test_a_model_is_saved_with_the_depth_tokenizer_it_came_with(tmp_path, made, depth_tokenizer):
    folder = save(tmp_path / "first", *made)
    depth_tokenizer.save(tmp_path / "first" / "depth_tokenizer")
    model = VPTForConditionalGeneration.from_pretrained(folder)
    second = tmp_path / "second"
    model.save_pretrained(second)
    made[1].save_pretrained(second)
    assert vpt.load(second, device="cpu").depth_tokenizer is not None
    model.save_pretrained(second)  # what lies there stays
    model.config.depth_tokenizer = "../first/depth_tokenizer"
    model.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / "depth_tokenizer").exists()


def test_a_broken_depth_tokenizer_is_told(tmp_path, made, depth_tokenizer):
    folder = save(tmp_path, *made)
    depth_tokenizer.save(tmp_path / "depth_tokenizer")
    (tmp_path / "depth_tokenizer" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"cannot read the weights .*depth_tokenizer"):
        vpt.load(folder, device="cpu")


def test_a_model_of_before_content_loads_as_it_was(tmp_path, plain):
    folder = save(tmp_path, *plain)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in list(settings):
        if name.startswith(("depth_", "box_", "perception_content")):
            del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = vpt.load(folder, device="cpu")
    assert loaded.vocabulary.content == NO_CONTENT
    assert not [token for token in loaded.vocabulary.ids if "DEPTH" in token or "PIXEL" in token]


@pytest.mark.parametrize("kinds", [("depth",), ("boxes",), ("depth", "boxes")])
def test_a_base_gets_the_content_that_is_asked_for(base, plain, kinds):
    model, processor = build_from_base(base, ["clip"], seed=4, content=ContentTokens(kinds))
    known = processor.tokenizer.get_vocab()
    tokens = ContentTokens(kinds).tokens
    assert known.keys() - plain[1].tokenizer.get_vocab().keys() == set(tokens)
    assert model.config.content_tokens == ContentTokens(kinds)
    assert model.get_input_embeddings().num_embeddings >= len(processor.tokenizer)
    Vocabulary.from_tokenizer(processor.tokenizer, ("reencode",), 8, ContentTokens(kinds))


@pytest.mark.parametrize("tied", [False, True])
def test_a_vpt_model_gets_content_and_keeps_all_else(tmp_path, tied):
    model, processor = tiny_model(("clip",), tie_word_embeddings=tied)
    folder = save(tmp_path, model, processor)
    given, its_processor = add_tokens(folder, RELEASED, seed=5)
    num_old, before, after = len(processor.tokenizer), model.state_dict(), given.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        is_table = "embed_tokens" in name or "lm_head" in name
        kept = num_old if is_table else len(value)
        assert torch.equal(after[name][:kept], value[:kept]), name
    new = its_processor.tokenizer.convert_tokens_to_ids(RELEASED.tokens)
    assert min(new) == num_old and len(its_processor.tokenizer) == num_old + len(new)
    for table in (given.get_input_embeddings().weight, given.lm_head.weight):
        old, drawn = table[:num_old].detach(), table[new].detach()
        assert len(drawn.unique(dim=0)) == len(drawn)
        torch.testing.assert_close(drawn.mean(0), old.mean(0), atol=0.2, rtol=0)
        assert float(drawn.std()) == pytest.approx(float(old.std()), rel=0.2)
    again, _ = add_tokens(folder, RELEASED, seed=5)
    assert torch.equal(again.lm_head.weight, given.lm_head.weight)
    save(tmp_path / "more", given, its_processor)
    loaded = vpt.load(str(tmp_path / "more"), device="cpu")
    assert loaded.vocabulary.content == RELEASED
    answer = loaded.ask(noise(0), "What?", perception="none", max_new_tokens=6)
    old_answer = vpt.load(folder, device="cpu").ask(
        noise(0), "What?", perception="none", max_new_tokens=6
    )
    assert [t.id for t in answer.trace.tokens] == [t.id for t in old_answer.trace.tokens]


def test_kinds_are_added_one_after_the_other(tmp_path):
    small = ContentTokens(("depth",), num_codes=8, num_cells=4)
    folder = save(tmp_path, *tiny_model((), content=small))
    model, processor = add_tokens(folder, ContentTokens(("boxes",)))
    assert model.config.content_tokens == ContentTokens(("depth", "boxes"), 8, 4)
    save(tmp_path / "both", model, processor)
    with pytest.raises(CheckpointError, match="has the tokens of depth already"):
        add_tokens(str(tmp_path / "both"), ContentTokens(("depth",)))


def test_content_for_a_plain_model_needs_branches(base):
    with pytest.raises(CheckpointError, match="is a plain qwen2_vl; name branches, or an empty"):
        add_tokens(base, RELEASED)


def test_the_config_refuses_what_cannot_be():
    model, _ = tiny_model(())
    settings = model.config.to_dict()
    with pytest.raises(CheckpointError, match="unknown perception content 'maps'"):
        type(model.config).from_dict({**settings, "perception_content": ["maps"]})


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("{box}, {box}. The answer is 2.", "The answer is 2."),
        ("The left one {box}, and another.", "The left one , and another."),
        ("The stars{box}, {box}, {box}. The answer is 3.", "The stars. The answer is 3."),
        ("{box}, {box}.", ""),
        ("A{box}, B{box}; C{box}", "A, B; C"),
        (", no boxes", ", no boxes"),
        ("many and are rings, {box}", "many and are rings"),
        ("{box} many, rings,", "many, rings,"),
        ("all,, many, {box}.", "all,, many."),
    ],
)
def test_a_list_of_boxes_leaves_no_commas_in_answer_and_stream(boxes_model, written, answer):
    answered, streamed = answer_and_stream(boxes_model, written)
    assert answered == streamed == answer


@pytest.mark.parametrize("seed", range(40))
def test_the_answer_is_what_streams(boxes_model, seed):
    draw = random.Random(seed)
    pieces = ["a", "a", " b", ",", " ", ";", ".", "\n", "{box}", "{box}"]
    limit = draw.choice([40, draw.randint(1, 20)])  # whole, or cut off
    written = "".join(draw.choices(pieces, k=9))
    answered, streamed = answer_and_stream(boxes_model, written, max_new_tokens=limit)
    assert answered == streamed


@pytest.fixture(scope="module")
def boxes_model():
    content = ContentTokens(("boxes",), num_pixels=12)
    return vpt.Runtime(*tiny_model(("clip",), content=content))


def answer_and_stream(runtime, written, **options):
    text = written.format(box="<PIXEL_1><PIXEL_2><PIXEL_3><PIXEL_4>") + TURN_END
    script = Script(runtime.processor, runtime.vocabulary, text, **options)
    streamed = "".join(event.text for event in script.of_type(TokenEvent))
    return script.trace.answer, streamed.strip()

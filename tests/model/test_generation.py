"""transformers' own generate gives the released tokens, batches and all."""

import golden_data as golden
import pytest
import torch
from golden_data import GOLDENS, VARIANTS
from tiny_model import tiny_model

from vpt.errors import NonFiniteError, PositionError
from vpt.model.generation import CACHE
from vpt.model.modeling import load_model
from vpt.protocol.tokens import BRANCH_TOKENS

BRANCH = {"clip": "reencode", "dino": "dino", "sam": "sam"}
CASES = [(v, "generate", n) for v, n in golden.case_names("generate")]
CASES.append(("clip", "region", "r2_region"))


@pytest.fixture(scope="module")
def models():
    return {v: load_model(str(GOLDENS / "checkpoints" / v), device="cpu") for v in VARIANTS}


@pytest.mark.parametrize(("variant", "group", "name"), CASES)
def test_generate_gives_the_released_tokens(models, variant, group, name):
    expected = golden.outputs(variant, group, name)
    case, kwargs = golden.cases(variant, group)[name], golden.inputs(variant, group, name)
    options = {k: v for k, v in case["generate_kwargs"].items() if k != "eos_token_id"}
    ends = case["generate_kwargs"]["eos_token_id"]
    options["pad_token_id"] = options["pad_token_id"] or 470
    got = models[variant].generate(
        **kwargs,
        **options,
        eos_token_id=ends,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert got.sequences.tolist() == expected["sequences"].tolist()
    if "step_logits" in expected:
        torch.testing.assert_close(
            torch.stack(got.logits), expected["step_logits"], atol=1e-4, rtol=0
        )


def test_the_same_model_generates_again_without_memory_of_the_last_time(models):
    model = models["dino"]
    runs = []
    for name in ("r1_forced_start", "r2_action", "r1_forced_start"):
        kwargs = golden.inputs("dino", "generate", name)
        out = model.generate(**kwargs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        runs.append(out.tolist())
    assert runs[0] == runs[2]


def test_without_a_cache_the_tokens_are_the_same(models):
    kwargs = golden.inputs("sam", "generate", "r2_action")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = models["sam"].generate(**kwargs, **options)
    assert torch.equal(cached, models["sam"].generate(**kwargs, **options, use_cache=False))


def test_what_generate_cannot_do_is_refused():
    model, processor = tiny_model()
    ids = torch.tensor([processor.encode_text("hello " + BRANCH_TOKENS["sam"].start).ids])
    with pytest.raises(PositionError, match="beam search is not supported"):
        model.generate(ids, num_beams=2, max_new_tokens=3)
    with pytest.raises(PositionError, match="not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 64))
    cache = _empty_cache(model)
    model(input_ids=ids, past_key_values=cache)
    with pytest.raises(PositionError, match="continued by one token with its position"):
        model(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_finite_end_generate(do_sample):
    model, processor = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    ids = torch.tensor([processor.encode_text("hello").ids])
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        model.generate(ids, max_new_tokens=3, do_sample=do_sample)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_read_and_returned_under_its_old_and_its_new_name(name):
    model, processor = tiny_model()
    ids = torch.tensor([processor.encode_text("hello").ids])
    whole = model(input_ids=ids).logits
    out = model(input_ids=ids[:, :-1], **{name: _empty_cache(model)})
    assert out[CACHE].get_seq_length() == ids.shape[1] - 1
    position_ids = torch.full((3, 1, 1), ids.shape[1] - 1)
    step = model(input_ids=ids[:, -1:], position_ids=position_ids, **{name: out[CACHE]})
    torch.testing.assert_close(step.logits[:, -1], whole[:, -1])


def test_an_input_that_is_not_read_is_refused():
    model, processor = tiny_model()
    ids = torch.tensor([processor.encode_text("hello").ids])
    for name, value in (("kv_cache", _empty_cache(model)), ("pixel_values_videos", ids)):
        with pytest.raises(PositionError, match=f"does not read the input '{name}'"):
            model(input_ids=ids, **{name: value})


def test_rows_padded_on_the_left_generate_as_alone_and_on_the_right_are_refused():
    model, processor = tiny_model(())
    texts = ["What?", "What is this thing?"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokenizer = processor.tokenizer
    alone = [model.generate(**tokenizer(t, return_tensors="pt"), **options)[0, -4:] for t in texts]
    tokenizer.padding_side = "left"
    left = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(model.generate(**left, **options)[:, -4:], torch.stack(alone))
    tokenizer.padding_side = "right"
    right = tokenizer(texts, padding=True, return_tensors="pt")
    with pytest.raises(PositionError, match=r"row 0 is padded on the right, .*; pad on the left"):
        model.generate(**right, **options)
    pad = {"pad_token_id": tokenizer.pad_token_id}  # by which transformers finds the padding
    with pytest.raises(PositionError, match="row 0 is padded on the right"):
        model.generate(right["input_ids"], **options, **pad)


def _empty_cache(model):
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config.text_config)

"""The training forward reproduces every recorded value of the released implementation."""

import re

import golden_data as golden
import pytest
import torch
from golden_data import GOLDENS, VARIANTS

from vpt.model.hub import key_mapping
from vpt.model.modeling import load_model

BRANCH = {"clip": "reencode", "dino": "dino", "sam": "sam"}
GROUPS = ("forward", "forward_batch", "forward_masked", "forward_alignment")
CASES = [(v, group, n) for group in GROUPS for v, n in golden.case_names(group)]


@pytest.fixture(scope="module")
def models():
    return {v: load_model(str(GOLDENS / "checkpoints" / v), device="cpu") for v in VARIANTS}


def run(model, variant, group, name):
    """Forward as recorded; also what the projector was given and made of it."""
    case, kwargs = golden.cases(variant, group)[name], golden.inputs(variant, group, name)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = golden.plain_positions(kwargs["input_ids"])
    for key, value in case.get("config", {}).items():
        setattr(model.config, key, value)
    seen = {"conditions": [], "projected": []}

    def record(module, args, output):
        seen["conditions"].append(args[1])
        seen["projected"].append(output.values)

    handle = model.projectors[BRANCH[variant]].register_forward_hook(record)
    model.train(case.get("config", {}).get("para_mask_id", 0) != 0)
    try:
        return model(**kwargs), seen
    finally:
        handle.remove()
        model.eval()


@pytest.mark.parametrize(("variant", "group", "name"), CASES)
def test_forward_equals_the_released_one(models, variant, group, name):
    expected = golden.outputs(variant, group, name)
    with torch.no_grad():
        got, seen = run(models[variant], variant, group, name)
    if "logits" in expected:
        torch.testing.assert_close(got.logits, expected["logits"], atol=1e-4, rtol=0)
    if "logits_sel" in expected:
        rows, columns = expected["logits_at"].T
        torch.testing.assert_close(
            got.logits[rows, columns], expected["logits_sel"], atol=1e-4, rtol=0
        )
    mask = golden.inputs(variant, group, name)["attention_mask"].bool()
    torch.testing.assert_close(
        got.logits.logsumexp(-1)[mask], expected["logits_logsumexp"][mask], atol=1e-4, rtol=0
    )
    if "loss" in expected:
        torch.testing.assert_close(got.loss.reshape(1), expected["loss"], atol=2e-5, rtol=0)
    if "condition" in expected and seen["conditions"]:
        torch.testing.assert_close(
            torch.stack(seen["conditions"]), expected["condition"], atol=5e-5, rtol=0
        )
    if "projector_out_final" in expected:
        entry = golden.cases(variant, group)[name]["outputs"]["projector_out_final"]
        values = torch.cat(seen["projected"])[:: entry["row_stride"]]
        largest = expected["projector_out_final"].abs().max()
        assert (values - expected["projector_out_final"]).abs().max() <= 5e-5 * largest


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_the_released_ones(variant):
    model = load_model(str(GOLDENS / "checkpoints" / variant), device="cpu")
    for name, parameter in model.named_parameters():
        # The released forward encodes images and looks tokens up without gradient.
        parameter.requires_grad_(not name.startswith(("model.visual", "branches")))
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.detach())
    got, _ = run(model, variant, "gradients", "action_pos1d")
    got.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    case = golden.cases(variant, "gradients")["action_pos1d"]
    for released_name, norm in case["grad_norms"].items():
        gradient = gradients.get(our_name(released_name))
        if norm is None:
            assert gradient is None or not gradient.any(), released_name
        else:
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4), released_name
    for key, expected in golden.outputs(variant, "gradients", "action_pos1d").items():
        released_name, _, rows = key.rstrip("]").partition("[")  # "[::4]" and "[:4]" take rows
        gradient = gradients[our_name(released_name)]
        if rows:
            gradient = gradient[slice(*(int(n) if n else None for n in rows.split(":")))]
        error = (gradient - expected).norm() / expected.norm()
        assert error < 1e-4, key


def our_name(released_name):
    for pattern, replacement in key_mapping(()).items():
        released_name = re.sub(pattern, replacement, released_name)
    return released_name


def test_input_embeddings_get_gradient(models):
    model = models["clip"]
    got, _ = run(model, "clip", "forward", "action_mrope")
    with_inputs = torch.autograd.grad(got.loss, model.get_input_embeddings().weight)[0]
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.detach())
    got, _ = run(model, "clip", "forward", "action_mrope")
    without = torch.autograd.grad(got.loss, model.get_input_embeddings().weight)[0]
    handle.remove()
    assert not torch.allclose(with_inputs, without)

"""Processes in lockstep: blank work changes nothing, and all of them run the same modules."""

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from streams import Row, batch, call, mixed_rows, picture
from tiny_model import tiny_model
from two_processes import run_in_two

from vpt.model import modeling
from vpt.model.lockstep import Work

ROOT = Path(__file__).parents[2]
UNUSED = "branches.dino.encoder.embeddings.mask_token"  # by any forward
COMMON = Work(5, {"image": 2, "reencode": 2, "dino": 3, "sam": 2})


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def made(request):
    return tiny_model(backbone=request.param, max_tokens=16)


@pytest.fixture
def in_lockstep(monkeypatch):
    """Make a process find others that need ``COMMON``; returns what it needs itself."""
    needed = []

    def agree(own, device):
        needed.append(own)
        return COMMON

    monkeypatch.setattr(modeling, "is_in_lockstep", lambda model: True)
    monkeypatch.setattr(modeling, "agree", agree)
    return needed


def batches(made):
    text, *_ = mixed_rows(made)
    image = picture(0)
    yield {"image": 0, "reencode": 0, "dino": 0, "sam": 0}, 0, batch(text, labels=True)
    one = Row(made, "see ", image, *call("dino", image), " blue")
    yield {"image": 1, "reencode": 0, "dino": 1, "sam": 0}, 1, batch(text, one, labels=True)
    two = Row(made, *call("sam", image), "x", *call("reencode", image), "y")
    yield {"image": 1, "reencode": 1, "dino": 1, "sam": 1}, 2, batch(one, two, labels=True)


def learn(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), {name: grad.clone() for name, grad in found.items() if grad is not None}


def modules_run(model, inputs):
    """Names of the modules with parameters of their own, in the order in which they run."""
    names, handles = [], []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            record = lambda module, args, name=name: names.append(name)  # noqa: E731
            handles.append(module.register_forward_pre_hook(record))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return names


def test_blank_work_changes_neither_loss_nor_gradients(made, in_lockstep, monkeypatch):
    model, _ = made
    for num_images, num_rounds, inputs in batches(made):
        with_blanks, gradients = learn(model.train(), inputs)
        assert in_lockstep.pop() == Work(num_rounds, num_images)
        with monkeypatch.context() as patch:
            patch.setattr(modeling, "is_in_lockstep", lambda model: False)
            alone, own = learn(model, inputs)
        assert with_blanks == pytest.approx(alone, rel=1e-6)
        for name, gradient in gradients.items():
            expected = own.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert dict(model.named_parameters()).keys() - gradients.keys() == {UNUSED}


def test_all_batches_run_the_same_modules_in_the_same_order(made, in_lockstep):
    model, _ = made
    runs = [modules_run(model, inputs) for _, _, inputs in batches(made)]
    assert runs[0] == runs[1] == runs[2]
    layer = "model.language_model.layers.1.mlp.down_proj"
    assert runs[0].count(layer) == COMMON.num_rounds + 1


# --- two processes ------------------------------------------------------------------------------

STEPS = ((1, 0), (2, 1), (0, 0), (0, 2))  # batch of each process
CASES = (  # backbone, whether activations are computed again, what is frozen
    ("qwen2_vl", False, ()),
    ("qwen2_vl", True, ("visual", "branches")),
    ("qwen3_vl", True, ("visual", "branches", "embed_tokens")),
)


def prepare(backbone, checkpointed, frozen):
    """A model, and batches that call for different parts of it."""
    made = model, _ = tiny_model(backbone=backbone, max_tokens=16)
    inputs = [one for _, _, one in batches(made)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), inputs


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train_alone(case):
    """Mean loss of every step, and the weights at the end."""
    model, inputs = prepare(*case)
    optimizer, losses = sgd(model), []
    for numbers in STEPS:
        loss = sum(model(**inputs[number]).loss for number in numbers) / len(numbers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_sharded(case):
    """The same with FSDP2: each layer, block and encoder by itself, and the rest."""
    from torch.distributed.fsdp import fully_shard

    model, inputs = prepare(*case)
    encoders = [branch.encoder for branch in model.branches.values()]
    for part in (*model.model.language_model.layers, *model.model.visual.blocks, *encoders, model):
        fully_shard(part)
    optimizer, losses = sgd(model), []
    for numbers in STEPS:
        loss = model(**inputs[numbers[dist.get_rank()]]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_of_processes(loss))
    return losses, {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def train_with_deepspeed(case, stage):
    """The same with ZeRO."""
    import deepspeed

    model, inputs = prepare(*case)
    model.trains_in_lockstep = True
    config = json.loads((ROOT / f"configs/accelerator/deepspeed_z{max(stage, 2)}.json").read_text())
    config = {key: value for key, value in config.items() if value != "auto" and key != "bf16"}
    zero = {key: one for key, one in config["zero_optimization"].items() if one != "auto"}
    config["zero_optimization"] = {**zero, "stage": stage, "stage3_param_persistence_threshold": 0}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    losses = []
    for numbers in STEPS:
        loss = engine(**inputs[numbers[dist.get_rank()]]).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean_of_processes(loss))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def mean_of_processes(loss):
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def train_all(folder, runs):
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for number, (train, *arguments) in enumerate(runs):
        learned = train(*arguments)
        if dist.get_rank() == 0:
            torch.save(learned, folder / f"{number}.pt")


def check_two_processes(folder, runs):
    run_in_two(train_all, folder, runs)
    for number, (_, case, *_) in enumerate(runs):
        alone, expected = train_alone(case)
        losses, weights = torch.load(folder / f"{number}.pt")
        assert losses == pytest.approx(alone, rel=1e-5)
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_processes_with_sharded_weights_train_as_one(tmp_path):
    check_two_processes(tmp_path, [(train_sharded, case) for case in CASES])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_processes_under_deepspeed_train_as_one(tmp_path, stage):
    pytest.importorskip("deepspeed")
    check_two_processes(tmp_path, [(train_with_deepspeed, case, stage) for case in CASES])

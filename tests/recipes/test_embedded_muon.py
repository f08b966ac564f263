"""Muon's orthogonalization is done in float32 on a CPU, and only where it is the one we know."""

import warnings

import pytest
import torch


@pytest.fixture
def muon(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba and rouge, when they are compiled
        module = pytest.importorskip("llamafactory.third_party.muon.muon")
        tuner = pytest.importorskip("llamafactory.train.tuner")
    from recipes.embedded.muon import main

    monkeypatch.setattr(module, "zeropower_via_newtonschulz5", module.zeropower_via_newtonschulz5)
    runs = []
    monkeypatch.setattr(tuner, "run_exp", lambda: runs.append(1))
    main()
    assert runs == [1]
    return module


def test_a_step_on_a_cpu_is_not_rounded(muon):
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    stock = muon.zeropower_via_newtonschulz5.__wrapped__
    ours = muon.zeropower_via_newtonschulz5(gradient, 5)
    assert ours.dtype is torch.float32
    assert stock(gradient, 5).dtype is torch.bfloat16
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.5 and values.max() < 1.5
    torch.testing.assert_close(ours, stock(gradient, 5).float(), atol=0.05, rtol=0)


def test_it_is_wrapped_once(muon):
    from recipes.embedded.muon import orthogonalize_in_float32_on_cpu

    ours = muon.zeropower_via_newtonschulz5
    orthogonalize_in_float32_on_cpu()
    assert muon.zeropower_via_newtonschulz5 is ours


@pytest.mark.parametrize(
    "other", [None, lambda matrix: matrix.bfloat16(), lambda matrix, steps: matrix.float()]
)
def test_another_orthogonalization_is_left_alone(muon, monkeypatch, other):
    from recipes.embedded.muon import orthogonalize_in_float32_on_cpu

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz5", other)
    orthogonalize_in_float32_on_cpu()
    assert muon.zeropower_via_newtonschulz5 is other


def test_the_optimizer_of_a_run_uses_it(muon):
    weight = torch.nn.Parameter(torch.eye(8))
    optimizer = muon.Muon(lr=0.1, wd=0.0, muon_params=[weight], adamw_params=[])
    weight.grad = torch.diag(torch.arange(1.0, 9.0))
    optimizer.step()
    stepped = torch.eye(8) - weight.detach()
    assert not torch.equal(stepped, stepped.bfloat16().float())

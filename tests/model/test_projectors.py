"""Projectors condition features on a control state; proposals of a detector become regions."""

import pytest
import torch

from vpt.boxes import contains, crop_box_px, grid_box_covering
from vpt.branches import Features
from vpt.model.projectors import Projector, token_grid
from vpt.protocol.calls import format_region, parse_turn


def made(stem, feature_dim=6, hidden_size=8):
    torch.manual_seed(0)
    projector = Projector(stem, feature_dim, hidden_size)
    projector.reset_parameters()
    return projector.requires_grad_(False)


def test_the_formula_is_features_plus_their_answer_along_the_condition():
    projector = made("identity", feature_dim=8)
    features = Features(torch.randn(6, 8), (2, 3))
    condition = torch.randn(8)
    out = projector(features, condition)
    c = projector.linear_condition(projector.layernorm_condition(condition))
    for value, feature, score in zip(out.values, features.values, out.scores, strict=True):
        assert score == pytest.approx(float(feature @ c), abs=1e-5)
        torch.testing.assert_close(value, feature + (feature @ c) * c)


@pytest.mark.parametrize(
    ("stem", "grid"), [("identity", (4, 8)), ("linear", (4, 8)), ("conv", (1, 2))]
)
def test_each_stem_gives_llm_width_on_its_grid(stem, grid):
    projector = made(stem, feature_dim=8)
    out = projector(Features(torch.randn(32, 8), (4, 8)))
    assert out.scores is None
    assert out.grid_hw == grid == token_grid(stem, (4, 8)) == projector.output_grid((4, 8))
    assert out.values.shape == (grid[0] * grid[1], 8)


def test_the_sign_of_the_condition_changes_the_scores_only():
    projector = Projector("identity", 8, 8)
    features, condition = Features(torch.randn(6, 8), (2, 3)), torch.randn(8)
    one = projector(features, condition)
    with torch.no_grad():
        for parameter in projector.linear_condition.parameters():
            parameter.neg_()
    other = projector(features, condition)
    torch.testing.assert_close(other.values, one.values)
    torch.testing.assert_close(other.scores, -one.scores)


def test_a_condition_of_zero_changes_nothing_but_the_scores():
    projector = made("linear")
    projector.linear_condition.weight.zero_()
    features = Features(torch.randn(4, 6), (2, 2))
    conditioned = projector(features, torch.randn(8))
    assert torch.equal(conditioned.values, projector(features).values)
    assert not conditioned.scores.any()


def test_conv_places_see_their_own_square():
    projector = made("conv")
    values = torch.randn(64, 6)
    before = projector(Features(values, (8, 8))).values
    values = values.clone()
    values[7] += 1  # row 0, column 7: the top right square
    changed = (projector(Features(values, (8, 8))).values != before).any(-1)
    assert changed.tolist() == [False, True, False, False]


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="unknown stem 'mlp'; available: conv, identity, linear"):
        Projector("mlp", 2, 2)


def test_a_proposed_box_becomes_a_region_that_covers_it():
    box, size = (130, 40, 310, 200), (640, 480)
    region = grid_box_covering(box, size)
    assert parse_turn(format_region(region)).calls[0].region == region
    assert contains(crop_box_px(region, size), box)


def test_features_of_a_detector_can_be_projected():
    queries = Features(torch.randn(5, 256), (1, 5))  # the k best queries of GroundingDINO
    out = made("linear", feature_dim=256)(queries, torch.randn(8))
    assert out.values.shape == (5, 8)
    assert out.scores.shape == (5,)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_a_frozen_stem_gets_no_gradient_and_its_conditioning_does(stem):
    torch.manual_seed(0)
    projector = Projector(stem, 6, 8, freeze_stem=True)
    free = Projector(stem, 6, 8)
    free.load_state_dict(projector.state_dict())
    features, condition = Features(torch.randn(16, 6), (4, 4)), torch.randn(8)
    frozen_values = projector(features, condition).values
    assert torch.equal(frozen_values, free(features, condition).values)
    frozen_values.square().sum().backward()
    trained = {name for name, value in projector.named_parameters() if value.grad is not None}
    assert trained and all("condition" in name for name in trained)

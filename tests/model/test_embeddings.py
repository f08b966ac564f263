"""Rows of new tokens begin among the old ones; those with an order begin in it."""

import pytest
import torch
import torch.nn.functional as F

from vpt.errors import CheckpointError
from vpt.model.building import draw_embeddings
from vpt.protocol.tokens import depth_tokens, pixel_tokens


@pytest.fixture(scope="module")
def old():
    return 0.3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(3)) + 1


def likeness(rows):
    rows = F.normalize(rows - rows.mean(0), dim=1)
    return rows @ rows.T


@pytest.mark.parametrize("tokens", [["<|x_0|>", "<|x_1|>"] * 40, pixel_tokens(), depth_tokens()])
def test_new_rows_lie_among_the_old_ones(old, tokens):
    rows = draw_embeddings(old, tokens, seed=0, codebook=torch.randn(128, 16))
    torch.testing.assert_close(rows.mean(0), old.mean(0), atol=0.15, rtol=0)
    assert float(rows.std()) == pytest.approx(float(old.std()), rel=0.1)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("num_pixels", [336, 32, 8])
def test_coordinates_that_are_near_each_other_begin_alike(old, num_pixels):
    alike = likeness(draw_embeddings(old, pixel_tokens(num_pixels), seed=0))
    nearest = alike.fill_diagonal_(-2).argmax(1)
    places = torch.arange(num_pixels)
    assert (nearest - places).abs().max() == 1
    far = (places[:, None] - places).abs() > num_pixels // 2
    assert alike[far].mean() < 0.1


def test_every_coordinate_has_a_row_of_its_own(old):
    rows = draw_embeddings(old, pixel_tokens(), seed=0)
    assert torch.pdist(rows).min() > 0.2 * old.std()


def test_the_order_is_that_of_the_numbers_whatever_order_they_are_given_in(old):
    given = draw_embeddings(old, ["<|x_0|>", *pixel_tokens(16)[::-1], "<|x_1|>"], seed=0)
    assert likeness(given[1:-1].flip(0))[0].argsort(descending=True)[1] == 1


def test_depth_codes_begin_as_alike_as_their_vectors(old):
    codebook = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    codebook[7] = codebook[3] + 0.05 * codebook[8]
    tokens = depth_tokens(32)
    rows = draw_embeddings(old, tokens, seed=0, codebook=codebook)
    alike = likeness(rows[2:])
    assert alike[3].argsort(descending=True)[1] == 7
    drawn = likeness(draw_embeddings(old, tokens, seed=0)[2:])
    assert float(drawn[3, 7]) < 0.5 < float(alike[3, 7])


def test_tokens_without_an_order_are_drawn_the_same_beside_content(old):
    names = ["<|x_0|>", "<|y_0|>"]
    alone = draw_embeddings(old, names, seed=4)
    beside = draw_embeddings(old, [*names, *pixel_tokens(8)], seed=4)
    assert torch.equal(alone, beside[:2])


def test_the_seed_decides(old):
    tokens = [*depth_tokens(8), *pixel_tokens(8)]
    first, again, other = (draw_embeddings(old, tokens, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any(1).all()


def test_a_codebook_too_small_is_refused(old):
    with pytest.raises(CheckpointError, match="has 4 vectors; there are 8 codes"):
        draw_embeddings(old, depth_tokens(8), seed=0, codebook=torch.randn(4, 16))

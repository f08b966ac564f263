"""The codebook: nearest codes, moving averages, and codes that are kept alive."""

import pytest
import torch

from vpt.depth.vqvae import Codebook, perplexity
from vpt.errors import DataError


def generator():
    return torch.Generator().manual_seed(3)


def clusters(num, width=8, each=30):
    """Vectors around ``num`` centers that lie far apart."""
    centers = torch.randn(num, width, generator=generator()) * 10
    noise = torch.randn(num * each, width, generator=generator()) * 0.01
    return centers.repeat_interleave(each, 0) + noise


def test_each_vector_gets_the_code_that_lies_nearest():
    book = Codebook(16, 8)
    vectors = torch.randn(50, 8, generator=generator())
    distances = torch.cdist(vectors, book._embedding)
    assert torch.equal(book.nearest(vectors), distances.argmin(1))
    assert torch.equal(book.nearest(book._embedding), torch.arange(16))


def test_an_unknown_code_is_refused():
    book = Codebook(4, 2)
    assert book.lookup(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 2)
    for codes in ([0, 4], [-1, 0]):
        with pytest.raises(DataError, match="expected codes of 0 to 3, got"):
            book.lookup(torch.tensor(codes))


def test_an_update_is_that_of_the_paper():
    # arXiv 1711.00937, equations 6 to 8, by hand: one code, two vectors, decay 0.9.
    book = Codebook(1, 2, decay=0.9)
    book._embedding.copy_(torch.tensor([[1.0, 0.0]]))
    book._ema_cluster_size.fill_(4.0)
    book._ema_w.copy_(torch.tensor([[4.0, 0.0]]))
    book.update(torch.tensor([[2.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    assert book._ema_cluster_size.item() == pytest.approx(0.9 * 4 + 0.1 * 2)
    assert book._embedding[0].tolist() == pytest.approx([3.8 / 3.8, 0.4 / 3.8], rel=1e-4)


def test_averages_settle_on_the_middle_of_what_a_code_stands_for():
    vectors = clusters(4)
    book = Codebook(4, 8, decay=0.8)
    book._embedding.copy_(vectors[::30])
    for _ in range(60):
        book.update(vectors + 1, book.nearest(vectors + 1))
    middles = (vectors + 1).view(4, 30, 8).mean(1)
    assert torch.cdist(middles, book._embedding).min(1).values.max() < 0.05


def test_k_means_uses_every_code():
    vectors = clusters(12)
    book = Codebook(12, 8)
    book.start_from(vectors, generator())
    assert len(book.nearest(vectors).unique()) >= 11
    assert book._ema_cluster_size.mean().item() == pytest.approx(1)


def test_k_means_needs_as_many_vectors_as_codes():
    with pytest.raises(DataError, match=r"expected at least 9 vectors to start .* got 8"):
        Codebook(9, 2).start_from(torch.zeros(8, 2), generator())


@pytest.mark.parametrize("revived", [True, False])
def test_revival_keeps_codes_alive(revived):
    vectors = clusters(16)
    book = Codebook(16, 8, decay=0.8)
    book._embedding.fill_(100)  # all but the first lie far from all there is
    book._embedding[0] = vectors.mean(0)
    for step in range(30):
        book.update(vectors, book.nearest(vectors))
        if revived and step % 5 == 0:
            book.revive(vectors, 0.1, generator())
    num_used = len(book.nearest(vectors).unique())
    assert num_used >= 12 if revived else num_used == 1


def test_revival_leaves_living_codes_alone():
    vectors = clusters(4)
    book = Codebook(4, 8)
    book._embedding.copy_(vectors[::30])
    book._ema_cluster_size.fill_(5.0)
    book._ema_w.copy_(book._embedding * 5)
    before = book._embedding.clone()
    assert book.revive(vectors, 0.1, generator()) == 0
    assert torch.allclose(book._embedding, before, atol=1e-4)


def test_more_dead_codes_than_vectors_wait_for_the_next_step():
    book = Codebook(8, 2)
    book._ema_cluster_size.copy_(torch.tensor([8.0, *[0.0] * 7]))
    assert book.revive(torch.ones(3, 2), 0.1, generator()) == 3


def test_perplexity_counts_equally_frequent_codes():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)
    assert 1 < perplexity(torch.tensor([9, 1])) < 2

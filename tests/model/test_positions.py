"""M-RoPE positions: those of transformers, whole or piece by piece, padded or not."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model

from vpt.errors import PositionError
from vpt.model.folder import BACKBONES
from vpt.model.modeling import BASE_MODELS
from vpt.model.positions import batch_mrope_positions, mrope_positions

IMAGE = 7
MERGE = 2
texts = st.lists(st.integers(0, 6), max_size=6)
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
streams = st.lists(st.one_of(texts, grids), max_size=6)


def spell(parts):
    """Token ids of text pieces and image grids (in tokens), and the grids alone."""
    ids = []
    for part in parts:
        ids += [IMAGE] * (part[0] * part[1]) if isinstance(part, tuple) else part
    return ids, [part for part in parts if isinstance(part, tuple)]


def as_patches(grids_hw):
    if not grids_hw:
        return None
    return torch.tensor([[1, h * MERGE, w * MERGE] for h, w in grids_hw])


@cache
def references():  # made by a fixture: a property has no time for it
    configs = {name: tiny_model((), backbone=name)[0].config for name in BACKBONES}
    return [BASE_MODELS[name](config).model for name, config in configs.items()]


@pytest.fixture(scope="module", autouse=True)
def made():
    references()


def transformers_positions(input_ids, grids_hw, attention_mask=None):
    """Positions that all backbones give."""
    positions, *others = [
        reference.get_rope_index(
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == IMAGE).int(),
            image_grid_thw=as_patches(grids_hw),
            attention_mask=attention_mask,
        )[0]
        for reference in references()
    ]
    assert all(torch.equal(positions, other) for other in others)
    return positions


@given(streams)
def test_positions_are_those_of_transformers(parts):
    # Text stands between images: transformers takes a run of placeholders for one image.
    ids, grids_hw = spell([[0], *(piece for part in parts for piece in (part, [0]))])
    positions, following = mrope_positions(ids, grids_hw, IMAGE)
    expected = transformers_positions(torch.tensor([ids]), grids_hw)
    assert torch.equal(positions, expected[:, 0])
    assert following == int(expected.max()) + 1


@given(streams, st.integers(0, 50))
def test_pieces_one_by_one_are_the_whole(parts, start):
    ids, grids_hw = spell(parts)
    whole, following = mrope_positions(ids, grids_hw, IMAGE, start)
    pieces, position = [], start
    for part in parts:
        piece, position = mrope_positions(*spell([part]), IMAGE, position)
        pieces.append(piece)
    assert torch.equal(torch.cat([torch.empty(3, 0, dtype=torch.long), *pieces], 1), whole)
    assert position == following


@given(streams, st.integers(0, 50))
def test_a_later_start_moves_all_positions_alike(parts, start):
    ids, grids_hw = spell(parts)
    positions, following = mrope_positions(ids, grids_hw, IMAGE)
    moved, moved_following = mrope_positions(ids, grids_hw, IMAGE, start)
    assert torch.equal(moved, positions + start)
    assert moved_following == following + start


def test_an_image_advances_the_stream_by_its_longer_side():
    positions, following = mrope_positions([1, *[IMAGE] * 6, 2], [(2, 3)], IMAGE)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert following == 5


def test_two_images_without_text_between_are_two():
    positions, _ = mrope_positions([IMAGE] * 4, [(1, 2), (2, 1)], IMAGE)
    assert positions[0].tolist() == [0, 0, 2, 2]


def test_an_empty_piece_has_no_positions():
    positions, following = mrope_positions([], [], IMAGE, 5)
    assert positions.shape == (3, 0)
    assert positions.dtype == torch.long
    assert following == 5


@st.composite
def batches(draw):
    """Rows of text and images, each padded to the longest on either side."""
    rows = [spell([[0], *parts]) for parts in draw(st.lists(streams, min_size=1, max_size=4))]
    length = max(len(ids) for ids, _ in rows) + draw(st.integers(0, 2))
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, (ids, _) in enumerate(rows):
        left = draw(st.sampled_from([0, length - len(ids)]))
        input_ids[row, left : left + len(ids)] = torch.tensor(ids)
        attention_mask[row, left : left + len(ids)] = 1
    return input_ids, attention_mask, rows


@given(batches())
def test_padding_on_either_side_changes_nothing(batch):
    input_ids, attention_mask, rows = batch
    grids_hw = [grid for _, row_grids in rows for grid in row_grids]
    got = batch_mrope_positions(input_ids, attention_mask, as_patches(grids_hw), IMAGE, MERGE)
    assert got.shape == (3, *input_ids.shape)
    for row, (ids, row_grids) in enumerate(rows):
        kept = attention_mask[row].bool()
        assert torch.equal(got[:, row, kept], mrope_positions(ids, row_grids, IMAGE)[0])
        assert not got[:, row, ~kept].any()


def test_a_padded_batch_has_the_positions_of_transformers():
    grids_hw = [(2, 3), (1, 2), (3, 1)]
    rows = [[1, *[IMAGE] * 6, 2, *[IMAGE] * 2], [1, 2, *[IMAGE] * 3, 4]]
    for left in (0, 4):
        padded = [rows[0], [0] * left + rows[1] + [0] * (4 - left)]
        input_ids = torch.tensor(padded)
        mask = torch.ones_like(input_ids)
        mask[1, :left], mask[1, len(rows[1]) + left :] = 0, 0
        got = batch_mrope_positions(input_ids, mask, as_patches(grids_hw), IMAGE, MERGE)
        expected = transformers_positions(input_ids, grids_hw, mask)
        assert torch.equal(got[:, mask.bool()], expected[:, mask.bool()])


def test_a_missing_mask_means_no_padding():
    input_ids = torch.tensor([[1, IMAGE, 0], [0, 0, 2]])
    grid = as_patches([(1, 1)])
    got = batch_mrope_positions(input_ids, None, grid, IMAGE, MERGE)
    whole = batch_mrope_positions(input_ids, torch.ones_like(input_ids), grid, IMAGE, MERGE)
    assert torch.equal(got, whole)
    assert got[0, 1].tolist() == [0, 1, 2]


def test_an_image_in_the_padding_takes_its_grid_and_no_position():
    input_ids = torch.tensor([[1, 2, IMAGE, IMAGE], [3, IMAGE, 4, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    grids = as_patches([(1, 2), (1, 1)])
    got = batch_mrope_positions(input_ids, mask, grids, IMAGE, MERGE)
    assert got[0].tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]


@pytest.mark.parametrize(
    ("ids", "grids_hw", "words"),
    [
        ([1, IMAGE], [], r"image placeholder at index 1, but only 0 image\(s\) came"),
        ([IMAGE] * 5, [(2, 2)], r"image placeholder at index 4, but only 1 image\(s\) came"),
        ([IMAGE] * 3, [(2, 2)], "an image of 2x2 tokens needs 4 placeholders from index 0 on"),
        ([1, IMAGE, 2, IMAGE], [(1, 2)], "an image of 1x2 tokens needs 2 placeholders from index"),
        ([1, 2], [(1, 1)], r"1 image\(s\) came, but there are fewer placeholder runs"),
        ([IMAGE], [(1, 1), (1, 1)], r"2 image\(s\) came, but there are fewer placeholder runs"),
    ],
)
def test_placeholders_that_do_not_fit_the_images_are_an_error(ids, grids_hw, words):
    with pytest.raises(PositionError, match=words):
        mrope_positions(ids, grids_hw, IMAGE)


def test_an_image_no_row_has_room_for_is_an_error():
    grid = as_patches([(1, 1), (1, 1)])
    with pytest.raises(PositionError, match="2 images came, but the text has room for 1"):
        batch_mrope_positions(torch.tensor([[1, IMAGE]]), None, grid, IMAGE, MERGE)


def test_a_row_without_its_image_is_an_error():
    ids = torch.tensor([[1, IMAGE], [IMAGE, 2]])
    with pytest.raises(PositionError, match="placeholder at index 0, but only 0 image"):
        batch_mrope_positions(ids, None, as_patches([(1, 1)]), IMAGE, MERGE)


def test_an_image_split_between_rows_is_an_error():
    ids = torch.tensor([[1, IMAGE], [IMAGE, 2]])
    with pytest.raises(PositionError, match="an image of 1x2 tokens needs 2 placeholders"):
        batch_mrope_positions(ids, None, as_patches([(1, 2)]), IMAGE, MERGE)

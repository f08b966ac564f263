"""Images of a row are opened once, preprocessed per branch, and counted the same either way."""

import pytest
import torch
from PIL import Image
from tiny_model import tiny_model

from vpt.errors import ImageError, PromptError
from vpt.images import from_pixels
from vpt.model.encoding import Pixels, forward_arguments, join_pixels
from vpt.model.folder import BACKBONES
from vpt.protocol.rows import KINDS

SIZES = [(1, 1), (28, 28), (57, 200), (300, 40), (513, 511), (2000, 9), (1200, 900)]


@pytest.fixture(scope="module", params=BACKBONES)
def made(request):
    return tiny_model(("clip", "dino"), max_tokens=16, backbone=request.param)


@pytest.fixture
def pixels(made):
    """Opens a picture of the size that its name says, and remembers what was opened."""
    model, processor = made

    def open_image(name):
        pixels.opened.append(name)
        if name == "none":
            raise ImageError("none does not exist")
        size = tuple(map(int, name.split("x")))
        return from_pixels(Image.new("RGB", size, (size[0] % 256, 3, 4)), name)

    pixels = Pixels(model.config, processor, open_image)
    pixels.opened = []
    return pixels


@pytest.mark.parametrize("kind", ["image", "reencode", "dino"])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_counted_without_preprocessing(pixels, kind, size):
    images = [(kind, f"{size[0]}x{size[1]}"), (kind, "60x61")]
    values, sizes = pixels(images)
    assert pixels.count(images) == sizes
    if kind == "dino":
        height, width = values["detection_images"].shape[-2:]
        assert sizes == {kind: [(height // 14) * (width // 14)] * 2}
    else:
        grids = values[forward_arguments(kind)[1]]
        assert sizes == {kind: (grids.prod(-1) // 4).tolist()}


def test_an_image_that_two_branches_see_is_opened_once(pixels):
    values, sizes = pixels([("image", "60x61"), ("dino", "60x61"), ("image", "70x30")])
    assert pixels.opened == ["60x61", "70x30"]
    assert set(values) == {"pixel_values", "image_grid_thw", "detection_images"}
    assert {kind: len(of_kind) for kind, of_kind in sizes.items()} == {"image": 2, "dino": 1}


def test_an_image_of_the_row_before_is_not_opened_again(pixels):
    for names in (["60x61"], ["60x61", "70x30"], ["70x30"], ["60x61"]):
        pixels.count([("image", name) for name in names])
    assert pixels.opened == ["60x61", "70x30", "60x61"]


def test_a_branch_the_model_lacks_is_told_before_an_image_is_opened(pixels):
    with pytest.raises(PromptError, match="lacks that branch; it has: reencode, dino"):
        pixels([("image", "none"), ("sam", "none")])
    assert pixels.opened == []


@pytest.mark.parametrize("way", ["count", "__call__"])
def test_an_image_that_cannot_be_read_is_told(pixels, way):
    with pytest.raises(ImageError, match="none does not exist"):
        getattr(pixels, way)([("dino", "none")])


def test_rows_are_joined_in_order(pixels):
    rows = [pixels([("dino", "60x61")])[0], pixels([("image", "60x61")])[0], {}]
    rows.append(pixels([("dino", "90x61")])[0])
    joined = join_pixels(rows)
    assert set(joined) == {"pixel_values", "image_grid_thw", "detection_images"}
    parts = [rows[0]["detection_images"], rows[3]["detection_images"]]
    assert torch.equal(joined["detection_images"], torch.cat(parts))


def test_every_kind_has_arguments_of_its_own():
    names = [name for kind in KINDS for name in forward_arguments(kind)]
    assert len(names) == len(set(names))

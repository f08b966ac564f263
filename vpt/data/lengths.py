"""How many tokens a row takes, told by the sizes of its images without opening them."""

from __future__ import annotations

from functools import cache

from PIL import Image

from vpt.data.image_sizes import Images
from vpt.data.row_view import RowView
from vpt.images import LoadedImage, fit_for_tower, from_pixels
from vpt.model.config import VPTConfig
from vpt.model.pixels import Pixels
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import split_crop_suffix, write_placeholders, write_turns

_TOWER_KINDS = ("image", "reencode")


class RowLengths:
    """Counts the tokens that :class:`vpt.protocol.rows.RowEncoder` makes of rows.

    Args:
        config: of the model.
        processor: of the model.
    """

    def __init__(self, config: VPTConfig, processor: VPTProcessor) -> None:
        self._config = config
        self._processor = processor
        self._pixels = Pixels(config, processor, lambda _: _blank())
        self._num_tower_tokens = cache(self._count_tower_tokens)
        self._num_encoder_tokens = cache(self._count_encoder_tokens)

    def num_tokens(self, view: RowView, images: Images) -> int | None:
        """Tokens of a row.

        Args:
            view: of the row.
            images: what is known of files.

        Returns:
            ``None`` if the row cannot be encoded with this model, or a size is not known.
        """
        num_beyond = 0  # tokens of images, but for one each, which stands in the text
        for kind, paths in view.images.items():
            if view.images_by_turn(kind) is None:
                return None
            if paths and kind not in ("image", *self._config.branches):
                return None
            for path in paths:
                if (size_wh := _size_wh(path, images)) is None:
                    return None
                num_beyond += self._num_image_tokens(kind, size_wh) - 1
        ones = {kind: [1] * len(paths) for kind, paths in view.images.items()}
        asked = write_placeholders([turn.asked for turn in view.turns], ones)
        written = write_turns(view.system, asked, [turn.answered for turn in view.turns])
        texts = [text for pair in written for text in pair]
        return num_beyond + sum(len(self._processor.encode_text(text).ids) for text in texts)

    def _num_image_tokens(self, kind: str, size_wh: tuple[int, int]) -> int:
        if kind in _TOWER_KINDS:
            return self._num_tower_tokens(kind, size_wh)
        return self._num_encoder_tokens(kind)

    def _count_tower_tokens(self, kind: str, size_wh: tuple[int, int]) -> int:
        """Tokens of an image under the backbone's tower, which depend on its size."""
        processor = self._processor.image_processor
        factor = processor.patch_size * processor.merge_size
        outline = Image.new("1", size_wh)
        fitted = fit_for_tower(outline, min_side=factor, max_side=self._config.max_side(kind))
        width, height = fitted.size
        num_patches: int = processor.get_number_of_image_patches(height, width, {})
        return num_patches // processor.merge_size**2

    def _count_encoder_tokens(self, kind: str) -> int:
        """Tokens of an image under an encoder, which sees all at one size."""
        _, sizes = self._pixels([(kind, "blank")])
        return sizes[kind][0]


def _blank() -> LoadedImage:
    return from_pixels(Image.new("RGB", (64, 64)), "blank")


def _size_wh(path: str, images: Images) -> tuple[int, int] | None:
    plain, box = split_crop_suffix(path)
    if box is not None:
        size_wh = box[2] - box[0], box[3] - box[1]
        return size_wh if min(size_wh) > 0 else None
    facts = images.get(plain)
    return None if facts is None else facts.size_wh

"""The segmenter behind ``mask``: the object at a place, by Segment Anything or by one's own."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from vpt.detector import source_name
from vpt.errors import CheckpointError, PromptError
from vpt.images import LoadedImage
from vpt.inference.results import Mask, Place
from vpt.model.hub import as_checkpoint_error
from vpt.released import DEFAULT_SEGMENTER

if TYPE_CHECKING:
    from transformers import SamModel, SamProcessor

_MOST_KEPT = 64  # masks
_EXTRA = 'needs segment-anything; pip install "vpt-runtime[sam]"'


class Segments(Protocol):
    """What finds the object at a place."""

    def segment(self, image: Image.Image, place: Place) -> Mask:
        """Whether each pixel ``[H, W]`` of an RGB image belongs to the object at a place."""


class Segmenter:
    """Finds objects in boxes, from any number of threads; SAM is loaded when needed.

    Args:
        source: a folder or hub id of transformers' ``SamModel``; a file ``*.pth`` of released
            weights, for the package segment-anything (extra ``sam``); a :class:`Segments`; or
            ``None`` for none.
        device: of the weights, which are float32.

    Attributes:
        name: path, id, or class of the source; empty without one.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Segments | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._source, self._device = source, device
        self.name = source_name(source)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, Place], Mask] = OrderedDict()

    def check(self) -> None:
        """Raise ``PromptError`` if there is no segmenter."""
        if self._source is None:
            raise PromptError(
                f"mask needs a segmenter: load the model with segmenter={DEFAULT_SEGMENTER!r}, or "
                "another one (--segmenter at the command line)"
            )

    def load(self) -> Segments:
        """Load the source, unless that was done; errors as of :meth:`segment`."""
        self.check()
        with self._lock:
            if isinstance(self._source, str | os.PathLike):
                self._source = _load(os.fspath(self._source), self._device)
            assert self._source is not None  # or check would have refused
            return self._source

    def segment(self, image: LoadedImage, place: Place) -> Mask:
        """Whether each pixel ``[H, W]`` of an image belongs to the object at a place; kept.

        Raises:
            CheckpointError: if the segmenter cannot be loaded, or its mask is of another size.
            PromptError: if there is none.
        """
        source, key = self.load(), (image.digest, place)
        with self._lock:
            if key not in self._kept:
                mask = np.asarray(source.segment(image.pixels, place), dtype=bool)
                if mask.shape != (expected := image.pixels.size[::-1]):
                    raise CheckpointError(
                        f"the segmenter gave a mask of {list(mask.shape)}; expected [H, W], "
                        f"{list(expected)}"
                    )
                self._kept[key] = mask
            self._kept.move_to_end(key)
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


def _load(source: str, device: torch.device | str) -> Segments:
    with as_checkpoint_error(f"cannot load the segmenter {source}"):
        if source.endswith(".pth"):
            return _Package(source, device)
        return _Transformers(source, device)


class _Transformers:
    """SAM of transformers."""

    def __init__(self, path_or_id: str, device: torch.device | str) -> None:
        from transformers import SamModel, SamProcessor

        self._model: SamModel = SamModel.from_pretrained(path_or_id).eval().to(device)
        self._processor: SamProcessor = SamProcessor.from_pretrained(path_or_id)

    @torch.no_grad()
    def segment(self, image: Image.Image, place: Place) -> Mask:
        prompt = "input_boxes" if len(place) == 4 else "input_points"
        numbers = [[[float(side) for side in place]]]
        inputs = self._processor(image, **{prompt: numbers}, return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        outputs = self._model(**inputs.to(self._model.device), multimask_output=False)
        (masks,) = self._processor.image_processor.post_process_masks(outputs.pred_masks, *sizes)
        return masks[0, 0].cpu().numpy()


class _Package:
    """SAM of the package segment-anything."""

    def __init__(self, weights: str, device: torch.device | str) -> None:
        if not Path(weights).is_file():
            raise FileNotFoundError("there is no such file")
        if importlib.util.find_spec("segment_anything") is None:
            raise CheckpointError(f"{weights} {_EXTRA}")
        from segment_anything import SamPredictor, sam_model_registry

        state: Any = torch.load(weights, map_location="cpu", weights_only=True)
        widths = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
        patches = state.get("image_encoder.patch_embed.proj.weight")
        if patches is None or len(patches) not in widths:
            raise CheckpointError(
                f"{weights} is not a file of segment-anything; expected its ViT-B, ViT-L or ViT-H"
            )
        model = sam_model_registry[widths[len(patches)]]()
        model.load_state_dict(state)
        self._predictor = SamPredictor(model.eval().to(device))

    def segment(self, image: Image.Image, place: Place) -> Mask:
        self._predictor.set_image(np.asarray(image))
        prompt: dict[str, Any] = {"box": np.array(place)}
        if len(place) == 2:
            prompt = {"point_coords": np.array([place]), "point_labels": np.array([1])}
        masks, _, _ = self._predictor.predict(**prompt, multimask_output=False)
        return masks[0]

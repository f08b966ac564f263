"""The segmenter behind ``mask``: the object at a place, by Segment Anything or by one's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from vpt.errors import CheckpointError
from vpt.finders import Finder
from vpt.images import LoadedImage
from vpt.inference.results import Mask, Place
from vpt.model.hub import as_checkpoint_error
from vpt.released import DEFAULT_SEGMENTER

if TYPE_CHECKING:
    from transformers import SamModel, SamProcessor

_EXTRA = 'needs segment-anything; pip install "vpt-runtime[sam]"'


class Segments(Protocol):
    """What finds the object at a place."""

    def segment(self, image: Image.Image, place: Place) -> Mask:
        """Whether each pixel ``[H, W]`` of an RGB image belongs to the object at a place."""


class Segmenter(Finder[Segments, "tuple[str, Place]", Mask]):
    """Finds objects in boxes, from any number of threads; SAM is loaded when needed.

    Args:
        source: a folder or hub id of transformers' ``SamModel``; a file ``*.pth`` of released
            weights, for the package segment-anything (extra ``sam``); a :class:`Segments`; or
            ``None`` for none.
        device: of the weights, which are float32.

    Attributes:
        name: path, id, or class of the source; empty without one.
    """

    _lacking = (
        f"mask needs a segmenter: load the model with segmenter={DEFAULT_SEGMENTER!r}, or "
        "another one (--segmenter at the command line)"
    )
    _most_kept = 64

    def segment(self, image: LoadedImage, place: Place) -> Mask:
        """Whether each pixel ``[H, W]`` of an image belongs to the object at a place; kept.

        Raises:
            CheckpointError: if the segmenter cannot be loaded, or its mask is of another size.
            PromptError: if there is none.
        """
        source = self.load()

        def find() -> Mask:
            mask = np.asarray(source.segment(image.pixels, place), dtype=bool)
            if mask.shape != (expected := image.pixels.size[::-1]):
                raise CheckpointError(
                    f"the segmenter gave a mask of {list(mask.shape)}; expected [H, W], "
                    f"{list(expected)}"
                )
            return mask

        return self._find((image.digest, place), find)

    @staticmethod
    def _load(source: str, device: torch.device | str) -> Segments:
        return _load(source, device)


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

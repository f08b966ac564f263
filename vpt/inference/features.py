"""Features of images under the branches: encoded in batches, kept by content, never mixed up."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from vpt.branches import Features
from vpt.images import LoadedImage, fit_for_tower
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.processing import VPTProcessor
from vpt.protocol.tokens import PLAIN, TOWER

DEFAULT_CACHE_BYTES = 512 * 2**20
_PIXELS_PER_BATCH = {"cpu": 2**18, "cuda": 2**24}
"""Encoded at once at most, of one image or several: a CPU is faster while all fits its caches."""


@dataclass(frozen=True)
class FeatureKey:
    """Everything on which features depend, for one model."""

    branch: str
    digest: str  # of mode, size and pixels of the image
    size_wh: tuple[int, int]
    mode: str
    preprocessing: str  # digest of the branch's settings


class FeatureCache:
    """Recently used features, ``max_bytes`` of them at most."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[FeatureKey, Features] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: FeatureKey) -> Features | None:
        """Features under ``key``, which become the most recently used."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: FeatureKey, features: Features) -> None:
        """Keep features; the least recently used give way. What is too large is not kept."""
        size = features.values.nbytes
        if size > self.max_bytes or key in self._entries:
            return
        self._entries[key] = features
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, old = self._entries.popitem(last=False)
            self.num_bytes -= old.values.nbytes


class Encoders:
    """The branches of a model with their preprocessing, and one cache of features.

    Attributes:
        num_encoded: images that cost encoder work so far.
        num_reused: images whose features were there.
    """

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        processor: VPTProcessor,
        cache: FeatureCache | None = None,
    ) -> None:
        self._model = model
        self.cache = FeatureCache() if cache is None else cache
        self.num_encoded = 0
        self.num_reused = 0
        self._branches = {
            name: model.branch(name, processor.image_processor)
            for name in (PLAIN, *model.config.branches)
        }
        self._settings = {}
        for name, branch in self._branches.items():
            settings = json.dumps(
                [model.config.max_side(name), branch.preprocess_config], sort_keys=True, default=str
            )
            self._settings[name] = hashlib.sha256(settings.encode()).hexdigest()

    def key(self, branch: str, image: LoadedImage) -> FeatureKey:
        """Under what the features of an image are kept."""
        mode, settings = image.pixels.mode, self._settings[branch]
        encoder = TOWER if branch == PLAIN else branch  # often at one size: encoded once then
        return FeatureKey(encoder, image.digest, image.size_wh, mode, settings)

    def encode(self, images: Sequence[tuple[str, LoadedImage]]) -> list[tuple[Features, bool]]:
        """Features of images, each under a branch, and whether they were there already.

        Plain images are under ``PLAIN``. Images that are not kept are encoded in batches, equal
        ones once.
        """
        keys = [self.key(branch, image) for branch, image in images]
        found = {key: features for key in keys if (features := self.cache.get(key)) is not None}
        known = set(found)
        missing = {key: one for key, one in zip(keys, images, strict=True) if key not in found}
        for branch in dict.fromkeys(branch for branch, _ in missing.values()):
            group = [key for key, (name, _) in missing.items() if name == branch]
            encoded = self._encode_all(branch, [missing[key][1] for key in group])
            for key, features in zip(group, encoded, strict=True):
                found[key] = features
                self.cache.put(key, features)
        self.num_encoded += len(missing)
        self.num_reused += len(images) - len(missing)
        return [(found[key], key in known) for key in keys]

    @torch.inference_mode()
    def _encode_all(self, branch: str, images: Sequence[LoadedImage]) -> list[Features]:
        encoder, max_side = self._branches[branch], self._model.config.max_side(branch)
        fitted = [
            fit_for_tower(image.pixels, min_side=encoder.min_side, max_side=max_side)
            for image in images
        ]
        most = _PIXELS_PER_BATCH.get(self._model.device.type, 2**24)
        return [
            # Each entry owns its memory: a view would keep the whole batch alive.
            Features(one.values.clone(), one.grid_hw)
            for batch in _batches(fitted, most)
            for one in encoder.encode(*encoder.preprocess(batch).values())
        ]


def _batches(images: Sequence[Image.Image], most_pixels: int) -> Iterator[list[Image.Image]]:
    """Neighbouring images of so many pixels together at most; a larger one is alone."""
    batch: list[Image.Image] = []
    room = most_pixels
    for image in images:
        size = image.width * image.height
        if batch and size > room:
            yield batch
            batch, room = [], most_pixels
        batch.append(image)
        room -= size
    if batch:
        yield batch

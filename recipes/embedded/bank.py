"""Rows as flat arrays, and the features of their pictures, each encoded once.

Where no encoder is trained, its features never change: a table of them, and of the tokens that
they stand for, is all that the language model is trained on (:mod:`recipes.embedded.language`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from recipes.embedded.views import TowerView
from vpt.data.curriculum import read_rows
from vpt.data.rows import Row
from vpt.errors import DataError
from vpt.files import replace_atomically
from vpt.model.config import VPTSettings, load_config
from vpt.model.encoding import IGNORE_INDEX, Pixels, RowEncoder, open_row_image
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.positions import mrope_positions
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import list_images, read_turns, split_crop_suffix
from vpt.protocol.tokens import PLAIN, TOWER

_CHUNK = 500  # rows per task of a worker
_BATCH = 64  # pictures that are encoded together
_TOKEN_PX = 28  # side of a token of the tower: two patches

Ints = NDArray[np.integer[Any]]


class Picture(NamedTuple):
    """A picture of a row: its kind and source, and the rows and columns of its tokens."""

    kind: str
    source: str
    grid_hw: tuple[int, int]


@dataclass
class Rows:
    """Encoded rows, end to end.

    Attributes:
        ids: ``[T]``.
        is_target: ``[T]``: what is learned: answers without control tokens.
        positions: ``[3, T]``.
        features: ``[T]`` index in the bank; -1 for text.
        starts: ``[R + 1]``: where each row begins; the end of the last.
        calls: ``[R]`` place of the control token in its row; -1 for none.
        branches: ``[R]`` index of its branch among those of the model.
        questions: ``[R, 2]`` first place of the first user turn and the place after it.
    """

    ids: Ints
    is_target: NDArray[np.bool_]
    positions: Ints
    features: Ints
    starts: Ints
    calls: Ints
    branches: Ints
    questions: Ints

    @property
    def lengths(self) -> Ints:
        """``[R]`` tokens of each row."""
        return np.diff(self.starts)


@dataclass
class Bank:
    """Rows of files, and ``[T, D]`` float16 features of all their pictures."""

    rows: dict[str, Rows]
    features: Tensor


@dataclass
class _EncodedRow:
    """One row; its pictures are in the order of its tokens."""

    ids: list[int]
    is_target: list[bool]
    positions: Ints
    call: int
    branch: int
    question: tuple[int, int]
    pictures: list[Picture]


class RowReader:
    """Encodes rows without reading pixels; only the heads of picture files are read.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: str) -> None:
        config = self.config = load_config(folder)
        self._encoder = RowEncoder(config, VPTProcessor.from_pretrained(folder))
        self._grids: dict[tuple[str, tuple[int, int]], tuple[int, int]] = {}
        self._pads = {config.image_token_id: PLAIN}
        self._pads |= {config.pad_id(name): name for name in config.branches}
        self._actions = [config.action_id(name) for name in config.branches]

    def read(self, row: Row) -> _EncodedRow:
        """Encode a row.

        Raises:
            DataError: if it has two calls.
        """
        turns = read_turns(row)
        waiting: dict[str, list[Picture]] = {}
        for kind, source in list_images(row):
            picture = Picture(kind, source, self._grid_hw(kind, source))
            waiting.setdefault(kind, []).append(picture)
        grids = {kind: [one.grid_hw for one in ones] for kind, ones in waiting.items()}
        sizes = {
            kind: [height * width for height, width in of_kind] for kind, of_kind in grids.items()
        }
        ids, labels = self._encoder.encode_turns(turns, sizes)
        calls = self._places(ids, *self._actions)
        if len(calls) > 1:
            raise DataError(f"expected one call per row at most, got {len(calls)}")
        config = self.config
        positions, _ = mrope_positions(ids, grids.get(PLAIN, ()), config.image_token_id)
        opened = self._places(ids, config.vision_start_token_id)
        kinds = [self._pads[ids[place + 1]] for place in opened]
        return _EncodedRow(
            ids,
            [label != IGNORE_INDEX for label in labels],
            positions.numpy(),
            calls[0] if calls else -1,
            self._actions.index(ids[calls[0]]) if calls else 0,
            (
                self._places(ids, config.para_start_id)[1] + 1,
                self._places(ids, config.para_end_id)[1],
            ),
            [waiting[kind].pop(0) for kind in kinds],
        )

    @staticmethod
    def _places(ids: Sequence[int], *wanted: int | None) -> list[int]:
        return [place for place, one in enumerate(ids) if one in wanted]

    def _grid_hw(self, kind: str, source: str) -> tuple[int, int]:
        path, box = split_crop_suffix(source)
        if box is None:
            with Image.open(path) as image:
                size = image.size
        else:
            size = (box[2] - box[0], box[3] - box[1])
        if (kind, size) not in self._grids:
            self._grids[kind, size] = self._encoder.pixels.grid_hw(kind, size)
        return self._grids[kind, size]


_reader: RowReader | None = None


def _start_worker(folder: str) -> None:
    global _reader
    torch.set_num_threads(1)
    _reader = RowReader(folder)


def _read_chunk(rows: Sequence[Row]) -> tuple[Rows, list[Picture]]:
    """Rows without their features, and their pictures: end to end, they pass to us in no time."""
    assert _reader is not None
    encoded = [_reader.read(row) for row in rows]
    packed = Rows(
        np.concatenate([np.array(row.ids, dtype=np.int32) for row in encoded]),
        np.concatenate([row.is_target for row in encoded]),
        np.concatenate([row.positions.astype(np.int16) for row in encoded], axis=1),
        np.empty(0, dtype=np.int32),
        np.cumsum([0, *(len(row.ids) for row in encoded)]),
        np.array([row.call for row in encoded]),
        np.array([row.branch for row in encoded]),
        np.array([row.question for row in encoded]),
    )
    return packed, [picture for row in encoded for picture in row.pictures]


def load_bank(
    model: VPTForConditionalGeneration,
    folder: str,
    files: Sequence[str],
    keep: str,
    num_workers: int,
) -> Bank:
    """Encode the rows of files and their pictures, or read them back.

    Args:
        model: whose encoders and projectors' stems are used.
        folder: of the model.
        files: of rows.
        keep: file to keep the bank in; not kept if empty. One of other rows, settings or
            encoders is written again.
        num_workers: processes.
    """
    made_of = _digest(model, folder, files)
    if keep and Path(keep).is_file():
        stored = torch.load(keep, weights_only=True, map_location="cpu")
        if stored["made_of"] == made_of:
            rows = {
                file: Rows(**{name: values.numpy() for name, values in of_file.items()})
                for file, of_file in stored["rows"].items()
            }
            return Bank(rows, stored["features"])
    offsets: dict[Picture, int] = {}
    total = 0
    rows = {}
    with ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(folder,)) as pool:
        for name in tqdm(files, desc="rows"):
            read = read_rows(Path(name), Path())
            chunks = [read[first : first + _CHUNK] for first in range(0, len(read), _CHUNK)]
            parts = list(pool.map(_read_chunk, chunks))
            rows[name], total = _join(parts, model.config, offsets, total)
    bank = Bank(rows, encode_pictures(model, folder, offsets, total, num_workers))
    if keep:
        tensors = {
            file: {name: torch.from_numpy(values) for name, values in vars(of_file).items()}
            for file, of_file in rows.items()
        }
        state = {"made_of": made_of, "rows": tensors, "features": bank.features.cpu()}
        with replace_atomically(Path(keep).parent) as draft:
            torch.save(state, draft / Path(keep).name)
    return bank


def _digest(model: VPTForConditionalGeneration, folder: str, files: Sequence[str]) -> str:
    """Of the rows, of all settings, and of all weights but the language model's."""
    digest = hashlib.sha256()
    for file in (*files, *sorted(map(str, Path(folder).glob("*.json")))):
        digest.update(file.encode() + Path(file).read_bytes())
    for name, value in model.state_dict().items():
        if ".language_model." not in name and not name.startswith("lm_head"):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _join(
    parts: Sequence[tuple[Rows, list[Picture]]],
    config: VPTSettings,
    offsets: dict[Picture, int],
    total: int,
) -> tuple[Rows, int]:
    """The rows of a file; its pictures that are not in the bank yet are added at its end."""
    ids = np.concatenate([rows.ids for rows, _ in parts])
    pads = [config.image_token_id, *(config.pad_id(name) for name in config.branches)]
    is_pad = np.isin(ids, pads)
    # Runs of placeholders, in order, are those of the pictures, in order.
    edges = np.flatnonzero(np.diff(is_pad.astype(np.int8), prepend=0, append=0))
    sizes = edges[1::2] - edges[::2]
    begins = []
    pictures = [picture for _, of_part in parts for picture in of_part]
    for picture, size in zip(pictures, sizes.tolist(), strict=True):
        if picture not in offsets:
            offsets[picture] = total
            total += size
        begins.append(offsets[picture])
    features = np.full(len(ids), -1, dtype=np.int32)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    features[is_pad] = np.repeat(np.array(begins, dtype=np.int64), sizes) + within
    joined = Rows(
        ids,
        np.concatenate([rows.is_target for rows, _ in parts]),
        np.concatenate([rows.positions for rows, _ in parts], axis=1),
        features,
        np.cumsum([0, *(length for rows, _ in parts for length in rows.lengths)]),
        np.concatenate([rows.calls for rows, _ in parts]),
        np.concatenate([rows.branches for rows, _ in parts]),
        np.concatenate([rows.questions for rows, _ in parts]),
    )
    return joined, total


class _Pictures(Dataset[Any]):
    """Batches of pictures of one kind and size; those of the tower as bytes of each pixel."""

    def __init__(self, batches: Sequence[list[Picture]], pixels: Pixels) -> None:
        self.batches = batches
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        torch.set_num_threads(1)
        batch = self.batches[number]
        images = [open_row_image(picture.source).pixels for picture in batch]
        kind, _, (height, width) = batch[0]
        if kind not in (PLAIN, TOWER):
            return self.pixels.preprocess(kind, images)
        size = (width * _TOKEN_PX, height * _TOKEN_PX)
        resized = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
        return torch.from_numpy(np.stack(resized))


@torch.no_grad()
def encode_pictures(
    model: VPTForConditionalGeneration,
    folder: str,
    offsets: Mapping[Picture, int],
    total: int,
    num_workers: int,
) -> Tensor:
    """``[total, D]`` float16 features of all pictures, as projectors' stems give them.

    Args:
        model: on any device.
        folder: of the model.
        offsets: where the features of each picture begin.
        total: number of features.
        num_workers: processes.

    Raises:
        DataError: for a picture that the tower does not see as a square.
    """
    groups: dict[tuple[str, tuple[int, int]], list[Picture]] = {}
    for picture in sorted(offsets):
        height, width = picture.grid_hw
        if height != width and picture.kind in (PLAIN, TOWER):
            raise DataError(
                f"expected square pictures, got {height} x {width} tokens of {picture.source}"
            )
        groups.setdefault((picture.kind, picture.grid_hw), []).append(picture)
    batches = [
        group[first : first + _BATCH]
        for group in groups.values()
        for first in range(0, len(group), _BATCH)
    ]
    processor = VPTProcessor.from_pretrained(folder)
    pictures = _Pictures(batches, Pixels(model.config, processor, open_row_image))
    device = next(model.parameters()).device
    view = TowerView(model, processor).to(device)
    bank = torch.empty(total, model.config.text_config.hidden_size, dtype=torch.half, device=device)
    loader = DataLoader(pictures, batch_size=None, num_workers=num_workers)
    read = tqdm(cast(Iterator[Any], loader), desc="pictures", total=len(batches))
    for batch, pixels in zip(batches, read, strict=True):
        kind = batch[0].kind
        if kind in (PLAIN, TOWER):
            values = view(pixels.to(device))
        else:
            project = model.projector(kind)
            encoded = model.encode(kind, *(one.to(device) for one in pixels))
            values = [project.project_features(one.values, one.grid_hw) for one in encoded]
        for picture, of_one in zip(batch, values, strict=True):
            begin = offsets[picture]
            bank[begin : begin + len(of_one)] = of_one
    return bank

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
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vpt.data.curriculum import read_rows
from vpt.data.rows import Row
from vpt.errors import DataError
from vpt.model.config import VPTSettings, load_config
from vpt.model.encoding import Pixels, open_row_image
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.positions import mrope_positions
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import (
    list_images,
    read_turns,
    split_crop_suffix,
    write_placeholders,
    write_turns,
)
from vpt.protocol.tokens import PLAIN, TOWER

_CHUNK = 500  # rows per task of a worker
_BATCH = 64  # pictures that are encoded together
_TOKEN_PX = 28  # side of a token of the tower: two patches

Ints = NDArray[np.integer[Any]]
Picture = tuple[str, str]
"""Kind and source."""


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
    """One row; its pictures, by kind and source, are in the order of its tokens."""

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
        self.config = load_config(folder)
        self.processor = VPTProcessor.from_pretrained(folder)
        self.pixels = Pixels(self.config, self.processor, open_row_image)
        self._grids: dict[tuple[str, tuple[int, int]], tuple[int, int]] = {}
        self._pads = {self.config.image_token_id: PLAIN}
        self._pads |= {self.config.pad_id(name): name for name in self.config.branches}
        self._actions = [self.config.action_id(name) for name in self.config.branches]
        self._start = int(cast(int, self.config.vision_start_token_id))

    def grid_hw(self, kind: str, source: str) -> tuple[int, int]:
        """Tokens of a picture, by rows and columns."""
        path, box = split_crop_suffix(source)
        if box is None:
            with Image.open(path) as image:
                size = image.size
        else:
            size = (box[2] - box[0], box[3] - box[1])
        if (kind, size) not in self._grids:
            self._grids[kind, size] = self.pixels.grid_hw(kind, size)
        return self._grids[kind, size]

    def read(self, row: Row) -> _EncodedRow:
        """Encode a row.

        Raises:
            DataError: if it has two calls.
        """
        system, turns = read_turns(row)
        waiting: dict[str, list[tuple[str, tuple[int, int]]]] = {}
        for kind, source in list_images(row):
            waiting.setdefault(kind, []).append((source, self.grid_hw(kind, source)))
        sizes = {kind: [h * w for _, (h, w) in ones] for kind, ones in waiting.items()}
        plain_grids = [grid for _, grid in waiting.get(PLAIN, ())]
        asked = write_placeholders([question for question, _ in turns], sizes)
        ids: list[int] = []
        targets: list[bool] = []
        question = (0, 0)
        for prompt, answer in write_turns(system, asked, [answered for _, answered in turns]):
            prompt_ids = list(self.processor.encode_text(prompt).ids)
            answer_ids = list(self.processor.encode_text(answer).ids)
            if not ids:
                opened = [i for i, one in enumerate(prompt_ids) if one == self.config.para_start_id]
                closed = [i for i, one in enumerate(prompt_ids) if one == self.config.para_end_id]
                question = (opened[1] + 1, closed[1])
            ids += prompt_ids + answer_ids
            targets += [False] * len(prompt_ids)
            targets += [one not in self._actions for one in answer_ids]
        calls = [place for place, one in enumerate(ids) if one in self._actions]
        if len(calls) > 1:
            raise DataError(f"expected one call per row at most, got {len(calls)}")
        opened = [place for place, one in enumerate(ids) if one == self._start]
        kinds = [self._pads[ids[place + 1]] for place in opened]
        positions, _ = mrope_positions(ids, plain_grids, self.config.image_token_id)
        return _EncodedRow(
            ids,
            targets,
            positions.numpy(),
            calls[0] if calls else -1,
            self._actions.index(ids[calls[0]]) if calls else 0,
            question,
            [(kind, waiting[kind].pop(0)[0]) for kind in kinds],
        )


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
        keep: file to keep the bank in; not kept if empty. One of other rows or encoders is
            written anew.
        num_workers: processes.
    """
    made_of = _digest(model, files)
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
            file = Path(name)
            read = [_with_paths(row, file.parent) for row in read_rows(file, file.parent)]
            chunks = [read[first : first + _CHUNK] for first in range(0, len(read), _CHUNK)]
            parts = list(pool.map(_read_chunk, chunks))
            rows[name], total = _join(parts, model.config, offsets, total)
    bank = Bank(rows, encode_pictures(model, folder, offsets, total, num_workers))
    if keep:
        tensors = {
            file: {name: torch.from_numpy(values) for name, values in vars(of_file).items()}
            for file, of_file in rows.items()
        }
        Path(keep).parent.mkdir(parents=True, exist_ok=True)
        state = {"made_of": made_of, "rows": tensors, "features": bank.features.cpu()}
        torch.save(state, keep)
    return bank


def _digest(model: VPTForConditionalGeneration, files: Sequence[str]) -> str:
    """Of the rows, and of all weights but the language model's."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.encode() + Path(file).read_bytes())
    for name, value in model.state_dict().items():
        if ".language_model." not in name and not name.startswith("lm_head"):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _with_paths(row: Row, folder: Path) -> Row:
    """The row with paths that do not depend on its file's folder."""
    columns = [key for key in row if key.endswith("images")]
    return {**row, **{key: [str(folder / path) for path in row[key]] for key in columns}}


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


class _Pictures(Dataset[tuple[list[Picture], Any]]):
    """Batches of pictures of one kind and size; those of the towers as bytes of each pixel."""

    def __init__(self, batches: Sequence[list[Picture]], folder: str) -> None:
        self.batches = batches
        self.folder = folder
        self._reader: RowReader | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[Picture], Any]:
        torch.set_num_threads(1)
        self._reader = self._reader or RowReader(self.folder)
        batch = self.batches[number]
        kind = batch[0][0]
        images = [open_row_image(source).pixels for _, source in batch]
        if kind not in (PLAIN, TOWER):
            return batch, self._reader.pixels.preprocess(kind, images)
        height, width = self._reader.grid_hw(*batch[0])
        size = (width * _TOKEN_PX, height * _TOKEN_PX)
        resized = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
        return batch, torch.from_numpy(np.stack(resized))


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
        offsets: by kind and source of a picture, where its features begin.
        total: number of features.
        num_workers: processes.
    """
    reader = RowReader(folder)
    groups: dict[tuple[str, tuple[int, int]], list[Picture]] = {}
    for kind, source in sorted(offsets):
        groups.setdefault((kind, reader.grid_hw(kind, source)), []).append((kind, source))
    batches = [
        group[first : first + _BATCH]
        for group in groups.values()
        for first in range(0, len(group), _BATCH)
    ]
    device = next(model.parameters()).device
    bank = torch.empty(total, model.config.text_config.hidden_size, dtype=torch.half, device=device)
    loader = DataLoader(_Pictures(batches, folder), batch_size=None, num_workers=num_workers)
    for batch, pixels in tqdm(cast(Iterator[Any], loader), desc="pictures", total=len(batches)):
        values = _features(model, reader, batch[0][0], pixels)
        for picture, of_one in zip(batch, values, strict=True):
            begin = offsets[tuple(picture)]
            bank[begin : begin + len(of_one)] = of_one
    return bank


@torch.no_grad()
def _features(
    model: VPTForConditionalGeneration, reader: RowReader, kind: str, pixels: Any
) -> Sequence[Tensor]:
    device = next(model.parameters()).device
    if kind in (PLAIN, TOWER):
        patches, grids = patches_of(pixels.to(device), reader.processor.image_processor)
        tokens = model.tower(patches, grids)
        return list(tokens.view(len(pixels), -1, tokens.shape[-1]).half())
    encoded = model.encode(kind, *(value.to(device) for value in pixels))
    project = model.projector(kind)
    return [project.project_features(one.values, one.grid_hw).half() for one in encoded]


def patches_of(pixels: Tensor, image_processor: Any) -> tuple[Tensor, Tensor]:
    """Patches and grids, as the tower takes them, of ``[N, H, W, 3]`` bytes."""
    mean, std = (
        torch.tensor(values, device=pixels.device)
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    values = (pixels.float() / 255 - mean) / std
    num, height, width = (int(one) for one in values.shape[:3])
    side = _TOKEN_PX // 2
    grid = values.view(num, height // _TOKEN_PX, 2, side, width // _TOKEN_PX, 2, side, 3)
    patches = grid.permute(0, 1, 4, 2, 5, 7, 3, 6)  # n, rows, columns, 2, 2, colour, y, x
    both = patches.unsqueeze(6).expand(*patches.shape[:6], 2, side, side)
    grids = torch.tensor([[1, height // side, width // side]], device=pixels.device)
    return both.reshape(-1, 3 * 2 * side * side), grids.expand(num, -1)

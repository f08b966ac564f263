"""The depth tokenizer: maps to codes and text, and back; loading and saving."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpt.depth.maps import Floats, as_map, fit_map
from vpt.depth.vqvae import DepthVQVAE
from vpt.errors import CheckpointError, DataError
from vpt.files import replace_atomically
from vpt.model.folder import check_depth_tokenizer, check_file, read_json
from vpt.model.hub import as_checkpoint_error
from vpt.protocol.calls import format_depth, parse_depth

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "vpt_depth_tokenizer"

_LARGEST = {
    "size_px": 2**12,
    "num_codes": 2**16,
    "code_dim": 2**13,
    "hidden_dim": 2**10,
    "num_downsamplings": 10,
    "num_residual_blocks": 2**6,
}
_NUM_NAMED = 4  # keys to list in a message


@dataclass(frozen=True)
class DepthTokenizerConfig:
    """Shape of a depth tokenizer; the defaults are Aurora's (arXiv 2412.03548, section 4.1).

    The side of the maps, and the arguments of :class:`vpt.depth.vqvae.DepthVQVAE`. A
    `CheckpointError` names an impossible number.
    """

    size_px: int = 320
    num_codes: int = 128
    code_dim: int = 512
    hidden_dim: int = 16
    num_downsamplings: int = 5
    num_residual_blocks: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "num_residual_blocks")
            if type(value) is not int or value < least:
                raise CheckpointError(
                    f"depth tokenizer: expected {field.name} of at least {least}, got {value!r}"
                )
            if value > (most := _LARGEST[field.name]):
                raise CheckpointError(
                    f"depth tokenizer: expected {field.name} of at most {most}, got {value:.3g}"
                )
        if self.size_px % 2**self.num_downsamplings:
            raise CheckpointError(
                f"depth tokenizer: size_px {self.size_px} is not a multiple of "
                f"{2**self.num_downsamplings}, the pixels of a code"
            )

    @property
    def grid_size(self) -> int:
        """Codes along each side."""
        return self.size_px >> self.num_downsamplings

    @property
    def num_cells(self) -> int:
        """Codes of a map."""
        return self.grid_size**2

    def build(self, seed: int = 0) -> DepthVQVAE:
        """Make the untrained network; torch's own random state is not changed."""
        shape = asdict(self)
        del shape["size_px"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DepthVQVAE(**shape)


class DepthTokenizer:
    """Encodes depth maps as codes and decodes codes to depth maps."""

    def __init__(self, network: DepthVQVAE, config: DepthTokenizerConfig) -> None:
        self.network = network.eval()
        self.config = config

    def encode(self, depth: NDArray[np.generic]) -> tuple[int, ...]:
        """Encode a map as ``num_cells`` codes, in reading order.

        ``depth`` is ``[H, W]`` of any size, as :func:`vpt.depth.maps.as_map` accepts it. It is
        stretched to a square. A `DataError` is raised if it is not a depth map.
        """
        square = np.ascontiguousarray(fit_map(as_map(depth), self.config.size_px))
        weight = next(self.network.parameters())
        with torch.inference_mode():
            codes = self.network.encode(torch.from_numpy(square)[None, None].to(weight))
        return tuple(codes.flatten().tolist())

    def decode(self, codes: Sequence[int]) -> Floats:
        """Decode ``num_cells`` codes to ``[size_px, size_px]`` float32, 0 far to 1 near.

        Raises:
            DataError: for another number of codes, or an unknown one.
        """
        if len(codes) != self.config.num_cells:
            raise DataError(f"expected {self.config.num_cells} codes, got {len(codes)}")
        side = self.config.grid_size
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            grid = torch.tensor(list(codes), dtype=torch.long, device=device).view(1, side, side)
            decoded = self.network.decode(grid)[0, 0].clamp(0, 1)
        return decoded.float().cpu().numpy()

    def to_text(self, depth: NDArray[np.generic]) -> str:
        """Encode a map as a model writes it: ``<DEPTH_START><DEPTH_12>...<DEPTH_END>``."""
        return format_depth(self.encode(depth), self.config.num_codes, self.config.num_cells)

    def from_text(self, text: str) -> Floats:
        """Decode the text of one map to ``[size_px, size_px]``; `DataError` for any other text."""
        return self.decode(parse_depth(text, self.config.num_codes, self.config.num_cells))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        target = Path(folder)
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        with replace_atomically(target) as draft:
            save_file(weights, draft / WEIGHTS, metadata={"format": "pt"})
            content = {"model_type": MODEL_TYPE, **asdict(self.config)}
            (draft / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_depth_tokenizer(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> DepthTokenizer:
    """Load a depth tokenizer, ours or a released one.

    Args:
        path: a folder that :meth:`DepthTokenizer.save` or ``vpt depth-tokenizer train`` wrote; or
            a file as AiT's training saves it: a state dict, by itself or under ``weights``, its
            names with or without ``module.`` in front. Such a file must have Aurora's shape.
        device: where to put it.

    Raises:
        CheckpointError: if it does not exist, cannot be read, or has weights that are missing,
            unexpected, of another shape, or not finite.
    """
    source = Path(path)
    check_depth_tokenizer(source)
    if source.is_dir():
        config, weights = _read_config(source / CONFIG), _read_weights(source / WEIGHTS)
    else:
        config, weights = DepthTokenizerConfig(), _read_weights(source)
    with torch.device("meta"):  # a wrong size in the config must not allocate memory
        _check_weights(weights, config.build().state_dict(), source)
    network = config.build()
    network.load_state_dict(weights)
    return DepthTokenizer(network.to(device), config)


def _read_config(file: Path) -> DepthTokenizerConfig:
    content = read_json(file)
    if content.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f"{file} does not describe a depth tokenizer ({MODEL_TYPE})")
    known = [field.name for field in fields(DepthTokenizerConfig)]
    if unknown := sorted(set(content) - set(known)):
        raise CheckpointError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    return DepthTokenizerConfig(**content)


def _read_weights(file: Path) -> dict[str, Tensor]:
    """State dict of a file, without running code in it."""
    check_file(file)
    with as_checkpoint_error(f"cannot read the weights {file}"):
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and "weights" in content:
        content = content["weights"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{file} holds no state dict, neither by itself nor under 'weights'")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _check_weights(given: dict[str, Tensor], wanted: dict[str, Tensor], source: Path) -> None:
    """Refuse weights of other names or shapes, naming the differences."""
    other = [
        f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    differing = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": other,
        "not finite (NaN or infinity)": [n for n, w in given.items() if not w.isfinite().all()],
    }
    if faults := [f"{kind}: {_some(names)}" for kind, names in differing.items() if names]:
        raise CheckpointError(f"{source} is no depth tokenizer of this shape; {'; '.join(faults)}")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + rest

"""M-RoPE positions of a token stream, whole or piece by piece (Qwen2-VL, arXiv 2409.12191)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpt.errors import PositionError


def mrope_positions(
    token_ids: Sequence[int],
    grids_hw: Sequence[tuple[int, int]],
    image_token_id: int,
    start: int = 0,
) -> tuple[Tensor, int]:
    """Positions of a piece of a stream.

    Text advances all three axes by one. An image of ``h x w`` tokens takes one temporal position
    and ``h`` and ``w`` spatial ones, all counted from where it starts, and advances the stream by
    ``max(h, w)``. Re-encoded features are numbered like text, as released.

    Args:
        grids_hw: of each image in the piece, in order, ``(h, w)`` in *tokens* (merged patches).
        start: position at which the piece begins.

    Returns:
        ``[3, S]`` positions (temporal, height, width) and the position after the piece.

    Raises:
        PositionError: if the placeholders are not exactly those of the grids.
    """
    pieces: list[Tensor] = []
    grids = iter(grids_hw)
    index, position = 0, start
    ids = list(token_ids)
    while index < len(ids):
        if ids[index] != image_token_id:
            end = index
            while end < len(ids) and ids[end] != image_token_id:
                end += 1
            pieces.append(torch.arange(position, position + end - index).expand(3, -1))
            position += end - index
        else:
            grid_hw = next(grids, None)
            if grid_hw is None:
                raise PositionError(
                    f"image placeholder at index {index}, but only {len(grids_hw)} image(s) came"
                )
            h, w = grid_hw
            end = index + h * w
            if any(token_id != image_token_id for token_id in ids[index:end]) or end > len(ids):
                raise PositionError(
                    f"an image of {h}x{w} tokens needs {h * w} placeholders from index {index} on"
                )
            height = torch.arange(h).repeat_interleave(w)
            width = torch.arange(w).repeat(h)
            pieces.append(torch.stack([torch.zeros(h * w, dtype=torch.long), height, width]))
            pieces[-1] = pieces[-1] + position
            position += max(h, w)
        index = end
    if next(grids, None) is not None:
        raise PositionError(f"{len(grids_hw)} image(s) came, but there are fewer placeholder runs")
    whole = torch.cat(pieces, dim=1) if pieces else torch.empty(3, 0, dtype=torch.long)
    return whole, position


def batch_mrope_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_grid_thw: Tensor | None,
    image_token_id: int,
    merge_size: int,
) -> Tensor:
    """Positions ``[3, B, S]`` of a padded batch, 0 at padding.

    Args:
        attention_mask: ``[B, S]``, 0 at padding on either side; ``None`` for no padding.
        image_grid_thw: ``[num_images, 3]`` in patches, all rows' images in reading order. An image
            may lie in the padding: LLaMA-Factory puts one there when a batch has none.

    Raises:
        PositionError: if placeholders and images disagree.
    """
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    grids_hw = [(h // merge_size, w // merge_size) for _, h, w in grids]
    used = 0
    for row, ids in enumerate(input_ids.cpu()):
        kept = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            kept = attention_mask[row].cpu().bool()
        placeholders = (ids == image_token_id).nonzero().flatten()
        row_grids: list[tuple[int, int]] = []
        while len(placeholders) and used < len(grids_hw):
            h, w = grids_hw[used]
            if kept[placeholders[: h * w]].any():
                row_grids.append((h, w))
            placeholders = placeholders[h * w :]
            used += 1
        row_ids = ids[kept].tolist()
        positions[:, row, kept] = mrope_positions(row_ids, row_grids, image_token_id)[0]
    if used != len(grids_hw):
        raise PositionError(f"{len(grids_hw)} images came, but the text has room for {used}")
    return positions.to(input_ids.device)

"""Fits and measures the test by which the embedded model recognises the images it is meant for.

Run ``python -m recipes.embedded.inputs --kinds data/embedded/train --heldout
data/embedded/heldout --model vpt/embedded``; each folder has images of a kind.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.cli.output import print_out
from vpt.errors import CheckpointError
from vpt.evaluation.intervals import wilson_interval
from vpt.files import write_atomic
from vpt.images import load_image
from vpt.model.folder import read_json
from vpt.model.intended import IntendedInputs, image_features

DESCRIPTION = "drawn pictures such as those in examples, not photos"
NUM_IMAGES = 1000  # of each kind
PASSED = 0.995  # share of the training images, as drawn and saved again
_SEED = 0
_SCALES, _QUALITIES = (0.4, 2.5), (40, 95)


def save_again(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image at another size, as a JPEG of another quality."""
    scale = np.exp(rng.uniform(*np.log(_SCALES)))
    width, height = (round(side * scale) for side in image.size)
    return as_jpeg(
        image.resize((width, height), Image.Resampling.BICUBIC), int(rng.integers(*_QUALITIES))
    )


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after JPEG compression."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def fit(kinds: Iterable[Iterable[Image.Image]]) -> IntendedInputs:
    """Fit a distribution to the images of each kind, each image as it is and saved again.

    Raises:
        CheckpointError: if there are too few.
    """
    fitted = [np.array(part) for part in zip(*map(_fit_kind, kinds), strict=True)]
    return IntendedInputs(DESCRIPTION, *fitted)


def _fit_kind(
    images: Iterable[Image.Image],
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Mean, precision and limit."""
    rng = np.random.default_rng(_SEED)
    both = [one for image in images for one in (image, save_again(image, rng))]
    if len(both) < 200:
        raise CheckpointError(f"expected at least 100 training images, found {len(both) // 2}")
    features = np.array([image_features(image) for image in both])
    mean, precision = map(_rounded, (features.mean(0), np.linalg.inv(np.cov(features.T))))
    offsets = features - mean
    squares = np.einsum("ni,ij,nj->n", offsets, precision, offsets)
    return mean, precision, round(float(np.quantile(squares, PASSED)), 2)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Six digits of each value."""
    return np.vectorize(lambda value: float(f"{value:.6g}"))(values)


def measure(
    inputs: IntendedInputs, drawn: Sequence[Image.Image], photos: Sequence[Image.Image]
) -> Iterator[str]:
    """Rows of a table: false alarms on drawn images, misses on photos, with Wilson intervals."""
    rng = np.random.default_rng(_SEED + 1)
    sets = {
        "held-out drawn images": drawn,
        "the same, saved again": [save_again(one, rng) for one in drawn],
        "the same, JPEG quality 50": [as_jpeg(one, 50) for one in drawn],
        "photos": photos,
        "the same photos, saved again": [save_again(one, rng) for one in photos],
    }
    for name, images in sets.items():
        if not images:
            continue
        num_warned = sum(inputs.distance(image) > 1 for image in images)
        num_wrong = len(images) - num_warned if "photos" in name else num_warned
        found = wilson_interval(num_wrong, len(images))
        kind = "misses" if "photos" in name else "false alarms"
        share = f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
        yield f"| {name} | {len(images)} | {kind} | {num_wrong} | {share} |"


def read_images(folder: Path, most: int | None = None) -> list[Image.Image]:
    """The JPEG and PNG images of a folder, in the order of their names."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".jpg", ".png"))
    return [load_image(file).pixels for file in files[:most]]


def write_setting(inputs: IntendedInputs, folder: Path) -> None:
    """Write the setting into the configuration of a model folder."""
    file = folder / "config.json"
    content = {**read_json(file), "intended_inputs": inputs.to_dict()}
    write_atomic(json.dumps(content, indent=2, sort_keys=True) + "\n", file)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, write and measure what the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kinds", type=Path, nargs="+", required=True, help="folders of images")
    parser.add_argument("--heldout", type=Path, nargs="+", required=True, help="others, to measure")
    parser.add_argument("--model", type=Path, required=True, help="model folder to write into")
    parser.add_argument("--photos", type=Path, help="folder of photos, to count misses")
    args = parser.parse_args(argv)
    try:
        inputs = fit(read_images(folder, NUM_IMAGES) for folder in args.kinds)
        write_setting(inputs, args.model)
    except CheckpointError as exc:
        parser.error(str(exc))
    drawn = [image for folder in args.heldout for image in read_images(folder, NUM_IMAGES)]
    photos = read_images(args.photos) if args.photos else []
    print_out("| images | n | error | number | share [95 % interval] |\n|---|---|---|---|---|")
    for row in measure(inputs, drawn, photos):
        print_out(row)


if __name__ == "__main__":
    main()

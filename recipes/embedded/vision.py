"""Stage 1 of the embedded model: its vision parts learn what is where, from dense labels.

Run ``python -m recipes.embedded.vision configs/embedded/1-vision.yaml``. Each encoder is
trained by itself and resumes where it was stopped; when all are there, the model is put together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from recipes.embedded.labels import CONTENTS, HEADS, IGNORE, Labels, label_view
from recipes.embedded.perception import (
    SceneBatches,
    SceneHeads,
    counting_sources,
    room_sources,
)
from recipes.embedded.questions import cell_of
from recipes.embedded.scenes import SIZE_PX, Scene, draw_scene
from recipes.embedded.settings import read_settings, warm_cosine
from recipes.embedded.shape import FIRST_LOOK_PX, TOWER_DEPTH, fresh_model
from recipes.embedded.sheets import CLOSE_PX, close_sheet, far_sheet
from recipes.embedded.views import BranchView, TowerView, whiten_patches
from vpt.boxes import GridBox, PixelBox, crop_box_px
from vpt.depth.tokenizer import load_depth_tokenizer
from vpt.errors import NonFiniteError
from vpt.files import replace_atomically
from vpt.model.modeling import VPTForConditionalGeneration, load_model
from vpt.model.processing import VPTProcessor

ENCODERS = ("tower", "dino", "sam")
_VIEW_PX = {"tower": FIRST_LOOK_PX, "dino": 256, "sam": 256}
_LABELS_PER_SIDE = {"tower": FIRST_LOOK_PX // 28, "dino": 16, "sam": 4}
_FIRST_DIGIT = CONTENTS.index("0")
_LOG_STEPS = 20
_FEATURE_STD = 0.5  # of the tower's tokens in the end: about that of word embeddings


@dataclass(frozen=True)
class Settings:
    """What the YAML says.

    Attributes:
        output_dir: folder of the trained model.
        encoders: which to train now.
        steps: per encoder.
        batch_size: views per step, per encoder.
        learning_rate: at its height.
        warmup_steps: until then.
        weight_decay: of matrices.
        save_steps: between checkpoints.
        num_workers: processes that draw.
        seed: of weights and pictures.
        tower_depth: blocks of the tower.
        start: folder of a model whose tower is trained further, and that gets it; fresh if missing.
        muon_learning_rate: of the matrices between first and last layer; AdamW's if missing.
        scene_batch_size: views of rooms and counting scenes per step of the tower, in addition.
        rooms: folder of ``make-scenes``.
        counting: folder of ``make-counting-scenes``.
        depth_tokenizer: folder of the tokenizer whose codes are learned.
    """

    output_dir: str
    encoders: tuple[str, ...] = ENCODERS
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    batch_size: Mapping[str, int] = dataclasses.field(default_factory=dict)
    learning_rate: float = 1.5e-3
    warmup_steps: int = 60
    weight_decay: float = 0.02
    save_steps: int = 200
    num_workers: int = 1
    seed: int = 1
    tower_depth: int = TOWER_DEPTH
    start: str = ""
    muon_learning_rate: float | None = None
    scene_batch_size: int = 0
    rooms: str = ""
    counting: str = ""
    depth_tokenizer: str = ""


class Views(Dataset[dict[str, Any]]):
    """Batches of labelled views, drawn when asked for; the number of a batch is its seed.

    Args:
        encoder: one of ``ENCODERS``.
        settings: of the run.
        split: ``"train"`` or ``"heldout"``.
    """

    def __init__(self, encoder: str, settings: Settings, split: str) -> None:
        self.encoder = encoder
        self.settings = settings
        self.split = split
        self.num_cells = _LABELS_PER_SIDE[encoder]
        self.scenes = scenes_of(settings) if encoder == "tower" else None

    def __len__(self) -> int:
        return self.settings.steps[self.encoder]

    def __getitem__(self, number: int) -> dict[str, Any]:
        seed = [self.settings.seed, ENCODERS.index(self.encoder), number, self.split == "heldout"]
        rng = np.random.default_rng(seed)
        draw = _near_and_far if self.encoder == "tower" else _whole_boards
        drawn: list[tuple[Image.Image, Labels, bool]] = []
        while len(drawn) < self.settings.batch_size[self.encoder]:
            drawn += draw(rng, self.split, self.num_cells)
        drawn = drawn[: self.settings.batch_size[self.encoder]]
        side = _VIEW_PX[self.encoder]
        resample = Image.Resampling.BILINEAR if self.encoder == "sam" else Image.Resampling.BICUBIC
        pixels = [np.asarray(image.resize((side, side), resample)) for image, _, _ in drawn]
        batch: dict[str, Any] = {"pixels": torch.from_numpy(np.stack(pixels))}
        for head in HEADS:
            grids = [getattr(labels, head) for _, labels, _ in drawn]
            batch[head] = torch.from_numpy(np.stack(grids))
        batch["is_close"] = torch.tensor([is_close for _, _, is_close in drawn])
        if self.scenes:
            batch["scenes"] = self.scenes[number]
        return batch


def scenes_of(settings: Settings) -> SceneBatches | None:
    """Rooms and counting scenes that the tower is trained on, if any.

    Raises:
        PromptError: if a folder that the settings name is missing.
    """
    if not settings.scene_batch_size:
        return None
    rooms = room_sources(Path(settings.rooms))
    counting = counting_sources(Path(settings.counting))
    return SceneBatches(
        rooms,
        counting,
        load_depth_tokenizer(settings.depth_tokenizer),
        settings.scene_batch_size,
        settings.steps["tower"],
        settings.seed,
    )


def _near_and_far(
    rng: np.random.Generator, split: str, num_cells: int
) -> list[tuple[Image.Image, Labels, bool]]:
    """What the tower sees: first looks, and crops."""
    out = []
    whole = (0.0, 0.0, float(SIZE_PX), float(SIZE_PX))
    close = (0.0, 0.0, float(CLOSE_PX), float(CLOSE_PX))
    scene = far_sheet(rng, split) if rng.random() < 0.3 else draw_scene(rng, split)
    out.append((scene.image, label_view(scene.items, whole, num_cells, reads_fine=False), False))
    if scene.kind == "tags":
        for item in scene.items[:2]:
            box = _crop_around(scene, cell_of(item), rng)
            view = scene.image.crop(box)
            out.append((view, label_view(scene.items, box, num_cells, reads_fine=False), True))
    for _ in range(2):
        sheet = close_sheet(rng, split)
        out.append((sheet.image, label_view(sheet.items, close, num_cells, reads_fine=False), True))
    return out


def _crop_around(scene: Scene, cell: GridBox, rng: np.random.Generator) -> PixelBox:
    """The box of a crop of an item; sometimes one cell off, as the model will be."""
    shift = rng.integers(-1, 2, 2) if rng.random() < 0.3 else (0, 0)
    x, y = (
        min(max(v + int(d), 0), 7) for v, d in zip((cell.x_min, cell.y_min), shift, strict=True)
    )
    return crop_box_px(GridBox(x, y, x, y), scene.image.size)


def _whole_boards(
    rng: np.random.Generator, split: str, num_cells: int
) -> list[tuple[Image.Image, Labels, bool]]:
    """What the sharper encoders see: whole pictures, mostly of boards."""
    kind = str(rng.choice(("boards", "tags", "things"), p=(0.9, 0.05, 0.05)))
    scene = draw_scene(rng, split, kind)
    whole = (0.0, 0.0, float(SIZE_PX), float(SIZE_PX))
    return [(scene.image, label_view(scene.items, whole, num_cells, reads_fine=True), False)]


class DenseHeads(nn.Module):
    """One linear read-out per head over the features of a place.

    Args:
        feature_dim: width of the features.
        names: which of ``HEADS``.
    """

    def __init__(self, feature_dim: int, names: Iterable[str] = HEADS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.heads = nn.ModuleDict()
        for name in names:
            size = HEADS[name]
            num_classes = 4 * (size // 4 + 1) if name == "tag" else size + 1
            self.heads[name] = nn.Linear(feature_dim, num_classes)

    def forward(
        self, features: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and accuracies.

        Places with nothing, with something and, apart from it, with a digit are averaged each for
        itself: there is far more of nothing, and digits are harder than the rest.

        Args:
            features: ``[B, n * n, C]``.
            batch: labels of the heads, ``[B, n, n]`` or ``[B, n, n, 4]``.

        Returns:
            The loss, and the share of right ones per group of places that are not empty.
        """
        features = self.norm(features)
        loss = features.new_zeros(())
        right = {}
        for name, head in self.heads.items():
            labels = batch[name].flatten()
            logits = head(features).view(len(labels), -1)
            for group, chosen in _groups(name, labels, logits.shape[-1] - 1, batch).items():
                if not chosen.any():
                    continue
                loss = loss + F.cross_entropy(logits[chosen], labels[chosen])
                if group != "nothing":
                    guessed = logits[chosen][:, :-1].argmax(-1)
                    right[group] = float((guessed == labels[chosen]).float().mean())
        return loss, right


def _groups(
    head: str, labels: Tensor, nothing: int, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Which places of a head are averaged together: name -> ``[places]`` bool."""
    counted = labels != IGNORE
    if head == "tag":  # crops do not say where on the whole picture they are
        far = ~batch["is_close"].view(-1, 1, 1, 1).expand_as(batch[head])
        counted = counted & far.flatten()
    empty = labels == nothing
    groups = {"nothing": counted & empty}
    if head != "content":
        return {head: counted & ~empty, **groups}
    is_digit = (labels >= _FIRST_DIGIT) & (labels < _FIRST_DIGIT + 10)
    return {"texture": counted & ~empty & ~is_digit, "digit": is_digit, **groups}


def train_encoder(encoder: str, settings: Settings) -> None:
    """Train one encoder, or go on where it was stopped.

    A branch is trained together with its projector, and read by the heads of the tower as they
    are: what the language model learns to read from one, it can then read from all.

    Args:
        encoder: one of ``ENCODERS``.
        settings: of the run.

    Raises:
        ValueError: for a branch, before the tower is trained.
    """
    torch.manual_seed(settings.seed)
    model, processor = fresh_model(settings.seed, settings.tower_depth)
    view = _view_of(encoder, model, processor)
    width = model.config.text_config.hidden_size
    heads = DenseHeads(width) if encoder == "tower" else _heads_of_tower(width, settings)
    views = Views(encoder, settings, "train")
    if isinstance(view, TowerView) and settings.start:
        start = load_model(settings.start, device="cpu", dtype=torch.float32)
        view.visual.load_state_dict(start.model.visual.state_dict())
    else:
        _whiten(encoder, view, views[0]["pixels"], settings.seed)
    trained = nn.ModuleDict({"view": view, "heads": heads})
    if views.scenes:
        trained["scene_heads"] = SceneHeads(width)
    optimizers = _make_optimizers(trained, settings)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: warm_cosine(step, len(views), settings.warmup_steps)
        )
        for one in optimizers
    ]
    state_file = Path(settings.output_dir) / f"{encoder}.pt"
    first = _restore(state_file, trained, optimizers, schedulers)
    batches = DataLoader(
        views,
        batch_size=None,
        sampler=range(first, len(views)),
        num_workers=settings.num_workers,
    )
    bar = tqdm(batches, desc=encoder, initial=first, total=len(views), mininterval=10)
    mean: dict[str, float] = {}
    for step, batch in enumerate(cast(Iterator[dict[str, Any]], bar), first + 1):
        loss, right = _loss(trained, batch)
        if not math.isfinite(loss_now := loss.item()):
            raise NonFiniteError(
                f"{encoder}: the loss of step {step} is {loss_now}; train with a smaller "
                "learning rate"
            )
        trained.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        for name, value in {"loss": loss_now, **right}.items():
            mean[name] = 0.95 * mean.get(name, value) + 0.05 * value
        bar.set_postfix({name: f"{value:.3f}" for name, value in mean.items()}, refresh=False)
        if step % _LOG_STEPS == 0:
            _log(state_file.with_suffix(".jsonl"), step, mean)
        if step % settings.save_steps == 0 or step == len(views):
            _save(state_file, step, trained, optimizers, schedulers, mean)


def _loss(trained: nn.ModuleDict, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch, and what each head is worth."""
    loss, right = trained["heads"](trained["view"](batch["pixels"]), batch)
    if "scenes" in batch:
        heads = cast(SceneHeads, trained["scene_heads"])
        more, shown = heads.loss(trained["view"](batch["scenes"]["pixels"]), batch["scenes"])
        loss = loss + more
        right |= {f"scene_{name}": value for name, value in shown.items()}
    return loss, right


def _make_optimizers(trained: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices between the first and the last layer if it has a rate."""
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "matrices": [], "vectors": []}
    for name, parameter in trained.named_parameters():
        is_inner = ".blocks." in name or ".merger.mlp.0." in name
        if parameter.requires_grad:
            kind = "matrices" if parameter.ndim > 1 else "vectors"
            by_muon = settings.muon_learning_rate and is_inner and parameter.ndim == 2
            groups["muon" if by_muon else kind].append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": groups["matrices"], "weight_decay": settings.weight_decay},
                {"params": groups["vectors"], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
        )
    ]
    if settings.muon_learning_rate:
        optimizers.append(
            torch.optim.Muon(
                groups["muon"],
                lr=settings.muon_learning_rate,
                weight_decay=settings.weight_decay,
            )
        )
    return optimizers


def _log(file: Path, step: int, mean: Mapping[str, float]) -> None:
    """Add a line of running means."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = {"step": step, **{name: round(value, 4) for name, value in mean.items()}}
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def _view_of(
    encoder: str, model: VPTForConditionalGeneration, processor: VPTProcessor
) -> TowerView | BranchView:
    if encoder == "tower":
        return TowerView(model, processor)
    return BranchView(model.branches[encoder], model.projector(encoder))


def _check_tower(settings: Settings) -> None:
    if not is_finished("tower", settings):
        raise ValueError(
            "the branches are read by the heads of the tower: train it first (encoders=tower)"
        )


def _heads_of_tower(width: int, settings: Settings) -> DenseHeads:
    """The tower's heads, frozen; not those for tags, whose places depend on the size of a token."""
    _check_tower(settings)
    heads = DenseHeads(width, [name for name in HEADS if name != "tag"])
    state = torch.load(Path(settings.output_dir) / "tower.pt", weights_only=True)["trained"]
    heads.load_state_dict({name: state[f"heads.{name}"] for name in heads.state_dict()})
    return heads.requires_grad_(False)


def _whiten(encoder: str, view: Any, pixels: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if encoder == "tower":
        patches = view.patches(pixels).flatten(0, 1)
        both = view.visual.patch_embed.proj.weight  # of the two frames, which are equal
        weight = torch.empty_like(both[:, :, 0])
    else:
        values = ((pixels.float() - view.mean) / view.std).permute(0, 3, 1, 2)
        embeddings = (m for m in view.modules() if isinstance(m, nn.Conv2d))
        convolution = next(embeddings)
        size = convolution.kernel_size[0]
        patches = F.unfold(values, size, stride=size).transpose(1, 2).flatten(0, 1)
        weight = convolution.weight
    with torch.no_grad():
        whiten_patches(weight, patches, generator)
        if encoder == "tower":
            both.copy_(weight.unsqueeze(2) / 2)


def _restore(
    file: Path, trained: nn.Module, optimizers: Sequence[Any], schedulers: Sequence[Any]
) -> int:
    """Steps that were done before."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    trained.load_state_dict(state["trained"])
    for name, ones in (("optimizers", optimizers), ("schedulers", schedulers)):
        for one, stored in zip(ones, state[name], strict=True):
            one.load_state_dict(stored)
    return int(state["step"])


def _save(
    file: Path,
    step: int,
    trained: nn.Module,
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    accuracies: Mapping[str, float],
) -> None:
    """Save whole or not at all."""
    state = {
        "step": step,
        "trained": trained.state_dict(),
        "optimizers": [one.state_dict() for one in optimizers],
        "schedulers": [one.state_dict() for one in schedulers],
        "accuracies": dict(accuracies),
    }
    with replace_atomically(file.parent) as draft:
        torch.save(state, draft / file.name)


def is_finished(encoder: str, settings: Settings) -> bool:
    """Whether an encoder has been trained to its end."""
    file = Path(settings.output_dir) / f"{encoder}.pt"
    if not file.exists():
        return False
    return bool(torch.load(file, weights_only=True)["step"] >= settings.steps[encoder])


def put_together(settings: Settings) -> None:
    """Make a model folder of the trained encoders.

    The last layers are shifted and scaled so that the tower's tokens are centred, with the spread
    of word embeddings: the language model starts from there.

    Args:
        settings: of the run.
    """
    model, processor = fresh_model(settings.seed, settings.tower_depth)
    for encoder in ENCODERS:
        _load_trained(encoder, _view_of(encoder, model, processor), settings)
    _center(
        TowerView(model, processor),
        settings,
        [model.projector("dino").linear_feature, model.projector("sam").conv_feature],
    )
    model.save_pretrained(settings.output_dir)
    processor.save_pretrained(settings.output_dir)


def _load_trained(encoder: str, view: nn.Module, settings: Settings) -> None:
    state = torch.load(Path(settings.output_dir) / f"{encoder}.pt", weights_only=True)
    own = "view."
    weights = {k.removeprefix(own): v for k, v in state["trained"].items() if k.startswith(own)}
    view.load_state_dict(weights)


@torch.no_grad()
def _center(view: TowerView, settings: Settings, others: Iterable[Any] = ()) -> None:
    """Shift and scale the last layer of the tower, and others alike, as word embeddings are."""
    batch = Views("tower", settings, "train")[0]
    pictures = [batch["pixels"], *([batch["scenes"]["pixels"]] if "scenes" in batch else [])]
    tokens = torch.cat([view(pixels).flatten(0, 1) for pixels in pictures])
    center = tokens.mean(0)
    scale = _FEATURE_STD / (tokens - center).std()
    for last in (view.visual.merger.mlp[2], *others):
        last.bias.sub_(center).mul_(scale)
        last.weight.mul_(scale)


def put_into_start(settings: Settings) -> None:
    """Make a model folder of the model that was the start, with its tower as trained.

    Its tokens are centred and scaled as in :func:`put_together`.
    """
    model = load_model(settings.start, device="cpu", dtype=torch.float32)
    processor = VPTProcessor.from_pretrained(settings.start)
    view = TowerView(model, processor)
    _load_trained("tower", view, settings)
    _center(view, settings)
    model.save_pretrained(settings.output_dir)
    processor.save_pretrained(settings.output_dir)


def vision_settings(file: Path, overrides: Sequence[str]) -> Settings:
    """Read a YAML, and ``key=value`` words that go before it; one encoder may be named alone.

    Raises:
        ValueError: for an unknown key or encoder, or a word without ``=``.
    """
    settings = read_settings(Settings, file, overrides)
    named = settings.encoders
    encoders = (named,) if isinstance(named, str) else tuple(named)
    if unknown := set(encoders) - set(ENCODERS):
        raise ValueError(
            f"unknown encoder {sorted(unknown)[0]!r}; available: {', '.join(ENCODERS)}"
        )
    return dataclasses.replace(settings, encoders=encoders)


def main() -> None:
    """Train what the YAML names; put the model together once every encoder is trained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        settings = vision_settings(args.config, args.overrides)
        if settings.encoders[0] != "tower":
            _check_tower(settings)
    except (OSError, ValueError) as exc:
        parser.error(str(exc))
    for encoder in settings.encoders:
        train_encoder(encoder, settings)
    if settings.start:
        put_into_start(settings)
        tqdm.write(f"the model is in {settings.output_dir}")
        return
    if unfinished := [encoder for encoder in ENCODERS if not is_finished(encoder, settings)]:
        tqdm.write(f"still to train: {', '.join(unfinished)}")
        return
    put_together(settings)
    tqdm.write(f"the model is in {settings.output_dir}")


if __name__ == "__main__":
    main()

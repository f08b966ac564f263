"""``python -m recipes make-detector``: a small GroundingDINO for the drawn images.

It has the form of the released detectors, in transformers' format, and learns phrases such as
"the blue tag" in minutes. transformers' own loss is of no use here (as of 5.24): it trains neither
the scores nor the boxes by which the encoder proposes queries, and its offsets of labels are wrong
in batches of more than two captions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from recipes.embedded.marks import COLORS
from recipes.embedded.scenes import SIZE_PX, Item, Scene, draw_scene
from vpt.boxes import contains, crop_box_px, iou, region_to_show
from vpt.branches import GroundingBranch
from vpt.branches.grounding import normalise, resize
from vpt.branches.groundingdino import correct_positions
from vpt.cli.output import check_out_folder, print_err, print_out
from vpt.cli.parser import Command, whole_number
from vpt.evaluation.intervals import wilson_interval

EDGES_PX = (160, 267)
KINDS = ("tag", "board", "thing")
STEPS, NUM_SCENES = 1600, 2400
THRESHOLD = 0.35  # of `GroundingBranch.propose`

MEASURES = (
    "IoU of the best box is 0.5 or more",
    "crop of the best box shows the whole item",
    "score of the best box is above 0.35",
    "box above 0.35 for what is not there",
)

_BATCH = 8
_LEARNING_RATE = 3e-3
_PATCH_PX = 8
_WORDS = ("the", "a", "one", *COLORS, *KINDS)
_CONTROL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
_FIRST_WORD, _VOCAB_SIZE = 200, 1030
_WIDTH = 64
_SWIN = {
    "embed_dim": 32,
    "patch_size": _PATCH_PX,
    "depths": [1, 1, 1],
    "num_heads": [2, 2, 4],
    "window_size": 7,
    "mlp_ratio": 2.0,
    "out_indices": [1, 2, 3],
    "drop_path_rate": 0.0,
}
_TEXT = {
    "model_type": "bert",
    "vocab_size": _VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DETECTOR = {
    "d_model": _WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "decoder_bbox_embed_share": False,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * _WIDTH,
    "decoder_ffn_dim": 2 * _WIDTH,
    "num_queries": 16,
    "num_feature_levels": 3,
    "max_text_len": 48,
    "dropout": 0.0,
    "fusion_droppath": 0.0,
}
_LIKE_AN_ANCHOR = 4  # proposals of the encoder that learn each box

Phrase = tuple[str, Item | None]


def fresh_detector(seed: int) -> GroundingBranch:
    """The detector with random weights."""
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        SwinConfig,
    )

    ids = _CONTROL_IDS | {word: _FIRST_WORD + i for i, word in enumerate(_WORDS)}
    words = {number: word for word, number in ids.items()}
    vocab = {words.get(i, f"[unused{i}]"): i for i in range(_VOCAB_SIZE)}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**_SWIN), text_config=dict(_TEXT), **_DETECTOR
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = GroundingDinoForObjectDetection(config)
        _spread(encoder)
    correct_positions(encoder)
    return GroundingBranch(encoder, BertTokenizer(vocab=vocab), EDGES_PX)


@torch.no_grad()
def _spread(encoder: Any) -> None:
    """Scale weights by their width, and let scores begin near 0: the usual start is too slow."""
    for name, module in encoder.named_modules():
        if "sampling_offsets" in name or "attention_weights" in name:
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            last = name.endswith(("fc2", "out_proj", "output.dense", "output_proj"))
            std = (0.5 if last else 1.0) * module.weight[0].numel() ** -0.5
            nn.init.normal_(module.weight, 0, std)
        elif isinstance(module, nn.Embedding) and "query" not in name:
            nn.init.normal_(module.weight, 0, 0.5)
    model = encoder.model
    for layer in model.encoder.layers:
        layer.fusion_layer.vision_param.fill_(0.3)
        layer.fusion_layer.text_param.fill_(0.3)
    # A score is the dot product of two normalised vectors: short ones, with a mean of -3.
    text_norm = model.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    text_norm.weight *= 0.1
    text_norm.bias += 6 / _WIDTH
    for norm in (model.enc_output_norm, model.decoder.layer_norm):
        norm.bias -= 0.5
    for layer in model.decoder.layers:
        layer.encoder_attn_text.key.weight *= 5
        layer.encoder_attn_text.value.weight *= 5
    for head in (model.encoder_output_bbox_embed, *encoder.bbox_embed):
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)


def phrases(scene: Scene, rng: np.random.Generator) -> list[Phrase]:
    """Phrases for the items of a scene, and for what it does not show, in random order."""
    found: list[Phrase] = []
    for item in scene.items[:6]:
        noun = str(rng.choice([item.kind, item.kind, "one"]))
        found.append((f"{rng.choice(['the ', 'a ', ''])}{item.color} {noun}", item))
    for color in _absent(scene, rng)[:3]:
        found.append((f"the {color} {rng.choice([*KINDS, 'one'])}", None))
    item = scene.items[int(rng.integers(len(scene.items)))]
    other = [kind for kind in KINDS if kind != item.kind]
    found.append((f"the {item.color} {rng.choice(other)}", None))
    return [found[i] for i in rng.permutation(len(found))]


def _absent(scene: Scene, rng: np.random.Generator) -> list[str]:
    present = {item.color for item in scene.items}
    absent = [color for color in COLORS if color not in present]
    return [absent[i] for i in rng.permutation(len(absent))]


def train(
    branch: GroundingBranch, scenes: Sequence[Scene], num_steps: int, seed: int
) -> Iterator[float]:
    """Train on scenes; yields the loss of each step."""
    encoder = branch.encoder.train()
    pixels = [torch.from_numpy(normalise(resize(scene.image, EDGES_PX))) for scene in scenes]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(num_steps):
        if len(order) < _BATCH:
            order = rng.permutation(len(scenes)).tolist()
        rows = [order.pop() for _ in range(_BATCH)]
        asked = [phrases(scenes[row], rng) for row in rows]
        loss = _loss(branch, torch.stack([pixels[row] for row in rows]), asked)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield float(loss.detach())
    encoder.eval()


def _loss(branch: GroundingBranch, pixel_values: Tensor, asked: Sequence[list[Phrase]]) -> Tensor:
    """Focal loss of the scores, and distance and overlap of the boxes, of encoder and decoder."""
    captions = [". ".join(words for words, _ in caption) + "." for caption in asked]
    tokens = branch.tokenizer(captions, return_tensors="pt", padding=True)
    outputs = branch.encoder(pixel_values=pixel_values, **tokens)
    is_text = tokens["attention_mask"].bool()
    num_tokens = is_text.shape[1]
    phrase_of = _phrase_of_token(tokens["input_ids"])
    targets = [_targets(*one) for one in zip(asked, phrase_of, strict=True)]
    proposed = outputs.enc_outputs_class[..., :num_tokens]
    proposed_boxes = outputs.enc_outputs_coord_logits.sigmoid()
    scores, boxes = outputs.logits[..., :num_tokens], outputs.pred_boxes
    anchors = _anchors(branch.encoder.config.num_feature_levels)
    loss = pixel_values.new_zeros(())
    for row, (true_boxes, true_tokens) in enumerate(targets):
        nearest = _overlap(anchors[:, None], true_boxes)[0].topk(_LIKE_AN_ANCHOR, dim=0).indices
        which = torch.arange(len(true_boxes)).expand_as(nearest).flatten()
        pairs = (nearest.flatten(), which)
        heads = [(proposed[row], proposed_boxes[row], pairs)]
        pairs = _match(scores[row], boxes[row], true_boxes, true_tokens)
        heads.append((scores[row], boxes[row], pairs))
        for head, head_boxes, (chosen, wanted) in heads:
            expected = torch.zeros_like(head)
            expected[chosen] = true_tokens[wanted]
            focal = _focal(head[:, is_text[row]], expected[:, is_text[row]])
            distance = (head_boxes[chosen] - true_boxes[wanted]).abs().sum()
            apart = (1 - _overlap(head_boxes[chosen], true_boxes[wanted])[1]).sum()
            loss = loss + (2 * focal + 5 * distance + 2 * apart) / len(chosen) / len(targets)
    return loss


def _phrase_of_token(input_ids: Tensor) -> Tensor:
    """``[B, T]``: the index of each token's phrase in its caption, -1 for delimiters."""
    ends = input_ids == _CONTROL_IDS["."]
    is_word = ~torch.isin(input_ids, torch.tensor(list(_CONTROL_IDS.values())))
    return torch.where(is_word, ends.cumsum(-1), -1)


def _targets(caption: Sequence[Phrase], phrase_of: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes ``[G, 4]`` (centre and size, 0 to 1) and their tokens ``[G, T]``."""
    named = [(i, item) for i, (_, item) in enumerate(caption) if item is not None]
    corners = torch.tensor([item.box for _, item in named]) / SIZE_PX
    boxes = torch.cat([corners.view(-1, 2, 2).mean(1), corners[:, 2:] - corners[:, :2]], dim=1)
    return boxes, torch.stack([(phrase_of == i).float() for i, _ in named])


def _anchors(num_levels: int) -> Tensor:
    """Where the port lets the encoder's proposals begin, ``[N, 4]``: centre and size."""
    boxes = []
    side = -(-EDGES_PX[0] // _PATCH_PX)
    for level in range(num_levels):
        middles = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        size = torch.full_like(x, 0.05 * 2**level)
        boxes.append(torch.stack([x, y, size, size], dim=-1).view(-1, 4))
        side = -(-side // 2)
    return torch.cat(boxes)


@torch.no_grad()
def _match(
    scores: Tensor, boxes: Tensor, true_boxes: Tensor, true_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Hungarian matching of queries and boxes, with the costs of GroundingDINO."""
    score = scores.sigmoid()
    positive = 0.25 * (1 - score) ** 2 * -(score + 1e-8).log()
    negative = 0.75 * score**2 * -(1 - score + 1e-8).log()
    shares = true_tokens / true_tokens.sum(1, keepdim=True)
    cost = 2 * (positive - negative) @ shares.T + 5 * torch.cdist(boxes, true_boxes, p=1)
    cost -= 2 * _overlap(boxes[:, None], true_boxes)[1]
    chosen, wanted = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(chosen), torch.from_numpy(wanted)


def _focal(logits: Tensor, expected: Tensor) -> Tensor:
    score = logits.sigmoid()
    error = torch.where(expected > 0, 1 - score, score)
    entropy = F.binary_cross_entropy_with_logits(logits, expected, reduction="none")
    return 0.5 * (entropy * error**2).sum()


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes ``[..., 4]``, centre and size."""
    low_a, high_a = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    low_b, high_b = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    inner = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    outer = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
    return inner / union, inner / union - (outer - union) / outer


def measure(branch: GroundingBranch, scenes: Sequence[Scene], seed: int) -> dict[str, list[bool]]:
    """Ask for each item of the scenes, and for things that are not there."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[bool]] = {name: [] for name in MEASURES}
    for scene in scenes:
        for item in scene.items:
            best = branch.propose(scene.image, item.phrase, box_threshold=0.0)[0]
            shown = crop_box_px(
                region_to_show(best.box_xyxy_px, scene.image.size), scene.image.size
            )
            found["IoU of the best box is 0.5 or more"].append(
                iou(best.box_xyxy_px, item.box) >= 0.5
            )
            found["crop of the best box shows the whole item"].append(contains(shown, item.box))
            found["score of the best box is above 0.35"].append(best.score > THRESHOLD)
        first = scene.items[0]
        missing = [(color, first.kind) for color in _absent(scene, rng)[:1]]
        missing.append((first.color, str(rng.choice([one for one in KINDS if one != first.kind]))))
        for color, kind in missing:
            proposals = branch.propose(scene.image, f"the {color} {kind}", box_threshold=THRESHOLD)
            found["box above 0.35 for what is not there"].append(bool(proposals))
    return found


def save(branch: GroundingBranch, folder: Path) -> None:
    """Write the folder that ``detector=`` takes, in float16."""
    branch.encoder.half().save_pretrained(folder)
    branch.encoder.float()
    branch.tokenizer.save_pretrained(folder)
    shortest, longest = branch.edges_px
    settings = {"size": {"shortest_edge": shortest, "longest_edge": longest}}
    text = json.dumps({**settings, "image_processor_type": "GroundingDinoImageProcessor"}, indent=2)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def draw(split: str, seed: int, number: int) -> Iterator[Scene]:
    """Scenes of a split and a seed of their own."""
    for i in range(number):
        yield draw_scene(np.random.default_rng([seed, i]), split)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    for name, default, of in (
        ("steps", STEPS, f"of training, {_BATCH} images each"),
        ("images", NUM_SCENES, "to train on"),
        ("heldout", 200, "images to measure it on"),
    ):
        what = f"{of} (default: {default})"
        parser.add_argument(
            f"--{name}", type=whole_number(1), default=default, metavar="N", help=what
        )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="of everything (default: 0)"
    )


def _make(args: argparse.Namespace) -> None:
    """Draw, train, save and measure."""
    check_out_folder(args.out)
    from tqdm import tqdm

    quiet = {"disable": not sys.stderr.isatty()}
    scenes = list(tqdm(draw("train", 10 + args.seed, args.images), total=args.images, **quiet))
    branch = fresh_detector(args.seed)
    average = None
    with tqdm(total=args.steps, unit="step", **quiet) as bar:
        for step, loss in enumerate(train(branch, scenes, args.steps, args.seed), start=1):
            average = loss if average is None else 0.95 * average + 0.05 * loss
            bar.update()
            bar.set_postfix(loss=f"{average:.2f}")
            if step % 100 == 0 and not sys.stderr.isatty():
                print_err(f"step {step} of {args.steps}: loss {average:.2f}")
    save(branch, args.out)
    heldout = list(draw("heldout", 4, args.heldout))  # the first of make-embedded's
    print_out("| measure | n | share [95 % interval] |\n|---|---|---|")
    for name, values in measure(GroundingBranch.from_transformers(args.out), heldout, 0).items():
        found = wilson_interval(sum(values), len(values))
        share = f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
        print_out(f"| {name} | {len(values)} | {share} |")


COMMAND = Command(
    help="train a small GroundingDINO for the drawn images",
    description=(
        'Train a detector of 0.5 M parameters on drawn images with captions such as "the blue\n'
        'tag", and measure it on held-out ones. The folder is one for --detector.'
    ),
    examples="example:\n  python -m recipes make-detector --out models/detector",
    add_arguments=_add_arguments,
    run=_make,
)

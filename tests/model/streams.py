"""Token streams written by hand, and the plainest way to run one: a whole pass per call."""

import torch
from PIL import Image

from vpt.model.modeling import scatter_features
from vpt.model.positions import batch_mrope_positions
from vpt.protocol.tokens import BRANCH_TOKENS, VISION_END, VISION_START

PIXELS = {"dino": "detection_images", "sam": "seg_images"}


def picture(seed, size=(56, 42)):
    generator = torch.Generator().manual_seed(seed)
    shape = (size[1], size[0], 3)
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


class Row:
    """A token stream written by hand, with the pixels it needs."""

    def __init__(self, made, *parts):
        self.model, self.processor = made
        self.ids = []
        self.pixels = {"image": [], "reencode": [], "dino": [], "sam": []}
        for part in parts:
            if isinstance(part, str):
                self._text(part)
            elif isinstance(part, tuple):
                self._look(*part)
            else:
                self._look("image", part)

    def _text(self, text):
        self.ids += self.processor.encode_text(text).ids

    def _look(self, kind, image):
        config = self.model.config
        pixels = self._preprocess(kind, image)
        if kind in ("image", "reencode"):
            num_tokens = int(pixels[1].prod()) // 4
        else:
            with torch.no_grad():
                (features,) = self.model.encode(kind, *pixels)
            h, w = self.model.projector(kind).output_grid(features.grid_hw)
            num_tokens = h * w
        pad = config.image_token_id if kind == "image" else config.pad_id(kind)
        self._text(VISION_START)
        self.ids += [pad] * num_tokens
        self._text(VISION_END)
        self.pixels[kind].append(pixels)

    def _preprocess(self, kind, image):
        if kind in ("image", "reencode"):
            out = self.processor.image_processor(images=[image], return_tensors="pt")
            return out["pixel_values"], out["image_grid_thw"]
        return (self.model.branches[kind].preprocess([image])["pixel_values"],)


def batch(*rows, side="right", labels=False):
    """Forward arguments of several rows, padded on one side."""
    width = max(len(row.ids) for row in rows)
    pad_id = rows[0].processor.tokenizer.pad_token_id
    ids, masks = [], []
    for row in rows:
        fill = [pad_id] * (width - len(row.ids))
        mask = [1] * len(row.ids), [0] * len(fill)
        ids.append(row.ids + fill if side == "right" else fill + row.ids)
        masks.append([*mask[0], *mask[1]] if side == "right" else [*mask[1], *mask[0]])
    kwargs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
    for kind, name, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("reencode", "clip_pixel_values", "clip_images_grid_thw"),
    ):
        if looks := [look for row in rows for look in row.pixels[kind]]:
            kwargs[name] = torch.cat([pixels for pixels, _ in looks])
            kwargs[grid] = torch.cat([grid_thw for _, grid_thw in looks])
    for kind, name in PIXELS.items():
        if looks := [look for row in rows for look in row.pixels[kind]]:
            kwargs[name] = torch.cat([pixels for (pixels,) in looks])
    if labels:
        kwargs["labels"] = kwargs["input_ids"].masked_fill(kwargs["attention_mask"] == 0, -100)
    return kwargs


def call(branch, image):
    return BRANCH_TOKENS[branch].call, "\nuser\n", (branch, image)


def mixed_rows(made):
    """No call, one call, four calls of three branches, a crop, text alone."""
    a, b = picture(0), picture(1, (90, 60))
    return [
        Row(made, "just text"),
        Row(made, "see ", a, " what? ", *call("dino", a), " blue"),
        Row(
            made,
            b,
            "q",
            *call("sam", b),
            "x",
            *call("reencode", b),
            *call("sam", a),
            "y",
            *call("dino", b),
            "done",
        ),
        Row(made, "crop ", a, " of ", b, " end"),
        Row(made, a, "only the action ", BRANCH_TOKENS["dino"].call, " nothing came back"),
    ]


def chat_rows(made):
    image = picture(0)
    turns = "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\n", image, " the question<|im_end|>"
    asked = (
        "\n<|im_start|>assistant\n" + BRANCH_TOKENS["dino"].call + "<|im_end|>\n<|im_start|>user"
    )
    with_call = Row(made, *turns, asked, ("dino", image), "<|im_end|>\n<|im_start|>assistant\nyes")
    return with_call, Row(made, *turns, "\n<|im_start|>assistant\nno<|im_end|>")


def naive_logits(model, row, hidden=None):
    """One pass of the whole stream per call, each using the control states found so far.

    The last pass, for the logits, does not see what is ``hidden``, a slice.
    """
    kwargs = batch(row)
    ids = kwargs["input_ids"]
    positions = batch_mrope_positions(
        ids, None, kwargs.get("image_grid_thw"), model.config.image_token_id, 2
    )
    embeds, deeper = model.get_input_embeddings()(ids), []
    if row.pixels["image"]:
        seen = model.tower(kwargs["pixel_values"], kwargs["image_grid_thw"])
        first, *rest = seen.split(embeds.shape[-1], dim=-1)
        places = ids == model.config.image_token_id
        deeper = [scatter_features(torch.zeros_like(embeds), places, one) for one in rest]
        embeds = scatter_features(embeds, places, first)
    actions = {model.config.action_id(b): b for b in model.config.branches}
    waiting = {b: iter(row.pixels[b]) for b in model.config.branches}
    conditions = {}
    for place, token_id in enumerate(row.ids):
        if (branch := actions.get(token_id)) is None:
            continue
        run = model._run(embeds, None, positions, None, deeper)
        condition = conditions[place] = run[0, place - 1]
        embeds = embeds.clone()
        embeds[0, place] = condition
        if (pixels := next(waiting[branch], None)) is None:
            continue
        projected = model.projector(branch)(model.encode(branch, *pixels)[0], condition).values
        pads = [i for i, t in enumerate(row.ids) if t == model.config.pad_id(branch) and i > place]
        embeds[0, pads[0] : pads[0] + len(projected)] = projected
    if hidden is not None:
        embeds = embeds.clone()
        embeds[0, hidden] = 0
        for place, condition in conditions.items():
            embeds[0, place] = condition
    return model.lm_head(model._run(embeds, None, positions, None, deeper))

"""The training forward beyond what the released one could do: mixed batches, several calls."""

import pytest
import torch
from PIL import Image

from vpt.building import tiny_model
from vpt.cache import ATTENTION_NAME
from vpt.errors import CheckpointError, FeatureCountError, PositionError
from vpt.modeling import scatter_features
from vpt.positions import batch_mrope_positions
from vpt.tokens import BRANCH_TOKENS, IMAGE_PAD, VISION_END, VISION_START

PIXELS = {"dino": "detection_images", "sam": "seg_images"}


@pytest.fixture(scope="module")
def made():
    return tiny_model()


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


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_mixed_batch(made, side):
    rows = mixed_rows(made)
    kwargs = batch(*rows, side=side)
    together = made[0](**kwargs).logits
    for number, row in enumerate(rows):
        alone = made[0](**batch(row)).logits[0]
        inside = together[number][kwargs["attention_mask"][number].bool()]
        torch.testing.assert_close(inside, alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(made):
    row = mixed_rows(made)[2]
    long_row = Row(made, "word " * 120)
    alone = made[0](**batch(row)).logits[0]
    padded = made[0](**batch(row, long_row)).logits[0, : len(row.ids)]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=0)


def naive_logits(model, row):
    """One pass of the whole stream per call, each using the control states found so far."""
    kwargs = batch(row)
    ids = kwargs["input_ids"]
    positions = batch_mrope_positions(
        ids, None, kwargs.get("image_grid_thw"), model.config.image_token_id, 2
    )
    embeds = model.get_input_embeddings()(ids)
    if row.pixels["image"]:
        seen = model.tower(kwargs["pixel_values"], kwargs["image_grid_thw"])
        embeds = scatter_features(embeds, ids == model.config.image_token_id, seen)
    actions = {model.config.action_id(b): b for b in model.config.branches}
    waiting = {b: iter(row.pixels[b]) for b in model.config.branches}
    for place, token_id in enumerate(row.ids):
        if (branch := actions.get(token_id)) is None:
            continue
        hidden = model._run(embeds, None, positions)
        condition = hidden[0, place - 1]
        embeds = embeds.clone()
        embeds[0, place] = condition
        if (pixels := next(waiting[branch], None)) is None:
            continue
        projected = model.projector(branch)(model.encode(branch, *pixels)[0], condition).values
        pads = [i for i, t in enumerate(row.ids) if t == model.config.pad_id(branch) and i > place]
        embeds[0, pads[0] : pads[0] + len(projected)] = projected
    return model.lm_head(model._run(embeds, None, positions))


@pytest.mark.parametrize("number", range(5))
@torch.no_grad()
def test_segments_over_a_cache_equal_whole_passes(made, number):
    row = mixed_rows(made)[number]
    logits = made[0](**batch(row)).logits
    torch.testing.assert_close(logits, naive_logits(made[0], row), atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [1, 2])
def test_gradients_of_segments_equal_those_of_whole_passes(made, number):
    model, row = made[0], mixed_rows(made)[number]
    weights = [p for n, p in model.named_parameters() if "visual" not in n and "norm" not in n]

    def gradients(logits):
        return torch.autograd.grad(logits.logsumexp(-1).sum(), weights, allow_unused=True)

    ours, theirs = gradients(model(**batch(row)).logits), gradients(naive_logits(model, row))
    for got, expected in zip(ours, theirs, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-6


@torch.no_grad()
def test_other_ways_to_attend_give_the_same(made):
    rows = mixed_rows(made)
    expected = made[0](**batch(*rows))
    seen = batch(*rows)["attention_mask"].bool()
    model, _ = tiny_model()
    model.model.language_model.config._attn_implementation = ATTENTION_NAME
    torch.testing.assert_close(
        model(**batch(*rows)).logits[seen], expected.logits[seen], atol=1e-4, rtol=0
    )
    model.set_attn_implementation("eager")
    torch.testing.assert_close(
        model(**batch(*rows)).logits[seen], expected.logits[seen], atol=1e-4, rtol=0
    )
    model.set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(
        model(**batch(*rows)).logits[seen], expected.logits[seen], atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_one_condition_may_steer_several_images(made):
    a, b = picture(0), picture(1)
    row = Row(made, "x", BRANCH_TOKENS["dino"].call, ("dino", a), ("dino", b), "end")
    conditions = []
    handle = (
        made[0]
        .projectors["dino"]
        .register_forward_hook(lambda module, args, output: conditions.append(args[1]))
    )
    made[0](**batch(row))
    handle.remove()
    assert len(conditions) == 2
    assert torch.equal(*conditions)


@torch.no_grad()
def test_control_tokens_are_ignored_in_the_loss(made):
    row = mixed_rows(made)[1]
    kwargs = batch(row, labels=True)
    actions = kwargs["input_ids"] == made[0].config.action_id("dino")
    loss = made[0](**kwargs).loss
    kwargs["labels"] = kwargs["labels"].masked_fill(actions, -100)
    assert loss == made[0](**kwargs).loss
    kwargs["labels"] = torch.full_like(kwargs["labels"], -100)
    kwargs["labels"][:, 1] = kwargs["input_ids"][:, 1]
    assert made[0](**kwargs).loss != loss


@torch.no_grad()
def test_alignment_projects_without_condition(made):
    model, _ = tiny_model()
    image = picture(0)
    row = Row((model, made[1]), ("dino", image), " describe it")
    with pytest.raises(PositionError, match="0 <\\|detection_action\\|> token"):
        model(**batch(row))
    model.config.alignment = True
    seen = []
    model.projectors["dino"].register_forward_hook(lambda m, args, out: seen.append(args[1]))
    model(**batch(row))
    assert seen == [None]


def masked_model(made, para_mask_id, ratio):
    model, _ = tiny_model()
    model.config.para_mask_id, model.config.para_mask_ratio = para_mask_id, ratio
    return model, made[1]


def chat_rows(made):
    image = picture(0)
    turns = "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\n", image, " the question<|im_end|>"
    asked = (
        "\n<|im_start|>assistant\n" + BRANCH_TOKENS["dino"].call + "<|im_end|>\n<|im_start|>user"
    )
    with_call = Row(made, *turns, asked, ("dino", image), "<|im_end|>\n<|im_start|>assistant\nyes")
    return with_call, Row(made, *turns, "\n<|im_start|>assistant\nno<|im_end|>")


def final_embeddings(model, kwargs):
    """What the last pass of the language model was given."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**kwargs)
    handle.remove()
    return seen


@pytest.mark.parametrize(("para_mask_id", "paragraphs"), [(1, {1}), (2, {1, 3})])
def test_masking_hides_paragraphs_of_rows_with_a_call_in_training_only(
    made, para_mask_id, paragraphs
):
    model, processor = masked_model(made, para_mask_id, 1.0)
    rows = chat_rows((model, processor))
    kwargs = batch(*rows)
    assert not any((e == 0).all(-1).any() for e in final_embeddings(model.eval(), kwargs))
    hidden = (final_embeddings(model.train(), kwargs)[-1] == 0).all(-1)
    assert not hidden[1].any()
    ids = kwargs["input_ids"][0]
    starts = (ids == model.config.para_start_id).nonzero().flatten().tolist()
    ends = (ids == model.config.para_end_id).nonzero().flatten().tolist()
    expected = torch.zeros(len(ids), dtype=torch.bool)
    for paragraph in paragraphs:
        expected[starts[paragraph] + 1 : ends[paragraph]] = True
    assert torch.equal(hidden[0], expected)


def test_masking_draws_per_sample_with_its_probability(made):
    model, processor = masked_model(made, 1, 0.5)
    model.train()
    row = chat_rows((model, processor))[0]
    torch.manual_seed(0)
    draws = [
        bool((final_embeddings(model, batch(row, row))[-1] == 0).all(-1)[r].any())
        for _ in range(20)
        for r in range(2)
    ]
    assert 10 <= sum(draws) <= 30


@torch.no_grad()
def test_projector_scale_joins_control_states(made):
    model, processor = tiny_model()
    assert model.projectors["dino"].layernorm_condition.weight.shape == (64,)
    config = model.config
    config.projector_scale = 2
    scaled = type(model)(config).eval()
    assert scaled.projectors["dino"].layernorm_condition.weight.shape == (128,)
    row = BRANCH_TOKENS["dino"]
    image = picture(0)
    twice = Row((scaled, processor), "x", row.start, row.action, row.action, ("dino", image), "y")
    seen = []
    scaled.projectors["dino"].register_forward_hook(lambda m, args, out: seen.append(args[1]))
    scaled(**batch(twice))
    assert seen[0].shape == (128,)


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ([("dino", 0)], PositionError, "row 0 has 0 <|detection_action|> token(s) but 1"),
        (["ac", ("dino", 0), ("dino", 1), ("dino", 2)], PositionError, "has 2 <|detection_action"),
        ([("dino", 0), "a"], PositionError, "re-encoded image of row 0 precedes its"),
    ],
)
def test_calls_and_images_that_do_not_fit_are_refused(made, parts, error, words):
    import re

    text = {"a": BRANCH_TOKENS["dino"].call, "ac": BRANCH_TOKENS["dino"].call * 2}
    built = [text[p] if isinstance(p, str) else (p[0], picture(p[1])) for p in parts]
    with pytest.raises(error, match=re.escape(words)):
        made[0](**batch(Row(made, "x", *built)))


def test_placeholders_and_features_are_counted(made):
    kwargs = batch(mixed_rows(made)[1])
    more = kwargs["input_ids"].clone()
    more[0, 0] = made[0].config.pad_id("dino")
    with pytest.raises(FeatureCountError, match=r"65 <.detection_image_pad.> tokens but 64"):
        made[0](**{**kwargs, "input_ids": more})
    more[0, 0] = made[1].tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    with pytest.raises(PositionError, match="placeholder"):
        made[0](**{**kwargs, "input_ids": more})
    with pytest.raises(
        FeatureCountError, match=r"64 <.detection_image_pad.> tokens but 0 features"
    ):
        made[0](**{**kwargs, "detection_images": None})
    positions = torch.arange(kwargs["input_ids"].shape[1]).expand(3, 1, -1)
    blind = {**kwargs, "position_ids": positions, "pixel_values": None}
    with pytest.raises(FeatureCountError, match="placeholder tokens but 0 features"):
        made[0](**blind)
    embeds = torch.zeros(1, 3, 4)
    with pytest.raises(FeatureCountError, match="2 placeholder tokens but 1 features"):
        scatter_features(embeds, torch.tensor([[True, True, False]]), torch.ones(1, 4))


def test_placeholders_of_one_row_do_not_hold_half_an_image(made):
    a = picture(0)
    rows = [Row(made, "x", *call("dino", a)), Row(made, "x", *call("dino", a))]
    kwargs = batch(*rows)
    pad = made[0].config.pad_id("dino")
    ids = kwargs["input_ids"]
    first = int((ids[0] == pad).nonzero()[0])
    ids[0, first], ids[1, first - 1] = ids[1, 0].item(), pad
    with pytest.raises(FeatureCountError, match="do not hold whole images"):
        made[0](**kwargs)


def test_pixels_for_a_branch_the_model_lacks_are_refused():
    model, processor = tiny_model(("clip",))
    pixels = torch.zeros(1, 3, 112, 112)
    ids = torch.tensor([processor.encode_text("hello").ids])
    with pytest.raises(PositionError, match="branch 'dino', which this model does not have"):
        model(input_ids=ids, detection_images=pixels)
    with pytest.raises(PositionError, match="input_ids are missing"):
        model()
    with pytest.raises(PositionError, match="without image_grid_thw"):
        model(input_ids=ids, pixel_values=torch.zeros(4, 1176))
    with pytest.raises(PositionError, match="without their grid"):
        model(input_ids=ids, clip_pixel_values=torch.zeros(4, 1176))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vision_encoder_ls": ["owl"]}, "unknown branch 'owl'.*available: clip, dino, sam"),
        ({"num_inner_forward_run": 3}, "must be 1 or 2, not 3"),
        ({"para_mask_id": 4}, "para_mask_id must be 0, 1 or 2, not 4"),
        ({"para_mask_id": 1}, "needs para_start_id and para_end_id"),
        ({"para_mask_ratio": 1.5}, "para_mask_ratio must be in 0..1"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    from vpt.config import VPTConfig

    with pytest.raises(CheckpointError, match=words):
        VPTConfig(**settings)


def test_a_branch_without_its_token_id_is_refused():
    from vpt.config import VPTConfig

    config = VPTConfig(vision_encoder_ls="dino")
    with pytest.raises(CheckpointError, match="branch 'dino' but no detection_action_id"):
        config.action_id("dino")

"""The training forward beyond what the released one could do: mixed batches, several calls."""

import copy
from unittest import mock

import pytest
import torch
from bases import EACH_BACKBONE
from streams import Row, batch, call, chat_rows, mixed_rows, naive_logits, picture
from tiny_model import tiny_model

from vpt.errors import CheckpointError, FeatureCountError, PositionError
from vpt.model.modeling import scatter_features
from vpt.model.segments import SegmentReader
from vpt.protocol.tokens import BRANCH_TOKENS, IMAGE_PAD


@pytest.fixture(scope="module", params=EACH_BACKBONE)
def made(request):
    return tiny_model(backbone=request.param)


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


@pytest.mark.parametrize("number", range(5))
@torch.no_grad()
def test_segments_over_a_cache_equal_whole_passes(made, number):
    row = mixed_rows(made)[number]
    logits = made[0](**batch(row)).logits
    torch.testing.assert_close(logits, naive_logits(made[0], row), atol=2e-4, rtol=0)


@torch.no_grad()
def test_one_condition_may_serve_several_images(made):
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
    model = copy.deepcopy(made[0])
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
    model = copy.deepcopy(made[0])
    model.config.para_mask_id, model.config.para_mask_ratio = para_mask_id, ratio
    return model, made[1]


def final_embeddings(model, kwargs):
    """What rows were read from, reading by reading."""
    seen, read = [], SegmentReader.read

    def watched(self, embeds, until, **options):
        seen.append(embeds)
        read(self, embeds, until, **options)

    with mock.patch.object(SegmentReader, "read", watched), torch.no_grad():
        model(**kwargs)
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
    model, processor = copy.deepcopy(made[0]), made[1]
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


@torch.no_grad()
def test_a_last_call_may_have_no_image(made):
    begun = Row(made, "x", *call("dino", picture(0)), "y")
    ended = Row(made, "x", *call("dino", picture(0)), "y", BRANCH_TOKENS["dino"].call)
    length = len(begun.ids)
    expected = made[0](**batch(begun)).logits
    assert torch.allclose(made[0](**batch(ended)).logits[:, :length], expected, atol=1e-5)


def test_two_calls_before_one_image_are_refused(made):
    action = BRANCH_TOKENS["dino"].call
    with pytest.raises(PositionError, match=r"has 2 <.detection_action.> token.s. but 1"):
        made[0](**batch(Row(made, "x", action, action, ("dino", picture(0)))))


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
        ({"para_mask_ratio": 1.5}, "para_mask_ratio must be a number from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    from vpt.model.config import VPTConfig

    with pytest.raises(CheckpointError, match=words):
        VPTConfig(**settings)


def test_a_branch_without_its_token_id_is_refused():
    from vpt.model.config import VPTConfig

    config = VPTConfig(vision_encoder_ls="dino")
    with pytest.raises(CheckpointError, match="branch 'dino' but no detection_action_id"):
        config.action_id("dino")

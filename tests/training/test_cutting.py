"""A row that ``cutoff_len`` cuts through an image loses that image, and nothing else goes wrong."""

import pytest
import torch
from factory import CALLS, arguments, make_row, save_model, save_rows, turn
from tiny_model import tiny_model

from vpt.errors import FeatureCountError
from vpt.model.config import load_config
from vpt.model.encoding import RowEncoder, drop_cut_images, open_row_image
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import KINDS
from vpt.protocol.tokens import VISION_END, VISION_START


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model()[1].tokenizer


def ids_of(tokenizer, *parts):
    """Ids of texts, and of runs of placeholders given as ``(kind, n)``."""
    texts = [p if isinstance(p, str) else KINDS[p[0]].pad * p[1] for p in parts]
    return tokenizer("".join(texts), add_special_tokens=False)["input_ids"]


def test_whole_images_are_kept(tokenizer):
    ids = ids_of(tokenizer, "a", ("image", 3), VISION_END, "b", ("sam", 2), VISION_END, "c")
    before = list(ids)
    assert drop_cut_images(ids, {"image": [3], "sam": [2]}, tokenizer) == {"image": 1, "sam": 1}
    assert ids == before


def test_a_cut_image_is_blanked_and_those_behind_it_are_dropped(tokenizer):
    ids = ids_of(tokenizer, "a", ("image", 3), VISION_END, ("image", 2), "answer")
    sizes = {"image": [3, 4, 5], "dino": [7]}
    assert drop_cut_images(ids, sizes, tokenizer) == {"image": 1, "dino": 0}
    kept = ids_of(tokenizer, "a", ("image", 3), VISION_END)
    blank = [tokenizer.pad_token_id] * 2
    assert ids == kept + blank + ids_of(tokenizer, "answer")


def test_an_image_cut_right_behind_its_placeholders_is_whole(tokenizer):
    ids = ids_of(tokenizer, "a", ("image", 3))
    assert drop_cut_images(ids, {"image": [3]}, tokenizer) == {"image": 1}


def test_an_image_cut_before_its_first_placeholder_is_dropped(tokenizer):
    ids = ids_of(tokenizer, "a", VISION_START)
    assert drop_cut_images(ids, {"image": [3]}, tokenizer) == {"image": 0}


@pytest.mark.parametrize("num", [2, 4])
def test_placeholders_of_another_size_are_no_cut(tokenizer, num):
    ids = ids_of(tokenizer, "a", ("image", num), VISION_END, "b")
    with pytest.raises(FeatureCountError, match=f"{num} <.image_pad.> tokens for an image of 3"):
        drop_cut_images(ids, {"image": [3]}, tokenizer)


def long_rows():
    """Rows with several calls, so that a cut may fall behind some and before others."""
    several = turn("<image>\nWhat?", CALLS["dino"]) + turn("<detection_image>", CALLS["sam"])
    several += turn("<seg_image>", CALLS["dino"]) + turn("<detection_image>", "A thing.")
    image = "images/1.png"
    columns = {"detection_images": [image] * 2, "seg_images": [image]}
    rows = [make_row(kind, n) for n, kind in enumerate(("region", "reencode", "dino", "sam"))]
    return [*rows, {"messages": several, "images": [image], **columns}]


def test_a_row_may_be_cut_anywhere(stock, tmp_path):
    folder = save_model(tmp_path / "model")
    rows = save_rows(tmp_path, rows=long_rows())
    parts = stock(arguments(folder, tmp_path, tmp_path / "out"))
    model = parts.model().eval()
    encoder = RowEncoder(
        load_config(str(folder)),
        VPTProcessor.from_pretrained(folder),
        lambda path: open_row_image(path, tmp_path),
    )
    num_blanked = 0
    for cutoff_len in (12, 75, 115, 140, 200):
        parts.data_args.cutoff_len = cutoff_len
        dataset = parts.dataset()["train_dataset"]
        for row, made in zip(rows, dataset, strict=True):
            expected = encoder.encode(row, cutoff_len=cutoff_len)
            assert made["input_ids"] == expected.input_ids
            batch = parts.collator(model)([made])
            blanked = batch["input_ids"][0, : len(expected.input_ids)] != torch.tensor(
                expected.input_ids
            )
            num_blanked += bool(blanked.any())
            is_pad = batch["input_ids"][0, : len(blanked)] == parts.tokenizer.pad_token_id
            assert is_pad[blanked].all()
            with torch.no_grad():
                assert torch.isfinite(model(**batch).logits).all()
    assert num_blanked > 3

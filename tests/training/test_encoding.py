"""Stock LLaMA-Factory makes the same ids, labels and pixels of a row as RowEncoder."""

import json
import shutil

import pytest
import torch
from factory import KINDS, arguments, make_row, save_model, save_rows
from golden_data import GOLDENS, VARIANTS

from vpt import cli
from vpt.data.check import ModelLimits
from vpt.data.checks import image_paths, view_row
from vpt.data.rows import measure_images
from vpt.errors import PositionError
from vpt.model.config import load_config
from vpt.model.encoding import RowEncoder, collate, open_row_image
from vpt.model.folder import BACKBONES
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import split_crop_suffix


def recorded(variant):
    return json.loads((GOLDENS / "goldens" / variant / "data_pipeline.json").read_text())


def encoder_of(folder, root):
    return RowEncoder(
        load_config(str(folder)),
        VPTProcessor.from_pretrained(folder),
        lambda path: open_row_image(path, root),
    )


def without_control(encoder, labels):
    return [-100 if i in encoder._actions else i for i in labels]


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_rows_are_encoded_as_released(stock, tmp_path, variant):
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "checkpoints" / variant, folder)
    assert cli.main(["set", str(folder), "--mask", "none"]) == 0
    rows = [sample["row"] for sample in recorded(variant)["samples"]]
    save_rows(tmp_path, rows=rows)
    settings = arguments(folder, tmp_path, tmp_path / "out", media_dir=str(GOLDENS))
    parts = stock(settings)
    dataset = parts.dataset()["train_dataset"]
    encoder = encoder_of(folder, GOLDENS)
    assert len(dataset) == len(rows)
    for row, made in zip(rows, dataset, strict=True):
        expected = encoder.encode(row)
        assert made["input_ids"] == expected.input_ids
        assert without_control(encoder, made["labels"]) == expected.labels
        batch = parts.collator(None)([made])
        for name, values in expected.pixels.items():
            assert torch.equal(batch[name], values), name
        is_text = not expected.pixels  # then an image in the padding is added
        added = {"pixel_values", "image_grid_thw"} if is_text else set(expected.pixels)
        assert set(batch) == {"input_ids", "attention_mask", "labels"} | added


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module", params=BACKBONES)
def on_each(tmp_path_factory, request):
    """A folder on each backbone."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model", backbone=request.param)


def test_mixed_batches_are_those_of_the_encoder(stock, on_each, tmp_path):
    rows = save_rows(tmp_path)
    parts = stock(arguments(on_each, tmp_path, tmp_path / "out"))
    dataset = parts.dataset()["train_dataset"]
    model = parts.model()
    encoder = encoder_of(on_each, tmp_path)
    made = [dataset[number] for number in range(7)]
    limits = ModelLimits(load_config(str(on_each)), encoder.processor)
    paths = {split_crop_suffix(path)[0] for row in rows for path in image_paths(row)}
    images = dict(measure_images(paths, tmp_path))
    counted = [limits.num_tokens(view_row(row, 8), images) for row in rows[:7]]
    assert counted == [len(one["input_ids"]) for one in made]
    batch = parts.collator(model)(made)
    samples = [encoder.encode(row) for row in rows[:7]]
    expected = collate(samples, parts.tokenizer.pad_token_id, pad_to_multiple_of=8)
    batch["labels"] = torch.tensor([without_control(encoder, r) for r in batch["labels"].tolist()])
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name


def test_prompts_for_prediction_are_those_of_the_encoder(stock, tiny, tmp_path):
    rows = save_rows(tmp_path)
    settings = arguments(tiny, tmp_path, tmp_path / "out", do_train=False, do_predict=True)
    settings |= {"eval_dataset": settings.pop("dataset"), "predict_with_generate": True}
    dataset = stock(settings).dataset()["eval_dataset"]
    encoder = encoder_of(tiny, tmp_path)
    for row, made in zip(rows, dataset, strict=True):
        expected = encoder.encode(row, predict=True)
        assert made["input_ids"] == expected.input_ids
        assert made["labels"] == expected.labels


def test_a_system_turn_is_kept(stock, tiny, tmp_path):
    rows = [make_row(kind, 1) for kind in KINDS[:2]]
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    save_rows(tmp_path, rows=rows)
    dataset = stock(arguments(tiny, tmp_path, tmp_path / "out")).dataset()["train_dataset"]
    encoder = encoder_of(tiny, tmp_path)
    for row, made in zip(rows, dataset, strict=True):
        assert made["input_ids"] == encoder.encode(row).input_ids
    assert "Be brief." in encoder.processor.tokenizer.decode(dataset[0]["input_ids"])


def test_a_batch_of_text_alone_gets_an_image_in_its_padding(stock, on_each, tmp_path):
    save_rows(tmp_path, rows=[make_row("text", n) for n in range(3)])
    parts = stock(arguments(on_each, tmp_path, tmp_path / "out"))
    dataset = parts.dataset()["train_dataset"]
    model = parts.model().eval()
    batch = parts.collator(model)([dataset[0], dataset[1]])
    assert batch["image_grid_thw"].shape == (1, 3)
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(input_ids=torch.tensor([dataset[0]["input_ids"]])).logits
    assert torch.allclose(together[:1, : alone.shape[1]], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "expected user and assistant by turns"),
        ({"images": []}, "row 0: 1 <image> in the text, 0 in images"),
        ({"images": ["images/none.png"]}, "none.png' does not exist"),
        ({"images": ["images/0.png", "images/1.png"]}, "row 0: 1 <image> in the text, 2 in images"),
    ],
)
def test_a_bad_row_is_told_before_training(stock, tiny, tmp_path, change, words):
    save_rows(tmp_path, rows=[{**make_row("direct", 0), **change}])
    parts = stock(arguments(tiny, tmp_path, tmp_path / "out"))
    with pytest.raises(ValueError, match=words):
        parts.dataset()


@pytest.mark.parametrize("neat", [False, True])
def test_packing_is_refused(stock, tiny, tmp_path, neat):
    save_rows(tmp_path)
    packing = {"packing": True, "neat_packing": neat, "cutoff_len": 600}
    parts = stock(arguments(tiny, tmp_path, tmp_path / "out", **packing))
    dataset, model = parts.dataset()["train_dataset"], parts.model()
    with pytest.raises(PositionError, match="set `packing: false`"):
        model(**parts.collator(model)([dataset[0]]))


def test_preprocessed_rows_are_found_in_the_cache_again(stock, tiny, tmp_path):
    from datasets.fingerprint import Hasher

    settings = arguments(tiny, tmp_path, tmp_path / "out")
    for name in ("template", "processor"):
        first, second = (Hasher.hash(getattr(stock(settings), name)) for _ in range(2))
        assert first == second, name


def test_mask_history_is_refused(stock, tiny, tmp_path):
    save_rows(tmp_path)
    parts = stock(arguments(tiny, tmp_path, tmp_path / "out", mask_history=True))
    with pytest.raises(Exception, match="mask_history is not supported"):
        parts.dataset()

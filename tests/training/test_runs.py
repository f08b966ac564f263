"""Whole runs of stock LLaMA-Factory, in this process: train, evaluate, resume, predict, export."""

import json
import shutil

import pytest
import torch
from factory import (
    IGNORE_TYING,
    arguments,
    export_arguments,
    losses,
    make_row,
    save_model,
    save_rows,
)
from safetensors.torch import load_file, save_file
from test_trainable import LORA

import vpt
from vpt.errors import CheckpointError
from vpt.model.config import load_config

INTENDED = {"description": "", "mean": [0] * 9, "precision": [[0] * 9] * 9, "limit": -1}  # no image

pytestmark = [
    # torch, for reading its own pinned memory setting where there is no GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_rows(folder)
    save_rows(folder, "calls", [make_row("dino", n) for n in range(8)])
    save_rows(folder, "texts", [make_row("text", n) for n in range(8)])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model", intended_inputs=INTENDED)


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(one, other):
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def results(folder, name="eval"):
    return json.loads((folder / f"{name}_results.json").read_text())


def evaluate(factory, model, data, out, **changes):
    """Metrics of a model without training; without an accuracy unless asked for."""
    settings = arguments(model, data, out, do_train=False, do_eval=True, **changes)
    factory.run_exp({**settings, "eval_dataset": settings.pop("dataset")})
    return results(out)


def test_a_run_trains_evaluates_and_leaves_a_model_that_answers(factory, model, data, tmp_path):
    out = tmp_path / "out"
    evaluating = {"do_eval": True, "val_size": 5, "compute_accuracy": True}
    factory.run_exp(arguments(model, data, out, max_steps=20, save_steps=10, **evaluating))
    said = losses(out)
    assert len(said) == 20 and sum(said[-5:]) < 0.9 * sum(said[:5])
    metrics = results(out)
    assert {"eval_loss", "eval_accuracy", "eval_accuracy_text", "eval_num_region"} <= set(metrics)
    assert metrics["eval_num_turn_end"] in range(5, 11)
    assert load_config(model).intended_inputs == INTENDED
    for folder in (out, out / "checkpoint-10"):
        assert load_config(folder).intended_inputs is None
        assert (folder / "vpt_shim.py").is_file()
        runtime = vpt.load(str(folder))
        image = data / "images" / "0.png"
        assert runtime.ask(image, "What?", perception="dino", max_new_tokens=4).num_calls >= 1


@pytest.mark.slow
def test_a_trained_folder_is_trained_on(factory, model, data, tmp_path):
    factory.run_exp(arguments(model, data, tmp_path / "one", max_steps=2))
    factory.run_exp(arguments(tmp_path / "one", data, tmp_path / "two", max_steps=2))
    assert sum(losses(tmp_path / "two")) < sum(losses(tmp_path / "one"))


def test_a_model_that_lacks_a_weight_is_not_trained(factory, model, data, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    stored = weights(folder)
    del stored["projectors.dino.linear_condition.bias"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(projectors\.dino\.linear_cond"):
        factory.run_exp(arguments(folder, data, tmp_path / "out"))


def test_a_run_resumes_exactly_masking_draws_included(factory, data, tmp_path):
    folder = save_model(tmp_path / "model", para_mask_id=1, para_mask_ratio=0.5)
    settings = {"max_steps": 6, "save_steps": 3, "dataset": "calls", "lr_scheduler_type": "cosine"}
    whole, again = tmp_path / "whole", tmp_path / "again"
    factory.run_exp(arguments(folder, data, whole, **settings))
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    torch.manual_seed(99)
    factory.run_exp(arguments(folder, data, again, **settings))
    assert losses(again) == losses(whole)
    assert largest_difference(weights(whole), weights(again)) == 0


def test_masking_is_drawn_in_training_and_never_in_evaluation(factory, model, data, tmp_path):
    said, evaluated = {}, {}
    for name, mask in {"none": 0, "question": 1}.items():
        folder = save_model(tmp_path / name, para_mask_id=mask, para_mask_ratio=1.0)
        out = tmp_path / f"{name}-out"
        factory.run_exp(arguments(folder, data, out, dataset="calls", max_steps=1))
        said[name] = losses(out)[0]
        metrics = evaluate(factory, folder, data, tmp_path / f"{name}-eval", dataset="calls")
        evaluated[name] = metrics["eval_loss"]
    assert said["none"] != said["question"]
    assert evaluated["none"] == evaluated["question"]


def test_alignment_leaves_the_condition_untrained(factory, data, tmp_path):
    folder = save_model(tmp_path / "model", alignment=True)
    out = tmp_path / "out"
    settings = {"dataset": "calls", "freeze_language_model": True, "weight_decay": 0.1}
    factory.run_exp(arguments(folder, data, out, **settings))
    before, after = weights(folder), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("layernorm_feature", "linear_feature")
    assert changed == {f"projectors.dino.{p}.{v}" for p in parts for v in ("weight", "bias")}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
def test_interleaved_datasets_are_streamed(factory, model, data, tmp_path, strategy):
    out = tmp_path / "out"
    streaming = {
        "dataset": "mixed,calls,texts",
        "streaming": True,
        "mix_strategy": strategy,
        "interleave_probs": "0.4,0.4,0.2",
        "buffer_size": 8,
        "accelerator_config": {"dispatch_batches": False},
        "dataloader_num_workers": 1,
        "val_size": 4,
        "do_eval": True,
        "overwrite_cache": None,
    }
    factory.run_exp(arguments(model, data, out, max_steps=3, **streaming))
    assert len(losses(out)) == 3
    assert results(out)["eval_loss"] > 0


@pytest.mark.slow
def test_a_streamed_run_resumes_exactly(factory, data, tmp_path):
    folder = save_model(tmp_path / "model", para_mask_id=2, para_mask_ratio=0.5)
    streaming = {"streaming": True, "buffer_size": 8, "dataloader_num_workers": 1}
    streaming |= {"accelerator_config": {"dispatch_batches": False}, "overwrite_cache": None}
    settings = {"max_steps": 6, "save_steps": 2, "dataset": "calls", **streaming}
    whole, again = tmp_path / "whole", tmp_path / "again"
    factory.run_exp(arguments(folder, data, whole, **settings))
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    factory.run_exp(arguments(folder, data, again, **settings))
    assert losses(again) == losses(whole)
    assert largest_difference(weights(whole), weights(again)) == 0


def test_rows_longer_than_the_cutoff_are_trained_on(factory, model, data, tmp_path):
    out = tmp_path / "out"
    factory.run_exp(arguments(model, data, out, cutoff_len=100, max_steps=10))
    assert all(0 < loss < 20 for loss in losses(out))


def test_control_tokens_do_not_count_in_the_loss(factory, model, data, tmp_path):
    """The loss of LLaMA-Factory equals the one over all other tokens of the answers."""
    from vpt.model.config import load_config
    from vpt.model.encoding import RowEncoder, collate, open_row_image
    from vpt.model.modeling import load_model
    from vpt.model.processing import VPTProcessor

    metrics = evaluate(
        factory, model, data, tmp_path / "out", dataset="calls", per_device_eval_batch_size=8
    )
    encoder = RowEncoder(
        load_config(str(model)),
        VPTProcessor.from_pretrained(model),
        lambda path: open_row_image(path, data),
    )
    batch = collate([encoder.encode(make_row("dino", n)) for n in range(8)], 0)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = load_model(str(model))(**batch).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_predictions_continue_the_prompt(factory, model, data, tmp_path):
    for package in ("jieba", "nltk", "rouge_chinese"):
        pytest.importorskip(package)
    out = tmp_path / "out"
    predicting = {"do_train": False, "do_predict": True, "predict_with_generate": True}
    settings = arguments(model, data, out, max_new_tokens=6, do_sample=False, **predicting)
    settings |= {"skip_special_tokens": False, "per_device_eval_batch_size": 3}
    settings["eval_dataset"] = settings.pop("dataset")
    factory.run_exp(settings)
    lines = (out / "generated_predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 20
    assert rows[0]["label"].startswith("It is thing 0.<|im_end|>")
    assert rows[2]["prompt"].count("<|clip_action|>") == 1
    assert all(row["predict"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@IGNORE_TYING
def test_lora_trains_resumes_merges_and_is_exported(factory, data, tmp_path, tied):
    settings = {"tie_word_embeddings": tied, "intended_inputs": INTENDED}
    model = save_model(tmp_path / "model", **settings)
    out, again, merged = tmp_path / "lora", tmp_path / "again", tmp_path / "merged"
    settings = {**LORA, "max_steps": 4, "save_steps": 2, "freeze_multi_modal_projector": None}
    evaluating = {"do_eval": True, "eval_dataset": "mixed"}
    factory.run_exp(arguments(model, data, out, **settings, **evaluating))
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    factory.run_exp(arguments(model, data, again, **settings))
    assert losses(again) == losses(out)
    name = "adapter_model.safetensors"
    assert largest_difference(load_file(out / name), load_file(again / name)) == 0
    factory.export_model(export_arguments(model, out, merged))
    trained = pytest.approx(results(out)["eval_loss"], rel=1e-5)
    assert evaluate(factory, merged, data, tmp_path / "m")["eval_loss"] == trained
    assert load_config(merged).intended_inputs is None
    runtime = vpt.load(str(merged))
    assert runtime.ask(data / "images" / "0.png", "What?", max_new_tokens=4).warnings == []

"""The stock ``llamafactory-cli`` in processes of its own, which know of us by the shim alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from factory import (
    IGNORE_TYING,
    arguments,
    environment,
    export_arguments,
    losses,
    make_row,
    run_factory,
    save_model,
    save_rows,
)
from safetensors.torch import load_file
from test_trainable import LORA

import vpt
from vpt.model.folder import BACKBONES

pytestmark = [
    pytest.mark.slow,
    # torch, for reading its own pinned memory setting where there is no GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("llamafactory")


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(one) == set(other)
    assert all(bool((one[name] == other[name]).all()) for name in one)


def changed_parts(one, other):
    """Parts of the model in which two folders differ."""
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(one) == set(other)
    parts = ("projectors", "model.visual", "branches", "model.language_model", "lm_head")
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    return {part for part in parts for name in changed if name.startswith(part)}


@IGNORE_TYING
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_chain_of_runs_ends_in_a_model_that_answers(factory, run, tmp_path, backbone):
    names = ("model", "aligned", "tuned", "again", "lora", "merged")
    model, aligned, tuned, again, adapter, merged = (tmp_path / name for name in names)
    save_model(model, backbone=backbone, alignment=True)
    save_rows(tmp_path)
    save_rows(tmp_path, "calls", [make_row("dino", n) for n in range(8)])
    template = {"template": "vpt_qwen3_vl"} if backbone == "qwen3_vl" else {}
    frozen = {"freeze_language_model": True, "dataset": "calls"}
    settings = arguments(model, tmp_path, aligned, **frozen, **template)
    run_factory("train", settings, tmp_path / "run")
    assert changed_parts(model, aligned) == {"projectors"}

    assert run("set", aligned, "--alignment", "off", "--mask", "question")[0] == 0
    saved = {"save_steps": 3, "max_steps": 6, "disable_gradient_checkpointing": False}
    evaluated = {"do_eval": True, "val_size": 4, "compute_accuracy": True}
    evaluated["preprocessing_num_workers"] = 2
    settings = {**template, **saved, **evaluated, "use_reentrant_gc": False}
    run_factory("train", arguments(aligned, tmp_path, tuned, **settings), tmp_path / "run")
    assert changed_parts(aligned, tuned) == {"projectors", "model.language_model", "lm_head"}
    said = losses(tuned)
    assert said[-1] < said[0]

    shutil.copytree(tuned / "checkpoint-3", again / "checkpoint-3")
    factory.run_exp(arguments(aligned, tmp_path, again, **settings))
    assert losses(again) == said
    assert_same_weights(again, tuned)

    evaluated = {"do_eval": True, "eval_dataset": "mixed"}
    settings = arguments(tuned, tmp_path, adapter, **LORA, **template, **evaluated, max_steps=2)
    run_factory("train", settings, tmp_path / "run")
    exporting = {**export_arguments(tuned, adapter, merged), **template}
    run_factory("export", exporting, tmp_path / "run")
    evaluated |= {"do_train": False, "dataset": None}
    factory.run_exp(arguments(merged, tmp_path, tmp_path / "eval", **template, **evaluated))
    trained, exported = (
        json.loads((folder / "eval_results.json").read_text())["eval_loss"]
        for folder in (adapter, tmp_path / "eval")
    )
    assert exported == pytest.approx(trained, rel=1e-5)
    runtime = vpt.load(str(merged))
    assert runtime.model.config.model_type == BACKBONES[backbone][0]
    for mode, branch in (("crop", "crop"), ("clip", "reencode"), ("dino", "dino"), ("sam", "sam")):
        image = tmp_path / "images" / "0.png"
        answer = runtime.ask(image, "What?", perception=mode, max_new_tokens=12)
        assert answer.trace.calls[0].branch == branch


def test_transformers_alone_finds_the_package_and_leaves_llamafactory_alone(tmp_path):
    folder = save_model(tmp_path / "model")
    code = (
        "import sys; from transformers import AutoModelForImageTextToText, AutoProcessor; "
        "f = sys.argv[1]; k = {'trust_remote_code': True}; "
        "AutoModelForImageTextToText.from_pretrained(f, **k).save_pretrained(f + '-again'); "
        "AutoProcessor.from_pretrained(f, **k).save_pretrained(f + '-again'); "
        "m = AutoModelForImageTextToText.from_pretrained(f + '-again', **k); "
        "print(type(m).__module__, 'llamafactory' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["vpt.model.modeling", "False"], done.stderr
    files = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "model-again").iterdir()} == files


def test_a_run_killed_while_it_saves_resumes_to_the_same_weights(tmp_path):
    folder = save_model(tmp_path / "model", para_mask_id=1, para_mask_ratio=0.5)
    save_rows(tmp_path)
    settings = {"max_steps": 45, "save_steps": 15, "dataloader_num_workers": 1}
    settings["lr_scheduler_type"] = "cosine"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_factory("train", arguments(folder, tmp_path, whole, **settings), tmp_path / "run")

    command = [sys.executable, "-m", "llamafactory.cli", "train", "train.yaml"]
    again = arguments(folder, tmp_path, killed, **settings)
    run_factory("version", again, tmp_path / "again")  # writes the YAML
    (tmp_path / "again" / "version.yaml").rename(tmp_path / "again" / "train.yaml")
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=tmp_path / "again",
            env=environment(tmp_path / "cache"),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        deadline = time.monotonic() + 900
        while not (killed / "checkpoint-30").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "checkpoint-45").exists()
    (killed / "checkpoint-30" / "trainer_state.json").unlink(missing_ok=True)  # written last

    resumed = run_factory("train", again, tmp_path / "run")
    assert "checkpoint-30, which is incomplete" in resumed
    assert "resuming from" in resumed and "checkpoint-15" in resumed
    assert losses(killed) == losses(whole)
    assert_same_weights(killed, whole)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, checkpointed):
    """Rows of one batch call different branches, so that each process leaves projectors unused."""
    folder = save_model(tmp_path / "model")
    kinds = ("dino", "sam", "reencode", "direct")
    rows = [make_row(kinds[n % 3], n) for n in range(8)]  # equally many labels in each
    save_rows(tmp_path, rows=rows)
    changes = {
        "disable_gradient_checkpointing": not checkpointed,
        "use_reentrant_gc": False,
        "max_steps": 4,
    }
    alone, both = tmp_path / "alone", tmp_path / "both"
    settings = arguments(folder, tmp_path, alone, per_device_train_batch_size=2, **changes)
    run_factory("train", settings, tmp_path / "run")
    changes |= {"ddp_find_unused_parameters": True, "ddp_backend": "gloo"}
    settings = arguments(folder, tmp_path, both, per_device_train_batch_size=1, **changes)
    run_factory("train", settings, tmp_path / "run", FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    one, two = (load_file(out / "model.safetensors") for out in (alone, both))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3

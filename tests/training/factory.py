"""A tiny model folder, rows with every kind of image, and the stock command that trains on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_model

from vpt.boxes import GridBox
from vpt.protocol.calls import format_region
from vpt.protocol.tokens import BRANCH_TOKENS

ROOT = Path(__file__).parents[2]
IGNORE_TYING = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`.*:UserWarning"
)
"""peft says so of every model that could be tied."""
CALLS = {name: row.call for name, row in BRANCH_TOKENS.items()}
REGION = format_region(GridBox(1, 2, 3, 4))


def save_model(folder, tie_word_embeddings=False, backbone="qwen2_vl", **settings):
    """The tiny model; ``settings`` go into its configuration."""
    made = {"tie_word_embeddings": tie_word_embeddings, "backbone": backbone}
    model, processor = tiny_model(max_tokens=16, **made)
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_images(folder, num=6):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for number in range(num):
        size = (60 + 20 * number, 110 - 10 * number, 3)
        pixels = rng.integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def turn(asked, answered):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def make_row(kind, number):
    """A row in the released format: ``kind`` is direct, region, text or a branch."""
    image = f"images/{number % 6}.png"
    row = {"messages": [], "images": [image]}
    question = f"<image>\nWhat is in picture {number}?"
    answer = f"It is thing {number}."
    if kind == "text":
        return {"messages": turn(f"What is {number}?", answer)}
    if kind == "direct":
        return {**row, "messages": turn(question, answer)}
    if kind == "region":
        row["images"].append(f"{image}_5,6,50,48")
        return {**row, "messages": turn(question, REGION) + turn("<image>", answer)}
    tokens = BRANCH_TOKENS[kind]
    row[f"{tokens.released}_images"] = [image]
    messages = turn(question, tokens.call) + turn(tokens.placeholder, answer)
    return {**row, "messages": messages}


KINDS = ("direct", "region", "reencode", "dino", "sam")


def save_rows(folder, name="mixed", rows=None, **entry):
    """Write a dataset, its entry in dataset_info.json and the images."""
    save_images(folder / "images")
    rows = rows if rows is not None else [make_row(KINDS[n % 5], n) for n in range(20)]
    (folder / f"{name}.json").write_text(json.dumps(rows))
    info = folder / "dataset_info.json"
    known = json.loads(info.read_text()) if info.exists() else {}
    known[name] = {"file_name": f"{name}.json", "formatting": "vpt", **entry}
    info.write_text(json.dumps(known, indent=1))
    return rows


def arguments(model, data, output, **changes):
    """What a YAML would hold, for a short run on the CPU."""
    settings = {
        "model_name_or_path": str(model),
        "trust_remote_code": True,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": False,
        "freeze_language_model": False,
        "disable_gradient_checkpointing": True,
        "dataset_dir": str(data),
        "dataset": "mixed",
        "template": "vpt_qwen2_vl",
        "cutoff_len": 4096,
        "output_dir": str(output),
        "logging_steps": 1,
        "save_steps": 1000,
        "report_to": "none",
        "plot_loss": False,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "lr_scheduler_type": "constant",
        "seed": 3,
        "use_cpu": True,
        "overwrite_cache": True,
    }
    settings.update(changes)
    return {key: value for key, value in settings.items() if value is not None}


def export_arguments(model, adapter, output):
    """What a YAML would hold to merge an adapter."""
    return {
        "model_name_or_path": str(model),
        "adapter_name_or_path": str(adapter),
        "template": "vpt_qwen2_vl",
        "trust_remote_code": True,
        "finetuning_type": "lora",
        "export_dir": str(output),
        "infer_dtype": "float32",
    }


def environment(cache, **changes):
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env |= {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{env.get('PATH', '')}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DISABLE_VERSION_CHECK": "0",
    }
    return env | changes


def run_factory(command, settings, folder, check=True, **env):
    """Run ``llamafactory-cli COMMAND some.yaml``; returns what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{command}.yaml"
    file.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "llamafactory.cli", command, str(file)],
        cwd=folder,
        env=environment(folder.parent / "cache", **env),
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    if check:
        assert done.returncode == 0, said[-6000:]
    return said


def losses(output):
    """Loss of every step, as the trainer logged it."""
    state = json.loads((Path(output) / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

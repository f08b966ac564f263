"""``vpt depth-tokenizer``, and the scenes it is trained on, as a person types the commands."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_depth_maps import depth_model  # noqa: F401

from vpt import cli
from vpt.depth.maps import find_maps, find_photos, read_map, write_map
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig

ROOT = Path(__file__).parents[2]
TINY = DepthTokenizerConfig(
    size_px=32, num_codes=8, code_dim=6, hidden_dim=2, num_downsamplings=3, num_residual_blocks=1
)
QUICK = ("--steps", 4, "--batch-size", 1, "--crop-cells", 1)


@pytest.fixture
def vpt(capsys):
    """Run ``vpt``; gives code, stdout and stderr."""

    def run(*words):
        code = cli.main(list(map(str, words)))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def few_vectors(monkeypatch):
    """Start codebooks from few maps, for speed."""
    monkeypatch.setattr("vpt.depth.training._VECTORS_PER_CODE", 2)


@pytest.fixture
def tokenizer(tmp_path):
    """Folder of a tiny untrained tokenizer."""
    folder = tmp_path / "tokenizer"
    DepthTokenizer(TINY.build(), TINY).save(folder)
    return folder


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Folder of six maps with a slope each."""
    folder = tmp_path_factory.mktemp("maps")
    slope = np.tile(np.linspace(0, 1, 40, dtype=np.float32), (40, 1))
    for number in range(6):
        write_map(np.rot90(slope, number) * (1 - number / 10), folder / f"{number}.png")
    return folder


# --- usage ------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys, vpt.cli;"
        "[vpt.cli.main(['depth-tokenizer', name, '--help'])"
        " for name in ('train', 'encode', 'decode', 'report')];"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("depth-tokenizer", "the following arguments are required: COMMAND"),
        ("depth-tokenizer train --out o", "expected either --maps or --photos"),
        ("depth-tokenizer train --out o --maps m --photos p", "expected either --maps or --ph"),
        ("depth-tokenizer train --out o --maps m --depth-model d", "--depth-model needs --photos"),
        ("depth-tokenizer train --out o --maps m --steps 0", "expected at least 1, got 0"),
        ("depth-tokenizer encode a.png", "the following arguments are required: --tokenizer"),
        ("depth-tokenizer encode a --tokenizer t --depth-model d", "--depth-model needs --est"),
        ("depth-tokenizer decode x --tokenizer t --out a.jpg", "expected a name that ends in .p"),
        (
            f"depth-tokenizer decode x --tokenizer t --out {__file__}/a.png",
            "py is a file; expected",
        ),
        ("depth-tokenizer report --maps m --tokenizer t --picture a.gif", "ends in .png, .jpg"),
    ],
)
def test_wrong_usage_is_told(vpt, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = vpt(*words.split())
    assert (code, out) == (2, "") and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_told(vpt, tmp_path, tokenizer):
    none = tmp_path / "none"
    code, _, err = vpt("depth-tokenizer", "encode", none, "--tokenizer", none)
    assert code == 4 and "there is no depth tokenizer" in err
    code, _, err = vpt("depth-tokenizer", "encode", none, "--tokenizer", tokenizer)
    assert code == 2 and "does not exist" in err
    code, _, err = vpt("depth-tokenizer", "train", "--maps", none, "--out", tmp_path / "o")
    assert code == 2 and "there is no folder" in err
    code, _, err = vpt("depth-tokenizer", "train", "--photos", none, "--out", tmp_path / "o")
    assert code == 2 and "there is no folder" in err


def test_what_macos_leaves_beside_photos_is_not_a_photo(tmp_path):
    for name in ("a.png", "._a.png", ".thumbnails/a.png", "b/c.jpg", "b/._c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    found = find_photos(tmp_path)
    assert found == [tmp_path / "a.png", tmp_path / "b/c.jpg"]
    assert find_maps(tmp_path) == [tmp_path / "a.png"]


# --- encode, decode, report -------------------------------------------------------------------


def test_text_of_a_map_decodes_to_a_map(vpt, tmp_path, tokenizer, maps, monkeypatch):
    code, text, _ = vpt("depth-tokenizer", "encode", maps / "0.png", "--tokenizer", tokenizer)
    assert code == 0 and text.startswith("<DEPTH_START>") and text.count("\n") == 1
    words = ("--tokenizer", tokenizer, "--out", tmp_path / "back.png")
    code, _, err = vpt("depth-tokenizer", "decode", text, *words)
    assert code == 0 and "near is bright" in err
    back = read_map(tmp_path / "back.png")
    assert back.shape == (32, 32)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    (tmp_path / "back.png").unlink()
    assert vpt("depth-tokenizer", "decode", "-", *words)[0] == 0
    assert np.array_equal(read_map(tmp_path / "back.png"), back)


def test_maps_of_distances_are_encoded_with_an_option(vpt, tmp_path, tokenizer):
    near = np.tile(np.linspace(0.1, 1, 64), (64, 1))
    far = np.rint(400 / near).astype(np.uint16)
    low, high = (1 / far).min(), (1 / far).max()
    np.save(tmp_path / "near.npy", ((1 / far - low) / (high - low)).astype(np.float32))
    Image.fromarray(far).save(tmp_path / "far.png")
    words = ("depth-tokenizer", "encode", tmp_path / "far.png", "--tokenizer", tokenizer)
    code, _, err = vpt(*words)
    assert code == 2 and "far.png has 16-bit values up to 4000" in err
    code, text, _ = vpt(*words, "--distances")
    assert code == 0
    assert text == vpt("depth-tokenizer", "encode", tmp_path / "near.npy", *words[3:])[1]


def test_json_names_files_codes_and_text(vpt, tokenizer, maps):
    files = sorted(maps.iterdir())[:2]
    _, out, _ = vpt("depth-tokenizer", "encode", *files, "--tokenizer", tokenizer, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert all(len(row["codes"]) == 16 and "<DEPTH_END>" in row["text"] for row in rows)


def test_text_that_is_no_map_is_told(vpt, tmp_path, tokenizer):
    words = ("--tokenizer", tokenizer, "--out", tmp_path / "a.png")
    code, _, err = vpt("depth-tokenizer", "decode", "<DEPTH_START><DEPTH_END>", *words)
    assert code == 2 and "expected a depth map of 16 codes, got 0" in err


def test_a_report_tells_numbers_and_draws(vpt, tmp_path, tokenizer, maps):
    words = ("depth-tokenizer", "report", "--maps", maps, "--tokenizer", tokenizer)
    code, out, _ = vpt(*words, "--picture", tmp_path / "look.jpg")
    assert code == 0 and "perplexity" in out
    with Image.open(tmp_path / "look.jpg") as picture:
        assert picture.width > 6 * 160
    numbers = json.loads(vpt(*words, "--json")[1])
    assert numbers["num_maps"] == 6 and numbers["num_codes"] == 8 and numbers["mse"] > 0


def test_photos_are_encoded_by_way_of_a_depth_model(vpt, tmp_path, tokenizer, depth_model):  # noqa: F811
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((60, 40), 90).convert("RGB").save(photo)
    words = ("--estimate", "--depth-model", depth_model, "--tokenizer", tokenizer)
    code, out, _ = vpt("depth-tokenizer", "encode", photo, *words)
    assert code == 0 and out.count("<DEPTH_") == 18


# --- train ------------------------------------------------------------------------------------


def test_training_writes_weights_numbers_and_a_picture(vpt, tmp_path, maps):
    words = ("depth-tokenizer", "train", "--maps", maps, "--out", tmp_path / "out", *QUICK)
    code, out, err = vpt(*words)
    assert code == 0, err
    assert "mse " in out and "perplexity" in out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "metrics.json", "reconstructions.png"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["run"]["steps"] == 4 and metrics["run"]["num_maps"] == 5
    assert metrics["heldout"]["num_maps"] == 1 and metrics["heldout"]["num_codes"] == 128
    assert metrics["history"][-1]["step"] == 4
    code, text, _ = vpt(
        "depth-tokenizer", "encode", maps / "0.png", "--tokenizer", tmp_path / "out"
    )
    assert code == 0 and text.count("<DEPTH_") == 102
    code, _, err = vpt(*words)
    assert code == 0 and "is trained already" in err
    code, _, err = vpt(*words, "--seed", 1)
    assert code == 2 and "holds a run with seed 0, not 1" in err


def test_maps_to_measure_on_are_not_trained_on(vpt, tmp_path, maps):
    code, _, err = vpt(
        *("depth-tokenizer", "train", "--maps", maps, "--heldout", maps, "--out", tmp_path / "o")
    )
    assert code == 2 and "holds maps to train on; separate them" in err


def test_photos_are_trained_on_by_way_of_a_depth_model(vpt, tmp_path, depth_model):  # noqa: F811
    (tmp_path / "photos").mkdir()
    for number in range(3):
        noise = Image.effect_noise((50, 40), 90).convert("RGB")
        noise.save(tmp_path / "photos" / f"{number}.jpg")
    code, _, err = vpt(
        *("depth-tokenizer", "train", "--photos", tmp_path / "photos", "--out", tmp_path / "out"),
        *("--depth-model", depth_model, *QUICK),
    )
    assert code == 0, err
    kept = sorted(file.name for file in (tmp_path / "out" / "maps").iterdir())
    assert kept == ["0.jpg.png", "1.jpg.png", "2.jpg.png"]


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, maps):
    words = ["--maps", str(maps), "--steps", "120", "--batch-size", "1", "--crop-cells", "1"]
    start = [sys.executable, "-m", "vpt", "depth-tokenizer", "train", *words, "--out"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, str(whole)], cwd=ROOT, env=env, check=True)
    running = subprocess.Popen([*start, str(broken)], cwd=ROOT, env=env)
    while not (broken / "training_state.pt").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (broken / "metrics.json").exists()
    done = subprocess.run([*start, str(broken)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming after step" in done.stderr
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)

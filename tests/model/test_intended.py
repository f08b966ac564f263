"""A model that is meant for images of one kind warns of others; all other models never do."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDENS
from PIL import Image

import vpt
from recipes.embedded import inputs as recipe
from recipes.embedded.scenes import KINDS, draw_scene
from vpt.errors import CheckpointError
from vpt.model.config import load_config
from vpt.model.intended import NUM_FEATURES, IntendedInputs, image_features
from vpt.released import PHOTO_MODEL

ROOT = Path(__file__).parents[2]
PHOTOS = Path(os.environ.get("VPT_HARDBLINK") or ROOT.parent / "shared/data/hardblink") / "images"
EXAMPLE = ROOT / "examples" / "tags.jpg"
PHOTO_LIKE = GOLDENS / "images" / "a_scene.png"
EYE = np.eye(NUM_FEATURES).tolist()
SETTING = {"description": "nothing", "mean": [0.0] * NUM_FEATURES, "precision": EYE, "limit": 1}


@pytest.fixture(scope="module")
def shipped():
    return vpt.load(device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_pictures_are_of_the_intended_kind(shipped, kind):
    pytest.importorskip("sklearn")  # the digits on the pictures
    scenes = [draw_scene(np.random.default_rng([9, n]), "heldout", kind) for n in range(5)]
    images = [vpt.load_image(image) for scene in scenes for image in variants(scene.image)]
    assert len(shipped.intended_inputs.warnings(images)) <= 1  # 15 images, 0.2 % false alarms
    examples = [vpt.load_image(file) for file in EXAMPLE.parent.glob("*.jpg")]
    assert len(examples) == 6 and shipped.intended_inputs.warnings(examples) == []


def variants(image):
    again = recipe.save_again(image, np.random.default_rng(0))
    return image, again, recipe.as_jpeg(image, 50)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos of HardBLINK are not here")
def test_photos_are_not(shipped):
    photos = recipe.read_images(PHOTOS)[::8]
    assert all(shipped.intended_inputs.distance(one) > 1 for one in photos)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (2, 3), (448, 448)])
@pytest.mark.parametrize("color", ["white", "black", "red"])
def test_flat_pictures_of_any_size_are_measured_and_are_not(shipped, size, color):
    pixels = Image.new("RGB", size, color)
    assert np.isfinite(image_features(pixels)).all()
    assert len(shipped.intended_inputs.warnings([vpt.load_image(pixels)])) == 1


def test_an_image_is_measured_once(shipped, monkeypatch):
    inputs = IntendedInputs.read(shipped.intended_inputs.to_dict())
    measured = []
    monkeypatch.setattr(
        IntendedInputs, "distance", lambda self, pixels: measured.append(pixels) or 0
    )
    image, other = vpt.load_image(EXAMPLE), vpt.load_image(PHOTO_LIKE)
    assert inputs.warnings([image, other]) == inputs.warnings([image]) == []
    assert measured == [image.pixels, other.pixels]


def test_an_answer_about_another_image_warns_once_and_says_what_to_use(shipped, tmp_path):
    images = [PHOTO_LIKE, EXAMPLE, PHOTO_LIKE]
    answer = shipped.ask(images, "What?", perception="crop", max_new_tokens=4)
    (warning,) = answer.warnings
    assert warning.startswith(f"{PHOTO_LIKE} is unlike the images") and PHOTO_MODEL in warning
    assert "vpt --list-models" in warning and recipe.DESCRIPTION in warning
    answer.trace.save(tmp_path / "trace.json")
    assert vpt.Trace.load(tmp_path / "trace.json").warnings == [warning]
    good = shipped.ask(EXAMPLE, "What number is on the blue one?", max_new_tokens=24)
    assert good.num_calls == 1 and good.warnings == [] and "warnings" not in good.trace.to_dict()
    assert shipped.ask([], "What?", max_new_tokens=1).warnings == []


def test_the_terminal_shows_the_warning_and_the_answer(run):
    code, out, err = run("ask", PHOTO_LIKE, "What is this?", "--max-new-tokens", 4)
    assert code == 0 and out.strip()
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert line.startswith(f"vpt: warning: {PHOTO_LIKE} is unlike")
    assert "warning" not in run("ask", EXAMPLE, "Is there a red one?")[2]


@pytest.mark.parametrize("variant", ["clip", "dino", "sam"])
def test_models_without_the_setting_never_warn(variant):
    runtime = vpt.load(str(GOLDENS / "checkpoints" / variant), device="cpu")
    assert runtime.intended_inputs is None
    assert runtime.ask(PHOTO_LIKE, "What?", max_new_tokens=2).warnings == []


def test_the_setting_is_saved_extended_and_gone_with_adapters(shipped, tmp_path, run):
    shipped.model.save_pretrained(tmp_path / "same")
    shipped.processor.save_pretrained(tmp_path / "same")
    before = shipped.model.config.intended_inputs
    assert load_config(tmp_path / "same").intended_inputs == before
    words = ("--base", tmp_path / "same", "--grounding", "--out", tmp_path / "grounding")
    assert run("init", *words)[0] == 0
    again = vpt.load(tmp_path / "grounding").intended_inputs
    assert again.to_dict() == IntendedInputs.read(before).to_dict()

    peft = pytest.importorskip("peft")
    model = vpt.load(tmp_path / "same", device="cpu").model
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    merged = peft.get_peft_model(model, lora).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert load_config(tmp_path / "merged").intended_inputs is None


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.0] * 8},
        {"precision": EYE[:-1]},
        {"precision": [[1, 2], [3]]},
        {"limit": "far"},
        {"limit": float("nan")},
        {"limit": []},
        {"limit": [1, 2]},
        {"mean": [[0.0] * NUM_FEATURES] * 2, "precision": [EYE], "limit": [1, 2]},
        {"description": 3},
        {"threshold": 2},
    ],
)
def test_a_malformed_setting_is_refused(tmp_path, change):
    config = json.loads((vpt.loading.EMBEDDED_MODEL / "config.json").read_text())
    config["intended_inputs"] = {**SETTING, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="intended_inputs must have a description, a mean"):
        load_config(tmp_path)
    for setting in ("photos", [], {"mean": [0.0] * 9}):
        with pytest.raises(CheckpointError, match="copy it from where the model was saved, or rem"):
            IntendedInputs.read(setting)


def test_the_recipe_fits_writes_and_measures(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder, num, strength in (("stage-3", 100, 9), ("heldout", 20, 9), ("photos", 20, 60)):
        (tmp_path / folder).mkdir()
        for number in range(num):
            pixels = rng.uniform(60, 180, 3) + rng.normal(
                0, strength * rng.uniform(0.7, 1.3), (48, 48, 3)
            )
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(tmp_path / folder / f"{number:03d}.png")
    (tmp_path / "config.json").write_text("{}")
    words = ["--kinds", tmp_path / "stage-3", "--heldout", tmp_path / "heldout"]
    words += ["--model", tmp_path, "--photos", tmp_path / "photos"]
    recipe.main([*map(str, words)])
    IntendedInputs.read(json.loads((tmp_path / "config.json").read_text())["intended_inputs"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[1], row[2]) for row in rows] == [("20", "false alarms")] * 3 + [
        ("20", "misses")
    ] * 2
    assert int(rows[0][3]) <= 3 and int(rows[3][3]) <= 3
    with pytest.raises(CheckpointError, match="expected at least 100 training images, found 20"):
        recipe.fit([recipe.read_images(tmp_path / "heldout")])


def test_an_image_of_one_of_several_kinds_is_intended():
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    here = image_features(image).tolist()
    far = [value + 100 for value in here]
    one = IntendedInputs.read({**SETTING, "mean": far})
    assert one.distance(image) > 1
    assert one.to_dict()["limit"] == [1.0]
    both = {**SETTING, "mean": [far, here], "precision": [EYE, EYE], "limit": [1, 2]}
    assert IntendedInputs.read(both).distance(image) == 0
    assert IntendedInputs.read(both).warnings([vpt.load_image(image)]) == []

"""``vpt set`` edits a model folder in place, says what changed, and refuses what has no effect."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_model import tiny_model

import vpt
from vpt.model.config import load_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "saved"
    model, processor = tiny_model(("dino",))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_what_is_set_is_in_the_folder_and_nothing_else_changes(run, folder):
    before = json.loads((folder / "config.json").read_text())
    code, out, err = run("set", folder, "--mask", "question+image", "--mask-ratio", 0.25)
    assert (code, err) == (0, "")
    assert out == "mask        none -> question+image\nmask-ratio  1.0 -> 0.25\n"
    after = json.loads((folder / "config.json").read_text())
    assert after == {**before, "para_mask_id": 2, "para_mask_ratio": 0.25}
    config = load_config(str(folder))
    assert (config.alignment, config.para_mask_id, config.para_mask_ratio) == (False, 2, 0.25)


def test_stems_can_be_frozen(run, folder):
    assert run("set", folder, "--stems", "frozen")[1] == "stems       trained -> frozen\n"
    model = vpt.load(str(folder), device="cpu").model
    assert model.projector("dino").freeze_stem
    assert run("set", folder, "--stems", "trained")[1] == "stems       frozen -> trained\n"


def test_conditioning_is_reset_to_small_weights(run, folder):
    before = load_file(folder / "model.safetensors")
    names = sorted(file.name for file in folder.iterdir())
    code, out, err = run("set", folder, "--reset-conditioning", "dino", "--seed", 3)
    assert (code, err, out) == (0, "", "conditioning of dino reset\n")
    after = load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    weight = "projectors.dino.linear_condition.weight"
    assert weight in changed and all("condition" in name for name in changed)
    assert after[weight].std() < 0.2 * before[weight].std()
    assert sorted(file.name for file in folder.iterdir()) == names
    vpt.load(str(folder), device="cpu")
    run("set", folder, "--reset-conditioning", "dino", "--seed", 3)
    assert torch.equal(after[weight], load_file(folder / "model.safetensors")[weight])


def test_the_former_name_of_an_option_works_with_a_note(run, folder):
    code, out, err = run("set", folder, "--fresh-steering", "dino", "--seed", 3)
    assert code == 0 and out == "conditioning of dino reset\n"
    assert "--fresh-steering is called --reset-conditioning now" in err


def test_conditioning_of_a_released_folder_is_reset(run, goldens, tmp_path):
    folder = shutil.copytree(goldens / "checkpoints" / "dino", tmp_path / "model")
    assert run("set", folder, "--reset-conditioning", "dino")[0] == 0
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(folder.glob("*.bin"))
    vpt.load(str(folder), device="cpu")


def test_conditioning_of_a_branch_that_is_not_there(run, folder):
    code, _, err = run("set", folder, "--reset-conditioning", "sam")
    assert code == 2 and f"no branch sam in {folder}; it has: dino" in err
    before = (folder / "config.json").read_text()
    assert run("set", folder, "--mask", "question", "--reset-conditioning", "sam")[0] == 2
    code, _, err = run("set", folder, "--reset-conditioning", "")
    assert code == 2 and "expected names of branches, as in dino,sam" in err
    assert (folder / "config.json").read_text() == before
    code, _, err = run("set", folder, "--reset-conditioning", "eyes")
    assert code == 2 and "unknown branch 'eyes'; available: clip, dino, sam" in err


def test_pictures_can_be_read_in_more_tokens(run, folder):
    runtime = vpt.load(str(folder), device="cpu")
    old = runtime.processor.image_processor.size["longest_edge"]
    assert run("set", folder, "--max-pixels", 784)[1] == f"max-pixels  {old} -> 784\n"
    assert run("set", folder, "--max-pixels", 784)[1] == "max-pixels  784, as it was\n"
    code, _, err = run("set", folder, "--max-pixels", 783, "--mask", "none")
    assert code == 2 and "must be at least 784, one token of this model (28x28 pixels)" in err
    smallest = vpt.load(str(folder), device="cpu").processor.image_processor
    assert smallest.size == {"shortest_edge": 784, "longest_edge": 784}
    assert run("set", folder, "--max-pixels", 50176)[0] == 0
    answer = vpt.load(str(folder), device="cpu").ask(
        Image.new("RGB", (448, 448)), "?", max_new_tokens=1, perception="none"
    )
    assert answer.trace.images[0].num_tokens == 64


def test_the_own_tower_can_look_again_in_more_tokens(run, tmp_path):
    model, processor = tiny_model(("clip",))
    for one in (model, processor):
        one.save_pretrained(tmp_path)
    old = processor.image_processor.size["longest_edge"]
    words = "set", tmp_path, "--own-tower-pixels", 50176
    assert run(*words)[1] == f"own-tower-pixels {old} -> 50176\n"
    assert run(*words)[1] == "own-tower-pixels 50176, as it was\n"
    code, _, err = run("set", tmp_path, "--own-tower-pixels", 783)
    assert code == 2 and "--own-tower-pixels must be at least 784, one token" in err
    picture = Image.new("RGB", (448, 448))
    answer = vpt.load(str(tmp_path), device="cpu").ask(
        picture, "?", max_new_tokens=8, perception="clip"
    )
    assert answer.trace.calls[0].num_tokens == 64
    assert answer.trace.images[0].num_tokens != 64


def test_a_model_without_its_own_tower_has_no_size_for_it(run, folder):
    code, _, err = run("set", folder, "--own-tower-pixels", 50176)
    assert code == 2 and "does not re-encode by its own tower" in err


def test_one_stage_follows_another(run, folder):
    assert run("set", folder, "--alignment", "on", "--mask", "none")[0] == 0
    assert load_config(str(folder)).alignment is True
    code, out, _ = run("set", folder, "--alignment", "off", "--mask", "question")
    assert code == 0
    assert out == "alignment   on -> off\nmask        none -> question\n"


def test_what_was_so_already_is_told(run, folder):
    assert run("set", folder, "--alignment", "off")[1] == "alignment   off, as it was\n"


def test_a_released_folder_becomes_one_that_llamafactory_loads(run, goldens, tmp_path):
    folder = shutil.copytree(goldens / "checkpoints" / "dino", tmp_path / "model")
    before = set(folder.iterdir())
    assert run("set", folder, "--mask", "question")[0] == 0
    added = {file.name for file in set(folder.iterdir()) - before}
    assert added == {"vpt_shim.py", "processor_config.json"}
    entry = json.loads((folder / "processor_config.json").read_text())
    assert entry["auto_map"] == {"AutoProcessor": "vpt_shim.VPTProcessor"}
    assert "AutoConfig" in json.loads((folder / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "there is nothing to set; give --alignment, --stems, --mask"),
        (["--mask", "answer"], 2, "invalid choice: 'answer'"),
        (["--mask", "question", "--mask-ratio", "2"], 2, "expected a number from 0 to 1, got 2"),
        (["--mask-ratio", "0.5"], 2, "--mask-ratio needs a mask"),
        (["--alignment", "on", "--mask", "question"], 2, "nothing is masked in alignment"),
        (["--alignment", "on", "--stems", "frozen"], 2, "alignment trains the stems"),
    ],
)
def test_what_cannot_be_set_is_told_and_changes_nothing(run, folder, words, code, message):
    before = (folder / "config.json").read_text()
    given, out, err = run("set", folder, *words)
    assert (given, out) == (code, "") and message in err and "Traceback" not in err
    assert (folder / "config.json").read_text() == before


def test_a_folder_that_is_none_is_told(run, tmp_path):
    code, _, err = run("set", tmp_path / "none", "--mask", "none")
    assert code == 4 and "there is no model folder" in err
    code, _, err = run("set", tmp_path, "--mask", "none")
    assert code == 4 and "holds no config.json" in err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run("set", tmp_path, "--mask", "none")
    assert code == 4 and "holds a model of type 'bert'" in err


def test_a_setting_that_does_not_fit_the_folder_is_told(run, folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "para_start_id": None}))
    code, _, err = run("set", folder, "--mask", "question")
    assert code == 4 and "para_mask_id needs para_start_id" in err


@pytest.mark.parametrize(
    "words", [["--mask-ratio", "0.5"], ["--alignment", "on", "--mask", "question"]]
)
def test_init_refuses_the_same(run, tmp_path, words):
    code, _, err = run("init", "--base", "b", "--branches", "", "--out", tmp_path / "o", *words)
    assert code == 2 and "mask" in err


def as_snapshot(folder, tmp_path):
    """The folder as the hub's cache has it: links to blobs that other snapshots share."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    return snapshot, blobs


@pytest.mark.parametrize(
    "words",
    [
        ["--mask", "question"],
        ["--max-pixels", "784"],
        ["--reset-conditioning", "dino"],
    ],
)
def test_blobs_that_snapshots_share_stay_as_they_are(run, folder, tmp_path, words):
    snapshot, blobs = as_snapshot(folder, tmp_path)
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    assert run("set", snapshot, *words)[0] == 0
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before
    changed = {file.name for file in snapshot.iterdir() if not file.is_symlink()}
    assert changed and not [name for name in changed if name.startswith(".")]
    vpt.load(str(snapshot), device="cpu")


def test_a_model_saved_over_its_own_snapshot_leaves_the_blobs(folder, tmp_path):
    snapshot, blobs = as_snapshot(folder, tmp_path)
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    runtime = vpt.load(str(snapshot), device="cpu")
    runtime.model.lm_head.weight.data.zero_()
    runtime.model.save_pretrained(snapshot)
    runtime.processor.save_pretrained(snapshot)
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before
    again = vpt.load(str(snapshot), device="cpu")
    assert not again.model.lm_head.weight.any()
    assert not [file for file in snapshot.iterdir() if file.is_dir()]


def test_weights_saved_in_other_shards_replace_the_old(folder):
    model = vpt.load(str(folder), device="cpu").model
    model.save_pretrained(folder, max_shard_size="100KB")
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model.save_pretrained(folder)
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]
    vpt.load(str(folder), device="cpu")


def test_a_tokenizer_of_another_model_is_not_set_up(run, folder, goldens):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(goldens / "checkpoints" / "sam" / name, folder / name)
    before = (folder / "config.json").read_text()
    code, _, err = run("set", folder, "--mask", "question")
    assert code == 4 and "the tokenizer is not that of the model" in err
    assert (folder / "config.json").read_text() == before

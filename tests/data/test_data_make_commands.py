"""The commands that make Aurora's data, through main() as a person types them."""

import json

import pytest
from aurora_samples import GreyTokenizer, write_photos

from recipes.__main__ import COMMANDS
from recipes.__main__ import main as recipe
from vpt import cli
from vpt.data.rows import read_entries
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig


@pytest.fixture
def vpt(capsys):
    """Run ``vpt data``, or a recipe; returns code, stdout and stderr."""

    def run(*words):
        words = list(map(str, words))
        code = recipe(words) if words[0] in COMMANDS.commands else cli.main(["data", *words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def grey(monkeypatch):
    """Let the commands load a tokenizer that needs no training."""
    monkeypatch.setattr("vpt.depth.tokenizer.load_depth_tokenizer", lambda _: GreyTokenizer())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("scenes") / "train", 12)


def test_from_scenes_to_a_checked_curriculum(vpt, grey, scenes, tmp_path):
    rows = tmp_path / "rows"
    words = ("--tokenizer", tmp_path, "--points", "2-3", "--skip-bad", "--out", rows)
    code, _, said = vpt("make-depth-rows", "--scenes", scenes, *words)
    assert code == 0 and "the lowest point is the nearest in" in said
    mixed = tmp_path / "mixed/curriculum.jsonl"
    mixed.parent.mkdir()
    code, out, _ = vpt(
        "make-curriculum",
        *("--atomic", rows / "depth_maps.jsonl", "--out", mixed),
        *("--tasks", rows / "depth_steps.jsonl", rows / "depth_direct.jsonl"),
    )
    assert code == 0 and "epoch  1:" in out and "100% atomic" in out and "epoch 10:" in out
    assert "curriculum" in json.loads((mixed.parent / "dataset_info.json").read_text())
    code, out, _ = vpt("check", mixed, "--images", mixed.parent)
    assert (
        code == 0 and "nothing found" in out and "epoch 10:" in out and " 8% atomic" in out
    )  # 1 of 12
    code, out, _ = vpt("check", mixed, "--images", mixed.parent, "--json")
    assert set(json.loads(out)["epochs"]) == {str(epoch) for epoch in range(1, 11)}
    assert read_entries(mixed)[0]["images"][0].startswith("../")


def test_counting_scenes_can_have_one_thing_of_each_kind(vpt, tmp_path):
    words = ("make-counting-scenes", "--out", tmp_path, "--num", 4, "--heldout", 0, "--size", 96)
    assert vpt(*words, "--one-of-each")[0] == 0
    annotations = json.loads((tmp_path / "train/annotations.json").read_text())
    for image in annotations["images"]:
        kinds = [
            a["category_id"] for a in annotations["annotations"] if a["image_id"] == image["id"]
        ]
        assert 3 <= len(kinds) == len(set(kinds)) <= 5
    code, _, said = vpt(*words)
    assert code == 2 and "choose another folder" in said


def test_from_counting_scenes_to_checked_rows(vpt, tmp_path):
    scenes, rows = tmp_path / "scenes", tmp_path / "rows"
    code, _, said = vpt(
        "make-counting-scenes", "--out", scenes, "--num", 5, "--heldout", 2, "--size", 96
    )
    assert code == 0 and "5 scenes in" in said and "2 scenes in" in said
    annotations = scenes / "train/annotations.json"
    words = ("--images", scenes / "train/images", "--out", rows)
    code, _, said = vpt("make-counting-rows", annotations, *words)
    assert code == 0 and "boxes.jsonl (5), count_steps.jsonl (5), count_direct.jsonl (5)" in said
    for name in ("boxes", "count_steps", "count_direct"):
        code, out, _ = vpt("check", rows / f"{name}.jsonl", "--images", rows)
        assert code == 0 and "nothing found" in out


def test_photos_without_maps_are_estimated(vpt, grey, scenes, tmp_path, monkeypatch):
    from vpt.depth.maps import read_map

    class Estimator:
        @staticmethod
        def estimate(photo):
            return read_map(scenes / "depth/000003.png")

    monkeypatch.setattr("vpt.cli.depth_tokenizer.load_estimator", lambda _: Estimator)
    words = ("--photos", scenes / "images", "--tokenizer", tmp_path, "--points", "2", "--limit", 2)
    code, _, said = vpt("make-depth-rows", *words, "--out", tmp_path / "rows")
    assert code == 0, said
    assert (tmp_path / "rows/maps/000000.jpg.png").exists()
    assert len(read_entries(tmp_path / "rows/depth_maps.jsonl")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("make-depth-rows --tokenizer t --out o", "expected either --scenes or --photos"),
        ("make-depth-rows --tokenizer t --out o --scenes s --maps m", "--maps belongs to --photos"),
        (
            "make-depth-rows --tokenizer t --out o --scenes s --distances",
            "--distances is for --photos; scenes have maps of their own",
        ),
        ("make-depth-rows --tokenizer t --out o --scenes s --points 7", "expected 2 to 5, or a"),
        ("make-depth-rows --tokenizer t --out o --scenes s", "there is no depth tokenizer t"),
        ("make-counting-scenes --out o --size 2000", "--size: expected 96 to 1024 pixels"),
        ("make-counting-rows a.json --images none --out o", "--images: there is no folder none"),
        ("make-counting-rows a.json --images . --out o", "a.json does not exist"),
        ("make-curriculum --atomic a --tasks b --out c.txt", "expected a name that ends in"),
        (f"make-curriculum --atomic a --tasks b --out {__file__}/c.json", "is a file; expected a"),
        ("make-curriculum --atomic a --tasks b --out c.json", "a does not exist"),
    ],
)
def test_mistakes_are_one_line(vpt, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, said = vpt(*words.split())
    assert code in (2, 4) and message in said.splitlines()[-1]
    assert said.count("\n") == 1 or said.startswith("usage:")
    assert not list(tmp_path.rglob("*.json*"))


def test_a_file_where_a_folder_should_be_is_refused(vpt, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.json").write_text("{}")
    for words in (
        ("make-depth-rows", "--scenes", "s", "--tokenizer", "t"),
        ("make-counting-scenes",),
        ("make-counting-rows", tmp_path / "a.json", "--images", tmp_path),
    ):
        code, _, said = vpt(*words, "--out", tmp_path / "file/rows")
        assert code == 2 and "is a file; expected a folder" in said


def test_an_entry_that_is_no_row_is_refused(vpt, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg"}\n')
    words = ("--atomic", tmp_path / "a.jsonl", "--tasks", tmp_path / "a.jsonl")
    code, _, said = vpt("make-curriculum", *words, "--out", tmp_path / "c.jsonl")
    assert code == 2 and "entry 0 is no row" in said


def test_a_tokenizer_of_another_shape_is_named(vpt, scenes, tmp_path):
    config = DepthTokenizerConfig(
        size_px=32, num_codes=8, code_dim=6, hidden_dim=2, num_downsamplings=3
    )
    DepthTokenizer(config.build(), config).save(tmp_path / "tokenizer")
    words = ("--scenes", scenes, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "rows")
    code, _, said = vpt("make-depth-rows", *words)
    assert code == 2 and "makes 16 codes out of 8; expected 100 out of 128" in said

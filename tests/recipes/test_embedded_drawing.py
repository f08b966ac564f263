"""The last stage of the embedded model: rows with a second look, a small tokenizer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import SHAPE
from PIL import Image

import recipes.__main__ as recipes_main
from recipes.counting.files import write_counting_scenes
from recipes.embedded import drawing, shrink
from recipes.embedded.drawing import (
    ASK_ALL_BOXES,
    ASK_ALL_COUNTS,
    ASK_ALL_POINTS,
    add_calls,
    kind_rows,
    looking_row,
    point_rows,
    say_point_boxes,
)
from vpt.cli.parser import build_parser
from vpt.cli.run import COMMANDS
from vpt.data.content_rows import (
    ASK_COUNT_STEPS,
    CategoryBoxes,
    counting_rows,
    read_levels,
    read_note,
    say_levels,
    say_places,
    say_plural,
)
from vpt.data.rows import make_row, read_entries
from vpt.depth.tokenizer import DepthTokenizer, load_depth_tokenizer
from vpt.errors import DataError
from vpt.protocol.tokens import BRANCH_TOKENS, TOWER

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "embedded" / "train.sh"
STEPS = counting_rows("a.jpg", CategoryBoxes("star", ((0, 0, 9, 9),)))[1]


def say(row):
    return [message["content"] for message in row["messages"]]


@pytest.mark.parametrize("invited", [True, False])
def test_the_own_tower_is_called_before_the_answer(invited):
    tower = BRANCH_TOKENS[TOWER]
    row = looking_row(STEPS, invited=invited)
    asked, call, seen, answered = say(row)
    assert (call, seen, answered) == (tower.call, tower.placeholder, say(STEPS)[1])
    assert asked.endswith(ASK_COUNT_STEPS) == invited
    assert asked.startswith("<image>\nHow many stars are in the image?")
    assert row["images"] == row[tower.column] == ["a.jpg"]


def test_files_of_rows_get_calls_and_paths_from_their_new_place(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "count_steps.jsonl").write_text(json.dumps(STEPS))
    words = ["drawing", "--rows", tmp_path / "rows", "--out", tmp_path / "new" / "train"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    drawing.main()
    (row,) = read_entries(tmp_path / "new" / "train" / "count_steps.jsonl")
    assert row["images"] == row["clip_images"] == ["../../rows/a.jpg"]
    assert say(row)[-1] == f"The stars{say(STEPS)[1]}"
    assert list(json.loads((tmp_path / "new" / "train" / "dataset_info.json").read_text())) == [
        "count_steps"
    ]


def test_all_kinds_of_a_picture_are_listed_by_name(tmp_path):
    list(write_counting_scenes(tmp_path / "scenes", "train", 6, 0, 96))
    pairs = list(kind_rows(tmp_path / "scenes", tmp_path / "new", 0))
    known = json.loads((tmp_path / "scenes" / "annotations.json").read_text())
    names = {one["id"]: one["name"] for one in known["categories"]}
    assert len(pairs) == 6
    for number, (boxes, counts) in enumerate(pairs):
        things = [
            names[one["category_id"]] for one in known["annotations"] if one["image_id"] == number
        ]
        expected = {say_plural(kind): things.count(kind) for kind in set(things)}
        asked, call, _, answered = say(boxes)
        assert call == BRANCH_TOKENS[TOWER].call and asked == f"<image>\n{ASK_ALL_BOXES}"
        parts = answered.removesuffix(".").split(". ")
        listed = [re.fullmatch(r"The ([a-z]+)((?:<PIXEL_\d+>|, )+)", part) for part in parts]
        assert {one[1]: one[2].count("<PIXEL_") / 4 for one in listed} == expected
        assert boxes["images"] == boxes["clip_images"] == [f"../scenes/images/{number:06d}.jpg"]
        assert counts["images"] == boxes["images"]
        asked, _, _, answered = say(counts)
        assert asked == f"<image>\n{ASK_ALL_COUNTS}"
        numbers = {part.split()[1]: int(part.split()[2]) for part in answered[:-1].split(". ")}
        assert list(numbers.items()) == [(one[1], expected[one[1]]) for one in listed]


def test_a_picture_without_things_has_no_rows(tmp_path):
    list(write_counting_scenes(tmp_path, "train", 2, 0, 96))
    known = json.loads((tmp_path / "annotations.json").read_text())
    known["annotations"] = [one for one in known["annotations"] if one["image_id"] == 1]
    (tmp_path / "annotations.json").write_text(json.dumps(known))
    ((row, _),) = kind_rows(tmp_path, tmp_path, 0)
    assert row["images"] == ["images/000001.jpg"]


def test_all_points_are_listed_in_any_order(tmp_path):
    places = {"A": (37, 281), "B": (120, 7), "C": (209, 251)}
    levels = {"A": 5, "B": 93, "C": 40}
    steps = f"Points: {say_places(places)}. Depth map: <DEPTH_START><DEPTH_0><DEPTH_END> "
    steps += f"Nearness: {say_levels(levels)}. The answer is (B)."
    row = make_row(["<image>\nWhich one?", steps], {"image": ["a.jpg"]})
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "depth_steps.jsonl").write_text(f"{json.dumps(row)}\n" * 12)
    orders = set()
    for made in point_rows(tmp_path / "rows" / "depth_steps.jsonl", tmp_path, 0):
        asked, call, _, answered = say(made)
        assert asked == f"<image>\n{ASK_ALL_POINTS}" and call == BRANCH_TOKENS[TOWER].call
        assert made["images"] == made["clip_images"] == ["rows/a.jpg"]
        assert read_levels(answered) == levels
        order = [*read_levels(answered)]
        assert say_point_boxes({letter: places[letter] for letter in order}) in answered
        orders.add(tuple(order))
    assert len(orders) > 3


def test_points_of_steps_become_boxes_of_their_circles(tmp_path):
    places = {"A": (37, 281), "B": (3, 330)}
    steps = f"Points: {say_places(places)}. Depth map: <DEPTH_START><DEPTH_0><DEPTH_END> x."
    row = make_row(["<image>\nWhich one?", steps], {"image": ["a.jpg"]})
    (tmp_path / "depth_steps.jsonl").write_text(
        json.dumps({**row, "note": '{"task": "depth-steps"}'})
    )
    (made,) = add_calls(tmp_path / "depth_steps.jsonl", tmp_path, 0)
    boxes = (
        "A<PIXEL_30><PIXEL_274><PIXEL_44><PIXEL_288>, B<PIXEL_0><PIXEL_323><PIXEL_10><PIXEL_335>"
    )
    rest = "Depth map: <DEPTH_START><DEPTH_0><DEPTH_END> x."
    assert say(made)[-1] == f"Points: {boxes}. {rest}"
    assert read_note(made) == {}


@pytest.mark.parametrize("answer", ["(B)", "Points: A at x 037 y 281. Nearness: B 05."])
def test_points_without_place_or_nearness_are_refused(tmp_path, answer):
    row = make_row(["<image>\nWhich one?", answer], {"image": ["a.jpg"]})
    (tmp_path / "depth_steps.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="the place and the nearness of each point, got "):
        list(point_rows(tmp_path / "depth_steps.jsonl", tmp_path, 0))


def test_folders_without_rows_are_refused(tmp_path, monkeypatch, capsys):
    words = ["drawing", "--rows", tmp_path, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit):
        drawing.main()
    assert "no rows in" in capsys.readouterr().err


def test_scenes_that_are_not_there_end_with_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "count_steps.jsonl").write_text(json.dumps(STEPS))
    words = [
        "drawing",
        "--rows",
        tmp_path,
        "--counting",
        tmp_path / "none",
        "--out",
        tmp_path / "x",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit):
        drawing.main()
    assert "annotations.json does not exist; check the path" in capsys.readouterr().err


def test_a_small_tokenizer_learns_the_codes_of_a_large_one(tmp_path, monkeypatch, capsys):
    teacher = DepthTokenizer(SHAPE.build(3), SHAPE)
    teacher.save(tmp_path / "teacher")
    (tmp_path / "maps").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        values = rng.integers(0, 256, (2, 2), dtype=np.uint8)
        image = Image.fromarray(values).resize((64, 64), Image.Resampling.BICUBIC)
        image.save(tmp_path / "maps" / f"{number}.png")
    words = ["shrink", tmp_path / "teacher", tmp_path / "small", "--steps", 60, "--hidden-dim", 2]
    words += ["--maps", tmp_path / "maps", "--heldout", tmp_path / "maps"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    shrink.main()
    told = re.search(
        r"4 maps: ([\d.]+) of the codes are equal; squared error ([\d.]+)", capsys.readouterr().out
    )
    small = load_depth_tokenizer(tmp_path / "small")
    assert small.config.hidden_dim == 2
    assert torch.equal(small.network.codebook.vectors, teacher.network.codebook.vectors)
    untrained = shrink.shrink(teacher, sorted((tmp_path / "maps").iterdir()), hidden_dim=2, steps=1)
    files = sorted((tmp_path / "maps").iterdir())
    before = re.search("squared error ([0-9.]+)", shrink.compare(teacher, untrained, files))
    assert float(told[2]) < float(before[1])


def test_the_whole_recipe_names_what_there_is():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    text = SCRIPT.read_text()
    stages = re.findall(r"^ *stage (?:vision|language) (\S+)$", text, re.MULTILINE)
    configs = {file.stem for file in (ROOT / "configs" / "embedded").glob("[0-9]-*.yaml")}
    assert set(stages) == configs - {"3-baseline"}
    assert stages == sorted(stages)
    for module in re.findall(r"-m (recipes\.\S+)", text):
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), module


def run_recipe(folder, command, **environment):
    """Run the script in an empty checkout with the same command in place of each of its own."""
    for name in ("python", "vpt", "torchrun"):
        (folder / name).write_text(f"#!/bin/bash\n{command}\n")
        (folder / name).chmod(0o755)
    copy = folder / "recipes" / "embedded" / "train.sh"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(SCRIPT.read_text())
    env = {"PATH": f"{folder}:/usr/bin:/bin", **environment}
    return subprocess.run(["bash", copy], capture_output=True, text=True, env=env, check=False)


def test_the_whole_recipe_stops_at_a_step_that_made_nothing(tmp_path):
    """With commands that do nothing it ends at the first, and says which."""
    ended = run_recipe(tmp_path, "exit 0")
    assert ended.returncode == 1
    assert "ended without data/embedded/dataset_info.json" in ended.stderr


MAKE_ALL = """
echo "$(basename "$0") $*" >> log
for word; do
  case $word in
    *.yaml) folder=models/embedded/$(basename "$word" .yaml) ;;
    data/* | models/*) folder=$word ;;
    *) continue ;;
  esac
  [ -f "$folder" ] && continue
  mkdir -p "$folder/heldout" 2> /dev/null || continue
  cd "$folder"
  touch config.json model.safetensors dataset_info.json
  touch heldout/objects.jsonl heldout/annotations.json
  cd - > /dev/null
done
"""


def test_the_last_stage_runs_in_as_many_processes_as_are_asked_for(tmp_path):
    ended = run_recipe(tmp_path, MAKE_ALL, PROCESSES="2")
    assert ended.returncode == 0, ended.stderr
    shared = [line for line in (tmp_path / "log").read_text().splitlines() if "torchrun" in line]
    words = "--standalone --nproc-per-node 2 -m recipes.embedded.language"
    assert shared == [f"torchrun {words} configs/embedded/3-language.yaml"]


def test_each_command_of_the_whole_recipe_is_one_that_can_be_given(tmp_path):
    """With commands that make what they name it goes to its end, and has nothing left to do."""
    ended = run_recipe(tmp_path, MAKE_ALL)
    assert ended.returncode == 0, ended.stderr
    given = (tmp_path / "log").read_text().splitlines()
    programs = {"vpt ": (COMMANDS, "vpt"), "python -m recipes ": (recipes_main.COMMANDS, "recipes")}
    for beginning, (program, name) in programs.items():
        lines = [line for line in given if line.startswith(beginning)]
        assert len(lines) >= 3
        for line in lines:
            build_parser(program, name).parse_args(line.removeprefix(beginning).split())
    assert sum("make-depth-rows" in line for line in given) == 4

    (tmp_path / "log").unlink()
    again = run_recipe(tmp_path, MAKE_ALL)
    assert again.returncode == 0 and "done: models/embedded/3-language" in again.stdout
    given = (tmp_path / "log").read_text().splitlines()
    assert all(re.match(r"vpt set |python -m recipes.embedded.inputs ", line) for line in given)

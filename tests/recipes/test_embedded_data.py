"""The generated data: the same for the same seed, no split in another, no question that tells."""

import contextlib
import json
import sys
from collections import defaultdict

import numpy as np
import pytest

pytest.importorskip("sklearn")

from recipes.__main__ import main
from recipes.embedded.handwriting import digit_pictures, write_digit
from recipes.embedded.labels import CONTENTS, HEADS, IGNORE, label_view
from recipes.embedded.looks import LOOKS, background
from recipes.embedded.make import (
    PARTS,
    answering_row,
    easy_rows,
    make_part,
    side_rows,
    write_index,
)
from recipes.embedded.marks import COLORS, LINES, PATTERNS, SHAPES, shape_mask, texture
from recipes.embedded.questions import (
    caption,
    cell_of,
    easy_question,
    listing,
    mode_of,
    reading_questions,
    side_questions,
)
from recipes.embedded.scenes import KINDS, SIZE_PX, draw_scene, random_value
from recipes.embedded.sheets import close_sheet, far_sheet
from vpt.boxes import GridBox, contains, crop_box_px
from vpt.errors import PromptError

WHOLE = (0.0, 0.0, float(SIZE_PX), float(SIZE_PX))
scenes = pytest.mark.parametrize("kind", KINDS)


def rng(*seed):
    return np.random.default_rng(list(seed))


@scenes
def test_a_seed_decides_the_whole_scene(kind):
    one, same, other = (draw_scene(rng(seed), "train", kind) for seed in (1, 1, 2))
    assert one.items == same.items
    assert np.array_equal(one.image, same.image)
    assert not np.array_equal(one.image, other.image)


def test_no_handwriting_is_in_two_splits():
    train, heldout = (digit_pictures(split) for split in ("train", "heldout"))
    assert sum(map(len, train.values())) + sum(map(len, heldout.values())) == 1797
    for digit in range(10):
        seen = {picture.tobytes() for picture in train[digit]}
        assert not [p for p in heldout[digit] if p.tobytes() in seen]


@pytest.mark.parametrize("look", LOOKS)
def test_backgrounds_of_the_splits_differ(look):
    train, heldout = (background(look, 64, split, rng(0)) for split in ("train", "heldout"))
    assert train.shape == (64, 64, 3)
    assert not np.allclose(train, heldout)


@scenes
def test_items_lie_in_the_picture_apart_and_have_colors_of_their_own(kind):
    for seed in range(40):
        scene = draw_scene(rng(seed), "train", kind)
        assert len({item.color for item in scene.items}) == len(scene.items)
        for item in scene.items:
            assert contains(WHOLE, item.box)
            assert contains(item.box, item.tile)
            for other in scene.items:
                x0, y0, x1, y1 = item.box
                apart = other.box[0] >= x1 or other.box[2] <= x0
                apart = apart or other.box[1] >= y1 or other.box[3] <= y0
                assert other is item or apart


def test_the_crop_of_a_tags_cell_shows_the_whole_tag():
    for seed in range(40):
        for item in draw_scene(rng(seed), "train", "tags").items:
            assert contains(crop_box_px(cell_of(item), (SIZE_PX, SIZE_PX)), item.box)


@pytest.mark.parametrize("name", [*LINES, *PATTERNS])
def test_fine_textures_vanish_in_the_first_look_and_stay_in_a_crop(name):
    """Shrunk to a quarter they are flat; shrunk as a crop is, they are not."""
    from PIL import Image

    waves = (152 + 58 * texture(name, 160, 4.8, 1.0)).astype(np.float32)
    image = Image.fromarray(waves)
    far, close = (
        np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))[4:-4, 4:-4]
        for side in (40, 107)
    )
    assert far.std() < 4 < 12 < close.std()


def test_textures_and_shapes_are_named():
    with pytest.raises(ValueError, match="unknown texture 'plaid'; available: horizontal"):
        texture("plaid", 8, 4, 0)
    with pytest.raises(ValueError, match="unknown shape 'blob'; available: circle"):
        shape_mask("blob", 8)


@pytest.mark.parametrize("halo", [0.0, 2.0])
def test_a_digit_is_ink_and_with_a_halo_cancels_out(halo):
    values = write_digit(8, 30, "train", rng(0), halo_px=halo)
    assert values.shape == (30, 30)
    assert values.max() > 0.3
    assert (abs(values.mean()) < 0.02) == (halo > 0)


def test_the_words_of_a_question_do_not_tell_how_to_look():
    modes = defaultdict(set)
    for seed in range(200):
        generator = rng(seed)
        scene = draw_scene(generator, "train")
        for question in reading_questions(scene, generator):
            wording = question.text.replace(question.item.color, "*")
            modes[wording].add(question.mode)
    assert all(len(seen) > 1 for seen in modes.values()), modes
    assert {m for seen in modes.values() for m in seen} == {
        *("direct", "region", "clip", "dino", "sam")
    }


@scenes
def test_easy_questions_are_right(kind):
    for seed in range(60):
        generator = rng(seed)
        scene = draw_scene(generator, "train", kind)
        question = easy_question(scene, generator)
        places = {item.color: item.center[0] for item in scene.items}
        named = [word.strip(",.?") for word in question.text.split()]
        colors = [word for word in named if word in COLORS]
        if question.family == "presence":
            assert (question.answer == "yes") == (colors[0] in places)
        elif question.family == "side":
            assert (question.answer == "left") == (places[colors[0]] < places[colors[1]])
        else:
            assert question.family == "count"


@scenes
def test_captions_name_every_item_with_its_cell(kind):
    scene = draw_scene(rng(3), "train", kind)
    told = caption(scene, rng(4)).answer
    for item in scene.items:
        cell = cell_of(item)
        assert f"{item.color}<|x_{cell.x_min}|><|y_{cell.y_min}|>" in told


@pytest.mark.parametrize("kind", ["boards", "things"])
def test_listings_name_what_every_item_shows_and_take_one_look(kind):
    modes = set()
    for seed in range(30):
        scene = draw_scene(rng(seed), "train", kind)
        told = listing(scene, rng(seed))
        assert set(told.answer.split(", ")) == {f"{i.color} {i.value}" for i in scene.items}
        needed = {mode_of(scene, item) for item in scene.items}
        assert told.mode in needed
        assert (told.mode == "direct") == (needed == {"direct"})
        modes.add(told.mode)
    assert modes == {"boards": {"direct", "dino", "sam"}, "things": {"direct", "clip"}}[kind]


def test_tags_have_no_listing_since_each_takes_a_region():
    assert listing(draw_scene(rng(1), "train", "tags"), rng(1)) is None


@scenes
def test_labels_fit_what_is_there(kind):
    scene = draw_scene(rng(5), "train", kind)
    labels = label_view(scene.items, WHOLE, 4, reads_fine=False)
    assert labels.tag.shape == (4, 4, 4)
    tags = sorted(labels.tag[labels.tag < len(COLORS)])
    assert tags == sorted(list(COLORS).index(i.color) for i in scene.items if i.kind == "tag")
    seen = {CONTENTS[i] for i in labels.content.flatten() if 0 <= i < len(CONTENTS)}
    coarse = {item.value for item in scene.items if item.kind == "board" and not item.fine}
    assert coarse <= seen <= coarse | {"too fine"}
    for head, size in HEADS.items():
        if head != "tag":
            values = getattr(labels, head)
            assert ((values >= 0) & (values <= size) | (values == IGNORE)).all()


def test_a_crop_is_labelled_with_what_its_tags_show():
    for seed in range(20):
        scene = draw_scene(rng(seed), "train", "tags")
        item = scene.items[0]
        box = crop_box_px(cell_of(item), (SIZE_PX, SIZE_PX))
        labels = label_view(scene.items, box, 4, reads_fine=False)
        assert CONTENTS.index(item.value) in labels.content[1:3, 1:3]


@pytest.mark.parametrize("draw", [far_sheet, close_sheet])
def test_sheets_are_full_and_seeded(draw):
    one, same = (draw(rng(7), "train") for _ in range(2))
    assert np.array_equal(one.image, same.image)
    assert len(one.items) >= 6


@scenes
def test_easy_rows_need_no_call(kind):
    scene = draw_scene(rng(7), "train", kind)
    rows = list(easy_rows(scene, "a.jpg", rng(7)))
    assert 3 <= len(rows) <= 5
    for row in rows:
        assert len(row["messages"]) == 2
        assert row["images"] == ["a.jpg"]
        assert not any(row[column] for column in row if column.endswith("_images"))


@scenes
def test_sides_are_right_and_asked_of_every_pair(kind):
    scene = draw_scene(rng(7), "train", kind)
    places = {item.color: item.center[0] for item in scene.items}
    asked = set()
    for question in side_questions(scene, rng(7)):
        named = [word.strip(",.?") for word in question.text.split()]
        one, other = (word for word in named if word in COLORS)
        assert question.answer == ("left" if places[one] < places[other] else "right")
        asked.add((one, other))
    assert asked == {(other, one) for one, other in asked}
    assert len(list(side_rows(scene, "a.jpg", rng(7)))) == min(len(asked), 4)


def test_rows_call_as_the_scene_demands():
    taken = set()
    for seed in range(40):
        scene = draw_scene(rng(seed), "train")
        for question in reading_questions(scene, rng(seed)):
            row = answering_row(question, "a.jpg")
            assert question.mode == mode_of(scene, question.item)
            assert row["messages"][-1]["content"] == question.item.value
            assert len(row["messages"]) == (2 if question.mode == "direct" else 4)
            if question.mode == "region":
                box = crop_box_px(cell_of(question.item), (SIZE_PX, SIZE_PX))
                assert row["images"][1] == f"a.jpg_{','.join(map(str, box))}"
            taken.add(question.mode)
    assert taken == {"direct", "region", "clip", "dino", "sam"}


def test_the_data_is_made_whole_and_goes_on_where_it_stopped(tmp_path):
    import dataclasses

    parts = [dataclasses.replace(part, num_scenes=8) for part in PARTS]
    for part in parts:
        assert sum(make_part(part, tmp_path, num_workers=1)) == 8
    write_index(tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.glob("*.json*")}
    assert set(files) == {
        *("captions.jsonl", "instructions.jsonl", "looks.jsonl", "listings.jsonl"),
        *("direct.jsonl", "direct_listings.jsonl", "easy.jsonl", "sides.jsonl"),
        *("questions.jsonl", "heldout.jsonl", "dataset_info.json"),
    }
    picture = tmp_path / "train" / "000001.jpg"
    before = picture.read_bytes()
    picture.unlink()
    for part in parts:
        list(make_part(part, tmp_path, num_workers=1))
    assert picture.read_bytes() == before
    assert {f: (tmp_path / f).read_bytes() for f in files} == files
    rows = {
        name: [json.loads(line) for line in content.splitlines()]
        for name, content in files.items()
        if name.endswith(".jsonl")
    }
    reencoded = ("clip_images", "detection_images", "seg_images")
    asked = rows["instructions.jsonl"]
    assert rows["looks.jsonl"] == [r for r in asked if any(r[c] for c in reencoded)] != []
    for name in ("instructions", "listings"):
        answers = [row["messages"][-1]["content"] for row in rows[f"{name}.jsonl"]]
        without = f"direct{'_listings' * (name == 'listings')}.jsonl"
        assert answers == [row["messages"][-1]["content"] for row in rows[without]] != []
        assert not any(row[column] for row in rows[without] for column in reencoded)


def test_cells_are_single():
    item = draw_scene(rng(1), "train", "tags").items[0]
    cell = cell_of(item)
    assert cell == GridBox(cell.x_min, cell.y_min, cell.x_min, cell.y_min)
    assert random_value("shape", rng(0)) in SHAPES


def test_missing_scikit_learn_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digit_pictures.cache_clear()
    with pytest.raises(PromptError, match="pip install scikit-learn"):
        digit_pictures("train")


def test_the_command_makes_a_few_pictures(tmp_path, capsys):
    args = ["make-embedded", "--out", str(tmp_path), "--fraction", "0.00001"]
    assert main([*args, "--workers", "1"]) == 0
    assert "1 picture in" in capsys.readouterr().err
    assert (tmp_path / "dataset_info.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fraction", "0"], "expected a number above 0, up to 1, got '0'"),
        (["--fraction", "much"], "expected a number above 0, up to 1, got 'much'"),
        (["--out", __file__], "is a file; expected a folder"),
    ],
)
def test_bad_options_of_the_command_are_refused(capsys, words, message):
    with contextlib.suppress(SystemExit):
        assert main(["make-embedded", *words]) == 2
    assert message in capsys.readouterr().err

"""Boxes and numbers: read as annotated, brought to the grid, left out where they are not sure."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes.counting.files import write_counting_scenes
from recipes.counting.scenes import NUM_ASKED, draw_counting_scene
from vpt.boxes import contains
from vpt.data.check import RowChecker, check_rows
from vpt.data.checks import image_paths
from vpt.data.content_rows import CategoryBoxes, counting_rows, read_count, read_note, say_plural
from vpt.data.counting import (
    CountingRecipe,
    make_counting_rows,
    read_lvis,
    to_pixel_grid,
)
from vpt.data.rows import measure_images, read_entries
from vpt.errors import DataError, ImageError, PromptError, RegionError
from vpt.protocol.calls import parse_pixel_boxes

FILES = ("boxes", "count_steps", "count_direct")
SOUND = {
    "images": [
        {"id": 7, "width": 200, "height": 100, "file_name": "a.png"},
        {"id": 8, "width": 100, "height": 100, "coco_url": "http://x.org/val2017/b.jpg"},
    ],
    "annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [100, 0, 100, 50.5]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 20, 20]},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 200, 100]},
    ],
    "categories": [{"id": 1, "name": "wine_bucket"}, {"id": 2, "name": "bat_(animal)"}],
}


def lvis(folder, content=SOUND, **changes):
    file = folder / "annotations.json"
    file.write_text(json.dumps({**content, **changes}))
    return file


def with_first(**changes):
    content = copy.deepcopy(SOUND)
    content["annotations"][0].update(changes)
    return content


def test_annotations_are_read_as_lvis_writes_them(tmp_path):
    read = read_lvis(lvis(tmp_path))
    first, second = read.pictures
    assert (first.path, first.size_wh, second.path) == ("a.png", (200, 100), "val2017/b.jpg")
    assert second.categories == ()
    assert first.categories == (
        CategoryBoxes("wine bucket", ((0, 0, 33, 67), (168, 0, 335, 169))),
        CategoryBoxes("bat", ((0, 0, 335, 335),)),
    )
    assert not read.left_out


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"iscrowd": 1}, "a crowd"),
        ({"bbox": [10, 10, 0, 5]}, "a box that is empty"),
        ({"bbox": [10, 10, -3, 5]}, "a box that is empty"),
        ({"bbox": [150, 10, 60, 5]}, "a box that is empty"),
        ({"bbox": [10, 10, float("nan"), 5]}, "a box that is empty"),
        ({"bbox": None}, "a box that is empty"),
        ({"bbox": [10, 10, 1, 1]}, "a box of less than 4 pixels"),
        ({"bbox": [0.1, 0.2, 0.5, 0.6]}, "a box with numbers of 0 to 1, as fractions have"),
    ],
)
def test_categories_whose_number_is_not_sure_are_left_out(tmp_path, changes, why):
    read = read_lvis(lvis(tmp_path, with_first(**changes)))
    assert [one.category for one in read.pictures[0].categories] == ["bat"]
    assert sum(read.left_out.values()) == 1 and next(iter(read.left_out)).startswith(why)


def test_too_many_boxes_and_unsure_categories_are_left_out(tmp_path):
    read = read_lvis(lvis(tmp_path), max_boxes=1)
    assert read.left_out == {"more than 1 boxes": 1}
    images = copy.deepcopy(SOUND["images"])
    images[0]["not_exhaustive_category_ids"] = [2]
    read = read_lvis(lvis(tmp_path, images=images))
    assert read.left_out == {"annotation that is not exhaustive": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images: Input should be a valid list, got None"),
        ({"images": [3]}, r"images\[0\]: Input should be a valid dict.*, got 3"),
        (
            {"images": [{"id": 7, "width": "200"}]},
            r"images\[0\]\.width: Input should be a valid integer, got '200'",
        ),
        (
            {"images": [{"id": 7, "width": 0, "height": 4}]},
            r"images\[0\]\.width: Input should be greater than 0, got 0",
        ),
        ({"images": SOUND["images"][1:]}, "annotations name image 7, which is none"),
        ({"categories": SOUND["categories"][:1]}, "category_id 2, which is none"),
        ({"images": [{"id": 7, "width": 9, "height": 9}]}, "neither file_name nor coco_url"),
        (
            {"categories": [*SOUND["categories"], {"id": 2, "name": "star"}]},
            "two of 'categories' have the id 2; keep one",
        ),
        ({"images": SOUND["images"] * 2}, "two of 'images' have the id 7"),
        ({"annotations": [{"id": 5, **SOUND["annotations"][0]}] * 2}, "two of 'annotations' have"),
    ],
)
def test_faults_of_the_file_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_lvis(lvis(tmp_path, **changes))


def test_categories_of_one_name_are_not_counted_apart(tmp_path):
    names = [{"id": 1, "name": "bat_(sports)"}, {"id": 2, "name": "bat_(animal)"}]
    read = read_lvis(lvis(tmp_path, categories=names))
    assert read.pictures[0].categories == ()
    assert read.left_out == {"a name that two categories of the picture share": 2}


def test_numbers_that_pandas_made_floats_are_read(tmp_path):
    images = [{**image, "id": float(image["id"]), "width": 200.0} for image in SOUND["images"]]
    assert read_lvis(lvis(tmp_path, images=images)).pictures[0].size_wh == (200, 100)


def test_a_key_given_twice_is_refused(tmp_path):
    file = lvis(tmp_path)
    file.write_text(file.read_text().replace('{"images"', '{"images": [], "images"'))
    with pytest.raises(DataError, match="the key 'images' is given twice"):
        read_lvis(file)


def test_a_file_that_is_no_annotations_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_lvis(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="holds no JSON object"):
        read_lvis(tmp_path / "list.json")
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(DataError, match="cannot read"):
        read_lvis(tmp_path / "cut.json")


sides = st.integers(20, 900)


@given(sides, sides, st.data())
def test_boxes_on_the_grid_cover_what_they_stand_for(width, height, data):
    x0, y0 = (data.draw(st.floats(0, side - 1)) for side in (width, height))
    x1, y1 = data.draw(st.floats(x0 + 0.5, width)), data.draw(st.floats(y0 + 0.5, height))
    box = to_pixel_grid((x0, y0, x1, y1), (width, height))
    assert 0 <= box[0] <= box[2] <= 335 and 0 <= box[1] <= box[3] <= 335
    scale_x, scale_y = width / 336, height / 336
    back = (box[0] * scale_x, box[1] * scale_y, (box[2] + 1) * scale_x, (box[3] + 1) * scale_y)
    slack = 1e-4 * max(width, height)
    assert contains(
        (back[0] - slack, back[1] - slack, back[2] + slack, back[3] + slack), (x0, y0, x1, y1)
    )
    assert back[2] - back[0] <= x1 - x0 + 2 * scale_x + slack  # and little more


def test_what_rows_say_is_what_is_annotated():
    found = CategoryBoxes("person", ((0, 5, 40, 60), (100, 100, 335, 335)))
    boxes, steps, direct = counting_rows("a.jpg", found)
    for row in (boxes, steps):
        assert parse_pixel_boxes(row["messages"][1]["content"]) == found.boxes
    assert "How many people are in the image?" in steps["messages"][0]["content"]
    assert direct["messages"][1]["content"] == "2"
    assert read_count(steps["messages"][1]["content"]) == 2
    assert read_count("no number") is None
    with pytest.raises(RegionError):
        counting_rows("a.jpg", CategoryBoxes("person", ((0, 0, 336, 5),)))


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("star", "stars"),
        ("cross", "crosses"),
        ("pencil box", "pencil boxes"),
        ("baby", "babies"),
        ("toy", "toys"),
        ("steak knife", "steak knives"),
        ("sheep", "sheep"),
    ],
)
def test_plurals(one, many):
    assert say_plural(one) == many


def test_scenes_show_what_is_annotated():
    numbers = []
    for number in range(40):
        scene = draw_counting_scene(0, number, size_px=160)
        asked = scene.things[0].kind
        numbers.append(sum(thing.kind == asked for thing in scene.things))
        for index, thing in enumerate(scene.things):
            assert contains((0, 0, 160, 160), thing.box)
            for other in scene.things[:index]:
                (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = thing.box, other.box
                assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
    assert min(numbers) == NUM_ASKED[0] and max(numbers) == NUM_ASKED[1]


def test_scenes_depend_on_seed_number_and_split_only():
    def drawn(*args):
        return draw_counting_scene(*args, size_px=96).image.tobytes()

    assert drawn(1, 2, "train") == drawn(1, 2, "train")
    assert len({drawn(1, 2, "train"), drawn(1, 2, "heldout"), drawn(2, 2), drawn(1, 3)}) == 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counting")
    for split in ("train", "heldout"):
        assert len(list(write_counting_scenes(folder / split, split, 10, 0, 96))) == 10
    return folder


def test_train_and_heldout_share_no_picture(scenes):
    pictures = [file.read_bytes() for file in scenes.rglob("*.jpg")]
    assert len(set(pictures)) == len(pictures) == 20


def make(scenes, folder, split="train", **recipe):
    annotations = read_lvis(scenes / split / "annotations.json")
    making = make_counting_rows(
        annotations, scenes / split / "images", CountingRecipe(**recipe), folder
    )
    assert sum(making.run()) == len(making.sources)
    return making.finish()


def test_every_row_passes_the_check_and_tells_the_number(scenes, tmp_path):
    made = make(scenes, tmp_path / "rows")
    content = json.loads((scenes / "train/annotations.json").read_text())
    for name in FILES:
        rows = read_entries(tmp_path / f"rows/{name}.jsonl")
        named = (p for row in rows for p in image_paths(row))
        facts = dict(measure_images(named, tmp_path / "rows"))
        report = check_rows(rows, RowChecker(facts))
        assert report.findings == {} and report.num_rows == 10
        for number, row in enumerate(rows):
            note = read_note(row)
            category = next(c["id"] for c in content["categories"] if c["name"] == note["category"])
            assert note["count"] == sum(
                a["image_id"] == number and a["category_id"] == category
                for a in content["annotations"]
            )
    asked = read_entries(tmp_path / "rows/answers.jsonl")
    assert asked == made.lines["answers"]
    direct = made.lines["count_direct"]
    assert [q["text"] for q in asked] == [r["messages"][1]["content"] for r in direct]
    assert set(json.loads((tmp_path / "rows/dataset_info.json").read_text())) == set(FILES)


def test_the_same_seed_gives_the_same_rows(scenes, tmp_path):
    for name in ("one", "two"):
        make(scenes, tmp_path / name)
    for name in (*FILES, "questions", "answers"):
        one, two = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in ("one", "two"))
        assert one == two


def test_pictures_that_are_missing_or_of_another_size_are_named_or_left_out(scenes, tmp_path):
    folder = tmp_path / "train"
    assert len(list(write_counting_scenes(folder, "train", 3, 0, 96))) == 3
    Image.new("RGB", (96, 90)).save(folder / "images/000000.jpg")
    with pytest.raises(DataError, match=r"has 96x90 px, annotated are 96x96.*--skip-bad"):
        make(tmp_path, tmp_path / "strict")
    (folder / "images/000000.jpg").unlink()
    with pytest.raises(ImageError, match=r"000000\.jpg"):
        make(tmp_path, tmp_path / "strict")
    made = make(tmp_path, tmp_path / "rows", skip_bad=True)
    assert [which for which, _ in made.problems] == ["000000.jpg"]
    assert len(made.lines["boxes"]) == 2
    for file in (folder / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="no picture could be used; the first"):
        make(tmp_path, tmp_path / "none", skip_bad=True)


def test_annotations_without_anything_to_count_are_refused(tmp_path):
    annotations = read_lvis(lvis(tmp_path), max_boxes=1, min_side=336)
    annotations.pictures[:] = annotations.pictures[1:]
    with pytest.raises(DataError, match="no picture has a category whose objects"):
        make_counting_rows(annotations, tmp_path, CountingRecipe(), tmp_path / "rows")


def test_a_folder_with_other_scenes_is_left_alone(scenes):
    with pytest.raises(PromptError, match="choose another folder"):
        next(write_counting_scenes(scenes / "train", "train", 10, 1, 96))

"""Rows built of annotations are those of the release, and what the runtime's stream holds."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.branches import Proposal
from vpt.data.build import (
    Annotation,
    Recipe,
    build_row,
    build_rows,
    read_annotation,
    read_annotations,
)
from vpt.data.rows import (
    ImageFacts,
    add_dataset_entry,
    dataset_entry,
    measure_images,
    read_entries,
    write_dataset_info,
    write_rows,
)
from vpt.errors import DataError, RegionError
from vpt.images import load_image
from vpt.inference.engine import Engine
from vpt.inference.request import Request
from vpt.model.encoding import RowEncoder, open_row_image
from vpt.model.generation import apply_rule_
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    GROUND_START,
    REGION_START,
    TURN_END,
    branches_named,
)

GROUNDED = (30, 100, 80, 190)
BOX = (15, 10, 70, 100)  # of a_tall.png, 90x150: its smallest region is that of the recorded row
KINDS = ("region", "grounding", "clip", "dino", "sam", "direct")


def annotation(**changes):
    entry = {"image": "a.png", "question": "What is it?", "answer": "A cat.", **changes}
    return read_annotation(entry)


def built(*entries, images=None, **recipe):
    read = read_annotations(entries)
    images = images or {"a.png": ImageFacts((90, 150))}
    return build_rows(read, images, Recipe(**recipe))


def entry(**changes):
    return {"image": "a.png", "question": "What is it?", "answer": "A cat.", **changes}


# The released format


def recorded_row(goldens, variant, name):
    content = json.loads((goldens / "goldens" / variant / "data_pipeline.json").read_text())
    return next(sample["row"] for sample in content["samples"] if sample["name"] == name)


@pytest.mark.parametrize(
    ("variant", "name", "kind", "question", "answer", "image"),
    [
        ("clip", "region", "region", "What is written on the sign?", "The sign says stop.", "tall"),
        *[
            (v, "action", k, "What color is the small box near the tree?", "The small box is blue.",
             "scene")
            for v, k in (("clip", "clip"), ("dino", "dino"), ("sam", "sam"))
        ],
        (
            *("clip", "plain", "direct"),
            "How many birds are there in the picture? "
            "Answer the question using a single word or phrase.",
            *("Two", "tall"),
        ),
    ],
)  # fmt: skip
def test_a_built_row_is_the_recorded_one(goldens, variant, name, kind, question, answer, image):
    path = f"images/a_{image}.png"
    size_wh = open_row_image(path, goldens).size_wh
    row = build_row(Annotation(path, question, answer, BOX), kind, size_wh)
    assert row == recorded_row(goldens, variant, name)


# The runtime's own stream


@pytest.fixture(scope="module")
def runtime():
    detector = SimpleNamespace(propose=lambda image, phrase: [Proposal(GROUNDED, 0.8, phrase)])
    return vpt.Runtime(*tiny_model(grounding=True), detector=detector)


@pytest.fixture
def streamed(runtime, monkeypatch):
    """Ids of the stream of a question in a mode, in which the model says given texts."""

    def run(image, question, mode, *said):
        ids = []
        script = [i for text in said for i in runtime.processor.encode_text(text).ids]

        def choose(self, logits, choices):
            token_id = script.pop(0)
            assert apply_rule_(choices[0].rule, torch.zeros(len(logits[0])))[token_id] == 0
            return [token_id]

        def decode(self, streams, token_ids, choices):
            ids.extend(token_ids)
            return choose(self, self.step(streams, token_ids), choices)

        def finish(self, prefill):
            ids.extend(prefill.token_ids)
            return finished(self, prefill)

        finished = Engine._finish
        for method in (choose, decode):
            monkeypatch.setattr(Engine, method.__name__, method)
        monkeypatch.setattr(Engine, "_finish", finish)
        request = Request([image], question, perception=mode)
        runtime.ask_many([request], batch_size=1)
        return ids

    return run


def upside_down(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((200, 120), 60).convert("RGB").save(folder / "turned.jpg", exif=exif)
    return "turned.jpg"


@pytest.mark.parametrize("question", ["What is it?", "  Say: two\nlines?\n "])
@pytest.mark.parametrize("kind", KINDS)
def test_a_built_row_is_what_the_runtime_streams(tmp_path, runtime, streamed, kind, question):
    path = upside_down(tmp_path)
    image = load_image(tmp_path / path)
    assert image.size_wh == (120, 200)
    note = Annotation(path, question, "A cat.", GROUNDED, phrase="a tag")
    row = build_row(note, kind, image.size_wh)
    called = row["messages"][1]["content"]
    rest = called.removeprefix(REGION_START)  # which is read with the prompt
    phrase = called.removeprefix(GROUND_START)
    calls = {"direct": (), "region": (rest + TURN_END,), "grounding": (phrase + TURN_END,)}.get(
        kind
    )
    if calls is None:
        calls = (BRANCH_TOKENS[branches_named([kind])[0]].start,)
    mode = "none" if kind == "direct" else kind
    ids = streamed(image, question, mode, *calls, "A cat." + TURN_END)

    def opened(path):
        return open_row_image(path, tmp_path)

    encoder = RowEncoder(runtime.model.config, runtime.processor, opened)
    whole = encoder.encode(row).input_ids
    assert ids == whole[:-1]  # the end of the last turn is chosen, but nothing reads it
    prompt = encoder.encode(row, predict=True).input_ids
    assert ids[: len(prompt)] == prompt


def test_without_invitation_a_row_is_what_auto_streams(tmp_path, runtime, streamed):
    image = load_image(tmp_path / upside_down(tmp_path))
    note = Annotation("turned.jpg", "Why?", "So.")
    row = build_row(note, "dino", image.size_wh, invited=False)
    ids = streamed(image, "Why?", "auto", BRANCH_TOKENS["dino"].start, "So." + TURN_END)

    def opened(path):
        return open_row_image(path, tmp_path)

    encoder = RowEncoder(runtime.model.config, runtime.processor, opened)
    assert ids == encoder.encode(row).input_ids[:-1]


def test_a_row_for_another_grid_names_its_cells():
    row = build_row(annotation(box=[40, 60, 50, 90]), "region", (90, 150), grid_size=3)
    assert row["messages"][1]["content"].count("<|x_0|><|y_0|>") == 2
    assert row["images"][1] == "a.png_0,0,60,100"


# Recipes


def test_each_annotation_gives_a_row_of_every_kind_it_permits():
    notes = entry(box=list(BOX)), entry(answer="No.")
    made = built(*notes, kinds=("direct", "region", "sam"))
    assert [row["messages"][-1]["content"] for row in made.rows] == ["A cat."] * 3 + ["No."] * 2
    assert [len(row["images"]) for row in made.rows] == [1, 2, 1, 1, 1]
    assert made.kinds == {"direct": 2, "region": 1, "sam": 2}
    assert (made.bad, made.num_without_box) == ([], 1)


def test_an_annotation_may_want_one_kind_itself():
    made = built(entry(kind="dino", box=list(BOX)), kinds=("direct", "region"))
    assert made.kinds == {"dino": 1} and made.num_without_box == 0


def test_the_first_kind_that_an_annotation_permits_is_built_alone():
    notes = entry(box=list(BOX)), entry(answer="No."), entry(kind="dino")
    made = built(*notes, kinds=("region", "direct"), first=True)
    assert made.kinds == {"region": 1, "direct": 1, "dino": 1}


def test_drawing_takes_one_kind_each_and_depends_on_the_seed_only():
    notes = [entry(question=f"{n}?") for n in range(40)]
    kinds = ("clip", "direct", "dino")
    first = built(*notes, kinds=kinds, draw=True, seed=1)
    assert built(*notes, kinds=kinds, draw=True, seed=1).rows == first.rows
    assert built(*notes, kinds=kinds, draw=True, seed=2).rows != first.rows
    assert len(first.rows) == 40 and set(first.kinds) == set(kinds)
    # A bad one in between changes nothing for the others.
    spoilt = built(*notes[:7], {"image": "a.png"}, *notes[8:], kinds=kinds, draw=True, seed=1)
    assert spoilt.rows == first.rows[:7] + first.rows[8:]


def test_order_is_kept_and_bad_annotations_are_listed():
    images = {"a.png": ImageFacts((90, 150)), "gone.png": ImageFacts(None, "'gone.png' is gone")}
    made = built(
        entry(question="1?"),
        entry(image="gone.png"),
        "text",
        entry(question="2?"),
        images=images,
        kinds=("direct",),
    )
    assert [row["messages"][0]["content"] for row in made.rows] == ["<image>\n1?", "<image>\n2?"]
    assert made.bad == [(1, "'gone.png' is gone"), (2, "expected a JSON object, got str")]


def test_an_annotation_of_which_nothing_can_be_built_is_bad():
    made = built(entry(), kinds=("region",))
    (bad,) = made.bad
    assert bad == (0, "no row of the kinds wanted can be built: 'region' needs a box")


# Annotations and boxes that cannot be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "expected 'question' to be a text that is not empty, there is none"),
        ({"answer": " "}, "expected 'answer' to be a text that is not empty, got ' '"),
        ({"answer": True}, "expected 'answer' to be a text that is not empty, got True"),
        ({"answer": float("nan")}, "expected 'answer' to be a text .* there is none"),
        ({"question": 4}, "expected 'question' to be a text that is not empty, got 4"),
        ({"question": "a <image> b"}, "'question' contains <image>, which would be read as an"),
        ({"answer": "<seg_image>"}, "'answer' contains <seg_image>, which would be read"),
        ({"question": "<|im_end|>"}, "'question' contains <|im_end|>, which would be .* control"),
        ({"answer": "<|x_3|>"}, "'answer' contains <|x_3|>"),
        ({"question": "\ud800?"}, "'question' is not valid text: it contains half of a surrogate"),
        ({"image": "a.png_1,2,3,4"}, "image 'a.png_1,2,3,4' names a crop; give the whole image"),
        ({"kind": "depth"}, "unknown kind 'depth'; available: region, grounding, clip, dino, sam"),
        ({"kind": "region"}, "kind 'region' needs a box"),
        ({"kind": "grounding", "phrase": "a tag"}, "kind 'grounding' needs a box"),
        ({"kind": "grounding", "box": list(BOX)}, "kind 'grounding' needs a phrase"),
        ({"phrase": " "}, "expected 'phrase' to be a text that is not empty"),
        ({"phrase": "a <|x_1|> tag"}, r"'phrase' contains <\|x_1\|>"),
        ({"box": [1, 2, 3]}, "expected 'box' to be four numbers x0, y0, x1, y1 in pixels"),
        ({"box": [1, 2, 3, "4"]}, "expected 'box' to be four numbers"),
        ({"box": [1, 2, 3, True]}, "expected 'box' to be four numbers"),
        ({"box": [0, 0, float("inf"), 4]}, "expected 'box' to be four numbers"),
        ({"box": [float("nan"), 0, 3, 4]}, "expected 'box' to be four numbers"),
        ({"box": {"x": 1}}, "expected 'box' to be four numbers"),
        ({"box": [5, 0, 5, 4]}, "is empty or reversed; expected x0 < x1 and y0 < y1"),
    ],
)  # fmt: skip
def test_an_annotation_that_cannot_be_used_is_refused(changes, message):
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        annotation(**changes)


def test_an_annotation_without_an_answer_is_refused():
    with pytest.raises(DataError, match=r"expected 'answer' to be .* there is none"):
        read_annotation({"image": "a.png", "question": "What?"})


def test_what_else_an_annotation_has_is_left_aside():
    assert annotation(category="count") == annotation()
    assert annotation(box=None) == annotation()


@pytest.mark.parametrize(
    "box", [(-3, 0, 50, 50), (0, 0, 50, 152), (100, 0, 140, 50), (0, 0, 5, 10**400)]
)
def test_a_box_that_reaches_out_of_the_image_is_refused(box):
    with pytest.raises(RegionError, match=r"reaches out of the image of 90x150 px; .* EXIF"):
        build_row(annotation(box=list(box)), "region", (90, 150))


@pytest.mark.parametrize("box", [[0.25, 0.12, 0.62, 0.5], [0, 0, 1, 1], [0.0, 0.5, 1.002, 1.0]])
def test_a_box_of_fractions_is_refused(box):
    done = built(entry(box=box), kinds=("region",))
    assert done.rows == []
    assert "has numbers of 0 to 1, as fractions of an image have; expected pixels" in done.bad[0][1]


@pytest.mark.parametrize(("answer", "written"), [(3, "3"), (3.0, "3"), (2.5, "2.5"), (-1, "-1")])
def test_an_answer_may_be_a_number(answer, written):
    assert annotation(answer=answer).answer == written


def test_missing_values_of_pandas_are_missing():
    nan = float("nan")
    assert annotation(box=nan, kind=nan) == annotation()
    assert annotation(box=[15.0, 10.0, 70.0, 100.0]).box == BOX


def test_a_box_may_reach_out_by_a_rounding():
    row = build_row(annotation(box=[80, -0.6, 90.5, 20]), "region", (90, 150))
    assert row["images"][1] == "a.png_67,0,90,37"


def test_a_box_on_the_edge_outside_is_refused():
    with pytest.raises(RegionError, match="covers nothing of an image"):
        build_row(annotation(box=[90, 0, 91, 20]), "region", (90, 150))


def test_a_region_row_without_a_box_is_refused():
    with pytest.raises(DataError, match="a row of kind 'region' needs a box"):
        build_row(annotation(), "region", (90, 150))


@pytest.mark.parametrize("path", ["photo", "photo.jp_g", "folder.x/photo"])
def test_an_image_whose_crop_could_not_be_named_is_refused(path):
    with pytest.raises(DataError, match=r"needs an extension like \.png, for a crop to be named"):
        build_row(annotation(image=path, box=list(BOX)), "region", (90, 150))


# Files


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_are_read_as_they_were_written(tmp_path, name):
    rows = [{"a": "ä\n"}, {"b": [1, 2]}]
    write_rows(rows, tmp_path / name)
    assert read_entries(tmp_path / name) == rows
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["", "\n \n", "[]", "\ufeff[]"])
def test_an_empty_file_has_no_entries(tmp_path, text):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    assert read_entries(tmp_path / "rows.json") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, ', "is no whole JSON list: "),
        (b"[" * 100_000, "is no whole JSON list: "),
        (b'{"a": 1}\n\n{"a": \n', "line 3: .* expected a JSON list, or a JSON object per line"),
        (
            b'[{"a": 1, "b": {"c": 1, "c": 2}}]',
            "the key 'c' is given twice in one object; keep one",
        ),
        (b'{"a": 1}\n{"a": 1, "a": 2}', "line 2: the key 'a' is given twice"),
        (b'{"a": "\xff"}', "is not in UTF-8 .byte 7.; convert it"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, content, message):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_entries(file)


def test_a_name_given_twice_in_dataset_info_is_refused(tmp_path):
    (tmp_path / "d.json").write_text('{"a": {"file_name": "a.json"}, "a": {"file_name": "b.json"}}')
    with pytest.raises(DataError, match="the key 'a' is given twice"):
        add_dataset_entry(tmp_path / "d.json", "mine", tmp_path / "rows.json")


def test_a_file_that_is_not_there_or_a_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="does not exist; check the path"):
        read_entries(tmp_path / "rows.json")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read_entries(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    write_rows([1], file)
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_rows([2] * 1000, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_images_are_opened_once_each_and_in_order(goldens):
    paths = ["a_tall.png", "none.png", "a_tall.png", "a_tile.png"]
    measured = list(measure_images(paths, goldens / "images"))
    assert [path for path, _ in measured] == ["a_tall.png", "none.png", "a_tile.png"]
    facts = dict(measured)
    assert facts["a_tall.png"] == ImageFacts((90, 150))
    assert facts["none.png"].is_missing and "does not exist" in facts["none.png"].problem


def test_the_dataset_entry_is_as_in_the_configs():
    assert dataset_entry("train.json") == {
        "file_name": "train.json",
        "formatting": "vpt",
        "columns": {
            name: name
            for name in ("messages", "images", "clip_images", "detection_images", "seg_images")
        },
    }


def test_an_entry_is_added_beside_others(tmp_path):
    info_file, rows_file = tmp_path / "configs" / "dataset_info.json", tmp_path / "train.json"
    info_file.parent.mkdir()
    info_file.write_text('{"other": {"file_name": "x"}}')
    info = add_dataset_entry(info_file, "mine", rows_file)
    assert list(info) == ["other", "mine"] and info["mine"]["file_name"] == "../train.json"
    write_dataset_info(info, info_file)
    assert add_dataset_entry(info_file, "mine", rows_file) == info
    with pytest.raises(DataError, match="has another entry 'other' already; choose another name"):
        add_dataset_entry(info_file, "other", rows_file)


def test_a_dataset_info_that_cannot_be_read_is_told(tmp_path):
    info_file = tmp_path / "dataset_info.json"
    assert list(add_dataset_entry(info_file, "mine", tmp_path / "rows.json")) == ["mine"]
    for text, message in (("{", "cannot read "), ("[]", "holds no JSON object but a list")):
        info_file.write_text(text)
        with pytest.raises(DataError, match=message):
            add_dataset_entry(info_file, "mine", tmp_path / "rows.json")

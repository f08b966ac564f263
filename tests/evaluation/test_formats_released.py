"""Released rows become questions with answers and evidence, whatever is odd about their calls."""

import json

import pytest

from vpt.boxes import GridBox
from vpt.errors import DataError
from vpt.evaluation.formats.benchmarks import read_released
from vpt.evaluation.samples import BadRow, ImageRef, ImageRoots, Sample
from vpt.protocol.tokens import BRANCH_TOKENS, INVITE_REENCODE, INVITE_REGION

VARIANTS = ("clip", "dino", "sam")
BRANCHES = {"clip": "reencode", "dino": "dino", "sam": "sam"}
REGION = "<|region_token_start|><|x_2|><|y_1|><|x_5|><|y_4|><|region_token_end|>"
BEYOND = "<|region_token_start|><|x_0|><|y_0|><|x_8|><|y_6|><|region_token_end|>"


def row(*contents, images=("a.png",), system=None, **columns):
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "images": list(images), **columns}


def region_row(call=REGION, crop="a.png_11,0,78,112", asked="<image>\nWhy?", answer="So."):
    return row(asked, call, "<image>", answer, images=["a.png", crop])


@pytest.fixture
def read_one(tmp_path):
    """What one row becomes."""

    def read_row(content):
        (tmp_path / "rows.json").write_text(json.dumps([content]), encoding="utf-8")
        (one,) = read_released(tmp_path / "rows.json", ImageRoots())
        return one

    return read_row


@pytest.fixture
def golden(goldens):
    """Golden rows of a variant, by name, as they are read."""

    def read_variant(variant, tmp_path):
        content = json.loads((goldens / "goldens" / variant / "data_pipeline.json").read_text())
        rows = {sample["name"]: sample["row"] for sample in content["samples"]}
        file = tmp_path / "rows.json"
        file.write_text(json.dumps(list(rows.values())), encoding="utf-8")
        samples = read_released(file, ImageRoots(root=goldens))
        return rows, dict(zip(rows, samples, strict=True))

    return read_variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_rows_become_samples(golden, variant, tmp_path, goldens):
    rows, samples = golden(variant, tmp_path)
    action = samples["action"]
    assert action.question == "What color is the small box near the tree?"
    assert action.answers == ("The small box is blue.",) and action.box is None
    assert action.facts == {
        "asked": rows["action"]["messages"][0]["content"],
        "calls": (BRANCHES[variant],),
        "region": None,
    }
    region = samples["region"]
    assert region.question == "What is written on the sign?"
    assert region.box == (11, 0, 78, 112) and region.facts["region"] == GridBox(2, 1, 5, 4)
    assert region.facts["calls"] == ("crop",)
    plain = samples["plain"]
    assert plain.question.endswith("Answer the question using a single word or phrase.")
    assert plain.answers == ("Two",) and plain.facts["calls"] == ()
    assert samples["system"].facts["system"] == "Answer in one word."
    for name in ("action", "region", "plain", "system"):
        path = str(goldens / rows[name]["images"][0])
        assert samples[name].images == (ImageRef(path, path),)
        assert samples[name].images[0].open().size_wh


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_rows_that_are_no_single_question_are_bad(golden, variant, tmp_path):
    _, samples = golden(variant, tmp_path)
    problems = {name: s.problem for name, s in samples.items() if isinstance(s, BadRow)}
    assert list(problems) == [
        "multiturn", "multiturn_action", "text_only", "align", "action_only"
    ]  # fmt: skip
    assert problems["multiturn"].startswith("row 5: messages[2] asks again; expected one question")
    assert "its first turn shows 0 images, the row has 0" in problems["text_only"]
    assert "it ends with a call, messages[1]; expected an answer" in problems["action_only"]
    assert [s.id for s in samples.values()] == [str(n) for n in range(len(samples))]


@pytest.mark.parametrize(
    "asked",
    [
        f"<image>\nWhy? {INVITE_REGION}",
        f"<image>\nWhy? \n{INVITE_REGION}",
        f"<image>\nWhy?{INVITE_REENCODE}",
        f"{INVITE_REENCODE} Why?<image>",
        f"<image>Why? {INVITE_REGION.rstrip('.')}",
        f"<clip_image><image>\n Why? {INVITE_REGION} {INVITE_REENCODE}\n",
    ],
)
def test_the_question_is_without_invitation_and_placeholders(read_one, asked):
    sample = read_one(row(asked, "So."))
    assert (sample.question, sample.facts["asked"]) == ("Why?", asked)


def test_other_instructions_stay_with_the_question(read_one):
    words = "Answer with the option's letter from the given choices directly."
    assert read_one(row(f"<image>\nWhy? {INVITE_REGION} {words}", "A")).question == f"Why? {words}"


def test_what_the_released_scoring_cuts_off_an_answer_is_cut(read_one):
    assert read_one(region_row(answer="Now answer the question.\nLion")).answers == ("Lion",)


def test_an_unknown_token_leaves_the_rest_of_the_row(read_one):
    # https://github.com/yu-rp/VisualPerceptionToken/issues/19 shows such a row
    sample = read_one(region_row(BEYOND, "a.png_0,0,562,328", answer="pillow"))
    assert sample.answers == ("pillow",) and sample.box == (0, 0, 562, 328)
    assert sample.facts["region"] is None and sample.facts["calls"] == ()
    assert sample.facts["problem"] == "<|x_8|> lies outside the 8x8 grid"


def test_of_several_regions_the_first_counts(read_one):
    corner = "<|region_token_start|><|x_0|><|y_0|><|region_token_end|>"
    crops = ["a.png", "a.png_11,0,78,112", "a.png_0,0,22,37"]
    sample = read_one(row("<image>q", REGION + corner, "<image><image>", "So.", images=crops))
    assert sample.box == (11, 0, 78, 112) and sample.facts["region"] == GridBox(2, 1, 5, 4)
    assert sample.facts["calls"] == ("crop", "crop") and len(sample.images) == 1


@pytest.mark.parametrize("crop", ["b.png_1,2,3,4", "cut.png"])
def test_a_second_image_that_is_no_crop_of_the_first_is_no_evidence(read_one, crop):
    assert read_one(region_row(crop=crop)).box is None


def test_an_empty_crop_is_a_problem_not_a_box(read_one):
    sample = read_one(region_row(crop="a.png_9,2,9,4"))
    assert sample.box is None
    assert sample.facts["problem"] == "crop 9,2,9,4 is empty; expected x0 < x1 and y0 < y1"


def test_evidence_in_a_crop_is_in_pixels_of_the_crop(read_one):
    images = ["a.png_10,20,90,120", "a.png_30,40,50,60"]
    sample = read_one(row("<image>q", REGION, "<image>", "So.", images=images))
    assert sample.box == (20, 20, 40, 40)
    assert sample.images[0].crop == (10, 20, 90, 120)
    assert sample.images[0].source.endswith("/a.png")
    assert sample.images[0].name.endswith("/a.png [10, 20, 90, 120]")


def test_a_path_that_only_resembles_a_crop_is_a_path(read_one):
    sample = read_one(row("<image>q", "So.", images=["a_1,2,3,4.png"]))
    assert sample.images[0].crop is None and sample.images[0].source.endswith("a_1,2,3,4.png")


def test_several_images_may_be_asked_about(read_one):
    sample = read_one(row("<image><image>q", "So.", images=["a.png", "b.png"]))
    assert [image.source[-5:] for image in sample.images] == ["a.png", "b.png"]


def test_images_are_where_the_roots_say(tmp_path):
    (file := tmp_path / "r.jsonl").write_text(
        json.dumps(region_row() | {"images": ["/far/a.png", "/far/a.png_1,2,3,4"]}) + "\n"
    )
    (sample,) = read_released(file, ImageRoots.parse([f"/far={tmp_path}"]))
    assert sample.images[0].source == str(tmp_path / "a.png") and sample.box == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (5, "expected a JSON object, got int"),
        ({}, "expected messages to be a list, got None"),
        (row("<image>q"), "expected user and assistant by turns, the assistant last"),
        (row("<image>q", " "), "expected 'answer' to be a text that is not empty"),
        (row("<image>\n", "So."), "expected 'question' to be a text that is not empty"),
        (row(f"<image> {INVITE_REGION}", "So."), "expected 'question' to be a text that is not"),
        (row("<image>q", "So.", images=[]), "its first turn shows 1 images, the row has 0"),
        (row("q", "So."), "its first turn shows 0 images, the row has 1"),
        (row("<image>q", "So.") | {"images": "a.png"}, "expected images to be a list of paths"),
        (row("<image>q", "Yes.", "And now?", "No."), r"messages\[2\] asks again"),
        (row("<image>q", BRANCH_TOKENS["dino"].call), "it ends with a call"),
        (row("<image>q", BEYOND), "it ends with a call"),
    ],
)
def test_a_row_that_makes_no_sense_is_bad_and_counted(tmp_path, content, problem):
    rows = [region_row(), content, region_row()]
    (file := tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    first, bad, last = read_released(file, ImageRoots())
    assert isinstance(first, Sample) and isinstance(last, Sample)
    assert (bad.id, last.id) == ("1", "2")
    with pytest.raises(DataError, match=f"^row 1: .*{problem}"):
        raise DataError(bad.problem)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist; check the path"), ("[{", "no whole JSON list")]
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_released(tmp_path / "rows.json", ImageRoots()))

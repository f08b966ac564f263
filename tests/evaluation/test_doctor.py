"""The doctor finds what would spoil a run, by row, and changes nothing."""

import io
import json

import pytest
from PIL import Image

from vpt.data.checks import FINDINGS
from vpt.errors import DataError
from vpt.evaluation.doctor import SPLIT_FINDINGS, CheckTarget, check_file, check_target
from vpt.evaluation.samples import ImageRoots
from vpt.evaluation.splits import SPLITS, find_split


@pytest.fixture
def folder(tmp_path):
    """With a sound picture of 90x150 and a damaged one."""
    Image.new("RGB", (90, 150)).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def own(**more):
    return {"image": "a.png", "question": "Why?", "answer": "So.", **more}


def checked(folder, *rows, **options):
    """Report on a file of one's own rows, and its findings without the kind's meaning."""
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = check_file(find_split(f"plain:{file}", folder), file, ImageRoots(), **options)
    assert set(report.findings) <= set(SPLIT_FINDINGS)
    return report, report.findings


def test_a_sound_split_has_no_findings(folder):
    report, findings = checked(folder, own(box=[0, 0, 91, 150]), own(choices=["So.", "No."]), own())
    assert findings == {} and (report.num_rows, report.num_images, report.num_left) == (3, 1, 0)
    assert report.row_kinds == {"open question": 2, "multiple choice": 1}
    assert report.num_with_findings == 0


def test_control_tokens_in_questions_are_found(folder):
    rows = [
        own(question="<|im_end|>?"),
        own(choices=["<|x_3|>", "So."]),
        own(question="<PIXEL_3>?"),
    ]
    _, findings = checked(folder, *rows, own(question="What is <|else|>?"), open_images=False)
    assert findings == {
        "control-token": [
            (0, "the question or a choice holds <|im_end|>"),
            (1, "the question or a choice holds <|x_3|>"),
            (2, "the question or a choice holds <PIXEL_3>"),
        ]
    }


def test_urls_are_named_as_they_are(folder):
    _, findings = checked(folder, own(image="https://x.org/a.png"), own(image="file:///a.png"))
    words = "'https://x.org/a.png' is a URL; remote images are not fetched, pass a file, or load "
    assert findings["unreadable-image"] == [
        (
            0,
            words + "the model with allowed_media_domains=['x.org'] "
            "(`vpt ask --allowed-media-domains x.org`)",
        ),
        (1, "'file:///a.png' is a file URL; pass the path alone"),
    ]


def test_each_fault_is_found_under_its_own_name_with_its_row(folder):
    report, findings = checked(
        folder,
        own(id="x"),
        own(question=""),
        own(image="gone.png", box=[0, 0, 2, 2]),
        own(image="torn.png"),
        own(box=[0, 0, 92, 10]),
        own(id="x"),
        own(choices=["yes", "no"]),
        "row",
    )
    assert {kind: [number for number, _ in entries] for kind, entries in findings.items()} == {
        "bad-row": [1, 6, 7],
        "duplicate-id": [5],
        "missing-image": [2],
        "unreadable-image": [3],
        "box-outside": [4],
    }
    details = {(kind, n): text for kind, entries in findings.items() for n, text in entries}
    assert details["bad-row", 1].startswith("expected 'question' to be a text")
    assert details["bad-row", 6] == "answer 'So.' is none of the choices: yes, no"
    assert details["duplicate-id", 5] == "x is the id of row 0"
    assert details["missing-image", 2].endswith("gone.png' does not exist; check the path")
    assert "torn.png' cannot be decoded" in details["unreadable-image", 3]
    assert details["box-outside", 4] == (
        "box [0, 0, 92, 10] reaches out of the image of 90x150 px; expected x0, y0, x1, y1 in "
        "pixels of the image as seen, that is after EXIF orientation"
    )
    assert (report.num_with_findings, report.num_images) == (7, 3)
    assert report.row_kinds == {"open question": 5, "bad row": 3}


def test_an_answer_that_the_score_cannot_use_is_found(folder):
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps(own(answer=a)) + "\n" for a in ("Yes", "Maybe")))
    split = SPLITS["POPE"]
    split = type(split)(**{**vars(split), "format": "plain", "file": str(file)})
    report = check_file(split, file, ImageRoots())
    ((number, detail),) = report.findings["unscorable"]
    assert number == 1 and "Maybe" in detail


def test_what_is_looked_at_can_be_chosen(folder):
    rows = [own(image="gone.png"), own(question=""), own(question="")]
    report, findings = checked(folder, *rows, open_images=False)
    assert list(findings) == ["bad-row"] and report.num_images == 0
    report, findings = checked(folder, *rows, limit=1, ignored=("bad-row",))
    assert list(findings) == ["missing-image"]
    assert (report.num_rows, report.num_left, report.num_with_findings) == (1, 2, 1)


def test_somebody_may_watch_the_images(folder):
    seen = []

    def watch(items, number, what):
        seen.append((number, what))
        return items

    checked(folder, own(), own(image="gone.png"), watch=watch)
    assert seen == [(2, "images")]


def test_pictures_inside_rows_are_opened(tmp_path):
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    Image.new("RGB", (4, 5)).save(buffer := io.BytesIO(), "PNG")
    columns = {"image": [buffer.getvalue(), b"torn"], "question": ["a", "b"], "answer": ["c", "d"]}
    parquet.write_table(pyarrow.table(columns), file := tmp_path / "own.parquet")
    report = check_file(find_split(str(file), tmp_path), file, ImageRoots())
    ((number, detail),) = report.findings["unreadable-image"]
    assert number == 1 and detail.startswith("image of 1: ") and report.num_images == 2


def test_released_splits_are_checked_as_rows(folder):
    (folder / "GQA_region_test.json").write_text("[]")
    target = check_target("GQA", folder, [f"/far={folder}"])
    assert target.check is None and target.findings is FINDINGS
    assert target.file == folder / "GQA_region_test.json"
    assert target.find_image("/far/a.png") == str(folder / "a.png")


def test_a_file_without_rows_is_told(tmp_path):
    (file := tmp_path / "heldout.jsonl").touch()
    with pytest.raises(DataError, match="holds no rows"):
        check_file(SPLITS["embedded_heldout"], file, ImageRoots())


def test_checking_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    checked(folder, own(), own(image="gone.png"), "x")
    (folder / "own.jsonl").unlink()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_target_checks_its_own_file(folder):
    (file := folder / "own.jsonl").write_text(json.dumps(own(image="gone.png")))
    target = CheckTarget.of_split(find_split(str(file), folder), file, ImageRoots())
    report = target.check(limit=None, open_images=True, ignored=(), watch=lambda i, n, w: i)
    assert list(report.findings) == ["missing-image"] and set(report.findings) <= set(
        target.findings
    )

"""``vpt data build`` and ``vpt data check``, through main() as a person types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vpt import cli
from vpt.cli.data import COMMANDS
from vpt.data.checks import FINDINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(capsys):
    """Run ``vpt data``; gives code, stdout and stderr."""

    def run(*words):
        code = cli.main(["data", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def notes(tmp_path):
    """A file of annotations beside its photos, two of which are sound."""
    Image.new("RGB", (90, 150)).save(tmp_path / "a.png")
    entries = [
        {"image": "a.png", "question": "Why?", "answer": "So.", "box": [15, 10, 70, 100]},
        {"image": "a.png", "question": "What?", "answer": "A cat.", "source": "mine"},
        {"image": "gone.png", "question": "Who?", "answer": "I."},
        {"image": "a.png", "question": "When?"},
    ]
    return write(tmp_path / "notes.jsonl", *entries)


def write(file, *entries):
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return file


def sound(notes, number=2):
    """Only the first of the notes."""
    lines = notes.read_text(encoding="utf-8").splitlines()[:number]
    return write(notes.with_name("sound.jsonl"), *map(json.loads, lines))


# Usage


def test_help_imports_nothing_heavy():
    code = (
        "import sys, vpt.cli; vpt.cli.main(['data', '--help']);"
        "[vpt.cli.main(['data', name, '--help']) for name in ('build', 'check')];"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stderr


def test_help_names_commands_exit_codes_and_kinds_of_findings(data):
    code, out, _ = data("--help")
    assert code == 0 and all(f"\n    {name}" in out for name in COMMANDS.commands)
    for name in COMMANDS.commands:
        code, out, _ = data(name, "--help")
        assert code == 0 and "vpt data: something is wrong with the data" in out
    _, out, _ = data("check", "--help")
    assert all(f"\n  {kind} " in out for kind in FINDINGS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["bild"], "invalid choice: 'bild'"),
        (["build", "n.jsonl"], "the following arguments are required: --out"),
        (["build", "--out", "x.json"], "the following arguments are required: ANNOTATIONS"),
        (["build", "n.jsonl", "--out", "x.txt"], "--out: expected a name that ends in .json or"),
        (["build", "n.jsonl", "--out", f"{__file__}/x.json"], "commands.py is a file; expected a"),
        (["build", "n.jsonl", "--out", "x.json"], "n.jsonl does not exist; check the path"),
        (["build", "n.json", "--out", "./n.json"], "--out: n.json holds the annotations and would"),
        (
            ["build", "n.json", "--out", "x.json", "--dataset-info", "n.json"],
            "--dataset-info: n.json holds the annotations and would be overwritten",
        ),
        (
            ["build", "n", "--out", "x.json", "--dataset-info", "x.json"],
            "--out and --dataset-info name the same file",
        ),
        (["build", "n", "--out", "x.json", "--images", "none"], "--images: there is no folder non"),
        (["build", "n", "--out", "x.json", "--kinds", "smell"], "unknown kind 'smell'; available:"),
        (["build", "n", "--out", "x.json", "--kinds", ","], "no kind given; available: region"),
        (["build", "n", "--out", "x.json", "--seed", "-1"], "expected at least 0, got -1"),
        (["build", "n", "--out", "x.json", "--name", "a,b"], "--name: expected a name without com"),
        (["build", "n", "--out", "x.json", "--name", ""], "--name: expected a name without commas"),
        (["check", "x.json"], "x.json does not exist; check the path"),
        (["check", "x.json", "--cutoff-len", "9"], "--cutoff-len needs --model"),
        (
            ["check", "x.json", "--model", "m", "--cutoff-len", "9", "--no-images"],
            "--cutoff-len needs the sizes of images; leave --no-images out",
        ),
        (["check", "x.json", "--model", "m", "--grid-size", "9"], "--grid-size is the model's own"),
        (["check", "x.json", "--images", "none"], "--images: there is no folder none"),
        (["check", "x.json", "--images", "a=none"], "--images: there is no folder "),
        (["check", "x.json", "--images", "/", "--images", "/tmp"], "--images: "),
        (["check", "x.json", "--ignore", "dupes"], "unknown kind of finding 'dupes'; available: "),
        (["check", "x.json", "--limit", "0"], "expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_usage_is_told(data, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = data(*words)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_told(data, tmp_path):
    write(tmp_path / "x.jsonl", {"messages": []})
    code, out, err = data("check", tmp_path / "x.jsonl", "--model", tmp_path / "none")
    assert (code, out) == (4, "") and "there is no model folder" in err


@pytest.mark.parametrize("words", [("build", "--out", "x.json"), ("check",)])
def test_a_file_that_holds_nothing_is_told(data, tmp_path, words):
    (tmp_path / "none.jsonl").touch()
    code, out, err = data(words[0], tmp_path / "none.jsonl", *words[1:])
    assert (code, out) == (2, "")
    assert f"none.jsonl holds no {'annotations' if words[0] == 'build' else 'rows'}" in err


# Build


def test_rows_are_written_and_the_entry_is_printed(data, notes):
    root, target = notes.parent, notes.with_name("train.json")
    code, out, err = data("build", sound(notes), "--images", root, "--out", target)
    assert code == 0
    rows = json.loads(target.read_text(encoding="utf-8"))
    assert [row["images"] for row in rows] == [["a.png", "a.png_11,0,78,112"], ["a.png"], ["a.png"]]
    entry = json.loads(out)["train"]
    assert entry["file_name"] == "train.json" and entry["formatting"] == "vpt"
    assert "wrote 3 rows to " in err and ": 2 direct, 1 region\n" in err
    assert "1 annotation without a box, from which no region row can be built" in err
    assert "ignored keys, with the number of annotations that have them: source (1)" in err
    assert f"train with media_dir: {root}; paths in the rows are relative to it" in err
    assert target.read_text(encoding="utf-8").count("\n") == len(rows) + 2


def test_urls_of_images_are_named_as_they_are(data, tmp_path):
    entry = {"image": "https://x.org/a.png", "question": "Why?", "answer": "So."}
    code, _, err = data("build", write(tmp_path / "n.jsonl", entry), "--out", tmp_path / "t.json")
    words = "'https://x.org/a.png' is a URL; remote images are not fetched, pass a file"
    assert code == 1 and words in err
    row = {"messages": [{"role": "user", "content": "<image>"}], "images": ["https://x.org/a.png"]}
    row["messages"].append({"role": "assistant", "content": "So."})
    code, out, _ = data("check", write(tmp_path / "rows.jsonl", row), "--images", tmp_path)
    assert code == 1 and words in out


def test_what_training_could_not_load_is_found(data, tmp_path):
    row = {"messages": [{"role": "user", "content": "Why?"}], "images": None}
    row["messages"].append({"role": "assistant", "content": "So."})
    file = tmp_path / "rows.json"
    text = json.dumps([{**row, "id": 1}, {**row, "id": "b"}])
    file.write_text(text, encoding="utf-8")
    code, out, _ = data("check", file, "--ignore", "duplicate-row")
    assert code == 1 and "\nnot-loadable: 1 row: what the loader of LLaMA-Factory refuses" in out
    assert "  row 1: id is a text, in row 0 it is a number; " in out
    file.write_text(text.replace("1", '"a"'), encoding="utf-8-sig")
    code, out, _ = data("check", file, "--ignore", "duplicate-row")
    assert code == 1 and "\nnot-loadable: the file: " in out
    assert "\n  the file: the file begins with a byte order mark; save it" in out
    code, out, _ = data("check", file, "--ignore", "duplicate-row", "--json")
    rows = json.loads(out)["findings"]["not-loadable"]["rows"]
    assert [one["row"] for one in rows] == [None]
    assert data("check", file, "--ignore", "duplicate-row,not-loadable")[0] == 0


def test_rows_that_training_could_not_load_are_not_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr("vpt.data.loading.CHUNK_BYTES", 2000)
    Image.new("RGB", (90, 150)).save(tmp_path / "a.png")
    entry = {"image": "a.png", "question": "Why?", "answer": "So."}
    notes = write(
        tmp_path / "n.jsonl", *[{**entry, "kind": "direct"}] * 20, {**entry, "kind": "sam"}
    )
    target = tmp_path / "rows.jsonl"
    code, _, err = data("build", notes, "--images", tmp_path, "--out", target)
    assert code == 2 and "seg_images[] is a text, which no row of the first" in err
    assert "or write a JSON list instead of JSON lines" in err and not target.exists()
    assert data("build", notes, "--images", tmp_path, "--out", tmp_path / "rows.json")[0] == 0


def test_folders_of_what_is_written_are_made(data, notes):
    target, info = notes.parent / "new" / "rows" / "train.json", notes.parent / "info" / "d.json"
    words = ("--images", notes.parent, "--out", target, "--dataset-info", info)
    code, _, err = data("build", sound(notes), *words)
    assert code == 0, err
    assert len(json.loads(target.read_text())) == 3 and "train" in json.loads(info.read_text())
    code, _, err = data("build", sound(notes), "--out", target / "a.json")
    assert code == 2 and f"--out: {target} is a file; expected a folder" in err


def test_what_was_built_is_the_same_every_time_and_sound(data, notes):
    root, targets = notes.parent, [notes.with_name(f"{n}.jsonl") for n in "abc"]
    for target, seed in zip(targets, (5, 5, 6), strict=True):
        words = ("--kinds", "region,clip,dino,sam,direct", "--draw", "--seed", seed)
        code, _, err = data("build", sound(notes), "--images", root, "--out", target, *words)
        assert code == 0, err
    first, again, other = (target.read_bytes() for target in targets)
    assert first == again != other
    code, out, err = data("check", targets[0], "--images", root)
    assert (code, err) == (0, "") and out.endswith("\nnothing found\n")


def test_rows_for_free_choice_are_not_invited_and_never_ambiguous(data, notes):
    target = notes.with_name("train.json")
    words = ("--images", notes.parent, "--free-choice", "--out", target)
    code, _, err = data("build", sound(notes), *words)
    assert code == 0 and "wrote 2 rows" in err and "1 direct, 1 region" in err
    asked = [row["messages"][0]["content"] for row in json.loads(target.read_text())]
    assert asked == ["<image>\nWhy?", "<image>\nWhat?"]
    code, _, err = data("build", sound(notes), *words, "--draw")
    assert code == 2 and "--draw: not allowed with argument --free-choice" in err


def test_with_bad_annotations_nothing_is_written(data, notes):
    target = notes.with_name("train.json")
    code, out, err = data("build", notes, "--images", notes.parent, "--out", target)
    assert (code, out) == (1, "") and not target.exists()
    assert "2 annotations cannot be used (the first is number 0):\n" in err
    assert "\n  2: '" in err and "gone.png' does not exist; check the path\n" in err
    assert "\n  3: expected 'answer' to be a text that is not empty, there is none\n" in err
    assert "correct them, or skip them with --skip-bad" in err
    assert err.endswith(f"nothing was written to {target}\n")


def test_bad_annotations_can_be_left_out(data, notes):
    target = notes.with_name("train.json")
    words = ("--images", notes.parent, "--out", target, "--skip-bad")
    code, _, err = data("build", notes, *words)
    assert code == 0 and len(json.loads(target.read_text(encoding="utf-8"))) == 3
    assert "2 annotations cannot be used" in err and "; 2 bad annotations skipped" in err


def test_if_all_are_bad_nothing_is_written(data, tmp_path):
    file, target = write(tmp_path / "n.jsonl", *["bad"] * 30), tmp_path / "train.json"
    code, _, err = data("build", file, "--out", target, "--skip-bad")
    assert code == 1 and not target.exists()
    assert "\n  19: expected a JSON object" in err and "\n  20: " not in err
    assert "\n  and 10 more; --verbose lists all\n" in err
    _, _, err = data("build", file, "--out", target, "--skip-bad", "--verbose")
    assert "\n  29: expected a JSON object" in err


def test_the_entry_is_added_to_dataset_info(data, notes, tmp_path):
    info_file, target = tmp_path / "dataset_info.json", tmp_path / "train.json"
    info_file.write_text('{"other": {"file_name": "x"}}')
    words = ("--images", tmp_path, "--out", target, "--dataset-info", info_file, "--name", "mine")
    code, out, err = data("build", sound(notes), *words)
    assert (code, out) == (0, "") and f"{info_file} names it 'mine'" in err
    info = json.loads(info_file.read_text())
    assert list(info) == ["other", "mine"] and info["mine"]["file_name"] == "train.json"
    assert data("build", sound(notes), *words)[0] == 0  # again is fine
    code, _, err = data("build", sound(notes), *words[:-1], "other")
    assert code == 2 and "has another entry 'other' already; choose another name" in err


def test_a_file_that_cannot_be_written_is_told(data, notes, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    target = notes.with_name("train.json")
    code, _, err = data("build", sound(notes), "--images", notes.parent, "--out", target)
    assert code == 2 and "train.json: No space left on device" in err and not target.exists()


# Check


def faulty(folder):
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "<|x_8|>"}]
    rows = [{"messages": turns, "images": ["gone.png"], "n": number} for number in range(9)]
    return write(folder / "rows.jsonl", *rows)


def test_findings_are_told_by_kind_with_the_first_rows(data, tmp_path):
    code, out, err = data("check", faulty(tmp_path), "--images", tmp_path)
    assert (code, err) == (1, "")
    assert f"{tmp_path / 'rows.jsonl'}: 9 rows, 1 image opened\n        9  malformed call\n" in out
    assert (
        "\nunknown-token: 9 rows: a control token that no VPT model with this grid knows\n" in out
    )
    assert (
        "  row 4: messages[1] contains <|x_8|>\n  and 4 more; --show 9 or --json lists them\n"
        in out
    )
    assert "\nmissing-image: 9 rows: " in out and "\nduplicate-row: 8 rows: " in out
    assert "\nnot checked: lengths (needs --model and --cutoff-len)\n" in out
    assert out.endswith("9 rows of 9 with findings (the first row is number 0)\n")


def test_what_is_told_can_be_chosen(data, tmp_path):
    ignored = "unknown-token,duplicate-row"
    _, out, _ = data("check", faulty(tmp_path), "--ignore", ignored, "--show", 0, "--limit", 2)
    assert "unknown-token:" not in out and "row 0" not in out and ": 2 rows, 1 image" in out
    assert "not checked: what --ignore names (unknown-token, duplicate-row)\n" in out
    assert "not checked: 7 further rows (--limit)\n" in out
    words = ("--ignore", f"{ignored},missing-image", "--no-images")
    code, out, _ = data("check", faulty(tmp_path), *words)
    assert code == 0 and "not checked: image files and crops (--no-images)\n" in out
    assert ": 9 rows, 0 images opened\n" in out and out.endswith("nothing found\n")


def test_machines_get_every_finding(data, tmp_path):
    code, out, err = data("check", faulty(tmp_path), "--json", "--images", tmp_path)
    assert (code, err, out.count("\n")) == (1, "", 1)
    report = json.loads(out)
    assert (report["num_rows"], report["num_rows_with_findings"]) == (9, 9)
    assert report["row_kinds"] == {"malformed call": 9} and report["num_images_opened"] == 1
    assert list(report["findings"]) == ["unknown-token", "missing-image", "duplicate-row"]
    found = report["findings"]["unknown-token"]
    assert found["meaning"] == FINDINGS["unknown-token"]
    assert found["rows"][8] == {"row": 8, "detail": "messages[1] contains <|x_8|>"}
    assert len(report["unchecked"]) == 2


def test_rows_are_checked_against_a_model(data, goldens, tmp_path):
    content = json.loads((goldens / "goldens" / "clip" / "data_pipeline.json").read_text())
    rows = write(tmp_path / "rows.jsonl", *[sample["row"] for sample in content["samples"]])
    words = ("--images", goldens, "--model", goldens / "checkpoints" / "dino", "--cutoff-len", 117)
    code, out, _ = data("check", rows, *words)
    assert (
        code == 1
        and "missing-branch: 6 rows: " in out
        and "the row uses clip; the model has: dino\n" in out
    )
    assert "too-long: 1 row: " in out and "not checked" not in out


def test_checking_changes_nothing(data, tmp_path):
    file = faulty(tmp_path)
    before = file.read_bytes(), file.stat().st_mtime_ns
    data("check", file, "--images", tmp_path)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_terminal_gets_a_bar(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, _, err = data("check", faulty(tmp_path))
    assert "images" in err and "rows" in err


# Check of splits


def questions(folder):
    rows = [
        {"image": "gone.png", "question": "Why?", "answer": "So."},
        {"image": "gone.png", "question": "Why?", "answer": ""},
    ]
    return write(folder / "own.jsonl", *rows)


def test_own_questions_are_checked_as_questions(data, tmp_path):
    file = questions(tmp_path)
    code, out, err = data("check", file)
    assert (code, err) == (1, "") and f"{file}: 2 rows, 1 image opened\n" in out
    assert "\n        1  bad row\n        1  open question\n" in out
    assert "\nbad-row: 1 row: a row of which no sample can be made\n  row 1: expected" in out
    assert "\nmissing-image: 1 row: an image file that is not there; --images says where" in out
    assert "not checked" not in out and "2 rows of 2 with findings" in out
    assert data("check", f"plain:{file}")[1] == out


def test_what_is_told_of_questions_can_be_chosen(data, tmp_path):
    file = questions(tmp_path)
    code, out, _ = data("check", file, "--ignore", "bad-row", "--no-images")
    assert code == 0 and out.endswith("\nnothing found\n")
    assert "not checked: image files and crops (--no-images)\n" in out
    code, out, _ = data("check", file, "--limit", 1, "--json")
    report = json.loads(out)
    assert code == 1 and report["unchecked"] == ["1 further row (--limit)"]
    assert list(report["findings"]) == ["missing-image"] and report["file"] == str(file)
    assert (report["num_rows"], report["num_images_opened"]) == (1, 1)


def test_a_split_is_found_by_name_and_its_images_where_they_went(data, tmp_path):
    Image.new("RGB", (90, 150)).save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": "<image>\nWhy?"}, {"role": "assistant", "content": "So."}
    ]  # fmt: skip
    write(tmp_path / "GQA_region_test.json", {"messages": turns, "images": ["/mnt/d/a.png"]})
    code, out, _ = data("check", "GQA", "--data", tmp_path)
    assert code == 1 and "missing-image: 1 row: " in out and "/mnt/d/a.png" in out
    code, out, _ = data("check", "GQA", "--data", tmp_path, "--images", f"/mnt/d={tmp_path}")
    assert code == 0 and f"{tmp_path / 'GQA_region_test.json'}: 1 row, 1 image opened" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["GQA"], "GQA is not there: looked for "),
        (["GQ"], "unknown split 'GQ'; did you mean GQA? available: DocVQA"),
        (["xml:x.json"], "unknown format 'xml'; available: released"),
        (["plain:x.json"], "x.json does not exist; check the path"),
        (["x.json"], "x.json does not exist; check the path"),
        (["GQA", "--images", "a="], "--images: expected a folder, or FROM=TO with something on"),
        (["own.jsonl", "--model", "m"], "--model, --cutoff-len and --grid-size are for rows; own"),
        (["own.jsonl", "--grid-size", "4"], "are for rows; own.jsonl is no file of rows"),
        (["own.jsonl", "--ignore", "turn-order"], "unknown kind of finding 'turn-order'; availab"),
    ],
)
def test_what_is_no_split_is_told(data, tmp_path, monkeypatch, words, message):
    questions(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = data("check", *words)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_checking_a_split_changes_nothing(data, tmp_path):
    file = questions(tmp_path)
    before = file.read_bytes(), file.stat().st_mtime_ns
    data("check", file)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl"]

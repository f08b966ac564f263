"""The documentation: links resolve, and every public name has a place in the reference."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vpt
import vpt.branches
from recipes import pictures
from recipes.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for glob in ("*.md", "docs/**/*.md", "*/README.md", "tests/goldens/README.md")
    for path in ROOT.glob(glob)
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def prose(page):
    """Text of a page without code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page):
    """Anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page, text):
    for target, anchor in LINK.findall(text):
        file = (ROOT / page).parent / target if target else ROOT / page
        if not file.exists():
            yield target
        elif anchor and anchor not in anchors(file.relative_to(ROOT)):
            yield f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_anchors_resolve(page):
    assert list(broken_links(page, prose(page))) == []


@pytest.mark.parametrize("link", ["gone.md", "docs/demo.md#gone", "#gone"])
def test_broken_links_are_found(link):
    assert list(
        broken_links("README.md", f"[a]({link}) [b](docs/demo.md#limits) [c](#limits)")
    ) == [link]


def test_every_public_name_is_in_the_reference():
    pages = [(ROOT / "docs" / name).read_text("utf-8") for name in ("api.md", "api-parts.md")]
    listed = re.findall(r"^::: ([\w.]+)$", "\n".join(pages), flags=re.M)
    assert len(listed) == len(set(listed))
    for module in (vpt, vpt.branches):
        for name in module.__all__:
            home = getattr(module, name).__module__
            assert {home, f"{home}.{name}"} & set(listed), f"{home}.{name} is not in docs/api*.md"


def share_of_changed_pixels(picture, file):
    """Pixels whose grey values differ by more than JPEG and the digits of a time explain."""
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=88)
    with Image.open(encoded) as now, Image.open(file) as then:
        assert now.size == then.size
        now, then = (np.asarray(one.convert("L"), dtype=float) for one in (now, then))
    return (abs(now - then) > 40).mean()


def test_the_readme_shows_what_the_program_draws():
    drawn, file = pictures.draw_look(), ROOT / "docs" / "look.jpg"
    assert share_of_changed_pixels(drawn, file) < 1e-3, "run `python -m recipes draw-docs`"
    drawn.paste("white", (0, 0, drawn.width // 2, 40))
    assert share_of_changed_pixels(drawn, file) > 5e-3


def test_every_picture_of_the_documentation_has_its_command():
    table = (ROOT / "recipes" / "README.md").read_text("utf-8")
    for path in (ROOT / "docs").rglob("*.*g"):
        assert path.relative_to(ROOT / "docs").as_posix() in table


def test_a_picture_that_cannot_be_drawn_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "LOG", tmp_path / "language.jsonl")
    main(["draw-docs", "embedded/learning.png", "aurora/counting.jpg", "--out", str(tmp_path)])
    assert "left out: embedded/learning.png: needs the training" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*.*g")] == ["counting.jpg"]
    with Image.open(tmp_path / "aurora" / "counting.jpg") as drawn:
        assert drawn.size == (908, 452)


def test_the_accuracies_are_drawn_from_the_log_of_the_training(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "LOG", tmp_path / "language.jsonl")
    lines = '{"step": 10, "accuracy_easy": 0.2}\n{"step": 20, "accuracy_looks": 0.5}\n'
    (tmp_path / "language.jsonl").write_text(lines)
    assert pictures.draw_learning().size == (1125, 300)


def test_the_curves_of_the_policy_training_are_drawn_from_its_logs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "POLICIES", tmp_path)
    mean = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    line = {"kind": "eval", "score": mean, "gain": mean, "called": 0.3}
    lines = [{**line, "step": 0}, {"kind": "train", "step": 1}, {**line, "step": 1}]
    for name in pictures.POLICY_RUNS:
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(one) + "\n" for one in lines)
        (tmp_path / name / "trainer_log.jsonl").write_text(text)
    assert pictures.draw_policy().size == (1125, 300)


def test_an_unknown_picture_is_refused(capsys):
    assert main(["draw-docs", "gone.jpg"]) == 2
    assert "unknown picture 'gone.jpg'; available: look.jpg" in capsys.readouterr().err

"""A wheel of the tree works away from the checkout, and beside modules with names like ours."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = shutil.ignore_patterns(
    ".git", "__pycache__", "build", "*.egg-info", ".*_cache", "docs"
)
ASK = """
import json, sys, pathlib, vpt, vpt.branches, vpt.evaluation
model = vpt.load(device="cpu")
picture = pathlib.Path(vpt.__file__).parent / "examples" / "tags.jpg"
result = model.ask([picture], "What number is on the blue one?")
files = [sys.modules[name].__file__ for name in ("vpt", "vpt.branches", "vpt.evaluation")]
print(json.dumps([result.text, [call.branch for call in result.trace.calls], files]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What an installer would put into ``site-packages``: a wheel unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=NOT_SHIPPED)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    made = subprocess.run(
        [sys.executable, "-c", build, str(folder)],
        cwd=folder / "tree",
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    shutil.rmtree(folder / "tree")
    return folder / "site"


def run_python(installed, cwd, *words, **options):
    """A Python in a folder of its own, with the wheel and without the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        **options,
    )


def test_nothing_but_the_package_is_installed(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"vpt"}
    shipped = {path.name for path in (installed / "vpt").iterdir()}
    assert {"branches", "evaluation", "examples", "embedded"} <= shipped
    assert not list(installed.rglob("recipes")) and not list(installed.rglob("test_*"))


def test_modules_with_names_like_ours_disturb_nothing(installed, tmp_path):
    for name in ("app", "branches", "evaluation", "recipes", "examples"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name} of a user')")
    (tmp_path / "script.py").write_text(ASK)
    done = run_python(installed, tmp_path, tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    answer, calls, files = json.loads(done.stdout.splitlines()[-1])
    assert (answer, calls) == ("3", ["crop"])
    assert all(Path(file).is_relative_to(installed) for file in files)


@pytest.mark.slow
def test_the_commands_work_away_from_the_checkout(installed, tmp_path):
    vpt = ("-m", "vpt")
    asked = run_python(
        installed,
        tmp_path,
        *(*vpt, "ask", installed / "vpt" / "examples" / "tags.jpg"),
        "What number is on the blue one?",
    )
    assert (asked.returncode, asked.stdout) == (0, "3\n"), asked.stderr
    picture = str(installed / "vpt" / "examples" / "tags.jpg")
    row = {"images": [picture], "question": "What number is on the blue one?", "answer": "3"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    words = ("eval", "--splits", "own.jsonl", "--out", "results", "--device", "cpu")
    measured = run_python(installed, tmp_path, *vpt, *words)
    assert measured.returncode == 0, measured.stderr
    assert (tmp_path / "results" / "report.html").is_file()


@pytest.mark.slow
def test_the_page_finds_its_examples(installed, tmp_path):
    pytest.importorskip("gradio")
    code = (
        "from vpt.demo.page import CSS, EXAMPLES; from vpt.demo.runs import read_examples\n"
        "found = read_examples(EXAMPLES)\n"
        "assert CSS.is_file() and all((EXAMPLES / one.picture).is_file() for one in found)\n"
        "print(len(found))"
    )
    done = run_python(installed, tmp_path, "-W", "ignore", "-c", code)
    assert done.returncode == 0 and int(done.stdout) > 3, done.stderr

"""The list of models: it is the README's, its commands exist, and it is printed at once."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vpt.cli.parser import build_parser
from vpt.cli.run import COMMANDS, main
from vpt.released import HEADINGS, MODELS, PHOTO_MODEL

ROOT = Path(__file__).parents[1]


def readme_rows():
    """Cells of the README's table of models, links and marks removed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Models")[2]
    table = text[text.index("\n|") + 1 :].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.split("\n")]
    plain = [
        tuple(re.sub(r"\[(.*?)\]\(.*?\)|`|, shipped", r"\1", one) for one in row) for row in rows
    ]
    return [plain[0], *plain[2:]]


def test_the_readme_has_the_same_table():
    assert readme_rows() == [HEADINGS, *(row.cells for row in MODELS)]


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_the_command_of_a_model_names_it_and_is_understood(row):
    program, *words = shlex.split(row.command)
    if program == "vpt":
        args = build_parser(COMMANDS).parse_args(words)
        assert (args.model or "vpt/embedded") == row.name
        assert (ROOT / args.words[0]).exists() or args.words[0] == "photo.jpg"
        assert (args.perception == "auto") == (row.kind == "free choice")
    else:
        assert row.kind == "projectors only" and row.name in words
        (config,) = re.findall(r"configs/\S+", row.purpose)
        assert words[-1] in (ROOT / config).read_text(encoding="utf-8")


def test_photos_are_for_a_released_model():
    assert PHOTO_MODEL.startswith("rp-yu/")


def test_the_list_is_printed_before_anything_is_imported(capsys):
    code = "import sys; from vpt.cli import main; main(['--list-models']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, modules = done.stdout.rstrip().rsplit("\n", 1)
    assert not {"torch", "transformers", "numpy", "PIL"} & set(modules.split())
    for row in MODELS:
        assert all(cell in listed for cell in (*row.cells, row.purpose, row.command))
    assert main(["--list-models"]) == 0
    assert capsys.readouterr().out.startswith("model ")

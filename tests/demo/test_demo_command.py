"""``vpt demo`` and ``python app.py``: options, and messages where it cannot start."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vpt.cli import demo as command
from vpt.cli import main
from vpt.cli.parser import build_command_parser
from vpt.errors import CheckpointError


@pytest.fixture
def page(monkeypatch):
    """The page is installed; what it was to serve."""
    pytest.importorskip("gradio")
    served = []
    entry = SimpleNamespace(name="page", load=lambda: lambda model, args: served.append(model))
    monkeypatch.setattr(command, "entry_points", lambda group: [entry])
    return served


def test_the_page_is_a_function_of_app_py(app_module):
    tables = (Path(app_module.__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points."{command.PAGES}"]\npage = "app:serve"\n' in tables
    assert callable(app_module.serve)


def test_it_serves_the_model_that_is_named(page, random_model):
    assert main(["demo", "--model", str(random_model), "--device", "cpu"]) == 0
    assert page[0].name == str(random_model)


def test_an_installation_without_the_page_is_told(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    monkeypatch.setattr(command, "entry_points", lambda group: [])
    assert main(["demo"]) == 2
    assert "this installation has no page" in capsys.readouterr().err


def test_it_binds_to_this_machine_and_shares_nothing_by_default():
    args = build_command_parser(command.COMMAND, "demo", "").parse_args([])
    assert (args.model, args.host, args.port, args.share) == (None, "127.0.0.1", 7860, False)


def test_a_model_that_cannot_be_loaded_is_an_exit_code(page, capsys):
    assert main(["demo", "--model", "no/such/folder/here"]) == 4
    assert "error: " in capsys.readouterr().err


def test_a_missing_gradio_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert 'pip install -e ".[demo]"' in capsys.readouterr().err


def test_app_py_names_a_missing_gradio_too(picture):
    code = "import sys; sys.modules['gradio'] = None; import app"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=picture.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("the demo needs gradio")


def test_a_port_beyond_all_ports_is_refused(page, capsys):
    assert main(["demo", "--port", "70000"]) == 2
    assert "--port must be at most 65535" in capsys.readouterr().err


def test_the_page_comes_up_anyway_where_that_is_wanted(capsys):
    served = []
    parser = build_command_parser(command.COMMAND, "demo", "")
    args = parser.parse_args(["--model", "no/such/folder/here", "--anyway"])
    command.run_demo(args, lambda model, _: served.append(model))
    assert isinstance(served[0], CheckpointError)
    assert "error: " in capsys.readouterr().err


def test_help_needs_no_gradio():
    code = "import sys; from vpt.cli import main; main(['demo', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gradio" not in done.stdout.split("\n")[-2].split() and "--share" in done.stdout


def test_the_runtime_knows_nothing_of_gradio():
    files = list((Path(command.__file__).parents[1]).rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names.append(getattr(node, "module", None) or "")
            assert not [name for name in names if str(name).startswith(("gradio", "app"))], file

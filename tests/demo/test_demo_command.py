"""``vpt demo`` and ``python app.py``: options, and messages where it cannot start."""

import ast
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from vpt.cli import demo as command
from vpt.cli import main
from vpt.cli.parser import build_parser
from vpt.errors import CheckpointError


@pytest.fixture
def page(monkeypatch):
    """A page that serves nothing; what it was to serve."""
    pytest.importorskip("gradio")
    served = []
    monkeypatch.setattr("vpt.demo.page.serve", lambda *args, **kwargs: served.append(args))
    return served


def test_it_serves_the_model_that_is_named(page, random_model):
    assert main(["demo", "--port", "0", "--model", str(random_model), "--device", "cpu"]) == 0
    assert page[0][0].name == str(random_model)
    assert page[0][1:] == ("127.0.0.1", 0)


def test_it_binds_to_this_machine_and_shares_nothing_by_default():
    args = build_parser(command.COMMAND, "demo").parse_args([])
    assert (args.model, args.host, args.port, args.share) == (None, "127.0.0.1", 7860, False)


def test_a_model_that_cannot_be_loaded_is_an_exit_code(page, capsys):
    assert main(["demo", "--port", "0", "--model", "no/such/folder/here"]) == 4
    assert "error: " in capsys.readouterr().err


def test_a_missing_gradio_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert 'pip install -e ".[demo]"' in capsys.readouterr().err


def test_app_py_names_a_missing_gradio_too(picture):
    code = (
        "import runpy, sys; sys.modules['gradio'] = None; sys.argv = ['app.py'];"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=picture.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2 and "the demo needs gradio" in done.stderr


def test_a_port_beyond_all_ports_is_refused(page, capsys):
    assert main(["demo", "--port", "70000"]) == 2
    assert "--port must be at most 65535" in capsys.readouterr().err


def test_a_busy_port_is_named_before_the_model_is_loaded(page, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["demo", "--port", str(port), "--model", "no/such/folder"]) == 2
    err = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in err
    assert "; end the program that uses the port, or choose another with --port or --host" in err
    assert main(["demo", "--host", "no.such.host.invalid"]) == 2
    assert "cannot listen at no.such.host.invalid, port 7860" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_uploads_do_not_outlive_the_page(app_module, tmp_path, how):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--port", str(port), "--anyway", "--model", "no/such/folder"]
    running = subprocess.Popen(
        [sys.executable, "-m", "vpt", "demo", *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path), "GRADIO_ANALYTICS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    boundary = "--x\r\nContent-Disposition: form-data; name=files; filename=a.txt\r\n\r\nhello"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/gradio_api/upload",
        f"{boundary}\r\n--x--\r\n".encode(),
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    for _ in range(120):
        time.sleep(0.5)
        with contextlib.suppress(OSError), urllib.request.urlopen(request) as answer:
            uploaded = Path(json.loads(answer.read())[0])
            break
    assert uploaded.is_file() and uploaded.is_relative_to(tmp_path)
    lines = [running.stdout.readline() for _ in range(2)]  # though it is piped
    assert any(f"http://127.0.0.1:{port}" in line for line in lines)
    running.send_signal(how)
    running.communicate(timeout=30)
    assert running.returncode in ((143,) if how == signal.SIGTERM else (0, 130))
    assert not list(tmp_path.glob("vpt-demo-*"))


def test_the_page_comes_up_anyway_where_that_is_wanted(page, capsys):
    assert main(["demo", "--port", "0", "--model", "no/such/folder/here", "--anyway"]) == 0
    assert isinstance(page[0][0], CheckpointError)
    assert "error: " in capsys.readouterr().err


def test_help_needs_no_gradio():
    code = "import sys; from vpt.cli import main; main(['demo', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gradio" not in done.stdout.split("\n")[-2].split() and "--share" in done.stdout


def test_the_runtime_knows_nothing_of_gradio():
    files = set((Path(command.__file__).parents[1]).rglob("*.py"))
    assert len(files) > 50
    files = {file for file in files if file.name != "page.py"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names.append(getattr(node, "module", None) or "")
            assert not {str(name).partition(".")[0] for name in names} & {"gradio", "app"}, file

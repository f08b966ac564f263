"""``vpt ask`` with folders, stdin, URLs and data URIs, and what a terminal shows."""

import base64
import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from vpt.cli import output
from vpt.images import load_image
from vpt.trace.records import Trace


@pytest.fixture
def folder(tmp_path, scene):
    """Three images, one of them damaged, and other files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (90, 60), "red").save(folder / "c.png")
    (folder / "b.JPG").write_bytes(b"hello")
    (folder / "a.png").write_bytes(Path(scene).read_bytes())
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden.png").write_text("mine")
    return folder


@pytest.fixture
def stdin(monkeypatch):
    def give(data, is_terminal=False):
        pipe = types.SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: is_terminal)
        monkeypatch.setattr(sys, "stdin", pipe)

    return give


def test_a_folder_gives_one_line_per_image_in_the_order_of_names(ask, folder, scene):
    options = ("--max-new-tokens", 6, "--temperature", 1, "--seed", 2)
    code, out, err = ask(folder, "What?", *options)
    assert [line.partition(": ")[0] for line in out.splitlines()] == ["a.png", "c.png"]
    assert code == 1 and "1 of 3 images failed" in err
    assert "b.JPG' is not a supported image format" in err
    alone = ask(scene, "What?", *options)[1]
    assert out.splitlines()[0] == f"a.png: {' '.join(alone.split())}"
    assert ask(folder, "What?", *options, "--batch-size", 1)[1] == out
    (folder / "b.JPG").unlink()
    assert ask(folder, "What?", *options)[0] == 0


def test_a_folder_gives_one_trace_per_line_and_files_by_name(ask, folder, tmp_path):
    code, out, err = ask(
        *(folder, "What?", "--perception", "dino", "--max-new-tokens", 2, "--json"),
        *("--picture", tmp_path / "new" / "pictures", "--trace", tmp_path / "traces"),
    )
    traces = [Trace.from_dict(json.loads(line)) for line in out.splitlines()]
    assert [Path(one.images[0].source).name for one in traces] == ["a.png", "c.png"]
    assert code == 1 and err.count("looks again: dino → ") == 2
    for name in ("a.png", "c.png"):
        picture = tmp_path / "new" / "pictures" / f"{name}.jpg"
        assert f"vpt: saved {picture}\n" in err
        assert load_image(picture).size_wh[0] == 1200
        assert Trace.load(tmp_path / "traces" / f"{name}.json").images[0].thumbnail


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["photos", "photos/c.png", "q"], 2, "asked about one by one; give nothing else"),
        (["photos", "q", "--picture", "look.jpg"], 2, "--picture: expected another folder"),
        (["photos", "q", "--trace", "photos"], 2, "--trace: expected another folder"),
        (["photos", "q", "--trace", "photos/c.png/x"], 2, "c.png is a file; expected a folder"),
        (["photos", "q", "--top-p", "0"], 2, "top_p must be a finite number above 0"),
        (["photos"], 2, "the last word is the question, but 'photos' is a folder"),
        ([".", "q"], 3, "no images at '.'; expected visible files that end in .jpg"),
        (["http://a.example/b.jpg", "q"], 3, "--allowed-media-domains a.example"),
        (["-", "q"], 3, "'<stdin>' is empty"),
    ],
)
def test_what_cannot_be_asked_about_is_told(ask, folder, monkeypatch, stdin, words, code, message):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("vpt.loading.load", None)
    stdin(b"")
    given, out, err = ask(*words)
    assert (given, out) == (code, "")
    assert message in err and "Traceback" not in err


def test_an_image_comes_from_stdin_or_a_data_uri(ask, scene, stdin):
    options = ("What?", "--json", "--max-new-tokens", 2)
    digest = json.loads(ask(scene, *options)[1])["images"][0]["digest"]
    data = Path(scene).read_bytes()
    stdin(data)
    image = json.loads(ask("-", *options)[1])["images"][0]
    assert (image["digest"], image["source"]) == (digest, "<stdin>")
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert json.loads(ask(uri, *options)[1])["images"][0]["digest"] == digest
    stdin(data, is_terminal=True)
    code, _, err = ask("-", "What?")
    assert code == 2 and "- reads an image from stdin, but that is the terminal" in err


def test_a_url_is_fetched_from_hosts_that_are_named(ask, monkeypatch, scene):
    asked = []

    def fetch(url, domains, *_):
        asked.append((url, tuple(domains)))
        return Path(scene).read_bytes()

    monkeypatch.setattr("vpt.images.fetch", fetch)
    url = "https://a.example/b.png"
    words = (url, "What?", "--max-new-tokens", 1, "--allowed-media-domains", "x.example,a.example")
    assert ask(*words)[0] == 0
    assert asked == [(url, ("x.example", "a.example"))]


def test_saved_files_are_named_and_their_folder_is_made(ask, scene, tmp_path):
    picture, trace = tmp_path / "out" / "new" / "look.jpg", tmp_path / "traces" / "t.json"
    words = (scene, "What?", "--max-new-tokens", 1, "--picture", picture, "--trace", trace)
    code, _, err = ask(*words)
    assert code == 0 and picture.exists() and trace.exists()
    assert f"vpt: saved {picture}\nvpt: saved {trace}\n" in err


def colours_of(text):
    return [f"\x1b[{code}m" in text for code in output._COLOURS.values()]


def test_colours_are_for_terminals_and_obey_the_environment(monkeypatch, capsys):
    def lines(is_terminal, **env):
        for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
        for kind in ("error", "warning", "note"):
            output.print_err(f"{kind}: \x1b[31mred")
        output.print_err("[looks again]", name="", is_dim=True)
        output.print_out("3", label="a.png: ")
        out, err = capsys.readouterr()
        assert "\\x1b[31mred" in err  # nobody else colours the terminal
        return out + err

    plain = lines(is_terminal=False)
    assert not any(colours_of(plain)) and "\x1b" not in plain
    coloured = lines(is_terminal=os.name != "nt")
    assert all(colours_of(coloured)) and coloured.count("\x1b[0m") == 5
    assert lines(is_terminal=False, FORCE_COLOR="1") == coloured
    assert lines(is_terminal=True, NO_COLOR="1", FORCE_COLOR="1") == plain
    assert lines(is_terminal=True, TERM="dumb") == plain


def test_a_terminal_shows_what_is_loaded_before_the_image_is_read(ask, monkeypatch):
    monkeypatch.setattr(output.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    err = ask("gone.png", "What?")[2]
    assert err.startswith("vpt: loading the embedded model ...\nvpt: error: 'gone.png'")

"""``vpt chat`` with a pipe, at a terminal, and its commands."""

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vpt import cli
from vpt.errors import PromptError
from vpt.images import load_image
from vpt.trace.records import Trace, load_traces

TAGS = Path(__file__).parents[2] / "examples" / "tags.jpg"


@pytest.fixture
def chat(capsys, monkeypatch, random_model, tmp_path):
    """Run ``vpt chat`` with lines on stdin; gives code, stdout and stderr."""
    monkeypatch.setattr("vpt.loading.EMBEDDED_MODEL", random_model)
    monkeypatch.chdir(tmp_path)

    def run(lines, *words):
        data = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        code = cli.main(["chat", *map(str, words)])
        return code, *capsys.readouterr()

    return run


SHORT = ("--max-new-tokens", 6, "--perception", "dino")


def test_a_question_of_a_pipe_continues_the_one_before(chat, scene, tmp_path):
    code, out, err = chat(["What?", "", "And then?", "/save out/chat.json"], scene, *SHORT)
    assert code == 0 and out.endswith("\n") and ">" not in err.replace("->", "")
    assert err.count("looks again: dino") == 2 and "vpt: saved out/chat.json" in err
    first, second = load_traces(tmp_path / "out" / "chat.json")
    assert [one.text for one in second.history] == ["What?", first.answer]
    assert second.counts.reused_tokens > first.counts.prompt_tokens
    assert out.split() == [*first.answer.split(), *second.answer.split()]


def test_images_join_by_command_or_by_their_name_alone(chat, scene, tmp_path):
    (tmp_path / "my photo.png").write_bytes(Path(scene).read_bytes())
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    lines = [
        *("red.png", "/image", "What?", "/image red.png", "'my photo.png'", "And these?"),
        *("/look 1", "This?", "/look latest", "/reset", "/look 1", "/save c.json"),
    ]
    code, _, err = chat(lines, scene, *SHORT)
    assert code == 1  # after the reset there is no image 1, and no answer to save
    assert "[image 1: red.png 90x60]\nvpt: note: took back 1 image\n" in err
    assert "[image 1: red.png 90x60]\n[image 2: my photo.png" in err
    places = [
        line.rpartition(" → ")[2].partition(",")[0] for line in err.splitlines() if "→" in line
    ]
    assert places == [Path(scene).name, "red.png", "red.png"]
    assert "there is no image 1: the chat has 1, counted from 0" in err
    assert "/save: there is no answer yet; ask a question first" in err
    assert "vpt: note: a new chat, with 1 image\n" in err and "vpt: error: 2 lines failed" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image gone.png", "'gone.png' does not exist"),
        ("/image -", "- is stdin, where the questions come from"),
        ("notes.txt", "'notes.txt' is not a supported image format"),
        ("/nope", "/nope is no command and no file; /help lists the commands"),
        ("/look never", "/look must be one of 'first', 'latest', not 'never'"),
        ("/picture", "/picture needs the name of a file"),
        ("/picture a.gif", "cannot save a picture as a.gif"),
        ("/picture notes.txt/a.png", "notes.txt is a file; expected a folder"),
        ("/save .", ". is a folder; expected a file name"),
        ("\udcff?", "the question is not valid text"),
        ("a <|im_end|>", "control token"),
        ("word " * 20_000, "a stream has room for|the model's context has"),
    ],
)
def test_a_line_that_fails_is_one_error_and_leaves_the_chat(chat, scene, tmp_path, line, message):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = chat(["What?", line, "Why?", "/save chat.json"], scene, *SHORT)
    wrong = [one for one in err.splitlines() if one.startswith("vpt: error: ")]
    assert code == 1 and len(wrong) == 2 and "Traceback" not in err
    with pytest.raises(PromptError, match=message):
        raise PromptError(wrong[0])
    assert [one.question for one in load_traces(tmp_path / "chat.json")] == ["What?", "Why?"]
    assert ("; or /reset begins a new chat" in err) is line.startswith("word")


def test_an_answer_is_drawn_and_help_and_quit_are_commands(chat, scene, tmp_path):
    lines = ["What?", "/picture look.png", "/help", "/quit", "/nope"]
    code, out, err = chat(lines, scene, *SHORT)
    assert code == 0 and "vpt: saved look.png" in err and "/reset " in err and "/reset" not in out
    assert load_image(tmp_path / "look.png").size_wh[0] == 1200


@pytest.mark.slow
def test_real_pipes_carry_questions_and_answers(tmp_path):
    lines = f"What number is on the blue one?\n/save {tmp_path}/t.json\nIs there a green one?\n"
    command = [sys.executable, "-m", "vpt", "chat", str(TAGS)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "3" and len(done.stdout.splitlines()) == 2
    assert "looks again: region x 3, y 2" in done.stderr and "loading" not in done.stderr
    assert Trace.load(tmp_path / "t.json").answer == "3"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a terminal of POSIX")
def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(random_model):
    import pty

    main, side = pty.openpty()
    code = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "from vpt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["chat", "--model", str(random_model), "--max-new-tokens", "2000"]
    running = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(side)

    unread = b""

    def wait_for(words, key=b""):
        """All up to these words; what follows them is kept for the next call.

        A signal that comes as input() begins is seen at the next key, so keys are pressed again.
        """
        nonlocal unread
        os.write(main, key)
        deadline = time.monotonic() + 90
        while not (found := re.search(words, unread)):
            assert time.monotonic() < deadline, unread
            if select.select([main], [], [], 2)[0]:
                unread += os.read(main, 4096)
            else:
                os.write(main, key)
        seen, unread = unread[: found.end()], unread[found.end() :]
        return seen

    try:
        assert b"no image yet; /help lists the commands" in wait_for(b"> ")
        os.write(main, b"Go on.\n")
        wait_for(rb"Go on\.\r\n\s*\S")  # it writes
        os.write(main, b"\x03")
        wait_for(b"stopped; the chat continues as if this had not been asked\r\n> ")
        wait_for(b"Ctrl-D ends the chat\r\n> ", key=b"\x03")
        os.write(main, b"\x04")
        assert running.wait(20) == 0
    finally:
        running.kill()
        running.wait()
        os.close(main)

"""The command line, through main() and once through a process of its own."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from golden_data import GOLDENS
from PIL import Image
from tiny_model import TINY_DINO, byte_tokenizer, tiny_model

import vpt.loading
import vpt.runtime
from vpt import cli
from vpt.branches import BranchError
from vpt.cli import ask as cli_ask
from vpt.cli.parser import build_parser
from vpt.cli.run import COMMANDS
from vpt.errors import BudgetError, PositionError
from vpt.inference.request import OPTIONS
from vpt.trace.records import Trace
from vpt.view.wording import STOP_TEXT, printable

ROOT = Path(__file__).parents[2]


# Help and usage


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys, vpt.cli; vpt.cli.main(['--help']); vpt.cli.main(['ask', '--help'])\n"
        "sys.argv = ['app.py', '--help']\n"
        "try: runpy.run_path('app.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'gradio', 'numpy', 'PIL', 'shtab')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = run_python("-c", code, cwd=ROOT)
    assert done.stdout.endswith(b"\n[]\n") and b"usage: app.py" in done.stdout, done.stderr


NEED_NO_TORCH = (
    (2, "eval --splits nope"),
    (2, "eval --splits DocVQA --data /nope"),
    (2, "eval --splits DocVQA --perception nope"),
    (4, "eval --splits rows.jsonl --model /nope"),
    (2, "data check nope"),
    (2, "data check /nope.json"),
    (4, "data check nope.json --model /nope"),
    (2, "data build /nope --out x.json"),
    (2, "data make-depth-rows --photos /nope --maps /nope --tokenizer . --out x"),
    (4, "data make-depth-rows --photos . --tokenizer /nope --out x"),
    (2, "data make-curriculum --atomic /nope --tasks /nope --out x.json"),
    (2, "depth-tokenizer train --maps /nope --out x"),
    (2, "depth-tokenizer train --photos /nope --out x"),
    (2, "depth-tokenizer report --maps /nope --tokenizer ."),
    (4, "depth-tokenizer decode text --tokenizer /nope --out x.png"),
    (2, "depth-tokenizer encode /nope --tokenizer ."),
    (4, "depth-tokenizer encode . --tokenizer /nope"),
    (4, "init --base /nope --branches clip --out x"),
    (4, "init --base . --branches clip --out x"),
    (4, "init --base /nope --content depth --depth-tokenizer /nope --out x"),
    (4, "set /nope --alignment on"),
    (4, "set . --alignment on"),
    (4 if find_spec("gradio") else 2, "demo --port 0 --model /nope"),
    (2, "compare /nope /nope"),
    (3, "ask /nope.jpg What?"),
    (4, "ask What? --model data/models/nope"),
    (4, "ask What? --model ."),
    (4, "ask What? --model bert"),
    (4, "ask What? --depth-tokenizer /nope"),
    (2, "chat -"),
    (2, "chat --top-p 0"),
    (3, "chat /nope.jpg"),
    (4, "chat --model /nope"),
)


def test_mistakes_that_need_no_torch_show_before_it_is_imported(tmp_path):
    another_type(tmp_path / "bert", None)
    (tmp_path / "rows.jsonl").write_text('{"question": "What?", "answer": "3"}')
    code = (
        "import json, sys; from vpt.cli import main; given, heavy = [], ('torch', 'transformers')\n"
        "for _, line in json.loads(sys.argv[1]):\n"
        "    given.append((main(line.split()), [m for m in heavy if m in sys.modules]))\n"
        "print(json.dumps(given))"
    )
    done = run_python("-c", code, json.dumps(NEED_NO_TORCH), cwd=tmp_path)
    given = zip(NEED_NO_TORCH, json.loads(done.stdout), strict=True)
    assert not [(line, got) for (code, line), got in given if got != [code, []]]
    assert done.stderr.count(b"error: ") == len(NEED_NO_TORCH)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["bert", "rows.jsonl"]  # nothing is left behind


def test_rows_are_made_and_checked_without_torch():
    code = (
        "import sys, vpt.data.build, vpt.data.check, recipes.embedded.make, recipes.scenes.files;"
        "import vpt.data.counting, vpt.data.curriculum;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.stdout == b"[]\n", done.stderr


def test_help_documents_every_exit_code(ask):
    for command in COMMANDS.commands:
        code, out, _ = ask("--help", command=command)
        assert code == 0
        for exit_code in (0, 1, 2, 3, 4, 5, 130, 141):
            assert f"\n  {exit_code} " in out


def test_two_dashes_end_the_options_of_a_command(ask, scene, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(scene, "-photo.png")
    code, out, _ = ask("--max-new-tokens", 2, "--json", "--", "-photo.png", "--json?")
    trace = json.loads(out)
    assert (code, trace["question"]) == (0, "--json?")
    assert trace["images"][0]["source"] == "-photo.png"
    assert ask("check", "--", "-rows.json", command="data")[2].startswith("vpt: error: ")
    assert cli.main(["ask", "-photo.png", "What?"]) == 2


def test_warnings_of_libraries_are_shown_on_demand_only(ask, scene, monkeypatch):
    load = vpt.load

    def noisy(*args, **kwargs):
        warnings.warn("from a library", UserWarning, stacklevel=2)
        logging.getLogger("some.library").warning("from a logger")
        return load(*args, **kwargs)

    monkeypatch.setattr(vpt, "load", noisy)
    err = ask(scene, "What?", "--max-new-tokens", 2)[2]
    assert "the answer is cut off" in err and "from a" not in err
    with pytest.warns(UserWarning, match="from a library"):
        ask(scene, "What?", "--max-new-tokens", 2, "--verbose")
    assert logging.root.manager.disable == logging.NOTSET


def test_version_is_that_of_the_package(ask):
    assert ask(command="--version") == (0, f"vpt {vpt.__version__}\n", "")


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_of_a_request_has_an_argument_with_its_default(name):
    parser = build_parser(cli_ask.COMMAND, "ask")
    assert getattr(parser.parse_args(["What?"]), name) == OPTIONS[name].default


def test_every_stop_but_the_good_one_is_explained():
    assert set(cli_ask.CUT_SHORT) == set(STOP_TEXT) - {"stop"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ask --foo", "vpt ask: error: unrecognized arguments: --foo"),
        ("ask What? -x", "vpt ask: error: unrecognized arguments: -x"),
        (
            "ask What? --pictures=x",
            "vpt ask: error: unrecognized arguments: --pictures=x; did you mean",
        ),
        ("data check a b", "vpt data check: error: unrecognized arguments: b"),
        ("data build --imgs=x", "vpt data build: error: unrecognized arguments: --imgs=x"),
        ("data --foo build", "vpt data: error: unrecognized arguments: --foo"),
        ("--versoin", "vpt: error: unrecognized arguments: --versoin; did you mean --version?"),
    ],
)
def test_an_unknown_flag_shows_the_usage_of_its_own_command(capsys, words, message):
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("usage: " + message.partition(":")[0].rstrip())


def test_a_value_may_look_like_an_unknown_flag_after_two_dashes(ask):
    assert ask("--max-new-tokens", 1, "--", "--foo")[0] == 0


COMPLETIONS = {
    "vpt da": "data",
    "vpt data check --no": "--no-images",
    "vpt ask --perc": "--perception",
    "vpt ask --perception reg": "",
    "vpt ask --perception re": "reencode",
    "vpt ask photo.jpg --tr": "--trace",
    "vpt ask ph": "photo.jpg",
    "vpt ask --model ph": "photo.jpg",
    "vpt depth-tokenizer train --ma": "--maps",
}


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_commands_options_values_and_files(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", "bash"]) == 0
    lines = [capsys.readouterr().out]
    for words in COMPLETIONS:
        lines.append(f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()")
        lines.append('_shtab_vpt 2>/dev/null; echo "${COMPREPLY[*]}"')
    (tmp_path / "photo.jpg").touch()
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True)
    assert done.stdout.decode().splitlines() == list(COMPLETIONS.values()), done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(capsys, shell):
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", shell]) == 0
    assert "--max-new-tokens" in (script := capsys.readouterr().out) or "max-new-tokens" in script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required"),
        (["--nonsense", "q"], "unrecognized arguments: --nonsense"),
        (["--device", "toaster", "q"], "unknown device 'toaster'; expected cpu, cuda"),
        (["--device", "cuda:", "q"], "unknown device 'cuda:'"),
        (["--dtype", "int3", "q"], "invalid choice: 'int3'"),
        (["--perception", "smell", "q"], "invalid choice: 'smell'"),
        (["--max-calls", "-1", "q"], "expected at least 0, got -1"),
        (["--max-new-tokens", "0", "q"], "expected at least 1, got 0"),
        (["--max-new-tokens", "many", "q"], "expected a whole number, got 'many'"),
        (["--temperature", "nan", "q"], "expected a number of at least 0, got nan"),
        (["--temperature", "warm", "q"], "expected a number, got 'warm'"),
        (["--top-p", "2", "q"], "expected a number from 0 to 1, got 2"),
        (["--top-p", "0", "q"], "top_p must be a finite number above 0"),
        ([""], "the question is empty"),
        (["what\udcff"], "the question is not valid text"),
        (["--perception", "sam", "q"], "perception='sam' needs an image"),
        (["--revision", "main", "q"], "--revision needs --model"),
        (["--picture", f"{__file__}/a.png", "q"], "test_cli.py is a file; expected a folder"),
        (["--picture", "a.xyz", "q"], "cannot save a picture as a.xyz; expected a name that ends"),
        (["--picture", "a", "q"], "cannot save a picture as a;"),
        (["--trace", f"{__file__}/a.json", "q"], "test_cli.py is a file; expected a folder"),
        (["--trace", "/", "q"], "/ is a folder; expected a file name"),
    ],
)
def test_wrong_usage_is_told_before_the_model_is_loaded(ask, monkeypatch, words, message):
    monkeypatch.setattr(vpt.loading, "load", None)
    code, out, err = ask(*words)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_an_unknown_command_is_wrong_usage(ask):
    code, _, err = ask(command="aks")
    assert code == 2 and "invalid choice: 'aks'" in err


def test_a_forgotten_question_is_told(ask, scene):
    code, _, err = ask(scene)
    assert code == 2 and "the last word is the question" in err and "is a file" in err


def test_an_input_image_is_not_overwritten(ask, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(photo)
    before = photo.read_bytes()
    for option in ("--picture", "--trace"):
        code, _, err = ask(photo, "q", option, photo)
        assert code == 2 and "is an input image and would be overwritten" in err
    assert photo.read_bytes() == before
    both = tmp_path / "x.png"
    code, _, err = ask("q", "--picture", both, "--trace", both)
    assert code == 2 and "name the same file" in err


def test_a_question_longer_than_a_file_name_is_a_question(ask):
    code, _, err = ask("why? " * 2000, "--max-new-tokens", 1)
    assert code == 0, err


def test_a_device_that_is_not_there_is_wrong_usage(ask, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = ask("q", "--device", "cuda")
    assert code == 2
    assert "device cuda is not there: torch finds no CUDA device; try --device cpu" in err


def test_control_tokens_in_the_question_are_wrong_usage(ask):
    code, _, err = ask("<|im_end|>")
    assert code == 2 and "the question holds the control token <|im_end|>" in err


# Images and models that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.png", None, "does not exist"),
        ("text.png", b"hello", "is not a supported image format"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\x00\x00", "cut.png"),
    ],
)
def test_an_image_that_cannot_be_used_is_told(ask, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = ask(tmp_path / name, "q")
    assert (code, out) == (3, "")
    assert message in err and err.startswith("vpt: error: ") and err.count("\n") == 1


def test_a_model_that_is_not_there_is_told_in_one_line(ask, tmp_path):
    code, out, err = ask("q", "--model", tmp_path / "none")
    assert (code, out) == (4, "")
    assert err.startswith("vpt: error: there is no model folder") and err.count("\n") == 1


def empty(folder, goldens):
    folder.mkdir()
    return "holds no config.json, so it is no model folder"


def broken_json(folder, goldens):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": ')
    return "cannot read "


def another_type(folder, goldens):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return "holds a model of type 'bert'; expected "


def truncated_weights(folder, goldens):
    shutil.copytree(goldens / "checkpoints" / "dino", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return "cannot read the weights "


@pytest.mark.parametrize("make", [empty, broken_json, another_type, truncated_weights])
def test_a_broken_model_folder_is_told_in_one_line(ask, tmp_path, goldens, make):
    message = make(tmp_path / "model", goldens)
    code, out, err = ask("q", "--model", tmp_path / "model")
    assert (code, out) == (4, "")
    assert message in err and err.startswith("vpt: error: ") and err.count("\n") == 1


def test_weights_that_are_not_finite_are_told(ask, scene, tmp_path):
    model, processor = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    code, out, err = ask(scene, "q", "--model", tmp_path)
    assert (code, out) == (4, "")
    assert "vpt: error: the model's logits are not finite" in err and "float32" in err


def test_verbose_shows_where_an_error_came_from(ask, tmp_path):
    code, _, err = ask("q", "--model", tmp_path / "none", "--verbose")
    assert code == 4 and "Traceback" in err and "vpt: error: there is no model folder" in err


def test_a_branch_the_model_lacks_is_told(ask, scene, goldens):
    model = goldens / "checkpoints" / "dino"
    code, _, err = ask(scene, "q", "--model", model, "--perception", "sam")
    assert code == 2 and "this model cannot do perception='sam'; it has: crop, dino" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), 5, "try --dtype bfloat16"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), 5, "--device cpu"),
        (MemoryError(), 5, "vpt: error: out of memory: try --dtype bfloat16, smaller images"),
        (BranchError("no encoder"), 4, "vpt: error: no encoder"),
        (BudgetError("no room"), 2, "vpt: error: no room"),
        (PositionError("ours"), 1, "Traceback"),
        (ZeroDivisionError("ours"), 1, "this is a bug; please report it"),
        (KeyboardInterrupt(), 130, "vpt: interrupted"),
    ],
)
def test_every_kind_of_error_has_its_code(ask, monkeypatch, error, code, message):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(vpt.loading, "load", load)
    given, _, err = ask("q")
    assert given == code
    assert message in err
    assert ("Traceback" in err) == (code == 1)


def test_ctrl_c_while_the_answer_streams_ends_the_run(ask, scene, monkeypatch):
    whole = vpt.runtime.Runtime.stream_many

    def stream_many(self, *args, **kwargs):
        for number, event in enumerate(whole(self, *args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(vpt.runtime.Runtime, "stream_many", stream_many)
    code, _, err = ask(scene, "q", "--json")
    assert code == 130 and err.endswith("\nvpt: interrupted\n")


# Answers


@pytest.mark.parametrize("seed", range(4))
def test_stdout_holds_what_the_model_says_made_harmless(ask, scene, seed):
    options = ("--temperature", 1, "--seed", seed, "--max-new-tokens", 60)
    code, out, _ = ask(scene, "What is this?", "--perception", "none", *options)
    answer = vpt.load(device="cpu").ask(
        scene, "What is this?", perception="none", temperature=1.0, seed=seed, max_new_tokens=60
    )
    assert code == 0
    assert out.strip() and out.strip() == printable(answer.text).strip()
    assert not any(ord(char) < 32 and char not in "\n\t" for char in out)


def test_the_answer_does_not_depend_on_where_options_stand(ask, scene):
    first = ask(scene, "What?", "--max-new-tokens", 9)
    assert ask("--max-new-tokens", 9, scene, "What?") == first
    assert ask(scene, "--max-new-tokens", 9, "What?") == first
    assert ask(scene, "--max-new-tokens", 9, "--", "What?") == first


def test_a_question_may_begin_with_a_dash(ask):
    code, out, _ = ask("--json", "--max-new-tokens", 1, "--", "-1 + 1?")
    assert code == 0 and json.loads(out)["question"] == "-1 + 1?"


def test_each_call_is_one_line_on_stderr(ask, scene):
    code, _, err = ask(scene, "What?", "--perception", "dino", "--max-new-tokens", 8)
    assert code == 0
    assert "[looks again: dino → a_scene.png, 64 tokens, " in err
    assert "cut off at the token limit; allow more with --max-new-tokens" in err


def test_the_box_of_a_region_is_told_in_pixels_of_the_photo(ask, scene):
    _, out, err = ask(scene, "Why?", "--perception", "region", "--max-new-tokens", 40, "--json")
    call = json.loads(out)["calls"][0]
    x_min, _, x_max, _ = call["region"]
    box = ",".join(map(str, call["box_xyxy_px"]))
    assert f"[looks again: region x {x_min}{f'-{x_max}' if x_max > x_min else ''}, y " in err
    assert f" → box {box} of a_scene.png, {call['num_tokens']} tokens, " in err


def test_a_released_checkpoint_answers(ask, scene, goldens):
    model = goldens / "checkpoints" / "dino"
    code, out, _ = ask(scene, "What?", "--model", model, "--max-new-tokens", 12)
    answer = vpt.load(str(model), device="cpu").ask(scene, "What?", max_new_tokens=12)
    assert (code, out) == (0, printable(answer.text) + "\n") and answer.text


def test_json_is_all_there_is_on_stdout(ask, scene):
    code, out, err = ask(scene, "What?", "--json", "--perception", "sam", "--max-new-tokens", 8)
    assert code == 0 and out.isascii() and out.count("\n") == 1
    trace = Trace.from_dict(json.loads(out))
    assert trace.calls[0].branch == "sam"
    assert "looks again: sam" in err


def test_trace_and_picture_are_saved(ask, scene, tmp_path):
    trace_file, picture_file = tmp_path / "t.json", tmp_path / "p.PNG"
    code, _, err = ask(
        *(scene, "What?", "--perception", "dino", "--max-new-tokens", 8),
        *("--trace", trace_file, "--picture", picture_file),
    )
    assert code == 0, err
    trace = Trace.load(trace_file)
    assert trace.images[0].thumbnail.startswith("data:image/jpeg;base64,")
    assert trace.calls[0].num_tokens == 64
    with Image.open(picture_file) as picture:
        assert picture.width == 1200
        assert len(picture.getcolors(2**24)) > 1000


def test_a_file_that_cannot_be_written_is_told(ask, monkeypatch, tmp_path):
    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trace, "save", save)
    code, _, err = ask("q", "--max-new-tokens", 1, "--trace", tmp_path / "t.json")
    assert code == 2 and "t.json: No space left on device" in err


def test_verbose_ends_with_a_summary(ask, scene):
    _, _, err = ask(scene, "What?", "--perception", "sam", "--max-new-tokens", 8, "--verbose")
    assert " prompt + " in err and "8 generated tokens" in err and "1 call;" in err
    assert "first token after" in err and "end: cut off at the token limit" in err


def test_malformed_calls_are_told(ask, scene):
    options = ("--no-constrain", "--temperature", 1.5, "--seed", 3, "--max-new-tokens", 40)
    _, out, err = ask(scene, "What is it?", "--json", *options)
    number = len(json.loads(out)["malformed"])
    assert number and f"note: {number} malformed call" in err


def test_a_call_beyond_the_budget_is_told(ask, scene):
    options = ("--no-constrain", "--temperature", 1.5, "--max-new-tokens", 40, "--max-calls", 0)
    for seed in range(40):  # some draw a call
        _, out, err = ask(scene, "What is it?", "--json", "--seed", seed, *options)
        if json.loads(out)["stop_reason"] == "max_calls":
            break
    assert "[does not look again: " in err and "allow more with --max-calls" in err


def test_only_the_first_frame_of_an_animation_is_seen_and_that_is_told(ask, tmp_path):
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    _, _, err = ask(tmp_path / "a.gif", "q", "--max-new-tokens", 1)
    assert "a.gif has 2 frames; only the first is seen" in err


# A process of its own


def run_python(*words, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, capture_output=True, timeout=120, **options)


def test_the_command_works_in_a_process_of_its_own():
    options = ["--json", "--max-new-tokens", "1", "--perception", "none"]
    done = run_python("-m", "vpt", "ask", str(ROOT / "examples/tags.jpg"), "What?", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["generated_tokens"] == 1
    assert len(done.stderr.splitlines()) == 1  # that the answer is cut off: no library noise


def test_a_reader_that_goes_away_ends_the_run(ask, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["ask", "What?", "--max-new-tokens", "30"]) == 141


@pytest.mark.slow
def test_a_reader_that_goes_away_makes_no_noise(scene):
    command = [sys.executable, "-m", "vpt", "ask", scene, "What?", "--max-new-tokens", "2000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err and b"BrokenPipe" not in err


@pytest.mark.slow
def test_ctrl_c_ends_the_process_with_its_code(scene):
    talkative = GOLDENS / "checkpoints" / "clip"  # untrained: it finds no end
    command = [sys.executable, "-m", "vpt", "ask", scene, "What?", "--model", str(talkative)]
    command += ["--max-new-tokens", "9000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"vpt: interrupted" in err and b"Traceback" not in err


# vpt init


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small plain Qwen2-VL and a small DINOv2."""
    from tiny_model import tiny_model
    from transformers import Dinov2Config, Dinov2Model, Qwen2VLForConditionalGeneration

    model, processor = tiny_model(())
    config = model.config.to_dict()
    kept = ("text_config", "vision_config", "image_token_id", "video_token_id")
    kept += ("vision_start_token_id", "vision_end_token_id")
    from transformers import Qwen2VLConfig

    plain = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**{key: config[key] for key in kept}))
    folder = tmp_path_factory.mktemp("base")
    plain.save_pretrained(folder)
    processor.tokenizer = byte_tokenizer()
    processor.save_pretrained(folder)
    Dinov2Model(Dinov2Config(**TINY_DINO)).save_pretrained(folder / "dino")
    return folder


def test_init_makes_a_model_that_can_be_asked(ask, base, scene, tmp_path):
    out_folder = tmp_path / "made by us"
    code, out, err = ask(
        *("--base", base, "--branches", "clip,dino", "--dino", base / "dino"),
        *("--out", out_folder),
        command="init",
    )
    assert code == 0, err
    assert "branches    crop, clip, dino" in out and "for perception, untrained" in out
    assert f"vpt ask --model '{out_folder}' photo.jpg" in out
    code, _, err = ask(
        *(scene, "q", "--model", out_folder, "--perception", "dino", "--max-new-tokens", 4)
    )
    assert code == 0 and "looks again: dino" in err
    code, _, err = ask("--base", base, "--branches", "clip", "--out", out_folder, command="init")
    assert code == 2 and "is not empty; choose another folder, or --force" in err
    code, _, err = ask(
        *("--base", base, "--branches", "", "--out", out_folder, "--force"),
        *("--mask", "question", "--mask-ratio", "0.5"),
        command="init",
    )
    assert code == 0, err
    settings = json.loads((out_folder / "config.json").read_text())
    assert (settings["para_mask_id"], settings["para_mask_ratio"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--base", "b", "--branches", "eyes"], 2, "unknown branch 'eyes'; available: clip, dino"),
        (["--base", "b", "--branches", "clip", "--sam", "x"], 2, "sam is not among --branches"),
        (["--base", "/none", "--branches", "clip"], 4, "cannot load the base model /none"),
        (["--base", "b", "--branches", "clip", "--grid-size", "0"], 2, "expected at least 1"),
        (["--branches", "clip"], 2, "the following arguments are required: --base"),
    ],
)
def test_what_init_cannot_do_is_told(ask, tmp_path, words, code, message):
    given, out, err = ask(*words, "--out", tmp_path / "out", command="init")
    assert (given, out) == (code, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [empty, broken_json])
def test_init_of_a_broken_base_is_told_in_one_line(ask, tmp_path, goldens, make):
    make(tmp_path / "base", goldens)
    words = ("--base", tmp_path / "base", "--branches", "clip", "--out", tmp_path / "out")
    code, out, err = ask(*words, command="init")
    assert (code, out) == (4, "")
    assert err.startswith(f"vpt: error: cannot load the base model {tmp_path / 'base'}")
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_init_of_a_model_of_another_type_is_told_in_one_line(ask, tmp_path, goldens):
    another_type(tmp_path / "base", goldens)
    words = ("--base", tmp_path / "base", "--branches", "clip", "--out", tmp_path / "out")
    code, out, err = ask(*words, command="init")
    assert (code, out) == (4, "")
    assert "is of type 'bert'" in err and "not 'qwen2_vl'" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_init_does_not_write_over_a_file(ask, tmp_path):
    (tmp_path / "f").write_text("mine")
    code, _, err = ask("--base", "b", "--branches", "clip", "--out", tmp_path / "f", command="init")
    assert code == 2 and "is a file; expected a folder" in err

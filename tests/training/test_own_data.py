"""docs/own-data.md: its commands run as written and leave a model that answers."""

import json
import re
import shlex
import subprocess

import pytest
import yaml
from factory import ROOT, environment, losses
from PIL import Image

from vpt.cli.parser import build_parser
from vpt.cli.run import COMMANDS
from vpt.loading import EMBEDDED_MODEL
from vpt.model.processing import VPTProcessor

PAGE = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", PAGE, re.MULTILINE))


def block(section, language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)
    return found.splitlines()


def run(line, folder):
    """Run a line of the page; what it printed, on both streams."""
    words = shlex.split(line)
    env = environment(folder / "cache")
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said


@pytest.fixture
def folder(tmp_path):
    """What the page asks for, in a folder that has the repository's configs and model."""
    pytest.importorskip("sklearn")
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("configs", "vpt"):
        (folder / name).symlink_to(ROOT / name)
    for line in block("Files", "bash"):
        run(line, folder)
    notes = folder / "data" / "own" / "notes.jsonl"
    notes.write_text("\n".join(block("Files", "json")), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_written(folder):
    pytest.importorskip("llamafactory")
    install, build, check, train, ask = block("Commands", "bash")
    assert install == 'pip install -e ".[train]"'
    wrote = re.search(r": (\d direct, \d region)", SECTIONS["Commands"])
    assert wrote and wrote[1] in run(build, folder)
    assert "nothing found" in run(check, folder)
    run(train, folder)
    assert losses(folder / "saves" / "own")[-1] < 0.05
    look, answer, saved = block("Commands", "text")
    said = run(ask, folder)
    assert {answer, saved} <= set(said.splitlines()) and look.split(",", 2)[0] in said
    assert "warning" not in said  # the photos that it was trained on are what it is for
    Image.open(folder / "look.jpg").verify()
    assert re.search(r"contains +6 +0 +1\.000 ", run(block("Accuracy", "bash")[0], folder))
    more = run(f"{train} overwrite_output_dir=false num_train_epochs=151", folder)
    assert "resuming from saves/own/checkpoint-150" in more
    state = json.loads((folder / "saves" / "own" / "trainer_state.json").read_text())
    assert state["global_step"] == 151
    assert answer in run(ask, folder).splitlines()


@pytest.mark.parametrize("text", ["eine Blüte", "佛香阁", "🙂 x\u0301\n\t~"])
def test_the_shipped_model_can_write_any_text(text):
    tokenizer = VPTProcessor.from_pretrained(EMBEDDED_MODEL).tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_commands_for_a_large_model_are_understood(tmp_path, monkeypatch):
    lines = block("A 2B model", "bash")
    for line in (line for line in lines if line.startswith("vpt ")):
        assert build_parser(COMMANDS).parse_args(shlex.split(line)[1:]).run
    hparams = pytest.importorskip("llamafactory.hparams")
    monkeypatch.chdir(tmp_path)
    (train,) = (line for line in lines if line.startswith("llamafactory-cli train "))
    file, *changes = train.split()[2:]
    settings = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    settings |= {k: yaml.safe_load(v) for k, v in (change.split("=") for change in changes)}
    _, data, training, *_ = hparams.get_train_args({**settings, "use_cpu": True})
    assert (data.dataset, data.streaming) == (["own"], False)
    assert (training.max_steps, training.num_train_epochs) == (-1, 3)

"""The language model trained on features of a bank: the model's own loss, order, resuming."""

import dataclasses
import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from two_processes import run_in_two

from recipes.embedded import language
from recipes.embedded.bank import load_bank
from recipes.embedded.language import (
    Muon,
    Reader,
    Settings,
    Table,
    Training,
    batches_of,
    learning_rate_at,
    order_of,
    train,
)
from recipes.embedded.make import Stage, make_part
from recipes.embedded.settings import read_settings
from recipes.embedded.shape import fresh_model
from vpt.errors import DataError, NonFiniteError, VPTError
from vpt.model.encoding import RowEncoder, collate, open_row_image
from vpt.model.modeling import load_model
from vpt.training.processes import Processes

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs" / "embedded"
FILES = ("instructions", "looks", "easy")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a fresh model and rows of a few scenes."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("language")
    part = Stage("train", "train", 24, 3, FILES)
    for _ in make_part(part, folder, 1):
        pass
    model, processor = fresh_model(1)
    model.config.para_mask_id = 0
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def settings_of(folder, **changed):
    files = {str(folder / f"{name}.jsonl"): 1.0 for name in FILES}
    one = Settings(
        model=str(folder / "model"),
        output_dir=str(folder / "out"),
        phases={0.0: files},
        steps=6,
        batch_size=4,
        num_held_out=4,
        save_steps=3,
        num_workers=1,
        bank=str(folder / "bank.pt"),
    )
    return dataclasses.replace(one, **changed)


def test_the_loss_is_that_of_the_models_own_forward(made):
    """For rows with regions, with each branch and without a call, in one batch."""
    folder = str(made / "model")
    model = load_model(folder, device="cpu", dtype=torch.float32).train()
    files = [str(made / f"{name}.jsonl") for name in FILES]
    bank = load_bank(model, folder, files, "", 1)
    _, processor = fresh_model(1)
    encoder = RowEncoder(model.config, processor, open_row_image)
    reader = Reader(model, bank.features.float())
    for name, file in zip(FILES, files, strict=True):
        rows = [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            for column in row:
                if column.endswith("images"):
                    row[column] = [str(made / path) for path in row[column]]
        chosen = np.arange(min(len(rows), 24))
        batch = collate(
            [encoder.encode(rows[number]) for number in chosen], processor.tokenizer.pad_token_id
        )
        model.model.language_model.config._attn_implementation = "sdpa"
        with torch.no_grad():
            own = model(**batch).loss
            model.model.language_model.config._attn_implementation = language._ATTENTION
            loss, guessed, right = reader.loss(Table(bank.rows[file], CPU), chosen)
        assert loss.item() == pytest.approx(own.item(), abs=2e-3)  # features are kept in float16
        assert len(guessed) == len(right) == int((batch["labels"] != -100).sum())


def test_a_hidden_question_changes_the_answers_of_calling_rows_only(made):
    folder = str(made / "model")
    model = load_model(folder, device="cpu", dtype=torch.float32)
    files = [str(made / f"{name}.jsonl") for name in ("looks", "easy")]
    bank = load_bank(model, folder, files, "", 1)
    reader = Reader(model, bank.features.float(), hidden_questions=1.0)
    losses = {}
    with torch.no_grad():
        for file in files:
            table, rng = Table(bank.rows[file], CPU), np.random.default_rng(0)
            chosen = np.arange(4)
            losses[file] = [reader.loss(table, chosen, one)[0].item() for one in (None, rng)]
    calling, easy = (losses[file] for file in files)
    assert calling[0] != calling[1] and easy[0] == easy[1]


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler
def test_a_compiled_run_learns_as_one_that_was_not(made):
    losses = []
    for is_compiled in (False, True):
        output = made / f"compiled-{is_compiled}"
        train(settings_of(made, output_dir=str(output), compile=is_compiled), CPU)
        line = json.loads((output / "language.jsonl").read_text().splitlines()[-1])
        losses.append([value for name, value in line.items() if name.startswith("loss")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_stopped_run_ends_as_one_that_was_not(made, monkeypatch):
    whole = settings_of(made, output_dir=str(made / "whole"))
    train(whole, CPU)
    stopped = settings_of(made, output_dir=str(made / "stopped"))
    log = language._log

    def log_and_stop(file, step, *rest):
        log(file, step, *rest)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(language, "_log", log_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, CPU)
    monkeypatch.undo()
    train(stopped, CPU)
    models = [
        load_model(str(made / name), device="cpu", dtype=torch.float32).state_dict()
        for name in ("whole", "stopped")
    ]
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], msg=name)
    lines = [json.loads(x) for x in (made / "whole" / "language.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert {f"accuracy_{name}" for name in FILES} < set(lines[-1])


def train_or_say_why(settings):
    try:
        train(settings, CPU)
    except VPTError as exc:
        return str(exc)
    return "trained"


@pytest.mark.slow
def test_two_processes_train_as_one(made):
    """Rows with a different number of targets, in halves of a batch, count the same."""
    alone = settings_of(made, output_dir=str(made / "one"), steps=4)
    train(alone, CPU)
    shared = dataclasses.replace(
        alone, output_dir=str(made / "two"), bank=str(made / "bank-of-two.pt")
    )
    assert set(run_in_two(train_or_say_why, shared).values()) == {"trained"}
    models = [
        load_model(str(made / name), device="cpu", dtype=torch.float32).state_dict()
        for name in ("one", "two")
    ]
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], atol=1e-4, rtol=1e-3, msg=name)
    lines = (made / "two" / "language.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4]
    for changed, message in (
        ({"bank": ""}, "2 processes need a bank to share; set bank to a file"),
        ({"batch_size": 1}, "expected a row per process, got 2 processes and batch_size=1"),
    ):
        told = run_in_two(train_or_say_why, dataclasses.replace(shared, **changed))
        assert set(told.values()) == {message}


def test_matrices_in_bfloat16_give_nearly_the_same_loss_and_gradient(made):
    folder = str(made / "model")
    file = str(made / "instructions.jsonl")
    model = load_model(folder, device="cpu", dtype=torch.float32)
    bank = load_bank(model, folder, [file], "", 1)
    found = []
    for bf16 in (False, True):
        model.zero_grad()
        reader = Reader(model, bank.features.float(), bf16=bf16)
        loss, _, _ = reader.loss(Table(bank.rows[file], CPU), np.arange(4))
        loss.backward()
        gradient = model.model.language_model.layers[0].mlp.up_proj.weight.grad.flatten()
        assert gradient.dtype == torch.float32
        found.append((loss.item(), gradient.clone()))
    (loss, gradient), (other_loss, other_gradient) = found
    assert loss != other_loss and other_loss == pytest.approx(loss, rel=5e-3)
    assert torch.cosine_similarity(gradient, other_gradient, dim=0) > 0.99


def test_only_the_language_model_is_trained(made):
    train(settings_of(made, output_dir=str(made / "only")), CPU)
    before, after = (
        load_model(str(made / name), device="cpu", dtype=torch.float32).state_dict()
        for name in ("model", "only")
    )
    for name, tensor in before.items():
        is_language = ".language_model." in name or name.startswith("lm_head")
        assert torch.equal(tensor, after[name]) != is_language, name


def test_a_bank_of_other_encoders_is_not_used(made, tmp_path):
    folder = str(made / "model")
    model = load_model(folder, device="cpu", dtype=torch.float32)
    files, keep = [str(made / "easy.jsonl")], str(tmp_path / "bank.pt")
    first = load_bank(model, folder, files, keep, 1)
    again = load_bank(model, folder, files, keep, 1)
    assert torch.equal(first.features, again.features)
    with torch.no_grad():
        model.model.visual.merger.mlp[2].bias.add_(1)
    other = load_bank(model, folder, files, keep, 1)
    assert not torch.equal(first.features, other.features)


def test_a_bank_of_other_settings_is_not_used(made, tmp_path):
    folder = shutil.copytree(made / "model", tmp_path / "model")
    model = load_model(str(folder), device="cpu", dtype=torch.float32)
    files, keep = [str(made / "easy.jsonl")], str(tmp_path / "bank.pt")
    first = load_bank(model, str(folder), files, keep, 1)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 28**2, "longest_edge": 56**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    smaller = load_bank(model, str(folder), files, keep, 1)
    assert len(smaller.features) * 4 == len(first.features)


def save_half(state, file):
    Path(file).write_bytes(b"half")
    raise KeyboardInterrupt


def test_a_stopped_save_leaves_the_last_bank_and_state_whole(made, tmp_path, monkeypatch):
    model = load_model(str(made / "model"), device="cpu", dtype=torch.float32)
    training = Training(model, settings_of(made), Processes(use_cpu=True))
    bank, state = tmp_path / "bank.pt", tmp_path / "language.pt"

    def save(name):
        load_bank(model, str(made / "model"), [str(made / f"{name}.jsonl")], str(bank), 1)

    save("easy")
    training.save(state)
    before = bank.read_bytes(), state.read_bytes()
    monkeypatch.setattr(torch, "save", save_half)
    for stopped in (lambda: save("looks"), lambda: training.save(state)):
        with pytest.raises(KeyboardInterrupt):
            stopped()
    assert (bank.read_bytes(), state.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [bank, state]


def test_a_picture_that_is_no_square_is_refused(made, tmp_path):
    row = json.loads((made / "easy.jsonl").read_text().splitlines()[0])
    row["images"] = [f"{made / row['images'][0]}_0,0,168,56"]
    (tmp_path / "wide.jsonl").write_text(json.dumps(row))
    model = load_model(str(made / "model"), device="cpu", dtype=torch.float32)
    with pytest.raises(DataError, match="expected square pictures, got "):
        load_bank(model, str(made / "model"), [str(tmp_path / "wide.jsonl")], "", 1)


@pytest.mark.parametrize(
    "name",
    [
        *("3-language", "3-baseline"),
        *("count-steps", "count-direct", "nearest-steps", "nearest-direct"),
    ],
)
def test_the_configs_are_read(name):
    settings = read_settings(Settings, CONFIGS / f"{name}.yaml", [])
    assert Path(settings.output_dir).name == name
    for shares in settings.phases.values():
        assert sum(shares.values()) == pytest.approx(1)
    next(order_of(settings, {file: np.full(200, 9) for file in settings.phases[0]}))


def test_every_step_has_rows_of_one_phase_and_of_similar_length():
    lengths = {"a": np.arange(100, 200), "b": np.full(60, 7)}
    phases = {0.0: {"a": 1.0}, 0.5: {"a": 0.5, "b": 0.5}}
    settings = Settings("", "", phases, 200, batch_size=4, num_held_out=10)
    steps = list(order_of(settings, lengths))
    assert {file for file, _ in steps[:100]} == {"a"}
    assert 30 < sum(file == "b" for file, _ in steps[100:]) < 70
    of_a = [rows for file, rows in steps if file == "a"]
    assert max(rows.max() for rows in of_a) < 90  # the others are held out
    assert np.mean([np.ptp(lengths["a"][rows]) for rows in of_a]) < 20
    counts = np.bincount(np.concatenate(list(islice(batches_of(lengths["b"], 4, [1]), 60))))
    assert counts.max() - counts.min() <= 2  # all are used alike


def test_after_a_restart_the_learning_rate_is_that_of_a_run_of_its_own():
    alone = Settings("", "", {}, steps=100, learning_rate=0.2, warmup_steps=5)
    again = dataclasses.replace(alone, steps=150, restarts={0.6666: 0.1})
    rates = [learning_rate_at(step, again) for step in range(150)]
    assert rates[:100] == [learning_rate_at(step, alone) for step in range(100)]
    after = dataclasses.replace(alone, steps=50, learning_rate=0.1)
    assert rates[100:] == [learning_rate_at(step, after) for step in range(50)]
    assert max(rates[100:]) == pytest.approx(0.1, rel=0.02) and rates[99] < 0.01


def test_muon_takes_steps_of_one_size_along_orthogonal_matrices():
    matrices = [torch.nn.Parameter(torch.zeros(8, 4)), torch.nn.Parameter(torch.zeros(4, 8))]
    for one in matrices:
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    Muon(matrices, weight_decay=0.0).step(0.1)
    for one in matrices:
        sizes = torch.linalg.svdvals(one.detach()) / (0.1 * 0.2 * 8**0.5)
        assert sizes.min() > 0.6 and sizes.max() < 1.3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_held_out": 10_000}, "rows; expected more than num_held_out, 10000"),
        ({"phases": {0.5: {}}}, "phases: expected one from 0 on, got [0.5]"),
        ({"restarts": {1.5: 0.1}}, "between 0 and 1, such as {0.8: 1.0e-3}; got 1.5: 0.1"),
        ({"restarts": {"0.5:0.1": None}}, "restarts: expected learning rates by shares of the"),
        ({"restarts": {0.5: "1e-3"}}, "got 0.5: '1e-3'"),
        ({"phases": {0: {}, "half": {}}}, "phases: expected shares of the steps, got 'half'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    made, tmp_path, monkeypatch, capsys, changed, message
):
    values = dataclasses.asdict(settings_of(made, **changed))
    if changed.get("phases"):
        values["phases"][0.5] = {str(made / "easy.jsonl"): 1.0}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["language", str(tmp_path / "x.yaml"), "bank="])
    with pytest.raises(SystemExit):
        language.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("model: a", [], "lacks the key 'output_dir'"),
        ("models: a", [], "unknown key 'models'"),
        ("model: a", ["steps"], "expected key=value, got 'steps'"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, monkeypatch, capsys, text, words, message):
    (tmp_path / "x.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["language", str(tmp_path / "x.yaml"), *words])
    with pytest.raises(SystemExit):
        language.main()
    assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(made):
    with pytest.raises(NonFiniteError, match="at step 3; train with a smaller learning rate"):
        train(settings_of(made, output_dir=str(made / "nan"), learning_rate=1e30), CPU)


def test_a_row_with_two_calls_is_refused(made, tmp_path):
    row = json.loads((made / "looks.jsonl").read_text().splitlines()[0])
    row["messages"] *= 2
    for column in row:
        if column.endswith("images"):
            first = [str(made / path) for path in row[column]]
            row[column] = first * 2
    (tmp_path / "two.jsonl").write_text(json.dumps(row))
    model = load_model(str(made / "model"), device="cpu", dtype=torch.float32)
    with pytest.raises(DataError, match="expected one call per row at most, got 2"):
        load_bank(model, str(made / "model"), [str(tmp_path / "two.jsonl")], "", 1)

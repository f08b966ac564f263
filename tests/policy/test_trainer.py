"""Policy training of a tiny model: it learns, resumes exactly, and refuses what it cannot do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from drawing import noise
from safetensors.torch import load_file
from tiny_model import tiny_model
from two_processes import run_in_two

import vpt
from vpt.errors import CheckpointError, DataError, NonFiniteError, PromptError
from vpt.policy import trainer as training
from vpt.policy.rewards import REWARDS
from vpt.policy.settings import PolicySettings
from vpt.policy.trainer import PolicyTrainer


def end_now_and_then(model, processor):
    """Fit the row of the head that ends a turn to the states of some answers."""
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    asked = {"question": "What 0?", "temperature": 1.0, "max_new_tokens": 120}
    vpt.Runtime(model, processor).ask(noise(0), **asked)
    hook.remove()
    states, logits = (
        torch.cat([torch.atleast_2d(one) for one in each]) for each in zip(*seen, strict=True)
    )
    wanted = logits.logsumexp(-1, keepdim=True) - 1.5
    row = torch.linalg.lstsq(states, wanted).solution[:, 0]
    model.lm_head.weight.data[processor.tokenizer.eos_token_id] = row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that now and then ends its answers, and questions about noise."""
    folder = tmp_path_factory.mktemp("policy")
    model, processor = tiny_model(("clip", "sam"))
    end_now_and_then(model, processor)
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    rows = []
    for number in range(6):
        noise(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"What {number}?", "answer": "a"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def settings(folder, tmp_path):
    def make(**more):
        given = {
            "model_name_or_path": str(folder / "model"),
            "output_dir": tmp_path / "out",
            "train_split": str(folder / "questions.jsonl"),
            "rewards": {"format": 1.0, "num_calls": -0.5, "num_tokens": -0.02},
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_new_tokens": 16,
            "max_calls": 1,
            "learning_rate": 1e-3,
            "num_sequences": 5,
            "use_cpu": True,
            **more,
        }
        return PolicySettings(**given)

    return make


def train(settings):
    trainer = PolicyTrainer(settings)
    return [figures for figures in trainer.run() if "eval" not in figures]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_cost_per_token_makes_answers_shorter(settings):
    more = {"rewards": {"num_tokens": -1.0}, "max_steps": 4, "max_new_tokens": 12}
    figures = train(settings(**more, learning_rate=1e-2))
    assert figures[-1]["num_tokens"] < 0.5 * figures[0]["num_tokens"]
    assert max(f["log_prob_gap"] for f in figures) < 1e-4


def test_a_run_that_was_stopped_resumes_to_the_same_weights(settings, tmp_path):
    more = {"max_steps": 3, "beta": 0.1, "save_steps": 1, "rewards": {"format": 1, "look_bonus": 1}}
    whole = train(settings(**more, output_dir=tmp_path / "whole"))
    out = tmp_path / "out"
    stopped = PolicyTrainer(settings(**more)).run()
    assert next(stopped)["step"] == 1 and next(stopped)["step"] == 2  # written after it is told
    stopped.close()
    (out / ".checkpoint-2.part").mkdir()  # killed while writing
    assert training.last_checkpoint(out).name == "checkpoint-1"
    resumed = PolicyTrainer(settings(**more, save_total_limit=1))
    assert resumed.step == 1
    again = list(resumed.run())
    timing = {"sampling_s", "step_s"}
    kept = [{k: v for k, v in f.items() if k not in timing} for f in whole[1:]]
    assert [{k: v for k, v in f.items() if k not in timing} for f in again] == kept
    assert same(weights(out), weights(tmp_path / "whole"))
    logged = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert [one.name for one in training._checkpoints(out)] == ["checkpoint-3"]
    assert vpt.load(out).ask(noise(0), "What?", max_new_tokens=4).trace.tokens
    assert list(PolicyTrainer(settings(**more)).run()) == []


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_weights(settings, tmp_path):
    import yaml

    more = {"max_steps": 12, "save_steps": 2, "lr_scheduler_type": "cosine"}
    values = json.loads(settings(**more).model_dump_json(exclude_none=True))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "vpt", "train-policy", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"output_dir={whole}"], check=True, env=environment)
    process = subprocess.Popen([*command, f"output_dir={killed}"], env=environment)
    while not (killed / "checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-12").exists()
    done = subprocess.run(
        [*command, f"output_dir={killed}"], env=environment, capture_output=True, text=True
    )
    assert "resuming after step" in done.stderr, done.stderr
    assert same(weights(killed), weights(whole))


def test_answers_that_were_cut_change_nothing(settings, folder, monkeypatch):
    monkeypatch.setitem(REWARDS, "format", lambda one: float(one.is_cut))
    (figures,) = train(settings(max_steps=1, max_new_tokens=2, rewards={"format": 1.0}))
    assert 0 < figures["reward"] == figures["cut"] < 1 and figures["grad_norm"] == 0
    assert same(weights(settings().output_dir), weights(folder / "model"))


def test_shuffled_rewards_are_those_of_other_answers(settings, tmp_path):
    plain, shuffled = (
        train(settings(max_steps=1, shuffle_rewards=flag, output_dir=tmp_path / str(flag)))[0]
        for flag in (False, True)
    )
    assert plain["reward"] == pytest.approx(shuffled["reward"])
    assert plain["grad_norm"] != shuffled["grad_norm"]


def test_gradients_do_not_depend_on_how_a_step_is_divided(settings, tmp_path):
    norms = [
        train(
            settings(
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                output_dir=tmp_path / str(size),
            )
        )[0]["grad_norm"]
        for size in (1, 4, 8)
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4) and norms[0] > 0


def test_only_the_language_model_is_trained_unless_projectors_are_asked_for(
    settings, folder, tmp_path
):
    start = weights(folder / "model")
    for frozen in (True, False):
        out = tmp_path / str(frozen)
        train(settings(freeze_multi_modal_projector=frozen, output_dir=out, max_steps=2))
        now = weights(out)
        changed = {name for name in now if not torch.equal(now[name], start[name])}
        assert any("projectors.reencode" in name for name in changed) is not frozen
        assert any("language_model" in name for name in changed)
        assert not any("visual" in name or "branches" in name for name in changed)


def test_mixed_precision_trains_float32_weights(settings):
    (figures, *_) = train(settings(bf16=True, max_steps=2))
    assert 1e-5 < figures["log_prob_gap"] < 0.5
    assert {w.dtype for w in weights(settings().output_dir).values()} == {torch.float32}


def test_an_evaluation_logs_figures_with_intervals_and_draws_answers(settings, folder):
    pytest.importorskip("tensorboard")
    more = {"eval_split": str(folder / "questions.jsonl"), "max_eval_samples": 4, "eval_steps": 1}
    list(PolicyTrainer(settings(**more, max_steps=1, report_to="tensorboard")).run())
    out = settings().output_dir
    logged = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert [(one["kind"], one["step"]) for one in logged] == [
        ("eval", 0),
        ("train", 1),
        ("eval", 1),
    ]
    assert logged[0]["gain"].keys() == {"mean", "low", "high", "n"} and logged[0]["gain"]["n"] == 4
    page = (out / "gallery" / "step-1.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 4 and "vpt-stream" in page and "What 1?" in page
    assert list((out / "runs").iterdir())


def test_what_cannot_be_trained_is_said(settings, folder, tmp_path):
    with pytest.raises(DataError, match=r"no.jsonl does not exist"):
        PolicyTrainer(settings(train_split=str(folder / "no.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"question": "What?"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl: row 0: expected 'image', there is none"):
        PolicyTrainer(settings(train_split=f"plain:{tmp_path / 'bad.jsonl'}"))
    with pytest.raises(CheckpointError, match=r"nothing"):
        PolicyTrainer(settings(model_name_or_path=str(folder / "nothing")))
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptError, match=r"output_dir: cannot make .*file/out: Not a directory"):
        PolicyTrainer(settings(output_dir=tmp_path / "file" / "out"))
    train(settings(max_steps=1))
    with pytest.raises(PromptError, match=r"holds a run with seed 0, not 1; repeat its settings"):
        PolicyTrainer(settings(max_steps=1, seed=1))
    state = settings().output_dir / "checkpoint-1" / training.STATE
    stored = torch.load(state, weights_only=True)
    older = {k: v for k, v in json.loads(stored["settings"]).items() if k != "images"}
    torch.save({**stored, "settings": json.dumps(older)}, state)  # before there was this setting
    assert PolicyTrainer(settings(max_steps=2)).step == 1
    state.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"delete .*checkpoint-1 to resume"):
        PolicyTrainer(settings(max_steps=2))


def test_numbers_that_are_not_finite_stop_the_run(settings, monkeypatch, tmp_path):
    huge = {"rewards": {"format": 1e38}, "scale_rewards": False}
    with pytest.raises(NonFiniteError, match=r"gradient of step 1 is (nan|inf); lower learning_r"):
        train(settings(**huge))
    monkeypatch.setitem(REWARDS, "format", lambda one: float("nan"))
    with pytest.raises(NonFiniteError, match=r"a reward of step 1 is not finite; check the weigh"):
        train(settings(output_dir=tmp_path / "nan"))


def test_the_command_trains_and_prints_a_line_per_step(run, settings, tmp_path):
    import yaml

    values = json.loads(settings(max_steps=2).model_dump_json(exclude_none=True))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    code, out, err = run("train-policy", tmp_path / "run.yaml", "eval_steps=9")
    assert code == 0 and "saved the model in" in err
    assert [line.split()[:2] for line in out.splitlines()] == [["step", "1/2"], ["step", "2/2"]]
    code, out, err = run("train-policy", tmp_path / "run.yaml", "max_stepps=3")
    assert code == 2 and "did you mean 'max_steps'?" in err


def figures_of(settings):
    return list(PolicyTrainer(settings).run())


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_answers(settings, tmp_path, folder):
    more = {"max_steps": 2, "eval_split": str(folder / "questions.jsonl"), "eval_steps": 2}
    more |= {"rewards": {"format": 1.0, "num_tokens": -0.02, "look_bonus": 1.0}, "save_steps": 1}
    one = settings(**more, gradient_accumulation_steps=4, output_dir=tmp_path / "one")
    alone = list(PolicyTrainer(one).run())
    shared = settings(**more, gradient_accumulation_steps=2, output_dir=tmp_path / "two")
    told = run_in_two(figures_of, shared)
    assert told[0] == told[1]
    for ours, theirs in zip(told[0], alone, strict=True):
        assert ours.get("eval", ours).keys() == theirs.get("eval", theirs).keys()
        if "eval" not in ours:
            for name in ("reward", "score", "num_tokens", "sampled_tokens", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        else:
            assert ours["eval"]["score"] == theirs["eval"]["score"]
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[name], atol=1e-4, rtol=1e-3)
    lines = (tmp_path / "two" / training.LOG).read_text().splitlines()
    assert len(lines) == len(told[0])  # of one process only
    with pytest.raises(PromptError, match="holds a run of 2 processes, not 1"):
        PolicyTrainer(shared)


def test_adapters_alone_are_trained_saved_and_resumed(settings, tmp_path, folder):
    pytest.importorskip("peft")
    more = {"finetuning_type": "lora", "lora_rank": 4, "max_steps": 2, "learning_rate": 1e-2}
    more |= {"rewards": {"num_tokens": -1.0}, "save_steps": 1}
    whole = train(settings(**more, output_dir=tmp_path / "whole"))
    assert max(one["log_prob_gap"] for one in whole) < 1e-4
    stopped = PolicyTrainer(settings(**more)).run()
    assert next(stopped)["step"] == 1 and next(stopped)["step"] == 2
    stopped.close()
    resumed = PolicyTrainer(settings(**more))
    assert resumed.step == 1
    list(resumed.run())
    saved = [load_file(tmp_path / one / "adapter_model.safetensors") for one in ("whole", "out")]
    assert same(*saved) and all("lora_" in name for name in saved[0])
    assert all("language_model" in name for name in saved[0])
    start = vpt.load(folder / "model", device="cpu")
    tuned = vpt.load(tmp_path / "out", device="cpu")
    changed = [
        name
        for (name, one), other in zip(
            start.model.named_parameters(), tuned.model.parameters(), strict=True
        )
        if not torch.equal(one, other)
    ]
    assert changed and all("language_model" in name and "_proj" in name for name in changed)

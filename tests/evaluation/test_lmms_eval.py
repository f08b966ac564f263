"""lmms-eval finds the model, and gets of it what the runtime answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.models.model_utils.gen_metrics import (
    reset_logged_metrics,
    summarize_logged_metrics,
)
from lmms_eval.models.registry_v2 import ModelRegistryV2

from vpt.errors import ImageError, PromptError, RunError
from vpt.evaluation.lmms_eval_model import (
    VPT,
    cut,
    decoding_options,
    fold_messages,
    stop_words,
)
from vpt.evaluation.lmms_eval_plugin import manifest

ROOT = Path(__file__).parents[2]
TASK = Path(__file__).parent / "lmms_task"
ENTRY = "vpt = {}vpt.evaluation.lmms_eval_plugin:manifest{}"
GREEDY = {"max_new_tokens": 5, "do_sample": False, "until": ["\n\n"]}
SAMPLED = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "until": ["\n\n"]}


def picture(number):
    return Image.new("RGB", (84 + 28 * number, 84), (40 * number, 90, 200))


def text(words):
    return {"type": "text", "text": words}


def image(pixels):
    return {"type": "image", "url": pixels}


def user(*content):
    return {"role": "user", "content": list(content)}


@pytest.fixture(scope="module")
def model(random_model):
    built = VPT(model=random_model, device="cpu", batch_size="3")
    built.task_dict = {"own": {"test": list(range(7))}}
    return built


def instance(number, gen_kwargs=GREEDY, doc_to_messages=None):
    def ask(doc):
        return [user(image(picture(doc)), text(f"What is number {doc}?"))]

    arguments = ("context", doc_to_messages or ask, dict(gen_kwargs), number, "own", "test")
    metadata = {"task": "own", "doc_id": number, "repeats": 1}
    return Instance("generate_until", arguments, 0, metadata)


def texts(model, instances):
    return [result.text for result in model.generate_until(instances)]


# --- finding the model --------------------------------------------------------------------------


def test_the_manifest_names_the_class():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("vpt") is VPT


def test_the_package_names_the_manifest():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (section,) = re.findall(r'\[project.entry-points."lmms_eval.models"\]\n(.*)', project)
    assert section == ENTRY.format('"', '"')


def test_arguments_come_as_text():
    arguments = "perception=region,device=cpu,constrain=true,max_calls=1"
    built = VPT.create_from_arg_string(arguments, {"batch_size": "2", "device": None})
    assert built.batch_size == 2


def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'perceptoin'"):
        VPT.create_from_arg_string("perceptoin=auto")


def test_an_unknown_way_to_look_is_an_error_at_once():
    with pytest.raises(PromptError, match="nonsense"):
        VPT(perception="nonsense", device="cpu")


def test_a_batch_size_must_be_a_number():
    with pytest.raises(ValueError, match="batch_size must be a number, not 'auto'"):
        VPT(batch_size="auto")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotImplementedError, match="vpt eval --workers"):
        VPT()


# --- answers ------------------------------------------------------------------------------------


def test_answers_are_those_of_the_runtime_in_the_order_asked(model):
    lengths = [9, 3, 6, 1, 8]
    asked = [instance(n, {**GREEDY, "max_new_tokens": m}) for n, m in enumerate(lengths)]
    alone = [
        model.runtime.ask(picture(n), f"What is number {n}?", max_new_tokens=m)
        for n, m in enumerate(lengths)
    ]
    results = model.generate_until(asked)
    assert [result.text for result in results] == [answer.text for answer in alone]
    assert [result.token_counts.output_tokens for result in results] == [
        answer.trace.counts.generated_tokens for answer in alone
    ]


def test_no_requests_have_no_answers(model):
    assert model.generate_until([]) == []


def test_a_question_without_images_is_answered(model):
    asked = instance(0, doc_to_messages=lambda doc: [user(text("What is 1 + 1?"))])
    (answer,) = texts(model, [asked])
    assert answer == model.runtime.ask([], "What is 1 + 1?", max_new_tokens=5).text


def test_system_words_reach_the_model(model):
    def ask(doc):
        return [{"role": "system", "content": [text("Be brief.")]}, user(text("Hello?"))]

    (answer,) = texts(model, [instance(0, doc_to_messages=ask)])
    assert answer == model.runtime.ask([], "Hello?", system="Be brief.", max_new_tokens=5).text


def test_repeats_are_drawn_anew_and_a_run_again_gives_the_same(model):
    model._times_asked.clear()
    first = texts(model, [instance(1, SAMPLED)] * 3)
    model._times_asked.clear()
    again = texts(model, [instance(1, SAMPLED)] * 3)
    assert len(set(first)) > 1
    assert first == again


def test_an_answer_ends_at_a_stop_word(model):
    long = {**GREEDY, "max_new_tokens": 12}
    (whole,) = texts(model, [instance(0, long)])
    word = whole[2]
    (answer,) = texts(model, [instance(0, {**long, "until": ["never", word]})])
    assert answer == whole[: whole.index(word)].strip()


def test_tokens_can_be_limited_beyond_the_task(model, monkeypatch):
    monkeypatch.setattr(model, "max_new_tokens", 2)
    results = model.generate_until([instance(0), instance(0, {"max_new_tokens": 1})])
    assert [result.token_counts.output_tokens for result in results] == [2, 1]


def test_answers_reach_the_cache_hook(model, monkeypatch):
    kept = []

    class Hook:
        def add_partial(self, *told):
            kept.append(told)

    monkeypatch.setattr(model, "cache_hook", Hook())
    (answer,) = texts(model, [instance(0)])
    assert kept == [("generate_until", ("context", GREEDY), answer)]


def test_answers_are_kept_by_the_response_cache(model, tmp_path):
    cache = ResponseCache(str(tmp_path / "cache.db"), str(tmp_path / "audit.jsonl"))
    asked = [instance(0), instance(1)]
    first = [result.text for result in cache.execute(model, "generate_until", asked)]
    assert first == texts(model, asked)
    assert cache.get_stats()["hits"] == 0
    cache.execute(model, "generate_until", asked)
    assert cache.get_stats()["hits"] == 2
    cache.close()


def test_the_model_is_gone_when_scoring_begins():
    built = VPT(device="cpu")
    built.clean()
    assert not hasattr(built, "runtime")


def test_calls_and_answers_cut_off_are_counted(model, monkeypatch):
    monkeypatch.setitem(model._options, "perception", "dino")
    monkeypatch.setitem(model._options, "max_calls", 1)
    reset_logged_metrics()
    model.generate_until([instance(n, {**GREEDY, "max_new_tokens": 12}) for n in (0, 1)])
    summary = summarize_logged_metrics()
    assert summary["total_gen_tokens"] == 24
    assert summary["avg_share_cut_off"] == 1.0
    assert summary["avg_calls_per_answer"] == 1.0


# --- what cannot be asked -----------------------------------------------------------------------


def test_what_is_not_supported_says_so(model):
    with pytest.raises(NotImplementedError, match="no log-likelihoods"):
        model.loglikelihood([instance(0)])
    with pytest.raises(NotImplementedError, match="holds no conversation"):
        model.generate_until_multi_round([instance(0)])


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_videos_and_sound_are_refused(kind):
    with pytest.raises(PromptError, match=f"a question holds {kind}, .* takes text and image"):
        fold_messages([user({"type": kind, "url": "a.mp4"}, text("What?"))])


def test_an_error_names_its_document(model, tmp_path, monkeypatch):
    def torn(doc):
        return [user(image(str(tmp_path / "missing.png")), text("What?"))]

    def broken(doc):
        raise KeyError("ours")

    kept = []
    monkeypatch.setattr(model.cache_hook, "add_partial", lambda *told: kept.append(told[-1]))
    asked = [instance(4, doc_to_messages=torn), instance(2, doc_to_messages=broken), instance(1)]
    with pytest.raises(ImageError, match=r"task 'own', document 4: .*missing\.png.*\(2 of 3 req"):
        model.generate_until(asked)
    answered = list(kept)
    assert answered == texts(model, [instance(1)])
    with pytest.raises(RunError, match="task 'own', document 2: the run failed with KeyError"):
        model.generate_until(asked[1:])
    for question in ("", "<|im_start|>"):
        asked = instance(2, doc_to_messages=lambda doc, words=question: [user(text(words))])
        with pytest.raises(PromptError, match="task 'own', document 2: the question"):
            model.generate_until([asked])


# --- messages and settings ----------------------------------------------------------------------


def test_images_in_front_leave_the_words_as_they_are():
    first, second = picture(0), picture(1)
    prompt = fold_messages([user(image(first), image(second), text("Which is"), text("red?"))])
    assert prompt == ([first, second], "Which is\nred?", None)


def test_places_of_images_between_words_are_marked():
    first, second = picture(0), picture(1)
    prompt = fold_messages([user(text("Is"), image(first), text("as red as"), image(second))])
    assert prompt[:2] == ([first, second], "Is\n<image 1>\nas red as\n<image 2>")


@pytest.mark.parametrize("roles", [[], ["user", "user"], ["user", "assistant", "user"]])
def test_conversations_are_refused(roles):
    with pytest.raises(PromptError, match="expected one user turn"):
        fold_messages([{"role": role, "content": [text("So?")]} for role in roles])


@pytest.mark.parametrize(
    ("gen_kwargs", "options"),
    [
        ({}, {}),
        ({"max_new_tokens": 7, "until": ["x"], "num_beams": 1}, {"max_new_tokens": 7}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {}),
        ({"do_sample": True, "temperature": 0}, {}),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.5, "top_p": None, "top_k": 3}, {"temperature": 0.5, "top_k": 3}),
        ({"temperature": 1, "top_p": 0.9, "seed": 4}, {"temperature": 1, "top_p": 0.9, "seed": 4}),
    ],
)
def test_settings_of_generation_become_options(gen_kwargs, options):
    assert decoding_options(gen_kwargs) == options


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("temprature", 1)])
def test_a_setting_that_cannot_be_honoured_is_an_error(name, value):
    with pytest.raises(PromptError, match=f"{name}={value} is not supported; available: do_sample"):
        decoding_options({name: value})


@pytest.mark.parametrize(
    ("until", "words"),
    [(None, []), ("end", ["end"]), (["\n\n", "", "a"], ["a"]), ([], [])],
)
def test_stop_words_leave_out_the_delimiter_of_examples(until, words):
    assert stop_words({"until": until}) == words


@pytest.mark.parametrize(
    ("until", "left"), [([], "one two three"), (["three", "two"], "one"), (["x"], "one two three")]
)
def test_text_is_cut_at_the_first_stop_word(until, left):
    assert cut("one two three\n", until) == left


# --- the whole way ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_runs_from_the_command_line(tmp_path):
    from recipes.embedded.make import Stage, make_part

    heldout = Stage("heldout", "heldout", 3, 4, ("heldout",))
    assert list(make_part(heldout, tmp_path, 1)) == [3]
    lines = (tmp_path / "heldout.jsonl").read_text("utf-8").splitlines()
    installed = tmp_path / "site" / "vpt_entry-0.dist-info"  # as pip would write it
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vpt-entry\nVersion: 0\n")
    entry = ENTRY.format("", "")
    (installed / "entry_points.txt").write_text(f"[lmms_eval.models]\n{entry}\n")

    command = "--model vpt --model_args perception=dino,device=cpu,max_calls=1 --batch_size 4"
    command += f" --tasks vpt_heldout --include_path {TASK} --log_samples --output_path results"
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *command.split()],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(installed.parent)]),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    # lmms-eval exits with 0 also when it has failed: only the files tell.
    assert list((tmp_path / "results").rglob("*_results.json")), done.stdout + done.stderr
    (results_file,) = (tmp_path / "results").rglob("*_results.json")
    results = json.loads(results_file.read_text("utf-8"))
    assert "exact_match,none" in results["results"]["vpt_heldout"]
    assert results["n-samples"]["vpt_heldout"]["effective"] == len(lines)
    assert results["throughput"]["avg_calls_per_answer"] == 1.0
    (samples_file,) = (tmp_path / "results").rglob("*_samples_vpt_heldout.jsonl")
    samples = [json.loads(line) for line in samples_file.read_text("utf-8").splitlines()]
    answers = [json.loads(line)["answer"] for line in lines]
    assert [sample["target"] for sample in samples] == answers

"""Rows and settings that spoil a run are refused in words; a run killed while saving resumes."""

import json
import re
import shutil

import pytest
from factory import arguments, losses, make_row, save_model, save_rows, turn

from vpt.errors import PromptError, TrainingError

pytestmark = [
    # torch, for reading its own pinned memory setting where there is no GPU
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
IMAGE = "images/0.png"
STREAMING = {
    "streaming": True,
    "overwrite_cache": None,
    "buffer_size": 8,
    "dataloader_num_workers": 1,
}
GOOD = {"messages": turn("<image>\nWhat?", "A thing."), "images": [IMAGE]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


def test_images_may_come_after_a_thousand_rows_of_text(factory, model, tmp_path):
    rows = [{"messages": turn(f"What is {n}?", f"tags {n}"), "images": []} for n in range(1200)]
    rows += [GOOD] * 20
    save_rows(tmp_path, rows=rows)
    factory.run_exp(arguments(model, tmp_path, tmp_path / "out", max_steps=1))
    assert len(losses(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": IMAGE}, "expected images to be a list of paths, got 'images/0.png'"),
        ({"images": [None]}, "expected images to be a list of paths, got [None]"),
        ({"messages": turn("What?", "A thing.")}, "0 <image> in the text, 1 in images"),
        (
            {"messages": turn("<image>\nWhat?", "A thing. <image>")},
            "messages[1] is an answer, but contains <image>",
        ),
    ],
)
def test_a_malformed_row_is_named(stock, model, tmp_path, changes, words):
    has_list = isinstance(changes.get("images", []), list)  # a column has one type
    good = GOOD if has_list else {"messages": turn("What?", "A thing."), "images": None}
    save_rows(tmp_path, rows=[good, good, {**GOOD, **changes}])
    settings = STREAMING if not has_list else {}
    parts = stock(arguments(model, tmp_path, tmp_path / "out", **settings))
    with pytest.raises(PromptError, match=re.escape(f"mixed.json, row 2: {words}")) as caught:
        list(parts.dataset()["train_dataset"])
    assert "mend it (`vpt data check` finds all)" in str(caught.value)


def test_a_stock_template_is_refused(factory, model, tmp_path):
    save_rows(tmp_path)
    settings = arguments(model, tmp_path, tmp_path / "out", template="qwen2_vl")
    with pytest.raises(TrainingError, match=r"set `template: vpt_qwen2_vl`"):
        factory.run_exp(settings)
    rows = [{"messages": turn("What?", "A thing.")}] * 4
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    save_rows(
        tmp_path,
        "texts",
        rows,
        formatting="sharegpt",
        columns={"messages": "messages"},
        tags={**tags, "assistant_tag": "assistant"},
    )
    with pytest.raises(TrainingError, match=r"another model; set `template: vpt_qwen2_vl`"):
        factory.run_exp({**settings, "dataset": "texts"})


@pytest.mark.parametrize("dispatch", [{}, {"accelerator_config": {"dispatch_batches": True}}])
def test_streaming_that_would_cut_pixels_is_refused(factory, model, tmp_path, dispatch):
    save_rows(tmp_path)
    settings = {**STREAMING, **dispatch}
    with pytest.raises(TrainingError, match=r"set `accelerator_config: \{dispatch_batches: false"):
        factory.run_exp(arguments(model, tmp_path, tmp_path / "out", **settings))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(
    factory, model, tmp_path, caplog
):
    save_rows(tmp_path, rows=[make_row("direct", n) for n in range(8)])
    whole, again = tmp_path / "whole", tmp_path / "again"
    settings = {"max_steps": 4, "save_steps": 1}
    factory.run_exp(arguments(model, tmp_path, whole, **settings))
    for step in (1, 2, 3):
        shutil.copytree(whole / f"checkpoint-{step}", again / f"checkpoint-{step}")
    (again / "checkpoint-3" / "trainer_state.json").unlink()
    cut(again / "checkpoint-2" / "model.safetensors")
    chosen = {"resume_from_checkpoint": str(again / "checkpoint-2")}
    with pytest.raises(TrainingError, match=r"cannot resume from .*-2: a file is cut off"):
        factory.run_exp(arguments(model, tmp_path, again, **settings, **chosen))
    factory.run_exp(arguments(model, tmp_path, again, **settings))
    assert losses(again) == losses(whole)
    assert "checkpoint-3, which is incomplete: there is no trainer_state.json" in caplog.text
    assert "checkpoint-2, which is incomplete: a file is cut off" in caplog.text


def test_a_run_without_a_complete_checkpoint_starts_again(factory, model, tmp_path, caplog):
    save_rows(tmp_path, rows=[make_row("direct", n) for n in range(8)])
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    factory.run_exp(arguments(model, tmp_path, tmp_path / "out", max_steps=2))
    assert len(losses(tmp_path / "out")) == 2
    assert "training starts from the first step" in caplog.text


def test_what_a_checkpoint_lacks_is_found(factory, tmp_path):
    from safetensors.torch import save_file

    from vpt.training.trainer import find_lack

    (tmp_path / "trainer_state.json").write_text("{}")
    assert find_lack(tmp_path, with_optimizer=False) == ""
    assert find_lack(tmp_path) == "there is no state of the optimizer"
    (tmp_path / "global_step4").mkdir()  # of DeepSpeed
    assert find_lack(tmp_path) == ""
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({}, tmp_path / "model-1.safetensors")
    assert find_lack(tmp_path) == "there is no model-2.safetensors"
    (tmp_path / "trainer_state.json").write_text('{"global_')
    assert find_lack(tmp_path).startswith("a file is cut off or damaged")

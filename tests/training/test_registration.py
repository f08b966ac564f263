"""Registration is harmless when repeated, and says so where LLaMA-Factory is not as tested."""

import shutil

import pytest
from tiny_model import byte_tokenizer, tiny_model

import vpt
from vpt.errors import CheckpointError, TrainingError


def test_registering_twice_is_harmless(factory):
    from llamafactory.data.converter import DATASET_CONVERTERS
    from llamafactory.data.template import TEMPLATES
    from llamafactory.model.model_utils.visual import COMPOSITE_MODELS

    vpt.register()
    template = TEMPLATES["vpt_qwen2_vl"]
    vpt.register()
    assert TEMPLATES["vpt_qwen2_vl"] is template
    assert DATASET_CONVERTERS["vpt"].__name__ == "VPTDatasetConverter"
    assert {"qwen2_vl_vpt", "vrt_qwen2_vl"} <= set(COMPOSITE_MODELS)


@pytest.mark.parametrize("change", [None, lambda model_type, projector_keys: None])
def test_another_way_to_name_parts_is_refused(factory, monkeypatch, change):
    from llamafactory.model.model_utils import visual

    monkeypatch.setattr(visual, "_register_composite_model", change)
    with pytest.raises(TrainingError, match=r"was tested with llamafactory 0\.9\.5"):
        vpt.register()


def test_another_metric_is_not_replaced(factory, monkeypatch):
    from llamafactory.train.sft import workflow

    from vpt.training.trainer import install_accuracy

    for value in (None, dict):
        monkeypatch.setattr(workflow, "ComputeAccuracy", value)
        with pytest.raises(TrainingError, match=r"was tested with llamafactory 0\.9\.5"):
            install_accuracy(byte_tokenizer())
        assert workflow.ComputeAccuracy is value


def test_a_run_that_takes_no_metric_from_there_is_refused(factory, monkeypatch):
    from llamafactory.train.sft import workflow

    from vpt.training.trainer import install_accuracy

    monkeypatch.setattr(workflow, "run_sft", lambda: None)
    with pytest.raises(TrainingError, match="does not use ComputeAccuracy as expected"):
        install_accuracy(byte_tokenizer())


def test_the_metric_is_replaced_once_per_tokenizer(factory, monkeypatch):
    from llamafactory.train.sft import workflow

    from vpt.training.trainer import TokenClassAccuracy, install_accuracy

    monkeypatch.setattr(workflow, "ComputeAccuracy", workflow.ComputeAccuracy)
    for tokenizer in (byte_tokenizer(), tiny_model()[1].tokenizer):
        install_accuracy(tokenizer)
        assert isinstance(workflow.ComputeAccuracy(), TokenClassAccuracy)


def test_only_processors_of_our_folders_are_taken(factory):
    from vpt.training.dataset import pixels_of

    with pytest.raises(TrainingError, match="make the folder with `vpt init`"):
        pixels_of(tiny_model()[1])


def test_videos_and_tools_are_refused(factory):
    from llamafactory.data.template import TEMPLATES

    template = TEMPLATES["vpt_qwen2_vl"]
    with pytest.raises(ValueError, match="takes no video and no sound"):
        template.mm_plugin.process_messages([], [], ["a.mp4"], [], None)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(TrainingError, match="tools are not supported"):
        template.encode_multiturn(byte_tokenizer(), messages, None, "[]")
    with pytest.raises(TrainingError, match="expected user and assistant by turns, got tool"):
        template.encode_multiturn(byte_tokenizer(), [{"role": "tool", "content": "x"}] * 2)


def test_a_tokenizer_of_another_model_is_not_trained_with(factory, goldens, random_model, tmp_path):
    from llamafactory.data.template import TEMPLATES
    from transformers import AutoTokenizer

    template = TEMPLATES["vpt_qwen2_vl"]
    template.fix_special_tokens(AutoTokenizer.from_pretrained(random_model, padding_side="right"))
    folder = shutil.copytree(random_model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(goldens / "checkpoints" / "sam" / name, folder / name)
    with pytest.raises(CheckpointError, match="the tokenizer is not that of the model"):
        template.fix_special_tokens(AutoTokenizer.from_pretrained(folder, padding_side="right"))

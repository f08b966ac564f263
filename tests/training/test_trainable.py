"""Each stage trains exactly the parameters it is meant to train."""

import pytest
import torch
from factory import IGNORE_TYING, arguments, save_model, save_rows

PROJECTORS = {
    f"projectors.{name}.{part}.{value}"
    for name, parts in {
        "reencode": ["layernorm_condition", "linear_condition"],
        "dino": ["layernorm_feature", "linear_feature", "layernorm_condition", "linear_condition"],
        "sam": ["layernorm_feature", "conv_feature", "layernorm_condition", "linear_condition"],
    }.items()
    for part in parts
    for value in ("weight", "bias")
}
LAYERS = [f"model.language_model.layers.{n}" for n in (0, 1)]
LINEAR = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]
LANGUAGE = {
    "lm_head.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.norm.weight",
    *(f"{layer}.{part}.weight" for layer in LAYERS for part in LINEAR),
    *(f"{layer}.self_attn.{part}_proj.bias" for layer in LAYERS for part in "qkv"),
    *(
        f"{layer}.{part}_layernorm.weight"
        for layer in LAYERS
        for part in ("input", "post_attention")
    ),
}
ADDED = "projectors.reencode,projectors.dino,projectors.sam,embed_tokens,lm_head"
LORA = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "additional_target": ADDED}


def lora_names():
    before = "base_model.model."
    adapters = {
        f"{before}{layer}.{part}.lora_{side}.default.weight"
        for layer in LAYERS
        for part in LINEAR
        for side in "AB"
    }
    whole = {f"{before}{name.rpartition('.')[0]}.modules_to_save.default.weight" for name in EMBEDS}
    for name in PROJECTORS:
        *module, part, value = name.split(".")
        whole.add(f"{before}{'.'.join(module)}.modules_to_save.default.{part}.{value}")
    return adapters | whole


EMBEDS = ("lm_head.weight", "model.language_model.embed_tokens.weight")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    save_rows(folder)
    return save_model(folder / "model"), folder


def made(stock, places, **changes):
    folder, data = places
    return stock(arguments(folder, data, data / "out", **changes)).model()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_alignment_trains_the_projectors_alone(stock, places):
    model = made(stock, places, freeze_language_model=True)
    assert trainable(model) == PROJECTORS


def test_instruction_tuning_trains_all_but_vision(stock, places):
    model = made(stock, places)
    assert trainable(model) == PROJECTORS | LANGUAGE
    rest = {name for name, _ in model.named_parameters()} - trainable(model)
    assert {name.partition(".")[0] for name in rest} == {"model", "branches"}
    assert {n.split(".")[1] for n in rest if n.startswith("model.")} == {"visual"}


def test_everything_can_be_trained(stock, places):
    model = made(stock, places, freeze_vision_tower=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_default_of_llamafactory_would_freeze_the_projectors(stock, places):
    model = made(stock, places, freeze_multi_modal_projector=None)
    assert trainable(model) == LANGUAGE


@IGNORE_TYING
def test_lora_trains_adapters_projectors_and_embeddings(stock, places):
    model = made(stock, places, freeze_multi_modal_projector=None, **LORA)
    assert trainable(model) == lora_names()


def test_new_tokens_get_gradients_in_embedding_and_head(stock, places):
    folder, data = places
    parts = stock(arguments(folder, data, data / "out"))
    dataset, model = parts.dataset()["train_dataset"], parts.model()
    batch = parts.collator(model)([dataset[n] for n in range(5)])
    model(**batch).loss.backward()
    tokenizer = parts.tokenizer
    read = ["<|detection_action_start|>", "<|detection_action_end|>", "<|region_token_start|>"]
    rows = tokenizer.convert_tokens_to_ids(read)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert (weight.grad[rows].abs().amax(1) > 0).all()
    action = tokenizer.convert_tokens_to_ids("<|detection_action|>")
    assert torch.equal(model.get_input_embeddings().weight.grad[action], torch.zeros(64))

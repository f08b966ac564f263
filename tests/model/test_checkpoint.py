"""Released checkpoints and our own load whole; anything less is refused with words."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from fuzz.limits import within_limits
from golden_data import GOLDENS, VARIANTS
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import vpt
from vpt import cli
from vpt.branches.dino import RELEASED_CONFIG as RELEASED_DINO
from vpt.branches.sam import RELEASED_CONFIG as RELEASED_SAM
from vpt.errors import CheckpointError, PromptError
from vpt.images import load_image
from vpt.model.config import VPTConfig, VRTConfig, load_config
from vpt.model.hub import UNUSED_RELEASED_KEYS, check_account, key_mapping, stored_weights
from vpt.model.modeling import VPTForConditionalGeneration, load_model
from vpt.model.processing import VPTProcessor
from vpt.protocol.tokens import BRANCH_TOKENS

CHECKPOINTS = GOLDENS / "checkpoints"
BRANCH = {"clip": "reencode", "dino": "dino", "sam": "sam"}
IMAGE = GOLDENS / "images" / "a_scene.png"
SUBSETS = [s for n in range(4) for s in itertools.combinations(VARIANTS, n)]


def load(folder):
    return load_model(str(folder), device="cpu")


def copy_of(variant, tmp_path):
    return Path(shutil.copytree(CHECKPOINTS / variant, tmp_path / variant))


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def read_weights(folder):
    if (file := folder / "model.safetensors").exists():
        return load_file(file)
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def edit_weights(folder, edit):
    """Rewrite the weights of a safetensors checkpoint."""
    weights = read_weights(folder)
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def our_name(released_name):
    name = released_name
    for pattern, replacement in key_mapping(()).items():
        name = re.sub(pattern, replacement, name)
    return name


def newer_name(name):
    """As transformers names DINOv2's attention from 5.20 on."""
    names = {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj"}
    for stored, newer in {**names, "output.dense": "o_proj"}.items():
        name = re.sub(
            rf"^(branches\.dino\..*)\.attention\.{stored}\.", rf"\1.attention.{newer}.", name
        )
    return name


def assert_same_weights(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


# --- released checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_released_weight_arrives_under_our_name(variant):
    model = load(CHECKPOINTS / variant)
    ours = stored_weights(model.state_dict())
    arrived = set()
    for name, value in read_weights(CHECKPOINTS / variant).items():
        our = our_name(name)
        if not any(re.search(pattern, our) for pattern in UNUSED_RELEASED_KEYS):
            arrived.add(our)
            assert torch.equal(ours[our], value.float()), name
    assert ours.keys() - arrived <= {"lm_head.weight"}
    assert model.config.branches == (BRANCH[variant],)
    assert not model.training


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_head_is_the_embedding_exactly_where_the_config_says_so(variant):
    model = load(CHECKPOINTS / variant)
    tied = json.loads((CHECKPOINTS / variant / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (variant != "sam")
    same = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert same == tied


def test_weights_are_float32_on_a_cpu_unless_asked_otherwise():
    assert read_weights(CHECKPOINTS / "sam")["lm_head.weight"].dtype == torch.bfloat16
    assert {p.dtype for p in load(CHECKPOINTS / "sam").parameters()} == {torch.float32}
    model = load_model(str(CHECKPOINTS / "sam"), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_sharded_pickles_load_like_one(tmp_path):
    folder = copy_of("clip", tmp_path)
    weights = read_weights(folder)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(weights)
    shards = {f"pytorch_model-0000{n + 1}-of-00003.bin": names[n::3] for n in range(3)}
    for file, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, folder / file)
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": {key: file for file, keys in shards.items() for key in keys},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_weights(load(folder), load(CHECKPOINTS / "clip"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_oldest_model_type_loads_alike(tmp_path, variant):
    folder = copy_of(variant, tmp_path)
    edit_config(folder, model_type="vrt_qwen2_vl")
    model = load(folder)
    assert type(model.config) is VRTConfig
    assert_same_weights(model, load(CHECKPOINTS / variant))


def test_branches_may_stand_in_one_string(tmp_path):
    folder = copy_of("clip", tmp_path)
    edit_config(folder, vision_encoder_ls="clip")
    assert load_config(str(folder)).branches == ("reencode",)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = copy_of("clip", tmp_path)
    touched = tmp_path / "touched"
    weights = {**read_weights(folder), "harm": Harm(touched)}
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"cannot read the weights .*_model\.bin: .* could run code"
    ):
        load(folder)
    assert not touched.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert touched.exists()  # so it was the refusal that kept it away


@pytest.mark.parametrize("variant", ["dino", "sam"])
def test_side_files_describe_the_encoder(variant):
    settings = load_config(str(CHECKPOINTS / variant)).branch_configs[variant]
    names = BRANCH_TOKENS[variant].side_files
    assert settings["encoder"] == json.loads((CHECKPOINTS / variant / names[0]).read_text())
    assert settings["preprocess"] == json.loads((CHECKPOINTS / variant / names[1]).read_text())


@pytest.mark.parametrize(("variant", "expected"), [("dino", RELEASED_DINO), ("sam", RELEASED_SAM)])
def test_without_side_files_the_released_encoder_is_meant(tmp_path, variant, expected):
    folder = copy_of(variant, tmp_path)
    for name in BRANCH_TOKENS[variant].side_files:
        (folder / name).unlink()
    config = load_config(str(folder))
    assert "encoder" not in config.branch_configs.get(variant, {})
    with torch.device("meta"):  # ViT-L takes a gigabyte
        model = VPTForConditionalGeneration(config)
    encoder = model.branches[variant].encoder
    assert {k: getattr(encoder.config, k) for k in expected} == expected
    assert len(encoder.layers if variant == "sam" else encoder.encoder.layer) == 24


# --- what is refused ------------------------------------------------------------------------


def test_a_missing_weight_is_named(tmp_path):
    folder = copy_of("dino", tmp_path)
    edit_weights(folder, lambda w: w.pop("detection_projector.linear_condition.weight"))
    words = r"1 missing \(projectors\.dino\.linear_condition\.weight, \.\.\.\)"
    with pytest.raises(CheckpointError, match=f"do not fit its config.json: {words}"):
        load(folder)


def test_an_unknown_weight_is_named(tmp_path):
    folder = copy_of("dino", tmp_path)
    edit_weights(folder, lambda w: w.update({"seg_projector.odd": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"1 unknown \(projectors\.sam\.odd, \.\.\.\)"):
        load(folder)


def test_a_branch_that_the_config_leaves_out_is_not_dropped_in_silence(tmp_path):
    folder = copy_of("dino", tmp_path)
    edit_config(folder, vision_encoder_ls=[])
    with pytest.raises(CheckpointError, match=r"[0-9]+ unknown \(branches\.dino\."):
        load(folder)


def test_a_branch_without_weights_is_not_made_up(tmp_path):
    folder = copy_of("clip", tmp_path)
    settings = tiny_model(("dino",))[0].config.branch_configs["dino"]
    edit_config(
        folder,
        vision_encoder_ls=["clip", "dino"],
        detection_image_token_id=1,
        detection_action_id=2,
        detection_action_start_id=3,
        branch_configs={"dino": settings},
    )
    with pytest.raises(CheckpointError, match=r"[0-9]+ missing \(branches\.dino\.encoder"):
        load(folder)


def test_a_weight_of_another_shape_is_named(tmp_path):
    folder = copy_of("dino", tmp_path)
    name = "detection_projector.linear_condition.bias"
    edit_weights(folder, lambda w: w.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"projectors\.dino\.linear_condition\.bias"):
        load(folder)


def test_saved_names_are_the_released_ones_with_every_transformers(tmp_path):
    model = load(CHECKPOINTS / "dino")
    model.save_pretrained(tmp_path)
    saved, released = read_weights(tmp_path), read_weights(CHECKPOINTS / "dino")
    assert {our_name(name) for name in released} == set(saved)
    assert any(newer_name(name) != name for name in saved)
    assert_same_weights(load(tmp_path), model)


def test_names_of_newer_transformers_are_read(tmp_path):
    model = load(CHECKPOINTS / "dino")
    model.save_pretrained(tmp_path)
    newer = {newer_name(name): value for name, value in read_weights(tmp_path).items()}
    save_file(newer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load(tmp_path), model)


@pytest.mark.parametrize("name", ["branches.dino.encoder.layernorm.bias", "lm_head.weight"])
def test_weights_that_are_missing_are_refused_at_the_door_of_trainers(tmp_path, name):
    model, _ = tiny_model()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(name))
    vpt.register()
    with pytest.raises(CheckpointError, match=re.escape(f"1 missing ({name}, ...)")):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_the_account_of_a_loading_is_given_on_demand():
    _, account = VPTForConditionalGeneration.from_pretrained(
        CHECKPOINTS / "clip", output_loading_info=True
    )
    assert not account["missing_keys"]


def test_an_account_names_three_of_many():
    account = {
        "missing_keys": {"d", "b", "c", "a"},
        "unexpected_keys": [],
        "mismatched_keys": [("e", (1,), (2,))],
    }
    words = re.escape("4 missing (a, b, c, ...); 1 of another shape (('e', (1,), (2,)), ...)")
    with pytest.raises(CheckpointError, match=words):
        check_account("folder", account)


def test_a_full_account_is_accepted():
    check_account("folder", {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []})


@pytest.mark.parametrize("path", ["./nowhere", "~/nowhere"])
def test_a_missing_folder_is_an_error(path):
    with pytest.raises(CheckpointError, match=f"there is no model folder {re.escape(path)}"):
        load(path)


def test_a_missing_absolute_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no model folder .*nowhere; pass"):
        load(tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"config\.json is a file; expected the folder of a mod"
    ):
        load(copy_of("clip", tmp_path) / "config.json")


def test_an_id_the_hub_does_not_give_is_an_error_that_says_so():
    with pytest.raises(CheckpointError, match=r"nobody/nothing.* hub "):
        load("nobody/nothing")


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llama", None])
def test_a_model_of_another_type_is_an_error(tmp_path, model_type):
    folder = copy_of("clip", tmp_path)
    edit_config(folder, model_type=model_type)
    with pytest.raises(CheckpointError, match=f"type {model_type!r}; expected qwen2_vl_vpt or vrt"):
        load(folder)


def test_a_folder_without_config_is_an_error(tmp_path):
    folder = copy_of("clip", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json, so it is no model folder"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "dinov2_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [('{"model_type": ', r"cannot read .*\.json: "), ("[1]", "expected a JSON object in")],
)
def test_a_broken_json_file_is_an_error(tmp_path, name, content, words):
    folder = copy_of("dino", tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_a_folder_without_weights_is_an_error(tmp_path):
    folder = copy_of("clip", tmp_path)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"cannot make a model of .*no file named"):
        load(folder)


@pytest.mark.parametrize(
    ("variant", "name"), [("dino", "model.safetensors"), ("clip", "pytorch_model.bin")]
)
def test_a_cut_off_weights_file_is_an_error(tmp_path, variant, name):
    folder = copy_of(variant, tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"cannot read the weights .*{re.escape(name)}: "):
        load(folder)


def test_a_folder_without_image_processor_settings_is_an_error(tmp_path):
    folder = copy_of("clip", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json; copy it from"):
        VPTProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    "gone",
    [
        ("tokenizer.json", "vocab.json", "merges.txt"),
        ("tokenizer.json", "merges.txt"),
        ("tokenizer.json", "vocab.json"),
    ],
)
@pytest.mark.parametrize("keeps_settings", [True, False])
def test_a_folder_without_tokenizer_is_an_error(tmp_path, gone, keeps_settings):
    folder = copy_of("clip", tmp_path)
    for name in (*gone, *([] if keeps_settings else ["tokenizer_config.json"])):
        (folder / name).unlink()
    words = f"has no tokenizer: expected tokenizer.json, or .*but {', '.join(gone)} are missing"
    for load_it in (vpt.load, VPTProcessor.from_pretrained):
        with pytest.raises(CheckpointError, match=words):
            load_it(str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_encoder_ls": ["clip", "dnio"]}, "unknown branch 'dnio' in vision_encoder_ls; av"),
        ({"num_inner_forward_run": 3}, "num_inner_forward_run must be 1 or 2, not 3"),
        ({"para_mask_id": 5}, "para_mask_id must be 0, 1 or 2, not 5"),
        ({"para_mask_id": 1, "para_end_id": None}, "para_mask_id needs para_start_id and para_end"),
        ({"para_mask_ratio": 1.5}, r"para_mask_ratio must be a number from 0 to 1, not 1\.5"),
    ],
)
def test_an_impossible_setting_is_an_error(tmp_path, changes, words):
    folder = copy_of("clip", tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=words):
        load_config(str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 10**9}, "hidden_size must be a whole number from 1 to 65536, not 10000"),
        (
            {"num_hidden_layers": 0},
            "num_hidden_layers must be a whole number from 1 to 1024, not 0",
        ),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a whole .*, not '4'"),
        ({"num_attention_heads": 5}, "hidden_size 64 must be a multiple of num_attention_heads 5"),
        ({"vocab_size": -1}, "vocab_size must be a whole number from 1 to"),
        ({"grid_size": 10**9}, "grid_size must be a whole number from 1 to 256, not 1000000000"),
        ({"image_resolution": True}, "image_resolution must be a whole .*, not True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 to 1, not nan"),
        (
            {"vision_config": {"num_heads": 3}},
            "embed_dim 1280 must be a multiple of 4 times num_he",
        ),
        ({"rope_scaling": {"rope_type": "default"}}, "expected mrope_section in rope_parameters"),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
            r"mrope_section must be whole numbers that add up to 8, .*, not \[2, 2, 2\]",
        ),
        ({"alignment": "off"}, "alignment must be true or false, not 'off'"),
        ({"torch_dtype": "float7"}, r"config\.json: .*float7"),
        ({"quantization_config": {"quant_method": "new"}}, r"quantised \(quantization_config: new"),
        (
            {"transformers_weights": "../x.bin"},
            r"transformers_weights names '\.\./x\.bin'; expected",
        ),
        ({"depth_tokenizer": "../x"}, r"depth_tokenizer must be a name in the model folder"),
        (
            {"branch_configs": {"dino": {"encoder": {"image_size": 0}}}},
            "encoder.image_size must be",
        ),
        ({"hidden_act": "swoosh"}, "cannot make a model of .*swoosh"),
    ],
)
def test_a_setting_that_no_model_has_is_refused_before_memory_is_spent(tmp_path, changes, words):
    folder = copy_of("clip", tmp_path)
    edit_config(folder, **changes)
    with within_limits(words, max_cpu_s=2), pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dinov2_config.json", "hidden_size must be"),
        ("dinov2_preprocessor_config.json", "size: ex"),
    ],
)
def test_an_absurd_side_file_is_refused(tmp_path, name, words):
    folder = copy_of("dino", tmp_path)
    changes = {"hidden_size": 10**9} if name == "dinov2_config.json" else {"size": {"height": -1}}
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_sizes_beyond_the_weights_are_refused_before_memory_is_spent(tmp_path):
    folder = copy_of("clip", tmp_path)
    edit_config(folder, intermediate_size=2**20, num_hidden_layers=100)
    words = r"describe 20,13\d,\d+,\d+ weights, but the files hold [\d,]+ bytes; check the sizes"
    with within_limits("weights", max_cpu_s=3), pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize("variant", ["clip", "dino"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "{} is empty; get the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "{} is a git LFS pointer"),
        (b"\xff" * 100, "cannot read the weights {}"),
        (None, "cannot read {}: Is a directory"),
    ],
)
def test_a_weights_file_that_is_none_is_named(tmp_path, variant, content, words):
    folder = copy_of(variant, tmp_path)
    file = next(
        folder / n for n in ("pytorch_model.bin", "model.safetensors") if (folder / n).exists()
    )
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(CheckpointError, match=words.format(rf"\S*{file.name}")) as caught:
        load(folder)
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize("base", ["Qwen/Qwen2-VL-2B-Instruct", None])
@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_is_no_model(tmp_path, base, has_config):
    folder = copy_of("clip", tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    if not has_config:
        (folder / "config.json").unlink()
    words = f"holds an adapter .* merge it into {base or 'the model it was trained on'} with"
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ({"a": "../clip/pytorch_model.bin"}, r"index\.json names '\.\./clip/.*outside the model"),
        ({"a": "/far/x.bin"}, "names '/far/x.bin', which is outside the model folder"),
        ({"a": "x.bin"}, r"index\.json names 'x\.bin', which is not in the folder; get it"),
        ({"a": 3}, "expected in .*index.json a weight_map of weights to file names"),
        (None, "expected in .*index.json a weight_map"),
    ],
)
def test_shards_are_in_the_folder(tmp_path, shards, words):
    folder = copy_of("clip", tmp_path)
    (folder / "pytorch_model.bin").rename(folder / "shard.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_a_weight_under_two_names_is_refused(tmp_path):
    folder = copy_of("dino", tmp_path)
    edit_weights(folder, lambda w: w.update({"model.language_model.norm.weight": torch.ones(64)}))
    words = r"holds the weight model\.language_model\.norm\.weight twice; remove one"
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": ', "[]", '{"eos_token_id": 1, "a": "', "\ufeff{}"]
)
def test_a_broken_generation_config_is_not_passed_over(tmp_path, text):
    folder = copy_of("clip", tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "chat_template.json"])
def test_a_folder_in_place_of_a_file_is_not_passed_over(tmp_path, name):
    folder = copy_of("clip", tmp_path)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is a folder; expected a file"):
        vpt.load(str(folder))


def test_a_chat_template_that_is_no_text_is_refused(tmp_path):
    folder = copy_of("clip", tmp_path)
    (folder / "chat_template.json").write_text('{"chat_template": 1}')
    with pytest.raises(CheckpointError, match=r"chat_template\.json of \S+ holds no text"):
        VPTProcessor.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[" * 10**5, "\ufeff{}", "version https://git-lfs.github.com/1"])
def test_json_that_cannot_be_read_is_named(tmp_path, text):
    folder = copy_of("clip", tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json(: | is a git LFS pointer)"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float7", "int8", torch.int32])
def test_an_unknown_dtype_is_named(dtype):
    with pytest.raises(
        PromptError, match=r"unknown dtype '[\w.]+'; available: auto, float64, float"
    ):
        load_model(str(CHECKPOINTS / "clip"), device="cpu", dtype=dtype)


# --- the tokenizer of another model ---------------------------------------------------------


def edit_tokenizer(folder, edit):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    edit({token["content"]: token for token in content["added_tokens"]}, content)
    file.write_text(json.dumps(content))


def swap(one, other):
    def edit(tokens, content):
        tokens[one]["content"], tokens[other]["content"] = other, one

    return edit


def drop(*names):
    def edit(tokens, content):
        content["added_tokens"] = [t for n, t in tokens.items() if n not in names]

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (swap("<|im_start|>", "<|im_end|>"), r"config\.json has <\|im_start\|> as para_start_id"),
        (swap("<|detection_action|>", "<|x_1|>"), r"<\|detection_action\|> as detection_action_id"),
        (drop("<|image_pad|>"), r"<\|image_pad\|> as image_token_id 261, but the tokenizer"),
        (drop("<|y_7|>"), r"the tokenizer lacks <\|y_7\|>: the tokenizer is not that of the model"),
        (drop("<|detection_action_end|>"), r"the tokenizer lacks <\|detection_action_end\|>"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path, random_model, edit, words):
    folder = shutil.copytree(random_model, tmp_path / "model")
    edit_tokenizer(folder, edit)
    for open_it in (vpt.load, VPTProcessor.from_pretrained):
        with pytest.raises(CheckpointError, match=f"{words}.*; copy tokenizer.json and"):
            open_it(str(folder))
    assert cli.main(["set", str(folder), "--mask", "question"]) == 4


def test_a_processor_of_another_model_is_refused():
    runtime = vpt.load(str(CHECKPOINTS / "dino"), device="cpu")
    with pytest.raises(CheckpointError, match="the tokenizer is not that of the model"):
        vpt.Runtime(runtime.model, VPTProcessor.from_pretrained(CHECKPOINTS / "sam"))


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    model, processor = tiny_model(())
    processor.tokenizer.add_tokens([f"<more_{n}>" for n in range(64)])
    words = r"the tokenizer has ids up to \d+, but vocab_size is 320"
    with pytest.raises(CheckpointError, match=words):
        vpt.Runtime(model, processor)


def test_an_end_that_is_no_end_is_refused(tmp_path):
    folder = copy_of("dino", tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [472, 5]}')
    with pytest.raises(
        CheckpointError, match=r"has eos_token_id 5, but the tokenizer has <\|im_end"
    ):
        vpt.load(str(folder))


def test_pixels_of_other_patches_are_refused(tmp_path):
    folder = copy_of("dino", tmp_path)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "merge_size": 3}))
    with pytest.raises(
        CheckpointError, match=r"has spatial_merge_size 2 in config\.json, but its im"
    ):
        vpt.load(str(folder))


def test_a_branch_without_token_ids_is_an_error_when_asked_for():
    config = VPTConfig(vision_encoder_ls=["dino"])
    with pytest.raises(CheckpointError, match="the branch 'dino' but no detection_image_token_id"):
        config.pad_id("dino")
    with pytest.raises(CheckpointError, match="the branch 'dino' but no detection_action_id"):
        config.action_id("dino")


# --- our own checkpoints --------------------------------------------------------------------


def test_the_chat_template_of_the_processor_is_saved(tmp_path):
    _, processor = tiny_model(())
    processor.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    processor.save_pretrained(tmp_path)
    assert VPTProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with all branches, its processor, and the folder both were saved to."""
    model, processor = tiny_model(seed=3)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def same_settings(config):
    volatile = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
    settings = config if isinstance(config, dict) else config.to_dict()
    return {
        key: same_settings(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in volatile
    }


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded_again(tmp_path, names, tied):
    model, _ = tiny_model(names, seed=1, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_weights(again, model)
    assert same_settings(again.config) == same_settings(model.config)
    assert type(again.config) is VPTConfig
    files = {file.suffix for file in tmp_path.iterdir()}
    assert files == {".json", ".safetensors", ".py"}


def test_weights_are_saved_under_our_names(saved):
    model, _, folder = saved
    names = stored_weights(model.state_dict()).keys()
    assert load_file(folder / "model.safetensors").keys() == names


def test_a_released_checkpoint_saved_anew_is_the_same_model(tmp_path):
    model = load(CHECKPOINTS / "dino")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)  # the encoder's settings are in config.json now
    assert_same_weights(again, model)
    assert again.branches["dino"].preprocess_config == model.branches["dino"].preprocess_config


def test_the_processor_survives_saving(saved):
    _, processor, folder = saved
    again = VPTProcessor.from_pretrained(folder)
    assert type(again.image_processor) is type(processor.image_processor)
    image = load_image(IMAGE)
    pixels, grid = processor.preprocess_images([image])
    pixels_again, grid_again = again.preprocess_images([image])
    assert torch.equal(pixels, pixels_again)
    assert torch.equal(grid, grid_again)
    question = "Où est-ce?  <x_1> 漢字"
    assert again.prompt(question, [image]) == processor.prompt(question, [image])
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert again.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text
    ids = again.encode_text("<|seg_action|><|seg_image_pad|><|x_1|>").ids
    assert len(ids) == 3
    assert again.decode(ids) == "<|seg_action|><|x_1|>"


def test_the_released_processor_saved_anew_is_the_same(tmp_path):
    processor = VPTProcessor.from_pretrained(CHECKPOINTS / "clip")
    processor.save_pretrained(tmp_path)
    again = VPTProcessor.from_pretrained(tmp_path)
    image = load_image(IMAGE)
    assert torch.equal(*(p.preprocess_images([image])[0] for p in (processor, again)))
    assert again.prompt("Where?", [image]) == processor.prompt("Where?", [image])
    assert again.chat_template == processor.chat_template is not None


@pytest.mark.parametrize("variant", ["clip", "dino", "sam"])
def test_the_auto_classes_of_transformers_load_a_released_folder(variant):
    vpt.register()
    vpt.register()  # twice is harmless
    folder = CHECKPOINTS / variant
    assert type(AutoConfig.from_pretrained(folder)) is VPTConfig
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, VPTForConditionalGeneration)
    assert_same_weights(model, load(folder))
    assert type(AutoProcessor.from_pretrained(folder)) is VPTProcessor


def test_the_auto_classes_of_transformers_load_what_we_saved(saved):
    vpt.register()
    model, processor, folder = saved
    assert same_settings(AutoConfig.from_pretrained(folder)) == same_settings(model.config)
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(folder), model)
    again = AutoProcessor.from_pretrained(folder)
    assert type(again) is VPTProcessor
    assert again.prompt("Where?", []) == processor.prompt("Where?", [])


def test_the_auto_classes_know_the_oldest_model_type(tmp_path):
    vpt.register()
    folder = copy_of("clip", tmp_path)
    edit_config(folder, model_type="vrt_qwen2_vl")
    assert type(AutoConfig.from_pretrained(folder)) is VRTConfig
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(folder), load(folder))

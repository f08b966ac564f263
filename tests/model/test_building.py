"""A fresh VPT model keeps all of its base, and a tiny one is the same for the same arguments."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from bases import save_base
from fuzz.limits import within_limits
from golden_data import GOLDENS
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import TINY_DINO, TINY_SAM, byte_tokenizer, tiny_model
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    Dinov2Config,
    Dinov2Model,
    SamConfig,
    SamModel,
)
from transformers.models.sam.configuration_sam import SamVisionConfig

import vpt
from vpt.branches.sam import rename_segment_anything
from vpt.errors import CheckpointError
from vpt.model.building import branches_named, build_from_base
from vpt.model.config import VPTConfig
from vpt.protocol.tokens import BRANCH_TOKENS, Vocabulary, perception_tokens

NAMES = ("clip", "dino", "sam")
NUM_OLD = len(byte_tokenizer())
SUBSETS = [s for n in range(4) for s in itertools.combinations(NAMES, n)]


def randomise(module):
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.2)
    return module.eval()


def edit_config(folder, **changes):
    """Change settings; those within others one by one."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for name, value in changes.items():
        is_part = isinstance(value, dict) and name in content
        content[name] = {**content[name], **value} if is_part else value
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return save_base(folder), str(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Encoders with weights that show, and the folders they were saved to."""
    torch.manual_seed(5)
    dino = randomise(Dinov2Model(Dinov2Config(**TINY_DINO)))
    sam = randomise(
        SamModel(
            SamConfig(
                vision_config=TINY_SAM,
                prompt_encoder_config={"hidden_size": 64, "image_size": 256, "patch_size": 16},
                mask_decoder_config={"hidden_size": 64, "num_attention_heads": 2, "mlp_dim": 32},
            )
        )
    )
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("dino", "sam")}
    dino.save_pretrained(folders["dino"])
    sam.save_pretrained(folders["sam"])
    return {"dino": dino, "sam": sam.vision_encoder}, folders


@pytest.fixture(scope="module")
def built(base, encoders):
    return build_from_base(base[1], NAMES, encoders=encoders[1], seed=4)


def new_ids(tokenizer, branches):
    special, ordinary = perception_tokens(branches)
    return tokenizer.convert_tokens_to_ids([*special, *ordinary])


# --- from a base model ----------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("clip",)], ids=["none", "clip"])
def test_only_the_tokens_of_the_branches_are_added(base, names):
    model, processor = build_from_base(base[1], names)
    branches = branches_named(names)
    special, ordinary = perception_tokens(branches)
    added = processor.tokenizer.convert_ids_to_tokens(range(NUM_OLD, len(processor.tokenizer)))
    assert added == special + ordinary
    assert model.config.branches == branches
    assert set(model.projectors) == set(branches)


def test_the_config_names_the_new_tokens(built):
    model, processor = built
    ids = processor.tokenizer.get_vocab()
    assert model.config.branches == tuple(BRANCH_TOKENS)
    for branch, row in BRANCH_TOKENS.items():
        assert model.config.pad_id(branch) == ids[row.pad]
        assert model.config.action_id(branch) == ids[row.action]
        assert getattr(model.config, f"{row.released}_action_start_id") == ids[row.start]
    assert model.config.para_start_id == ids["<|im_start|>"]
    assert model.config.para_end_id == ids["<|im_end|>"]
    assert model.config.model_type == "qwen2_vl_vpt"
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, model.config.branches)
    assert vocabulary.branches == ("crop", *BRANCH_TOKENS)


def test_old_tokens_are_written_as_before(built):
    tokenizer, old = built[1].tokenizer, byte_tokenizer()
    text = "<|im_start|>user\n<|vision_start|><|image_pad|>Où? 漢\n\n  x_1<|im_end|>"
    assert tokenizer(text)["input_ids"] == old(text)["input_ids"]


def test_every_weight_of_the_base_is_kept(base, built):
    ours = built[0].state_dict()
    tables = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    for name, value in base[0].state_dict().items():
        if name in tables:
            assert torch.equal(ours[name][:NUM_OLD], value[:NUM_OLD]), name
        else:
            assert torch.equal(ours[name], value), name


def test_new_embeddings_lie_among_the_old_ones(built):
    model, processor = built
    ids = new_ids(processor.tokenizer, BRANCH_TOKENS)
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        old, new = table[:NUM_OLD].detach(), table[ids].detach()
        assert len(new.unique(dim=0)) == len(new)  # each token its own
        torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.2, rtol=0)
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_rows", [NUM_OLD, 320])
def test_the_tables_have_room_for_every_token(tmp_path, num_rows, tied):
    before = save_base(tmp_path, num_rows=num_rows, tied=tied)
    model, processor = build_from_base(str(tmp_path), ["clip"])
    rows = model.get_input_embeddings().num_embeddings
    assert rows >= max(len(processor.tokenizer), num_rows)
    assert rows == num_rows or rows % 64 == 0
    assert model.lm_head.out_features == rows == model.config.text_config.vocab_size
    same = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert same == tied
    for mine, theirs in ((model.lm_head, before.lm_head),):
        assert torch.equal(mine.weight[:NUM_OLD], theirs.weight[:NUM_OLD])


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [NUM_OLD, 320])
def test_text_is_read_as_the_base_reads_it(tmp_path, num_rows):
    before = save_base(tmp_path, num_rows=num_rows)
    model, processor = build_from_base(str(tmp_path), ["clip"])
    text = "<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n"
    input_ids = torch.tensor([processor.encode_text(text).ids])
    ours = model(input_ids=input_ids).logits[..., :NUM_OLD]
    theirs = before(input_ids=input_ids).logits[..., :NUM_OLD]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_image_is_read_as_the_base_reads_it(base, built):
    model, processor = built
    image = vpt.load_image(Image.linear_gradient("L").resize((84, 56)))
    pixel_values, grid = processor.preprocess_images([image])
    torch.testing.assert_close(
        model.tower(pixel_values, grid),
        base[0].model.visual(pixel_values, grid_thw=grid).pooler_output,
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("name", ["dino", "sam"])
def test_encoders_are_the_given_ones(built, encoders, name):
    mine, given = built[0].branches[name].encoder.state_dict(), encoders[0][name].state_dict()
    assert mine.keys() == given.keys()
    for key, value in given.items():
        assert torch.equal(mine[key], value), key


def test_projectors_start_from_the_released_initialisation(built):
    for projector in built[0].projectors.values():
        for module in projector.children():
            weight = module.weight.detach()
            if isinstance(module, torch.nn.Linear):
                bound = math.sqrt(6 / sum(weight.shape))  # Xavier, uniform
                assert 0.95 * bound < float(weight.abs().max()) <= bound
                assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
                assert not module.bias.any()
            elif isinstance(module, torch.nn.LayerNorm):
                assert (weight == 1).all()
                assert not module.bias.any()
            else:  # a convolution, as PyTorch starts it
                bound = 1 / math.sqrt(weight[0].numel())
                assert 0.95 * bound < float(weight.abs().max()) <= bound
                assert float(module.bias.detach().abs().max()) <= bound


def test_the_seed_decides_what_is_drawn(base):
    first, again, other = (
        build_from_base(base[1], ["clip"], seed=seed)[0].state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = "projectors.reencode.linear_condition.weight"
    assert not torch.equal(first[drawn], other[drawn])
    row = NUM_OLD
    table = "model.language_model.embed_tokens.weight"
    assert not torch.equal(first[table][row], other[table][row])


def test_dtype_is_that_of_the_base_unless_asked_otherwise(base):
    assert {p.dtype for p in build_from_base(base[1], ["clip"])[0].parameters()} == {torch.float32}
    model, _ = build_from_base(base[1], ["clip"], dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_another_grid_has_other_tokens(base):
    model, processor = build_from_base(base[1], [], grid_size=3)
    assert model.config.grid_size == 3
    tokens = processor.tokenizer.get_vocab()
    assert "<|x_2|>" in tokens
    assert "<|x_3|>" not in tokens
    assert Vocabulary.from_tokenizer(processor.tokenizer, (), 3).branches == ("crop",)


def test_the_saved_model_loads_and_answers(tmp_path, built):
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    runtime = vpt.load(str(tmp_path), device="cpu")
    mine, theirs = runtime.model.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    for name in ("dino", "sam"):
        loaded = runtime.model.branches[name].preprocess_config
        assert loaded == model.branches[name].preprocess_config
    image = Image.linear_gradient("L").resize((84, 56))
    for perception, branch in (("dino", "dino"), ("sam", "sam"), ("clip", "reencode")):
        answer = runtime.ask(image, "What is it?", perception=perception, max_new_tokens=8)
        assert [call.branch for call in answer.trace.calls][:1] == [branch]


def as_segment_anything(encoder):
    """Weights of transformers' SAM encoder under the names of the segment-anything package."""
    names = {
        "patch_embed.projection.": "patch_embed.proj.",
        "layers.": "blocks.",
        ".layer_norm": ".norm",
        "neck.conv1.": "neck.0.",
        "neck.layer_norm1.": "neck.1.",
        "neck.conv2.": "neck.2.",
        "neck.layer_norm2.": "neck.3.",
    }
    renamed = {}
    for key, value in encoder.state_dict().items():
        for old, new in names.items() if not key.startswith("neck") else list(names.items())[3:]:
            key = key.replace(old, new)
        renamed[f"image_encoder.{key}"] = value
    return renamed


def test_sam_may_come_from_a_segment_anything_file(tmp_path, base):
    torch.manual_seed(6)
    config = SamVisionConfig(**{**TINY_SAM, "image_size": 1024})
    encoder = randomise(
        SamModel(
            SamConfig(
                vision_config=config.to_dict(),
                prompt_encoder_config={"hidden_size": 64},
                mask_decoder_config={"hidden_size": 64, "num_attention_heads": 2, "mlp_dim": 32},
            )
        )
    ).vision_encoder
    weights = as_segment_anything(encoder)
    assert rename_segment_anything(weights).keys() == encoder.state_dict().keys()
    torch.save(weights, tmp_path / "sam.pth")
    model, _ = build_from_base(Path(base[1]), ["sam"], encoders={"sam": tmp_path / "sam.pth"})
    mine = model.branches["sam"].encoder.state_dict()
    for key, value in encoder.state_dict().items():
        assert torch.equal(mine[key], value), key
    encoder_config = model.config.branch_configs["sam"]["encoder"]
    for key in ("hidden_size", "num_attention_heads", "global_attn_indexes", "image_size"):
        assert encoder_config[key] == getattr(config, key)


# --- what is refused ------------------------------------------------------------------------


def test_an_unknown_branch_is_an_error(base):
    with pytest.raises(CheckpointError, match="unknown branch 'dnio'; available: clip, dino, sam"):
        build_from_base(base[1], ["clip", "dnio"])


def test_branches_come_in_table_order_whatever_was_asked():
    assert branches_named(["sam", "clip"]) == ("reencode", "sam")
    assert branches_named(iter(["dino", "dino"])) == ("dino",)
    assert branches_named(["seg", "reencode", "clip"]) == ("reencode", "sam")
    assert branches_named([]) == ()


def test_an_encoder_for_a_branch_that_takes_none_is_an_error(base):
    with pytest.raises(CheckpointError, match="'clip' takes no encoder; those that do: dino, sam"):
        build_from_base(base[1], ["clip"], encoders={"clip": "somewhere"})


def test_a_missing_base_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot load the base model .*nowhere"):
        build_from_base(str(tmp_path / "nowhere"), ["clip"])


def test_a_base_of_another_kind_is_an_error(encoders):
    words = r"the base model .* is of type 'dinov2', not 'qwen2_vl'"
    with pytest.raises(CheckpointError, match=words):
        build_from_base(encoders[1]["dino"], ["clip"])


@pytest.mark.parametrize("registered", [False, True])
def test_a_model_that_is_vpt_already_is_no_base(tmp_path, registered, monkeypatch):
    tiny_model(())[0].save_pretrained(tmp_path)
    if registered:
        AutoConfig.register("qwen2_vl_vpt", VPTConfig, exist_ok=True)
    else:
        monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    words = r"cannot load the base model|is of type 'qwen2_vl_vpt', not 'qwen2_vl'"
    with pytest.raises(CheckpointError, match=words):
        build_from_base(str(tmp_path), ["clip"])


@pytest.mark.parametrize("name", ["dino", "sam"])
@pytest.mark.parametrize("file", ["nowhere", "nowhere.pth"])
def test_a_missing_encoder_is_an_error(tmp_path, base, name, file):
    words = rf"(there is no model folder|cannot read) \S*{file}[;:]"
    with pytest.raises(CheckpointError, match=words):
        build_from_base(base[1], [name], encoders={name: str(tmp_path / file)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; get the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git LFS pointer"),
        (b"PK\x03\x04 cut off", "load the sam encoder"),
        (b"nothing", "load the sam encoder .* it is damaged"),
    ],
)
def test_a_pth_file_that_cannot_be_read_is_an_error(tmp_path, base, content, words):
    (tmp_path / "sam.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        build_from_base(base[1], ["sam"], encoders={"sam": str(tmp_path / "sam.pth")})


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("dino", {"hidden_size": 10**9}, "hidden_size must be a whole number from 1 to 65536"),
        ("dino", {"hidden_size": 2**15, "num_hidden_layers": 50}, "weights, but the files hold"),
        ("sam", {"vision_config": {"mlp_dim": 2**19}}, "weights, but the files hold"),
        ("dino", {"quantization_config": {"quant_method": "gptq"}}, r"quantised \(.*: gptq\)"),
    ],
)
def test_an_encoder_of_absurd_sizes_is_refused(tmp_path, base, encoders, name, changes, words):
    folder = shutil.copytree(encoders[1][name], tmp_path / name)
    edit_config(folder, **changes)
    with within_limits(words), pytest.raises(CheckpointError, match=words):
        build_from_base(base[1], [name], encoders={name: str(folder)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"vision_start_token_id": 5},
            r"has <\|vision_start\|> as vision_start_token_id 5, but the",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(.*: awq\)"),
        (
            {"text_config": {"num_hidden_layers": 10**9}},
            r"text_config\.num_hidden_layers must be a",
        ),
    ],
)
def test_a_base_with_impossible_settings_is_refused(tmp_path, base, changes, words):
    folder = shutil.copytree(base[1], tmp_path / "base")
    edit_config(folder, **changes)
    with within_limits(words), pytest.raises(CheckpointError, match=words):
        build_from_base(str(folder), ["clip"])


def test_a_base_with_vocabulary_and_merges_only_is_refused(tmp_path, base):
    folder = shutil.copytree(base[1], tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    released = GOLDENS / "checkpoints" / "clip"
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(released / name, folder / name)
    with pytest.raises(CheckpointError, match="the tokenizer is not that of the model"):
        build_from_base(str(folder), ["clip"])


def test_a_pth_file_of_something_else_is_an_error(tmp_path, base):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"load the sam encoder .*other\.pth: expected"):
        build_from_base(base[1], ["sam"], encoders={"sam": str(tmp_path / "other.pth")})


def drop_weights(folder, prefix):
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_base_that_lacks_weights_is_an_error(tmp_path, part):
    save_base(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    block = {"vision": "blocks.0.", "language": "layers.1."}[part]
    prefix = next(name[: name.index(block)] + block for name in names if block in name)
    drop_weights(tmp_path, prefix)
    with pytest.raises(
        CheckpointError, match=r"the weights in .* do not fit its config.json: \d+ missing"
    ):
        build_from_base(str(tmp_path), ["clip"])


@pytest.mark.parametrize(
    ("name", "prefix"), [("dino", "encoder.layer.1."), ("sam", "vision_encoder.layers.1.")]
)
def test_an_encoder_that_lacks_weights_is_an_error(tmp_path, base, encoders, name, prefix):
    folder = Path(shutil.copytree(encoders[1][name], tmp_path / name))
    drop_weights(folder, prefix)
    with pytest.raises(CheckpointError, match=f"cannot load the {name} encoder"):
        build_from_base(base[1], [name], encoders={name: str(folder)})


# --- the tiny model -------------------------------------------------------------------------


def weights(**arguments):
    return tiny_model(**arguments)[0].state_dict()


def test_a_tiny_model_is_the_same_for_the_same_seed():
    first, again = weights(seed=1), weights(seed=1)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_tiny_model_of_another_seed_is_another():
    first, other = weights(seed=1), weights(seed=2)
    matrices = [key for key, value in first.items() if value.ndim > 1 and value.any()]
    assert len(matrices) > 50
    assert not [key for key in matrices if torch.equal(first[key], other[key])]


def test_a_tiny_model_does_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    first = weights()
    torch.manual_seed(2)
    again = weights()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_tiny_model_leaves_the_global_generator_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    tiny_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_weights_are_the_same_whatever_the_branches():
    whole = weights(branches=NAMES)
    row = NUM_OLD  # ids of perception tokens differ, the tables' rows of old tokens do not
    for name, value in weights(branches=("clip",)).items():
        if value.shape == whole[name].shape:
            assert torch.equal(value, whole[name]), name
        else:
            assert name.endswith(("embed_tokens.weight", "lm_head.weight"))
            assert torch.equal(value[:row], whole[name][:row]), name


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_a_tiny_model_has_the_branches_asked_for(names):
    model, processor = tiny_model(names)
    assert model.config.branches == branches_named(names)
    assert set(model.branches) == set(names) - {"clip"}
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, model.config.branches)
    assert vocabulary.branches == ("crop", *branches_named(names))
    assert model.get_input_embeddings().num_embeddings >= len(processor.tokenizer)
    assert not model.training


def test_sizes_of_a_tiny_model_can_be_chosen():
    model, _ = tiny_model(("clip",), hidden_size=96, num_layers=3, tie_word_embeddings=True)
    assert model.get_input_embeddings().embedding_dim == 96
    assert len(model.model.language_model.layers) == 3
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model, _ = tiny_model((), rms_norm_eps=1e-3)
    assert model.config.text_config.rms_norm_eps == 1e-3


def test_max_pixels_bounds_the_first_look():
    image = vpt.load_image(Image.new("RGB", (600, 600)))
    for max_tokens in (16, 64):
        _, processor = tiny_model((), max_tokens=max_tokens)
        grid = processor.preprocess_images([image])[1]
        assert max_tokens / 2 < int(grid.prod()) / 4 <= max_tokens


def test_the_byte_tokenizer_writes_any_text():
    tokenizer = byte_tokenizer()
    for text in ("", "plain", "  two  blanks \n\n", "Où? 漢字 🙂", "<|x_1|>", "\x00\x7f"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"

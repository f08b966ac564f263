"""The depth tokenizer: maps, codes and text; released weights and our own files."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig, load_depth_tokenizer
from vpt.depth.vqvae import DepthVQVAE
from vpt.errors import CheckpointError, DataError

TINY = DepthTokenizerConfig(
    size_px=32, num_codes=8, code_dim=6, hidden_dim=2, num_downsamplings=3, num_residual_blocks=1
)
# Of https://github.com/SwinTransformer/AiT `vae/models/VQVAE.py`, in the shape that
# `vae/configs/depth/ait_depth_vqvae.py` gives it.
RELEASED = {
    **{f"encoder.{2 * i}": (16 * 2**i, (1, 16, 32, 64, 128)[i], 4, 4) for i in range(5)},
    **{f"encoder.{i}.net.{j}": (256, 256, 3, 3) for i in (10, 11) for j in (0, 2)},
    **{f"encoder.{i}.net.4": (256, 256, 1, 1) for i in (10, 11)},
    "encoder.12": (512, 256, 1, 1),
    "decoder.0": (256, 512, 1, 1),
    **{f"decoder.{i}.net.{j}": (256, 256, 3, 3) for i in (2, 3) for j in (0, 2)},
    **{f"decoder.{i}.net.4": (256, 256, 1, 1) for i in (2, 3)},
    "decoder.4": (256, 256, 4, 4),
    **{f"decoder.{4 + 2 * i}": (256 >> (i - 1), 256 >> i, 4, 4) for i in range(1, 5)},
    "decoder.14": (1, 16, 1, 1),
}
TRANSPOSED = {f"decoder.{4 + 2 * i}" for i in range(5)}  # biases count the second side

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def released_weights(prefix="", scale=0.05):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in RELEASED.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        weights[f"{name}.bias"] = torch.zeros(shape[name in TRANSPOSED])
    weights["_vq_vae._embedding"] = torch.randn(128, 512, generator=generator) * scale
    weights["_vq_vae._ema_cluster_size"] = torch.ones(128)
    weights["_vq_vae._ema_w"] = weights["_vq_vae._embedding"].clone()
    return {prefix + name: value for name, value in weights.items()}


def tiny_tokenizer(seed=0):
    return DepthTokenizer(TINY.build(seed), TINY)


def random_map(seed=0, shape=(32, 32)):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


# --- maps, codes, text ------------------------------------------------------------------------


def test_the_released_shape_gives_100_codes_of_128():
    config = DepthTokenizerConfig()
    assert (config.grid_size, config.num_cells, config.num_codes) == (10, 100, 128)
    tokenizer = DepthTokenizer(config.build(), config)
    codes = tokenizer.encode(random_map(shape=(240, 400)))
    assert len(codes) == 100 and all(0 <= code < 128 for code in codes)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (320, 320) and decoded.dtype == np.float32
    assert decoded.min() >= 0 and decoded.max() <= 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=16, max_size=16))
def test_any_codes_become_a_map(codes):
    assert tiny_tokenizer().decode(codes).shape == (32, 32)


def test_text_is_that_of_the_codes_and_reads_back():
    tokenizer, depth = tiny_tokenizer(), random_map()
    codes, text = tokenizer.encode(depth), tokenizer.to_text(depth)
    assert text == "<DEPTH_START>" + "".join(f"<DEPTH_{c}>" for c in codes) + "<DEPTH_END>"
    assert np.array_equal(tokenizer.from_text(text), tokenizer.decode(codes))


def test_codes_stand_in_reading_order():
    few, many = torch.zeros(2, 1, 4, 4, dtype=torch.long)
    many[0, 0, 3] = 5  # upper right
    network = tiny_tokenizer().network
    changed = (network.decode(many) - network.decode(few)).abs()[0, 0]
    assert changed[:16, 16:].sum() > 2 * changed[16:, :16].sum()
    depth = random_map()
    grid = network.encode(torch.from_numpy(depth)[None, None])[0]
    assert tiny_tokenizer().encode(depth) == tuple(grid.flatten().tolist())


def test_encoding_is_the_same_alone_and_in_a_batch():
    tokenizer = tiny_tokenizer()
    maps = [random_map(seed) for seed in range(4)]
    together = tokenizer.network.encode(torch.from_numpy(np.stack(maps))[:, None])
    assert [tuple(c.flatten().tolist()) for c in together] == [tokenizer.encode(m) for m in maps]


def test_gradients_pass_straight_through_the_codebook():
    network = TINY.build()
    done = network(torch.rand(2, 1, 32, 32))
    (done.decoded.square().mean() + done.commitment).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.encoder.parameters())
    assert done.codes.shape == (32,) and done.vectors.shape == (32, 6)


@pytest.mark.parametrize(
    ("codes", "message"),
    [([0] * 15, "expected 16 codes, got 15"), ([8] * 16, "expected codes of 0 to 7, got 8 to 8")],
)
def test_codes_that_are_no_map_are_refused(codes, message):
    with pytest.raises(DataError, match=message):
        tiny_tokenizer().decode(codes)


def test_values_that_are_no_map_are_refused():
    with pytest.raises(DataError, match="scale it first"):
        tiny_tokenizer().encode(random_map() * 9)


# --- released weights -------------------------------------------------------------------------


def test_our_names_are_those_of_the_released_module():
    ours = {name: list(value.shape) for name, value in DepthVQVAE().state_dict().items()}
    assert ours == {name: list(value.shape) for name, value in released_weights().items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_released_weights_load(tmp_path, prefix, wrapped):
    weights = released_weights(prefix)
    torch.save({"weights": weights} if wrapped else weights, tmp_path / "vae-final.pt")
    tokenizer = load_depth_tokenizer(tmp_path / "vae-final.pt")
    for name, value in tokenizer.network.state_dict().items():
        assert torch.equal(value, weights[prefix + name])
    assert len(tokenizer.encode(random_map(shape=(320, 320)))) == 100


def drop(name):
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("decoder.0.bias"), "of this shape; missing: decoder.0.bias$"),
        (lambda w: w.update(extra=torch.zeros(1)), "; unexpected: extra$"),
        (
            lambda w: w.update({"_vq_vae._embedding": torch.zeros(64, 512)}),
            r"of another shape: _vq_vae._embedding \[64, 512\] instead of \[128, 512\]",
        ),
        (lambda w: w.clear(), "missing: .* and [0-9]+ more"),
        (
            lambda w: w["decoder.0.bias"].fill_(torch.nan),
            r"not finite \(NaN or infinity\): decoder.0.bias$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, spoil, message):
    weights = released_weights()
    spoil(weights)
    torch.save({"weights": weights}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_depth_tokenizer(tmp_path / "a.pth")


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this ran')",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: torch.save({"weights": [1]}, file), "holds no state dict"),
        (lambda file: torch.save({"weights": {"a": 1}}, file), "holds no state dict"),
        (lambda file: torch.save(Harmful(), file), "cannot read the weights"),
        (lambda file: file.write_bytes(b"nothing"), "cannot read the weights"),
        (lambda file: file.write_bytes(b""), r"a\.pt is empty; get the file again"),
        (lambda file: file.write_bytes(LFS_POINTER), "a git LFS pointer, .*run `git lfs pull`"),
        (lambda file: file.mkdir(), "holds no depth tokenizer|cannot read .*config.json"),
    ],
)
def test_files_that_are_no_weights_are_refused(tmp_path, write, message):
    write(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_depth_tokenizer(tmp_path / "a.pt")


# --- our own files ----------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_and_does_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path)
    loaded = load_depth_tokenizer(tmp_path)
    assert loaded.config == TINY and loaded.to_text(random_map()) == tokenizer.to_text(random_map())
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda f: change_config(f, model_type="bert"), "does not describe a depth tokenizer"),
        (lambda f: change_config(f, colour=1), "unknown key 'colour'; known: size_px, "),
        (lambda f: change_config(f, num_codes=0), "expected num_codes of at least 1, got 0"),
        (lambda f: change_config(f, num_codes="8"), "expected num_codes of at least 1, got '8'"),
        (lambda f: change_config(f, num_codes=10**9), "num_codes of at most 65536, got 1e.09"),
        (lambda f: change_config(f, code_dim=8192), r"_embedding \[8, 6\] instead of \[8, 8192\]"),
        (lambda f: change_config(f, size_px=33), "size_px 33 is not a multiple of 8"),
        (lambda f: change_config(f, num_codes=9), r"_embedding \[8, 6\] instead of \[9, 6\]"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot read .*model.safetensors: No such"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 64), "cannot read the weights"),
    ],
)
def test_a_damaged_folder_is_told(tmp_path, spoil, message):
    tiny_tokenizer().save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_depth_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"there is no depth tokenizer {tmp_path}")):
        load_depth_tokenizer(tmp_path / "none")
    (tmp_path / "a.txt").touch()
    with pytest.raises(CheckpointError, match=r"nor a file that ends in \.pt, \.pth, \.bin"):
        load_depth_tokenizer(tmp_path / "a.txt")

"""A model folder with something wrong in it is refused with words, or answers: never anything else.

Each case is one seeded mutation of a tiny model's folder; to see one again, run its number alone.
"""

import json
import random
import shutil

import pytest
from fuzz.limits import within_limits
from golden_data import GOLDENS
from PIL import Image
from safetensors.torch import save_file
from tiny_model import tiny_model

import vpt
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig
from vpt.errors import RunError, VPTError
from vpt.protocol.tokens import ContentTokens

PICTURE = Image.radial_gradient("L").convert("RGB")
NOT_READ = ("added_tokens.json", "merges.json", "special_tokens_map.json", "vocab.json")
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1.5, 1e-30, -0.5, 10**9, 2**63, 10**400),
    *("", "x", "auto", "../x", "float7", [], [1], [0, 0, 0], ["x"], {}, {"x": 1}),
    *(float("nan"), float("inf")),
)
NUM_ALL = 300
NUM_QUICK = 15


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders of three models: whole, in shards with a depth tokenizer, and as released."""
    whole, shards = (tmp_path_factory.mktemp(name) for name in ("whole", "shards"))
    for folder, content in ((whole, ()), (shards, ("depth",))):
        model, processor = tiny_model(content=ContentTokens(content))
        processor.save_pretrained(folder)
        model.save_pretrained(folder, max_shard_size="1GB" if folder == whole else "400KB")
    sizes = DepthTokenizerConfig(code_dim=4, hidden_dim=1, num_residual_blocks=0)
    DepthTokenizer(sizes.build(), sizes).save(shards / "depth_tokenizer")
    save_file({}, shards / "unused.safetensors")
    assert (whole / "model.safetensors").exists()
    assert (shards / "model.safetensors.index.json").exists()
    return whole, shards, GOLDENS / "checkpoints" / "clip", GOLDENS / "checkpoints" / "dino"


def places(content):
    """Every key or index in nested JSON, with its container."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        found.append((content, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def change_setting(rng, folder):
    files = [file for file in sorted(folder.rglob("*.json")) if file.name not in NOT_READ]
    file = rng.choice([folder / "config.json", *files])
    content = json.loads(file.read_text())
    container, key = rng.choice(places(content))
    value = rng.choice(VALUES)
    kind = rng.random()
    if kind < 0.1:
        del container[key]
    elif kind < 0.2 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif kind < 0.5 and isinstance(container[key], int):
        value = container[key] + rng.choice((-1, 1, container[key], 10**6))
        container[key] = value
    else:
        container[key] = value
    file.write_text(json.dumps(content))
    return f"{file.name}: {key} = {value!r}"[:120]


def harm_file(rng, folder):
    file = rng.choice([file for file in sorted(folder.rglob("*")) if file.is_file()])
    data = file.read_bytes()
    harm = rng.choice(("empty", "cut", "gone", "folder", "pointer", "noise", "swap", "bom", "nest"))
    if harm == "empty":
        file.write_bytes(b"")
    elif harm == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif harm in ("gone", "folder"):
        file.unlink()
        if harm == "folder":
            file.mkdir()
    elif harm == "pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    elif harm == "noise":
        noisy = bytearray(data)
        for _ in range(rng.choice((1, 20))):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        file.write_bytes(bytes(noisy))
    elif harm == "swap":
        other = rng.choice([one for one in sorted(folder.iterdir()) if one.is_file()])
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif harm == "bom":
        file.write_bytes(b"\xef\xbb\xbf" + data)
    else:
        file.write_bytes(b"[" * 10**5)
    return f"{file.name}: {harm}"


def change_tokens(rng, folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    added, known = content["added_tokens"], content["model"]["vocab"]
    kind = rng.choice(("drop", "swap", "rename", "byte", "far"))
    if kind == "drop":
        for _ in range(rng.choice((1, 9, len(added)))):
            added.pop(rng.randrange(len(added)))
    elif kind == "swap":
        one, other = rng.sample(added, 2)
        one["content"], other["content"] = other["content"], one["content"]
    elif kind == "rename":
        rng.choice(added)["content"] = rng.choice(("<|x|>", "", "a", "<|im_end|>"))
    elif kind == "byte":
        known.pop(rng.choice(sorted(known)))
    else:
        rng.choice(added)["id"] = rng.choice((0, 10**6, 2**31))
    file.write_text(json.dumps(content))
    return f"tokens: {kind}"


def change_index(rng, folder):
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    names = content["weight_map"]
    values = ("../model.safetensors", "/etc/passwd", "none.safetensors", "", ".", 3, None)
    value = rng.choice((*values, "config.json", "unused.safetensors", *names.values()))
    names[rng.choice(sorted(names))] = value
    if rng.random() < 0.2:
        content["weight_map"] = rng.choice(VALUES)
    if rng.random() < 0.1:
        del content["metadata"]
    file.write_text(json.dumps(content))
    return f"index: {value!r}"


def harm_weights(rng, folder):
    file = rng.choice([*sorted(folder.rglob("model*.safetensors")), *folder.glob("*.bin")])
    data = bytearray(file.read_bytes())
    kind = rng.choice(("length", "header", "values"))
    if kind == "length":
        data[:8] = rng.choice((0, 1, 2**20, 2**40, 2**63)).to_bytes(8, "little")
    elif kind == "header":
        data[rng.randrange(8, 2000)] = rng.randrange(256)
    else:
        start = rng.randrange(len(data) // 2, len(data) - 64)
        data[start : start + 64] = rng.randbytes(64)
    file.write_bytes(bytes(data))
    return f"{file.name}: {kind}"


MUTATIONS = (change_setting, change_setting, harm_file, change_tokens, change_index, harm_weights)


def try_one(number, stored, tmp_path):
    """Returns whether the folder answered; what was done to it shows if this fails."""
    rng = random.Random(number)
    mutate = rng.choice(MUTATIONS)
    source = stored[1] if mutate is change_index else rng.choice(stored)
    folder = shutil.copytree(source, tmp_path / "model")
    what = f"case {number}, {mutate(rng, folder)}"
    with within_limits(what):
        try:
            options = {"max_new_tokens": 3, "max_calls": 1}
            vpt.load(str(folder), device="cpu").ask(PICTURE, "What is it?", **options)
        except VPTError as exc:
            assert not (isinstance(exc, RunError) and exc.__cause__), f"{what}: {exc!r}"
            assert str(exc).strip(), what
            assert "weights_only=False" not in str(exc), what
            return False
        except BaseException as exc:
            raise AssertionError(f"{what}: {type(exc).__name__}: {exc}") from exc
    return True


def test_a_sound_folder_answers(stored):
    for folder in stored:
        vpt.load(str(folder), device="cpu").ask(PICTURE, "What is it?", max_new_tokens=3)
    assert vpt.load(str(stored[1])).depth_tokenizer is not None


@pytest.mark.parametrize("number", range(NUM_QUICK))
def test_a_harmed_folder_answers_or_says_why_not(stored, tmp_path, number):
    try_one(number, stored, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_QUICK, NUM_ALL))
def test_a_harmed_folder_answers_or_says_why_not_in_many_cases(stored, tmp_path, number):
    try_one(number, stored, tmp_path)

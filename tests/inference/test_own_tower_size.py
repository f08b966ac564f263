"""The own tower can look again at another size than at the first look."""

import pytest
import torch
from PIL import Image
from tiny_model import tiny_model
from two_pass import TwoPassEngine

from vpt.images import load_image
from vpt.inference.features import Encoders
from vpt.model.encoding import RowEncoder
from vpt.model.processing import FeaturePiece, ImagePiece
from vpt.protocol.tokens import BRANCH_TOKENS, PLAIN, TOWER
from vpt.runtime import Runtime

SIZE = {"shortest_edge": 784, "longest_edge": 9 * 784}
NUM_TOKENS = {PLAIN: 4, TOWER: 9}


@pytest.fixture(scope="module")
def runtime():
    model, processor = tiny_model(("clip", "dino"), num_layers=3)
    model.config.branch_configs[TOWER] = {"preprocess": {"size": SIZE}}
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 4 * 784}
    return Runtime(model, processor)


@pytest.fixture(scope="module")
def image():
    values = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(1))
    return Image.fromarray(values.numpy().astype("uint8")).resize((120, 120))


def test_each_look_has_its_number_of_tokens(runtime, image):
    trace = runtime.ask(image, "What is it?", perception="clip", max_new_tokens=8).trace
    assert trace.images[0].num_tokens == NUM_TOKENS[PLAIN]
    assert trace.calls[0].num_tokens == NUM_TOKENS[TOWER]
    assert trace.calls[0].grid_hw == (3, 3)
    assert not trace.calls[0].reused


def test_features_of_the_two_looks_are_never_mixed_up(runtime, image):
    encoders = Encoders(runtime.model, runtime.processor)
    looks = [(PLAIN, load_image(image)), (TOWER, load_image(image))]
    for was_there in (False, True):
        found = encoders.encode(looks)
        assert [len(features.values) for features, _ in found] == list(NUM_TOKENS.values())
        assert [reused for _, reused in found] == [was_there, was_there]


def test_the_stream_equals_two_passes(runtime, image):
    loaded, encode = load_image(image), runtime.processor.encode_text
    pieces = [encode("Look: "), ImagePiece(loaded), encode(BRANCH_TOKENS[TOWER].call)]
    pieces += [FeaturePiece(TOWER, loaded), encode(" then")]
    engine, oracle = runtime.engine, TwoPassEngine(runtime.model, runtime.processor)
    got, expected = (one.extend(one.open(), pieces) for one in (engine, oracle))
    assert got.token_ids == expected.token_ids
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0)


def test_rows_have_the_same_placeholders(runtime, image, tmp_path):
    image.save(tmp_path / "a.png")
    path, tower = str(tmp_path / "a.png"), BRANCH_TOKENS[TOWER]
    turns = ["<image>\nWhat?", tower.call, tower.placeholder, "A square."]
    row = {
        "messages": [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, turns, strict=True)
        ],
        "images": [path],
        tower.column: [path],
    }
    config = runtime.model.config
    encoded = RowEncoder(config, runtime.processor).encode(row)
    assert encoded.input_ids.count(config.image_token_id) == NUM_TOKENS[PLAIN]
    assert encoded.input_ids.count(config.pad_id(TOWER)) == NUM_TOKENS[TOWER]
    assert encoded.pixels["clip_images_grid_thw"].tolist() == [[1, 6, 6]]

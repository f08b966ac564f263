import importlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from reference import TEXT_NUMBERS, build_package_encoder, spread
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)

from vpt.branches import Branch, BranchError, Features, GroundingBranch, crop
from vpt.branches.grounding import normalise, resize, to_pixels
from vpt.branches.groundingdino import Caption, detect, load_port, make_caption
from vpt.detector import Detector
from vpt.errors import PromptError
from vpt.images import load_image

# groundingdino-py 0.4.0 and its timm warn at import and at each position grid.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Importing from timm.models.layers:FutureWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning"),
]

# Tokens of bert-base-uncased at their own ids, which transformers' port has built in.
WORDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029, "a": 1037}
WORDS |= {"cat": 4937, "dog": 3899, "red": 2417}


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {f"[unused{i}]": i for i in range(5000)}
    for word, token in WORDS.items():
        del vocab[f"[unused{token}]"]
        vocab[word] = token
    return BertTokenizer(vocab=dict(sorted(vocab.items(), key=lambda entry: entry[1])))


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A detector in transformers' format, for small images."""
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config={"model_type": "bert", **TEXT_NUMBERS},
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=20,
    )
    encoder = GroundingDinoForObjectDetection(config)
    spread(encoder, encoder.model.decoder.layer_norm)
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    set_size(tmp_path, {"shortest_edge": 64, "longest_edge": 96})
    return tmp_path


def set_size(folder, size):
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))


@pytest.fixture
def branch(folder):
    return GroundingBranch.from_transformers(folder)


@pytest.fixture(scope="module")
def package(tokenizer):
    """groundingdino-py, the reference."""
    pytest.importorskip("groundingdino")
    return build_package_encoder(tokenizer)


@pytest.fixture
def released(tmp_path, package):
    """A file in the form of IDEA-Research's weights."""
    weights = {f"module.{key}": value for key, value in package.state_dict().items()}
    weights["module.bert.embeddings.position_ids"] = torch.arange(300)[None]
    weights["module.label_enc.weight"] = torch.zeros(2, 2)
    torch.save({"model": weights}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def scene(size=(90, 60), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_branch_has_the_promised_form(branch):
    assert isinstance(branch, Branch)
    assert (branch.name, branch.feature_dim) == ("grounding", 64)
    assert all(key.startswith("encoder.") for key in branch.state_dict())


def test_a_detector_proposes_what_its_branch_does(branch):
    image = load_image(scene())
    found = Detector(branch).propose(image, "a cat")
    assert found == branch.propose(image.pixels, "a cat")
    with pytest.raises(PromptError, match=r"look_for='\?': expected a phrase"):
        Detector(branch).propose(image, "?")


def test_a_detector_is_loaded_from_its_folder(folder):
    found = Detector(folder).propose(load_image(scene()), "a cat")
    assert isinstance(found, list)


def test_features_are_the_best_queries_with_their_boxes(branch):
    pixels = branch.preprocess([scene(), scene(seed=1)])
    features = branch.encode(**pixels, phrase="a cat", num_queries=5)
    assert len(features) == 2
    for one in features:
        assert isinstance(one, Features)
        assert one.grid_hw == (1, 5)
        assert one.values.shape == (5, 64)
        assert one.boxes_cxcywh.shape == (5, 4)
        assert (one.scores.diff() <= 0).all()
        assert (one.boxes_cxcywh >= 0).all() and (one.boxes_cxcywh <= 1).all()
    assert features[0].values.requires_grad


def test_padding_changes_nothing(branch):
    images = [scene(), scene((60, 90), seed=1)]  # so both are padded
    together = branch.encode(**branch.preprocess(images), phrase="a red dog", num_queries=20)
    for image, batched in zip(images, together, strict=True):
        (alone,) = branch.encode(**branch.preprocess([image]), phrase="a red dog", num_queries=20)
        assert torch.allclose(alone.scores, batched.scores, atol=1e-4)
        assert torch.allclose(alone.values, batched.values, atol=1e-4)
        assert torch.allclose(alone.boxes_cxcywh, batched.boxes_cxcywh, atol=1e-4)


def test_boxes_lie_inside_the_image_and_come_best_first(branch):
    image = scene((90, 61))
    proposals = branch.propose(image, "a cat . a dog", box_threshold=0.0, max_proposals=10)
    assert len(proposals) == 10
    scores = [proposal.score for proposal in proposals]
    assert scores == sorted(scores, reverse=True)
    for proposal in proposals:
        assert min(crop(image, proposal.box_xyxy_px).size) >= 1
        assert set(proposal.phrase.split()) <= {"a", "cat", "dog"}


def test_thresholds_bound_what_is_proposed(branch):
    image = scene()
    assert branch.propose(image, "a cat", box_threshold=1.0) == []
    everything = branch.propose(
        image, "a cat", box_threshold=0.0, text_threshold=1.0, max_proposals=99
    )
    assert len(everything) == 20  # all queries
    assert {proposal.phrase for proposal in everything} == {""}
    bound = everything[3].score
    above = branch.propose(image, "a cat", box_threshold=bound, text_threshold=0.0)
    assert [one.score for one in above] == [one.score for one in everything if one.score > bound]


def test_the_phrase_changes_what_is_seen(branch):
    pixels = branch.preprocess([scene()])
    cat, dog = (branch.encode(**pixels, phrase=phrase)[0] for phrase in ("cat", "red dog"))
    assert not torch.allclose(cat.values, dog.values, atol=1e-4)


def test_the_phrase_is_read_without_case_and_full_stop(branch):
    pixels = branch.preprocess([scene()])
    plain, other = (branch.encode(**pixels, phrase=phrase)[0] for phrase in ("a cat", " A Cat."))
    assert torch.equal(plain.values, other.values)


@pytest.mark.parametrize("phrase", ["", "  ", " . ", "?"])
def test_an_empty_phrase_is_rejected(branch, phrase):
    with pytest.raises(BranchError, match="expected a phrase to look for; got"):
        branch.propose(scene(), phrase)


def test_a_phrase_that_is_too_long_is_rejected(branch):
    with pytest.raises(BranchError, match="a phrase may have 256 tokens; got 303: cat cat"):
        branch.propose(scene(), "cat " * 300)


def test_more_queries_than_the_decoder_has_are_rejected(branch):
    pixels = branch.preprocess([scene()])
    with pytest.raises(BranchError, match="num_queries must be 1 to 20, the decoder's; got 21"):
        branch.encode(**pixels, phrase="a cat", num_queries=21)


@pytest.mark.parametrize("text", ["a cat.", "a red cat. a dog.", "cat dog red a cat?.", "[UNK]."])
def test_released_weights_give_what_the_package_gives(released, package, tokenizer, text):
    """Masks, positions and each layer: in float32, whatever transformers is installed."""
    torch.manual_seed(1)
    pixel_values = torch.randn(1, 3, 64, 96)
    hidden_states = []
    handle = package.transformer.register_forward_hook(
        lambda _module, _args, outputs: hidden_states.append(outputs[0][-1])
    )
    with torch.no_grad():
        expected = package(pixel_values, captions=[text])
        caption = Caption(text, dict(tokenizer([text], return_tensors="pt")))
        encoder = GroundingBranch.from_checkpoint(released, tokenizer).encoder
        found = detect(encoder, pixel_values, caption)
    handle.remove()
    assert torch.allclose(found.hidden_states, hidden_states[0][0], atol=1e-5)
    assert torch.allclose(found.token_scores, expected["pred_logits"][0].sigmoid(), atol=1e-5)
    assert torch.allclose(found.boxes_cxcywh, expected["pred_boxes"][0], atol=1e-3)
    assert found.boxes_cxcywh.std(0).min() > 0.01


def test_phrases_do_not_change_each_other_before_the_image(branch, tokenizer):
    """Each phrase, alone in the text encoder, gives what it gives inside the caption."""
    caption = make_caption(tokenizer, "a cat . red dog a", 256)
    text_backbone, outputs = branch.encoder.model.text_backbone, []
    handle = text_backbone.register_forward_hook(
        lambda _module, _args, output: outputs.append(output.last_hidden_state[0])
    )
    with torch.no_grad():
        detect(branch.encoder, torch.randn(1, 3, 64, 64), caption)
        handle.remove()
        input_ids = caption.tokens["input_ids"]
        for start, stop in [(0, 1), (1, 4), (4, 8), (8, 9)]:  # [CLS]; a cat.; red dog a.; [SEP]
            words = input_ids[:, start:stop]
            positions = torch.arange(stop - start)[None]
            attends = torch.ones(1, 1, stop - start, stop - start, dtype=torch.bool)
            alone = text_backbone(words, attends, torch.zeros_like(words), positions)
            assert torch.allclose(outputs[0][start:stop], alone.last_hidden_state[0], atol=1e-5)


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (300, 20), (64, 64), (33, 47), (640, 481)])
@pytest.mark.parametrize("edges", [(64, 96), (800, 1333)])
def test_pixels_equal_those_of_the_package(size, edges):
    pytest.importorskip("groundingdino")
    transforms = importlib.import_module("groundingdino.datasets.transforms")
    package_resize = transforms.RandomResize([edges[0]], max_size=edges[1])
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    chain = transforms.Compose([package_resize, transforms.ToTensor(), normalize])
    expected, _ = chain(scene(size), None)
    found = torch.from_numpy(normalise(resize(scene(size), edges)))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 3000)])
def test_any_shape_of_image_can_be_searched(branch, size):
    proposals = branch.propose(scene(size), "a cat", box_threshold=0.0)
    assert len(proposals) == 16
    for one in proposals:
        assert min(crop(scene(size), one.box_xyxy_px).size) >= 1


def test_images_of_a_batch_are_padded_and_masked(branch):
    pixels = branch.preprocess([scene((90, 60)), scene((60, 90))])
    assert pixels["pixel_values"].shape == (2, 3, 96, 96)
    assert pixels["pixel_mask"].sum(dim=(1, 2)).tolist() == [64 * 96, 64 * 96]
    assert not pixels["pixel_values"][0, :, 64:].any()


def test_a_folder_says_at_which_size_it_looks(folder):
    assert GroundingBranch.from_transformers(folder).edges_px == (64, 96)
    set_size(folder, {"shortest_edge": 0, "longest_edge": 9})
    with pytest.raises(BranchError, match="size: expected sides of 1 to 8192 pixels"):
        GroundingBranch.from_transformers(folder)
    set_size(folder, {"height": 8, "width": 8})
    with pytest.raises(
        BranchError, match=r"size: expected shortest_edge .* got \['height', 'width"
    ):
        GroundingBranch.from_transformers(folder)
    (folder / "preprocessor_config.json").unlink()
    assert GroundingBranch.from_transformers(folder).edges_px == (800, 1333)


def test_a_checkpoint_must_be_a_grounding_dino(released, tokenizer):
    weights = torch.load(released)["model"]
    torch.save({**weights, "module.extra": torch.zeros(1)}, released)
    with pytest.raises(BranchError, match=r"released form: .*'unexpected': \['extra'\]"):
        GroundingBranch.from_checkpoint(released, tokenizer)
    del weights["module.feat_map.bias"]
    torch.save(weights, released)
    with pytest.raises(BranchError, match=r"'missing': \['model.text_projection.bias'\]"):
        GroundingBranch.from_checkpoint(released, tokenizer)
    torch.save({"weight": torch.zeros(1)}, released)
    with pytest.raises(BranchError, match=r"tiny.pth holds no GroundingDINO"):
        GroundingBranch.from_checkpoint(released, tokenizer)


def test_half_precision_is_refused_with_words(branch):
    pixels = branch.preprocess([scene()])
    with pytest.raises(BranchError, match=r"runs in float32 only; .* torch.bfloat16"):
        branch.to(torch.bfloat16).encode(**pixels, phrase="a cat")


def test_a_tokenizer_without_delimiters_is_refused(folder):
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "cat": 4}
    with pytest.raises(BranchError, match=r"tokens \[CLS\] \[SEP\] . \? at 101, .*; got ids"):
        GroundingBranch.from_transformers(folder, tokenizer=BertTokenizer(vocab=vocab))


def test_eager_attention_is_refused(folder):
    with pytest.raises(BranchError, match="sdpa attention; got eager"):
        load_port(folder, attn_implementation="eager")


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.5, 0.5, 1.0, 1.0), (0, 0, 100, 50)),
        ((0.5, 0.5, 2.0, 2.0), (0, 0, 100, 50)),
        ((0.255, 0.5, 0.01, 0.02), (25, 24, 26, 26)),
        ((1.0, 1.0, 0.0, 0.0), (99, 49, 100, 50)),
        ((-1.0, 2.0, 0.1, 0.1), (0, 49, 1, 50)),
    ],
)
def test_boxes_are_rounded_outwards_and_clamped(box, expected):
    assert to_pixels(box, (100, 50)) == expected
    assert math.prod(np.subtract(expected[2:], expected[:2])) >= 1


@pytest.mark.parametrize("phrase", ["a cat . a dog", "no. 5", "a cat? a dog"])
def test_a_detector_takes_one_phrase(branch, phrase):
    with pytest.raises(PromptError, match=r"look_for='.*': expected one phrase; got several"):
        Detector(branch).propose(load_image(scene()), phrase)


@pytest.mark.parametrize("phrase", ["a cat.", " A\nCat ?", "a  cat . "])
def test_what_surrounds_a_phrase_changes_nothing(branch, phrase):
    found = Detector(branch).propose(load_image(scene()), phrase)
    assert found == Detector(branch).propose(load_image(scene()), "a cat")


def test_a_phrase_of_too_many_tokens_names_the_limit(branch):
    with pytest.raises(PromptError, match="a phrase may have 256 tokens; got 303: cat cat"):
        Detector(branch).propose(load_image(scene()), "cat " * 300)

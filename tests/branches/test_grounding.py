import importlib
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)

from vpt.branches import Branch, BranchError, Features, GroundingBranch, crop, grounding
from vpt.branches.grounding import normalise, resize, to_pixels
from vpt.branches.groundingdino import load_port, transformers_port_is_right
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

CONFIG = {
    "modelname": "groundingdino",
    "backbone": "swin_T_224_1k",
    "position_embedding": "sine",
    "pe_temperatureH": 20,
    "pe_temperatureW": 20,
    "return_interm_indices": [1, 2, 3],
    "backbone_freeze_keywords": None,
    "enc_layers": 1,
    "dec_layers": 2,
    "pre_norm": False,
    "dim_feedforward": 32,
    "hidden_dim": 256,  # the package fixes the width of its text positions
    "dropout": 0.0,
    "nheads": 4,
    "num_queries": 20,
    "query_dim": 4,
    "num_patterns": 0,
    "num_feature_levels": 4,
    "enc_n_points": 4,
    "dec_n_points": 4,
    "two_stage_type": "standard",
    "two_stage_bbox_embed_share": False,
    "two_stage_class_embed_share": False,
    "transformer_activation": "relu",
    "dec_pred_bbox_embed_share": True,
    "dn_box_noise_scale": 1.0,
    "dn_label_noise_ratio": 0.5,
    "embed_init_tgt": True,
    "dn_labelbook_size": 20,
    "max_text_len": 256,
    "text_encoder_type": "bert-base-uncased",
    "use_text_enhancer": True,
    "use_fusion_layer": True,
    "use_checkpoint": True,
    "use_transformer_ckpt": True,
    "use_text_cross_attention": True,
    "text_dropout": 0.0,
    "fusion_dropout": 0.0,
    "fusion_droppath": 0.1,
    "sub_sentence_present": True,
}
TEXT_NUMBERS = {
    "vocab_size": 5000,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 300,
    "initializer_range": 0.5,
}
TEXT_CONFIG = BertConfig(**TEXT_NUMBERS)
MODEL_FILE = "groundingdino.models.GroundingDINO.groundingdino"


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {f"[unused{i}]": i for i in range(5000)}
    for word, token in WORDS.items():
        del vocab[f"[unused{token}]"]
        vocab[word] = token
    return BertTokenizer(vocab=dict(sorted(vocab.items(), key=lambda entry: entry[1])))


@pytest.fixture
def small_images(monkeypatch):
    monkeypatch.setattr(grounding, "SHORTEST_EDGE_PX", 64)
    monkeypatch.setattr(grounding, "LONGEST_EDGE_PX", 96)


def tiny_swin():
    module = "groundingdino.models.GroundingDINO.backbone.swin_transformer"
    swin = importlib.import_module(module).SwinTransformer

    def build(name, pretrain_img_size, **kwargs):
        return swin(
            pretrain_img_size=pretrain_img_size,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            **kwargs,
        )

    return build


@pytest.fixture
def tiny_package(monkeypatch):
    """groundingdino-py with a small Swin, whose size its config cannot say."""
    pytest.importorskip("groundingdino")
    backbone = importlib.import_module("groundingdino.models.GroundingDINO.backbone.backbone")
    monkeypatch.setattr(backbone, "build_swin_transformer", tiny_swin())
    return importlib.import_module(MODEL_FILE)


def spread(encoder, last_norm):
    """Let boxes differ, whose head starts at zero, and scores, which a random model saturates."""
    with torch.no_grad():
        last_norm.weight *= 0.05
        for weight in encoder.bbox_embed.parameters():
            torch.nn.init.normal_(weight, std=0.3)


@pytest.fixture
def branch(tiny_package, tokenizer, small_images):
    torch.manual_seed(0)
    branch = GroundingBranch.from_config(CONFIG, tokenizer, text_config=TEXT_CONFIG)
    spread(branch.encoder, branch.encoder.transformer.decoder.norm)
    return branch


@pytest.fixture
def port_branch(tmp_path, tokenizer, small_images):
    """transformers' port, saved and loaded."""
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
        d_model=256,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=20,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not transformers_port_is_right():
        pytest.skip("this version of transformers is refused")
    branch = GroundingBranch.from_transformers(tmp_path)
    spread(branch.encoder, branch.encoder.model.decoder.layer_norm)
    return branch


@pytest.fixture(params=["branch", "port_branch"])
def either(request):
    return request.getfixturevalue(request.param)


def scene(size=(90, 60), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_branch_has_the_promised_form(either):
    assert isinstance(either, Branch)
    assert (either.name, either.feature_dim) == ("grounding", 256)
    assert all(key.startswith("encoder.") for key in either.state_dict())


def test_a_detector_proposes_what_its_branch_does(either):
    image = load_image(scene())
    found = Detector(either).propose(image, "a cat")
    assert found == either.propose(image.pixels, "a cat")
    with pytest.raises(PromptError, match=r"look_for='\?': expected a phrase"):
        Detector(either).propose(image, "?")


def test_a_detector_is_loaded_from_its_folder(port_branch, tmp_path):
    found = Detector(tmp_path).propose(load_image(scene()), "a cat")
    assert isinstance(found, list)


def test_features_are_the_best_queries_with_their_boxes(either):
    pixels = either.preprocess([scene(), scene(seed=1)])
    features = either.encode(**pixels, phrase="a cat", num_queries=5)
    assert len(features) == 2
    for one in features:
        assert isinstance(one, Features)
        assert one.grid_hw == (1, 5)
        assert one.values.shape == (5, 256)
        assert one.boxes_cxcywh.shape == (5, 4)
        assert (one.scores.diff() <= 0).all()
        assert (one.boxes_cxcywh >= 0).all() and (one.boxes_cxcywh <= 1).all()
    assert features[0].values.requires_grad


def test_padding_changes_nothing(either):
    images = [scene(), scene((60, 90), seed=1)]  # so both are padded
    together = either.encode(**either.preprocess(images), phrase="a red dog", num_queries=20)
    for image, batched in zip(images, together, strict=True):
        (alone,) = either.encode(**either.preprocess([image]), phrase="a red dog", num_queries=20)
        assert torch.allclose(alone.scores, batched.scores, atol=1e-4)
        assert torch.allclose(alone.values, batched.values, atol=1e-4)
        assert torch.allclose(alone.boxes_cxcywh, batched.boxes_cxcywh, atol=1e-4)


def test_boxes_lie_inside_the_image_and_come_best_first(either):
    image = scene((90, 61))
    proposals = either.propose(image, "a cat . a dog", box_threshold=0.0, max_proposals=10)
    assert len(proposals) == 10
    scores = [proposal.score for proposal in proposals]
    assert scores == sorted(scores, reverse=True)
    for proposal in proposals:
        assert min(crop(image, proposal.box_xyxy_px).size) >= 1
        assert set(proposal.phrase.split()) <= {"a", "cat", "dog"}


def test_thresholds_bound_what_is_proposed(either):
    image = scene()
    assert either.propose(image, "a cat", box_threshold=1.0) == []
    everything = either.propose(
        image, "a cat", box_threshold=0.0, text_threshold=1.0, max_proposals=99
    )
    assert len(everything) == 20  # all queries
    assert {proposal.phrase for proposal in everything} == {""}
    bound = everything[3].score
    above = either.propose(image, "a cat", box_threshold=bound, text_threshold=0.0)
    assert [one.score for one in above] == [one.score for one in everything if one.score > bound]


def test_the_phrase_changes_what_is_seen(either):
    pixels = either.preprocess([scene()])
    cat, dog = (either.encode(**pixels, phrase=phrase)[0] for phrase in ("cat", "red dog"))
    assert not torch.allclose(cat.values, dog.values, atol=1e-4)


def test_the_phrase_is_read_without_case_and_full_stop(either):
    pixels = either.preprocess([scene()])
    plain, other = (either.encode(**pixels, phrase=phrase)[0] for phrase in ("a cat", " A Cat."))
    assert torch.equal(plain.values, other.values)


@pytest.mark.parametrize("phrase", ["", "  ", " . ", "?"])
def test_an_empty_phrase_is_rejected(either, phrase):
    with pytest.raises(BranchError, match="expected a phrase to look for; got"):
        either.propose(scene(), phrase)


def test_a_phrase_that_is_too_long_is_rejected(either):
    with pytest.raises(BranchError, match="a phrase may have 256 tokens; got 303: cat cat"):
        either.propose(scene(), "cat " * 300)


def test_more_queries_than_the_decoder_has_are_rejected(either):
    pixels = either.preprocess([scene()])
    with pytest.raises(BranchError, match="num_queries must be 1 to 20, the decoder's; got 21"):
        either.encode(**pixels, phrase="a cat", num_queries=21)


def test_text_is_encoded_phrase_by_phrase(branch, tokenizer):
    """Each phrase, alone in a plain BertModel, gives what it gives inside the caption."""
    tokens = tokenizer(["a cat. red dog a."], return_tensors="pt")
    module = sys.modules[MODEL_FILE]
    mask, position_ids, _ = module.generate_masks_with_special_tokens_and_transfer_map(
        tokens, branch.encoder.specical_tokens, tokenizer
    )
    adapter = branch.encoder.bert
    hidden_states = adapter(
        input_ids=tokens["input_ids"],
        token_type_ids=tokens["token_type_ids"],
        attention_mask=mask,
        position_ids=position_ids,
    )["last_hidden_state"]
    reference = BertModel(TEXT_CONFIG).eval()
    reference.load_state_dict(adapter.state_dict())
    for start, stop in [(0, 1), (1, 4), (4, 8), (8, 9)]:  # [CLS]; a cat.; red dog a.; [SEP]
        alone = reference(input_ids=tokens["input_ids"][:, start:stop]).last_hidden_state
        assert torch.allclose(hidden_states[:, start:stop], alone, atol=1e-5)


def test_proposals_equal_those_of_the_package(branch):
    """`predict` of groundingdino/util/inference.py in short; that file needs `supervision`."""
    image = scene((90, 61))
    transforms = importlib.import_module("groundingdino.datasets.transforms")
    package_resize = transforms.RandomResize([64], max_size=96)
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    pixel_values, _ = transforms.Compose([package_resize, transforms.ToTensor(), normalize])(
        image, None
    )
    with torch.no_grad():
        outputs = branch.encoder(pixel_values[None], captions=["a cat."])
    scores = outputs["pred_logits"][0].sigmoid().amax(dim=-1)
    order = scores.argsort(descending=True, stable=True)
    proposals = branch.propose(image, "a cat", box_threshold=0.0, max_proposals=20)
    assert [one.score for one in proposals] == pytest.approx(scores[order].tolist(), abs=1e-5)
    for proposal, (cx, cy, w, h) in zip(
        proposals, outputs["pred_boxes"][0][order].tolist(), strict=True
    ):
        left, _, _, bottom = proposal.box_xyxy_px
        assert left == pytest.approx(min(max((cx - w / 2) * 90, 0), 89), abs=1.01)
        assert bottom == pytest.approx(min((cy + h / 2) * 61, 61), abs=1.01)


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (300, 20), (64, 64), (33, 47), (640, 481)])
@pytest.mark.parametrize("edges", [(64, 96), (800, 1333)])
def test_pixels_equal_those_of_the_package(monkeypatch, size, edges):
    pytest.importorskip("groundingdino")
    monkeypatch.setattr(grounding, "SHORTEST_EDGE_PX", edges[0])
    monkeypatch.setattr(grounding, "LONGEST_EDGE_PX", edges[1])
    transforms = importlib.import_module("groundingdino.datasets.transforms")
    package_resize = transforms.RandomResize([edges[0]], max_size=edges[1])
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    chain = transforms.Compose([package_resize, transforms.ToTensor(), normalize])
    expected, _ = chain(scene(size), None)
    assert torch.allclose(torch.from_numpy(normalise(resize(scene(size)))), expected, atol=1e-6)


def test_images_of_a_batch_are_padded_and_masked(branch):
    pixels = branch.preprocess([scene((90, 60)), scene((60, 90))])
    assert pixels["pixel_values"].shape == (2, 3, 96, 96)
    assert pixels["pixel_mask"].sum(dim=(1, 2)).tolist() == [64 * 96, 64 * 96]
    assert not pixels["pixel_values"][0, :, 64:].any()


def test_building_leaves_the_package_as_it_was(tiny_package, tokenizer):
    before = dict(vars(tiny_package))
    GroundingBranch.from_config(CONFIG, tokenizer, text_config=TEXT_CONFIG)
    assert vars(tiny_package) == before
    with pytest.raises(TypeError, match="not supported between"):
        GroundingBranch.from_config({**CONFIG, "enc_layers": None}, tokenizer)
    assert vars(tiny_package) == before


def test_parameter_names_are_those_of_released_checkpoints(branch):
    names = set(branch.encoder.state_dict())
    assert {
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.pooler.dense.weight",
        "feat_map.weight",
        "transformer.level_embed",
        "backbone.0.patch_embed.proj.weight",
    } <= names


def test_a_checkpoint_is_loaded_and_must_fit(tmp_path, branch, tokenizer):
    config = tmp_path / "tiny.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in CONFIG.items()))
    weights = {f"module.{key}": value for key, value in branch.encoder.state_dict().items()}
    weights["module.bert.embeddings.position_ids"] = torch.arange(300)[None]
    weights["module.label_enc.weight"] = torch.zeros(2, 2)
    torch.save({"model": weights}, tmp_path / "tiny.pth")
    loaded = GroundingBranch.from_checkpoint(
        tmp_path / "tiny.pth", config, tokenizer, text_config=TEXT_CONFIG
    )
    pixels = branch.preprocess([scene()])
    expected = branch.encode(**pixels, phrase="a cat")[0].values
    assert torch.equal(loaded.encode(**pixels, phrase="a cat")[0].values, expected)

    del weights["module.feat_map.bias"]
    weights["module.extra"] = torch.zeros(1)
    torch.save({"model": weights}, tmp_path / "tiny.pth")
    with pytest.raises(BranchError, match=r"missing \['feat_map.bias'\] .* \['extra'\] \(1\)"):
        GroundingBranch.from_checkpoint(
            tmp_path / "tiny.pth", config, tokenizer, text_config=TEXT_CONFIG
        )


def test_a_shipped_config_is_read(tiny_package, tokenizer, small_images):
    package = importlib.import_module("groundingdino.config")
    config = f"{package.__path__[0]}/GroundingDINO_SwinT_OGC.py"
    branch = GroundingBranch.from_config(config, tokenizer, text_config=TEXT_CONFIG)
    assert branch.feature_dim == 256
    assert branch.encoder.num_queries == 900


def test_half_precision_is_refused_with_words(branch):
    pixels = branch.preprocess([scene()])
    with pytest.raises(BranchError, match=r"runs in float32 only; .* torch.bfloat16"):
        branch.to(torch.bfloat16).encode(**pixels, phrase="a cat")


def test_a_missing_package_names_the_extra(monkeypatch, tokenizer):
    for name in [name for name in sys.modules if name.partition(".")[0] == "groundingdino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "groundingdino", None)
    with pytest.raises(BranchError, match=r'pip install "vpt-runtime\[grounding\]"'):
        GroundingBranch.from_config(CONFIG, tokenizer)


def test_another_version_of_the_package_is_refused(monkeypatch, tiny_package, tokenizer):
    class BertModelWarper(torch.nn.Module):
        pass

    monkeypatch.setattr(tiny_package, "BertModelWarper", BertModelWarper)
    with pytest.raises(BranchError, match=r"fits groundingdino-py 0.4.0; .* another BertModelWa"):
        GroundingBranch.from_config(CONFIG, tokenizer)


def test_a_config_without_separate_phrases_is_refused(tiny_package, tokenizer):
    with pytest.raises(BranchError, match="sub_sentence_present = True; got False"):
        GroundingBranch.from_config({**CONFIG, "sub_sentence_present": False}, tokenizer)


def test_a_tokenizer_without_delimiters_is_refused():
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "cat": 4}
    with pytest.raises(BranchError, match=r"knows the tokens \[CLS\] \[SEP\] . \?; got ids"):
        GroundingBranch.from_config(CONFIG, BertTokenizer(vocab=vocab))


def test_the_port_is_judged_by_what_it_computes(tokenizer):
    """Worked out by hand: positions run 0, 1, ... in a phrase and count its full stop."""
    from transformers.models.grounding_dino import modeling_grounding_dino as port

    input_ids = tokenizer(["a cat. red dog a."], return_tensors="pt")["input_ids"]
    assert input_ids.tolist() == [[101, 1037, 4937, 1012, 2417, 3899, 1037, 1012, 102]]
    build = port.generate_masks_with_special_tokens_and_transfer_map
    try:
        _, position_ids = build(input_ids)
    except TypeError:
        _, position_ids = build(input_ids, torch.tensor([101, 102, 1012, 1029]))
    by_hand = [0, 0, 1, 2, 0, 1, 2, 3, 0]
    assert transformers_port_is_right() == (position_ids[0].tolist() == by_hand)


def test_a_wrong_port_is_refused(monkeypatch):
    port = sys.modules[load_port.__module__]
    monkeypatch.setattr(port, "transformers_port_is_right", lambda: False)
    with pytest.raises(BranchError, match=r"gives each word .* use groundingdino-py instead"):
        GroundingBranch.from_transformers("nowhere")


def test_eager_attention_of_the_port_is_refused(tmp_path, port_branch):
    with pytest.raises(BranchError, match="sdpa attention; got eager"):
        load_port(tmp_path, attn_implementation="eager")


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

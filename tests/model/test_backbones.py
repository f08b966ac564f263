"""Every backbone: exact without calls, one pass with them, saved, loaded and made from its base."""

import pytest
import torch
from bases import save_base
from PIL import Image
from tiny_model import tiny_model
from two_pass import TwoPassEngine

import vpt
from vpt import remote
from vpt.errors import CheckpointError
from vpt.images import load_image
from vpt.inference.engine import Engine
from vpt.inference.features import Encoders
from vpt.loading import load
from vpt.model.building import build_from_base
from vpt.model.folder import BACKBONES
from vpt.model.generation import apply_rule_
from vpt.model.modeling import BASE_MODELS, MODELS
from vpt.model.processing import FeaturePiece, ImagePiece
from vpt.protocol.grammar import PerceptionGrammar, TurnState
from vpt.protocol.tokens import BRANCH_TOKENS
from vpt.runtime import Runtime


@pytest.fixture(scope="module", params=BACKBONES)
def runtime(request):
    return Runtime(*tiny_model(num_layers=3, backbone=request.param), name=request.param)


def noise(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return load_image(Image.fromarray(values.numpy()).resize((width * 4, height * 4)))


def plain_model(runtime):
    """Transformers' own model of the family with the same weights."""
    family = BASE_MODELS[runtime.name]
    settings = runtime.model.config.to_dict()
    base = family.config_class.from_dict({**settings, "model_type": runtime.name})
    plain = family(base).eval()
    ours = runtime.model.state_dict()
    plain.load_state_dict({name: ours[name] for name in plain.state_dict()})
    return plain


def conversation_inputs(runtime, questions):
    """Inputs of transformers' models for questions with images, padded on the left."""
    messages = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": image.pixels} for image in images),
                    {"type": "text", "text": question},
                ],
            }
        ]
        for question, images in questions
    ]
    return runtime.processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        padding=True,
    )


QUESTIONS = [
    ("What is this?", []),
    ("What?", [noise(20, 15, 0)]),
    ("Which one?", [noise(9, 30, 1), noise(33, 12, 2), noise(8, 8, 3)]),
]


def test_logits_without_calls_are_those_of_transformers(runtime):
    inputs = dict(conversation_inputs(runtime, QUESTIONS))
    image_token = runtime.model.config.image_token_id
    types = (inputs["input_ids"] == image_token).int()
    present = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = runtime.model(**inputs).logits
        theirs = plain_model(runtime)(**{**inputs, "mm_token_type_ids": types}).logits
    torch.testing.assert_close(ours[present], theirs[present], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("question", "images"), QUESTIONS)
def test_greedy_tokens_without_calls_are_those_of_transformers(runtime, question, images):
    answer = runtime.ask(images, question, perception="none", max_new_tokens=12)
    inputs = dict(conversation_inputs(runtime, [(question, images)]))
    types = (inputs["input_ids"] == runtime.model.config.image_token_id).int()
    rule = PerceptionGrammar(runtime.vocabulary).rule(TurnState(), ())
    banned = apply_rule_(rule, torch.zeros(runtime.model.lm_head.out_features)).isinf()
    generated = plain_model(runtime).generate(
        **{**inputs, "mm_token_type_ids": types},
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=runtime.processor.tokenizer.eos_token_id,
        suppress_tokens=banned.nonzero().flatten().tolist(),
    )
    written = [token.id for token in answer.trace.tokens]
    assert written == generated[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.trace.counts.prompt_tokens == inputs["input_ids"].shape[1]


def several_calls(runtime):
    image, encode = noise(20, 15, 0), runtime.processor.encode_text
    pieces = [encode("Look: "), ImagePiece(image)]
    for branch in ("dino", "reencode", "dino", "sam"):
        pieces += [encode(f" then {BRANCH_TOKENS[branch].call}"), FeaturePiece(branch, image)]
    return [*pieces, encode(" and "), ImagePiece(noise(9, 30, 1)), encode(" end")]


@pytest.mark.parametrize("tokens_per_pass", [13, 10**6])
def test_several_calls_in_one_pass_equal_one_pass_per_call(runtime, tokens_per_pass):
    encoders = Encoders(runtime.model, runtime.processor)
    engine = Engine(runtime.model, encoders, 1, 2048, tokens_per_pass, prefix_bytes=0)
    oracle = TwoPassEngine(runtime.model, runtime.processor)
    pieces, ours, theirs = several_calls(runtime), engine.open(), oracle.open()
    got, expected = engine.extend(ours, pieces), oracle.extend(theirs, pieces)
    assert got.token_ids == expected.token_ids
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("perception", ["auto", "crop", "clip", "dino", "sam"])
def test_a_batch_equals_its_questions_alone(runtime, perception):
    options = {"perception": perception, "max_new_tokens": 14, "look_at": "latest"}
    asked = [
        {"images": images or [noise(11, 22, 5)], "question": question, **options}
        for question, images in QUESTIONS
    ]
    alone = Runtime(runtime.model, runtime.processor, prefix_cache_bytes=0)
    expected = [[t.id for t in alone.ask(**one).trace.tokens] for one in asked]
    together = runtime.ask_many(asked, batch_size=3)
    assert [[t.id for t in one.trace.tokens] for one in together] == expected


def test_the_training_forward_is_what_inference_computes(runtime):
    image, pieces = noise(20, 15, 0), several_calls(runtime)
    engine = runtime.engine
    stream = engine.open()
    extension = engine.extend(stream, pieces)
    engine.close(stream)
    processor, model = runtime.processor, runtime.model
    pixel_values, grid = processor.preprocess_images([image, noise(9, 30, 1)])
    pixels = {"dino": "detection_images", "sam": "seg_images"}
    inputs = {
        argument: model.branches[branch].preprocess([image.pixels])["pixel_values"]
        for branch, argument in pixels.items()
    }
    inputs["detection_images"] = inputs["detection_images"].repeat(2, 1, 1, 1)
    clip, clip_grid = processor.preprocess_images([image])
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([extension.token_ids]),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            clip_pixel_values=clip,
            clip_images_grid_thw=clip_grid,
            **inputs,
        ).logits[0, -1]
    torch.testing.assert_close(extension.logits, logits, atol=2e-4, rtol=0)


def test_gradients_reach_tower_and_language_model(runtime):
    model, _ = tiny_model(backbone=runtime.name)
    inputs = dict(conversation_inputs(runtime, QUESTIONS[1:]))
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    lacking = [
        name
        for name, one in model.named_parameters()
        if one.grad is None and not name.startswith(("projectors", "branches"))
    ]
    assert not lacking


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_is_made_of_a_base_saved_and_loaded(tmp_path, backbone):
    save_base(tmp_path / "base", backbone=backbone)
    model, processor = build_from_base(tmp_path / "base", ["clip"])
    assert model.config.model_type == BACKBONES[backbone][0]
    assert {type(model).__name__, type(model.config).__name__} <= set(remote.__all__)  # the shim's
    made = Runtime(model, processor)
    made.save_pretrained(tmp_path / "made")
    again = load(tmp_path / "made", device="cpu")
    asked = {"images": noise(20, 15, 0), "question": "What?", "perception": "clip"}
    first, second = (one.ask(**asked, max_new_tokens=8) for one in (made, again))
    assert type(again.model) is type(model)
    assert [t.id for t in first.trace.tokens] == [t.id for t in second.trace.tokens]
    vpt.register()
    from transformers import AutoModelForImageTextToText

    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "made")) is type(model)
    other = MODELS["qwen3_vl_vpt" if backbone == "qwen2_vl" else "qwen2_vl_vpt"]
    with pytest.raises(CheckpointError, match=f"or {type(model).__name__}$"):
        other.from_pretrained(tmp_path / "made")

"""What users of transformers write works with VPT models as with others."""

import base64
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from golden_data import GOLDENS
from PIL import Image
from tiny_model import tiny_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TorchAoConfig,
    pipeline,
)

import vpt
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig
from vpt.errors import CheckpointError, ImageError, PromptError, ServiceError
from vpt.images import load_image
from vpt.loading import EMBEDDED_MODEL
from vpt.model.processing import TokenPiece
from vpt.protocol.tokens import IMAGE_PAD, PLAIN, ContentTokens

TAGS = "examples/tags.jpg"
QUESTION = "What number is on the blue one?"
CALL = "<|region_token_start|><|x_3|><|y_2|><|x_3|><|y_2|><|region_token_end|>"
ASK = {
    "tokenize": True,
    "return_dict": True,
    "return_tensors": "pt",
    "add_generation_prompt": True,
}


def user(*parts):
    content = [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]
    return {"role": "user", "content": content}


def image(source=TAGS, key="image"):
    return {"type": "image", key: source}


MESSAGES = [user(image(), QUESTION)]


@pytest.fixture(scope="module")
def embedded():
    vpt.register()
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def random_runtime(random_model):
    return vpt.load(random_model, device="cpu", dtype="float32")


def prompt_ids(runtime, images, question):
    """Ids that the runtime begins with, placeholders of the images written out."""
    loaded = [load_image(one) for one in images]
    encoded = runtime.encoders.encode([(PLAIN, one) for one in loaded])
    counts = iter(len(features.values) for features, _ in encoded)
    pad = runtime.processor.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    ids = []
    for piece in runtime.processor.prompt(question, loaded):
        ids += piece.ids if isinstance(piece, TokenPiece) else [pad] * next(counts)
    return ids


def noise(size, seed=0):
    pixels = torch.randint(
        256, (3, size[1], size[0]), generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())


# The chat template, then generate


def test_generate_writes_the_call_and_reads_its_crop(embedded):
    model, processor = embedded
    answer = vpt.Runtime(model, processor).ask(TAGS, QUESTION)
    inputs = processor.apply_chat_template(MESSAGES, **ASK)
    out = model.generate(**inputs, max_new_tokens=20)
    written = processor.decode(out[0, inputs["input_ids"].shape[1] :])
    assert written == answer.trace.calls[0].text == CALL
    crop = Image.open(TAGS).crop(answer.trace.calls[0].box_xyxy_px)
    longer = [*MESSAGES, {"role": "assistant", "content": written}, user(image(crop))]
    inputs = processor.apply_chat_template(longer, **ASK)
    assert inputs["image_grid_thw"].shape == (2, 3)
    out = model.generate(**inputs, max_new_tokens=20)
    assert processor.decode(out[0, inputs["input_ids"].shape[1] :]) == answer.text == "3"


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_ids_of_messages_are_those_of_the_runtimes_prompt(random_runtime, num_images):
    images = [noise((900, 70), 1), noise((90, 140), 2)][:num_images]  # the first is shrunk to 512
    messages = [user(*map(image, images), "What is it?")]
    inputs = random_runtime.processor.apply_chat_template(messages, **ASK)
    expected = prompt_ids(random_runtime, images, "What is it?")
    assert inputs["input_ids"].tolist() == [expected]
    assert ("pixel_values" in inputs) == bool(images)
    if images:
        loaded = [load_image(one) for one in images]
        pixels, grid = random_runtime.processor.preprocess_images(loaded, 512)
        assert torch.equal(inputs["pixel_values"], pixels)
        assert torch.equal(inputs["image_grid_thw"], grid)


@pytest.mark.parametrize("variant", ["clip", "dino", "sam"])
def test_released_templates_give_the_same_ids(variant):
    runtime = vpt.load(GOLDENS / "checkpoints" / variant, device="cpu", dtype="float32")
    picture = noise((200, 100))
    for parts in (
        (image(picture), "What?"),
        ("What?", image(picture)),
        (image(picture), "\nWhat?"),
    ):
        inputs = runtime.processor.apply_chat_template([user(*parts)], **ASK)
        assert inputs["input_ids"].tolist() == [prompt_ids(runtime, [picture], "What?")]


def test_conversations_of_other_lengths_are_padded_and_answered_as_alone(random_runtime):
    model, processor = random_runtime.model, random_runtime.processor
    conversations = [
        [user(image(noise((60, 90), 1)), "What?")],
        [{"role": "system", "content": "Be brief."}, user("Who are you, and why?")],
        [user(image(noise((150, 60), 2)), image(noise((30, 30), 3)), "Equal?")],
    ]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    alone = []
    for one in conversations:
        inputs = processor.apply_chat_template(one, **ASK)
        alone.append(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :])
    batch = processor.apply_chat_template(conversations, **ASK)
    assert sorted(batch["attention_mask"].sum(-1).tolist())[0] < batch["input_ids"].shape[1]
    got = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(got, torch.stack(alone))


def test_images_of_messages_come_in_every_form(embedded, tmp_path):
    _, processor = embedded
    picture = Image.open(TAGS)
    file = io.BytesIO()
    picture.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    uri = f"data:image/png;base64,{text}"
    parts = [
        image(picture),
        image(load_image(TAGS)),
        image(TAGS, "path"),
        image(TAGS, "url"),
        image(text, "base64"),
        image(uri, "url"),
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
    ]
    expected = processor.apply_chat_template(MESSAGES, **ASK)
    for part in parts:
        got = processor.apply_chat_template([user(part, QUESTION)], **ASK)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_remote_image_of_a_message_is_refused(embedded):
    with pytest.raises(ImageError, match="is a URL; remote images are not fetched"):
        embedded[1].apply_chat_template([user(image("https://x.org/a.png", "url"), "What?")], **ASK)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages must be a list of dicts, not "),
        ("What?", "messages must be a list of dicts, not 'What"),
        ([{"role": "user"}], r"messages\[0\] must be a dict of role and content, not "),
        (
            [{"role": "tool", "content": ""}],
            r"messages\[0\] has the role 'tool'; expected one of sys",
        ),
        ([{"role": "user", "content": 3}], r"content of messages\[0\] must be a text or a list"),
        ([user({"type": "video"})], r"part 0 of messages\[0\] must be text or image"),
        ([user({"type": "text"})], r"part 0 of messages\[0\] must be text or image"),
        ([user({"type": "image"})], "an image part has no image; add image, url, path or base64"),
        ([user(image(3, "url"))], r"url of part 0 of messages\[0\] must be a text, not 3"),
        ([{"role": "system", "content": [image()]}], r"part 0 of messages\[0\] must be text of"),
        ([user(f"a {IMAGE_PAD}")], "the user turn holds the control token"),
    ],
)
def test_other_messages_are_refused(embedded, messages, words):
    with pytest.raises(PromptError, match=words):
        embedded[1].apply_chat_template(messages, **ASK)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"text": "What?", "images": TAGS},
            r"one image for each .*, got \[1\] images for \[0\] pl",
        ),
        ({"text": IMAGE_PAD * 2, "images": TAGS}, r"got \[1\] images for \[2\] placeholders"),
        ({"text": [IMAGE_PAD, ""], "images": [[], [TAGS]]}, r"got \[0, 1\] images for \[1, 0\]"),
        ({"text": "a", "videos": [1]}, "videos and audio are not supported"),
        ({"images": TAGS}, "text must be a text or a list of them"),
        ({"text": "a", "max_pixel": 3}, "unknown option 'max_pixel'; available: add_special"),
        (
            {"text": IMAGE_PAD, "images": TAGS, "truncation": True, "max_length": 5},
            "truncation cut an image off; raise max_length",
        ),
    ],
)
def test_other_calls_of_the_processor_are_refused(embedded, call, words):
    with pytest.raises(PromptError, match=words):
        embedded[1](**call)


# Messages in place of images and question


def test_a_runtime_answers_messages_as_images_and_a_question(embedded):
    runtime = vpt.Runtime(*embedded)
    data = base64.b64encode(Path(TAGS).read_bytes()).decode()
    url = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    messages = [{"role": "system", "content": "Be brief."}, user(QUESTION, url)]
    expected = runtime.ask(TAGS, QUESTION, system="Be brief.")
    for answer in (runtime.ask(messages=messages), *runtime.ask_many([{"messages": messages}])):
        assert [t.id for t in answer.trace.tokens] == [t.id for t in expected.trace.tokens]
        assert answer.trace.images[0].digest == expected.trace.images[0].digest
    (*_, stop) = runtime.stream(messages=[user("Hello")], max_new_tokens=2)
    assert not stop.trace.images


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"messages": [*MESSAGES, {"role": "assistant", "content": "3"}]},
            "end with the user's, .* not user, assistant",
        ),
        ({"messages": [{"role": "system", "content": "a"}]}, "end with the user's, .* not system"),
        (
            {"messages": MESSAGES, "question": "What?"},
            "pass messages alone, or images and question",
        ),
        ({"messages": MESSAGES, "system": "a"}, "pass messages alone"),
        ({"messages": [user(image())]}, "the question is empty"),
        ({"images": TAGS}, r"question must be text \(str\), not None"),
    ],
)
def test_messages_that_are_no_question_are_refused(embedded, arguments, words):
    with pytest.raises(PromptError, match=words):
        vpt.Runtime(*embedded).ask(**arguments)


# Auto classes and the pipeline


@pytest.mark.parametrize("folder", [EMBEDDED_MODEL, GOLDENS / "checkpoints" / "sam", None])
def test_auto_classes_load_every_folder(folder, random_model):
    vpt.register()
    folder = folder or random_model
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, vpt.VPTForConditionalGeneration)
    assert isinstance(AutoConfig.from_pretrained(folder), vpt.VPTConfig)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, vpt.VPTProcessor)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(CALL)["input_ids"] == processor.tokenizer(CALL)["input_ids"]
    pixels = AutoImageProcessor.from_pretrained(folder)
    assert pixels.patch_size == model.config.vision_config.patch_size


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.filterwarnings("ignore:.*max_new_tokens")
def test_the_pipeline_takes_every_documented_form(embedded, is_loaded):
    model, processor = embedded
    if is_loaded:
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
    else:
        pipe = pipeline("image-text-to-text", model=str(EMBEDDED_MODEL), dtype=torch.float32)
    options = {"max_new_tokens": 20, "return_full_text": False}
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    picture = Image.open(TAGS)
    one = [
        pipe(text=MESSAGES, **options),
        pipe(MESSAGES, **options),
        pipe(images=picture, text=prompt, **options),
        pipe(images=TAGS, text=prompt, **options),
        pipe({"images": picture, "text": prompt}, **options),
    ]
    two = [
        pipe(text=[MESSAGES, MESSAGES], **options),
        pipe(images=[picture, picture], text=[prompt, prompt], **options),
    ]
    for record in [*one, *two[1:]]:
        assert record[0]["generated_text"] == CALL
    assert [record[0]["generated_text"] for record in two[0]] == [CALL, CALL]
    whole = pipe(text=MESSAGES, max_new_tokens=20)[0]["generated_text"]
    assert whole == [*MESSAGES, {"role": "assistant", "content": CALL}]


# LoRA weights, devices, quantisation

IGNORE_TYING = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
ADDED = ["projectors.reencode", "projectors.dino", "projectors.sam", "embed_tokens", "lm_head"]


def train_adapter(folder, tied):
    """Save a tiny model and LoRA weights for it, as LLaMA-Factory's training writes them."""
    peft = pytest.importorskip("peft")
    model, processor = tiny_model(tie_word_embeddings=tied)
    for part in (model, processor):
        part.save_pretrained(folder / "base")
    model = vpt.load(folder / "base", device="cpu").model
    layers = [n for n, _ in model.named_modules() if "model.layers" in n and n.endswith("_proj")]
    config = peft.LoraConfig(
        r=4, target_modules=layers, modules_to_save=ADDED, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(folder / "lora")
    return adapted.eval()


def logits(model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("tied", [False, True])
@IGNORE_TYING
def test_lora_weights_are_merged_into_their_base(tmp_path, tied):
    adapted = train_adapter(tmp_path, tied)
    expected = logits(adapted)
    runtime = vpt.load(tmp_path / "lora", device="cpu")  # they name their base
    near = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(logits(runtime.model), expected, **near)
    assert (logits(vpt.load(tmp_path / "base", device="cpu").model) - expected).abs().max() > 0.1
    projectors = adapted.base_model.model.projectors
    for name, value in runtime.model.projectors.named_parameters():
        branch, _, rest = name.partition(".")
        trained = projectors[branch].modules_to_save["default"].get_parameter(rest)
        assert torch.equal(value, trained)
    runtime.save_pretrained(tmp_path / "merged")
    merged = vpt.load(tmp_path / "merged", device="cpu").model
    torch.testing.assert_close(logits(merged), expected, **near)
    assert runtime.ask(noise((80, 60)), "What?", perception="dino", max_new_tokens=8).num_calls


@IGNORE_TYING
def test_lora_weights_that_cannot_be_merged_are_refused(tmp_path, random_model, monkeypatch):
    train_adapter(tmp_path, tied=False)
    lora, other = tmp_path / "lora", tmp_path / "other"
    model, processor = tiny_model(("dino",))
    for part in (model, processor):
        part.save_pretrained(other)
    with pytest.raises(
        CheckpointError, match=r"is not in the adapter's configuration|cannot apply"
    ):
        vpt.load(lora, base=other, device="cpu")
    with pytest.raises(PromptError, match=r"base is for LoRA weights, but .* is a whole model"):
        vpt.load(random_model, base=other)
    with pytest.raises(PromptError, match="cannot be merged into a quantised model"):
        vpt.load(lora, quantization_config=object())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        CheckpointError, match="a LoRA adapter, which needs peft: `pip install peft`"
    ):
        vpt.load(lora, device="cpu")
    config = json.loads((lora / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (lora / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not name its base model; pass base="):
        vpt.load(lora)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_of_one_device_is_used(random_model, random_runtime, device_map):
    pytest.importorskip("accelerate")
    runtime = vpt.load(random_model, device_map=device_map, dtype="float32")
    picture = noise((80, 60))
    one, other = (r.ask(picture, "What?", max_new_tokens=5) for r in (runtime, random_runtime))
    assert one.text == other.text


def test_other_device_maps_are_refused(random_model):
    with pytest.raises(PromptError, match="pass device or device_map, not both"):
        vpt.load(random_model, device="cpu", device_map="cpu")
    pytest.importorskip("accelerate")
    parts = dict.fromkeys(("model", "projectors", "branches"), "cpu") | {"lm_head": "disk"}
    with pytest.raises(CheckpointError, match="over cpu, disk; the runtime runs on one device"):
        vpt.load(random_model, device_map=parts)


def test_weights_quantised_by_torchao_answer_the_same():
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    runtime = vpt.load(device="cpu", quantization_config=config)
    weight = runtime.model.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert runtime.ask(TAGS, QUESTION).text == "3"


# Saving, and the hub


def test_a_saved_runtime_answers_the_same(tmp_path):
    runtime = vpt.load(image_resolution=200)
    runtime.save_pretrained(tmp_path)
    again = vpt.load(tmp_path)
    assert again.model.config.image_resolution == again.processor.image_resolution == 200
    for question in (QUESTION, "What number is on the red one?"):
        one, other = runtime.ask(TAGS, question), again.ask(TAGS, question)
        assert [t.id for t in one.trace.tokens] == [t.id for t in other.trace.tokens]
        assert one.trace.calls[0].scores == other.trace.calls[0].scores


def test_the_depth_tokenizer_in_use_is_saved_with_the_model(tmp_path):
    content = ContentTokens(("depth",), num_codes=16, num_cells=4)
    model, processor = tiny_model((), content=content)
    config = DepthTokenizerConfig(8, num_codes=16, code_dim=8, hidden_dim=4, num_downsamplings=2)
    tokenizer = DepthTokenizer(config.build(), config)
    vpt.Runtime(model, processor, depth_tokenizer=tokenizer).save_pretrained(tmp_path)
    again = vpt.load(tmp_path, device="cpu").depth_tokenizer
    weights = tokenizer.network.state_dict()
    assert again.config == config
    assert all(torch.equal(weights[k], v) for k, v in again.network.state_dict().items())


def test_a_folder_that_cannot_be_written_is_named(embedded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save the model to .*file: File exists"):
        vpt.Runtime(*embedded).save_pretrained(tmp_path / "file")


class FakeHub(BaseHTTPRequestHandler):
    """The part of the hub's API that a push uses; writes committed files into a folder."""

    def do_POST(self):
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, {"error": "Invalid username or password."})
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.paths.append(self.path)
        if "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{**one, **mode} for one in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = self.server.folder / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            url = "https://huggingface.co/me/looker/commit/123"
            return self.answer(200, {"commitUrl": url, "commitOid": "123"})
        return self.answer(200, {"url": "https://huggingface.co/me/looker"})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        server.folder, server.paths = tmp_path / "hub", []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


def test_a_pushed_runtime_answers_the_same_from_the_hubs_files(embedded, hub):
    runtime = vpt.Runtime(*embedded)
    url = runtime.push_to_hub("me/looker", token="secret", private=True)
    assert url.endswith("me/looker/commit/123")
    assert hub.paths[0] == "/api/repos/create"
    assert hub.paths[-1] == "/api/models/me/looker/commit/main"
    assert vpt.load(hub.folder).ask(TAGS, QUESTION).text == "3"


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("me/looker", "other", "cannot push to 'me/looker': .*401.*; check the name, the network"),
        ("a b/c/d", "secret", "cannot push to 'a b/c/d': Repo id must"),
    ],
)
def test_a_refused_push_says_what_to_check(embedded, hub, repo_id, token, words):
    with pytest.raises(ServiceError, match=words):
        vpt.Runtime(*embedded).push_to_hub(repo_id, token=token)
    assert not hub.folder.exists()

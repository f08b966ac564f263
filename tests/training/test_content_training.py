"""Models that write boxes and depth maps, trained by the stock command as configs/ says."""

from pathlib import Path

import pytest
from factory import IGNORE_TYING, arguments, export_arguments, save_images, save_rows
from safetensors.torch import load_file
from tiny_model import tiny_model

import vpt
from vpt.data.content_rows import CategoryBoxes, counting_rows, with_note
from vpt.protocol.tokens import ContentTokens

yaml = pytest.importorskip("yaml")

CONFIGS = Path(__file__).parents[2] / "configs"
CHOSEN = ("finetuning_type", "lora_rank", "lora_alpha", "lora_target", "additional_target")
BOX = (3, 40, 200, 335)


@pytest.fixture
def model(tmp_path):
    """With tied embeddings, as the 2B model has them."""
    made, processor = tiny_model(
        ("clip",), content=ContentTokens(("boxes",)), tie_word_embeddings=True
    )
    made.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@IGNORE_TYING
def test_new_tokens_are_trained_and_merged(factory, model, tmp_path):
    data = tmp_path / "data"
    rows = [
        with_note(row, epoch=1)
        for number in range(6)
        for row in counting_rows(f"images/{number}.png", CategoryBoxes("star", (BOX,)))
    ]
    save_images(data / "images")
    save_rows(data, "boxes", rows)
    config = yaml.safe_load((CONFIGS / "aurora-count.yaml").read_text(encoding="utf-8"))
    chosen = {key: config[key] for key in CHOSEN}
    out, merged = tmp_path / "lora", tmp_path / "merged"
    settings = {**chosen, "dataset": "boxes", "max_steps": 6, "learning_rate": 5e-3}
    settings |= {"disable_shuffling": True, "freeze_multi_modal_projector": None}
    settings |= {"freeze_language_model": None}
    factory.run_exp(arguments(model, data, out, **settings))
    factory.export_model(export_arguments(model, out, merged))
    runtime = vpt.load(str(merged), device="cpu")
    ids = [runtime.vocabulary.ids[f"<PIXEL_{pixel}>"] for pixel in BOX]
    name = "model.language_model.embed_tokens.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (model, merged))
    assert ((before - after)[ids].abs().amax(1) > 1e-3).all()
    answer = runtime.ask(data / "images" / "0.png", "Where?", max_new_tokens=40)
    assert not answer.trace.malformed

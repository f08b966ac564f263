"""The first stage of the embedded model, in its smallest size."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")

import vpt
from recipes.embedded.labels import HEADS
from recipes.embedded.shape import fresh_model
from recipes.embedded.views import TowerView, whiten_patches
from recipes.embedded.vision import (
    ENCODERS,
    DenseHeads,
    Settings,
    Views,
    is_finished,
    main,
    put_into_start,
    put_together,
    train_encoder,
    vision_settings,
)
from vpt.errors import NonFiniteError
from vpt.images import from_pixels
from vpt.model.modeling import load_model


@pytest.fixture(scope="module")
def fresh():
    return fresh_model(0)


def settings(folder, **changes):
    few = dict.fromkeys(ENCODERS, 4)
    given = {"steps": few, "batch_size": few, "num_workers": 0, "save_steps": 2, **changes}
    return Settings(output_dir=str(folder), **given)


def test_the_model_is_small_and_the_same_for_the_same_seed(fresh):
    model, processor = fresh
    num_bytes = 2 * sum(p.numel() for p in model.parameters())
    assert num_bytes < 12e6
    again, _ = fresh_model(0)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert processor.decode(processor.encode_text("Wörter wie 42?").ids) == "Wörter wie 42?"
    assert model.config.para_mask_id == 1
    assert model.projector("sam").freeze_stem


def test_the_view_of_the_tower_is_the_tower(fresh):
    model, processor = fresh
    pixels = np.random.default_rng(0).integers(0, 255, (2, 112, 112, 3), dtype=np.uint8)
    images = [from_pixels(Image.fromarray(one), "noise") for one in pixels]
    given, grid = processor.preprocess_images(images)
    with torch.no_grad():
        expected = model.tower(given, grid)
        got = TowerView(model, processor)(torch.from_numpy(pixels))
    torch.testing.assert_close(got.flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


def test_views_are_seeded_by_their_number(tmp_path):
    views = Views("tower", settings(tmp_path), "train")
    one, same, other = views[1], views[1], views[2]
    assert set(one) == {"pixels", "is_close", *HEADS}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["pixels"], other["pixels"])


def test_whitened_patches_do_not_hang_together():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4000, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.zeros(4, 24)
    whiten_patches(weight, patches, generator)
    seen = torch.corrcoef((patches @ weight.T).T)
    assert (seen - torch.eye(4)).abs().max() < 0.1


def test_a_tower_may_start_from_that_of_a_model(tmp_path):
    chosen = settings(tmp_path, steps={"tower": 1}, learning_rate=0.0, start="vpt/embedded")
    train_encoder("tower", chosen)
    trained = torch.load(tmp_path / "tower.pt", weights_only=True)["trained"]
    expected = load_model("vpt/embedded", device="cpu", dtype=torch.float32).model.visual
    for name, value in expected.state_dict().items():
        assert torch.equal(trained[f"view.visual.{name}"], value)


def test_a_further_trained_tower_is_put_into_its_model(tmp_path):
    chosen = settings(tmp_path, steps={"tower": 1}, start="vpt/embedded", encoders=("tower",))
    train_encoder("tower", chosen)
    put_into_start(chosen)
    trained = torch.load(tmp_path / "tower.pt", weights_only=True)["trained"]
    model, start = (
        load_model(folder, device="cpu", dtype=torch.float32).state_dict()
        for folder in (str(tmp_path), "vpt/embedded")
    )
    assert set(model) == set(start)
    towers = [name for name in model if ".visual." in name]
    for name in (name for name in towers if "merger.mlp.2" not in name):
        assert torch.equal(model[name], trained[f"view.visual.{name.split('visual.')[1]}"])
    assert any(not torch.equal(model[name], start[name]) for name in towers)
    assert all(torch.equal(model[name], start[name]) for name in set(model) - set(towers))
    whole = load_model(str(tmp_path), device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        tokens = TowerView(whole, fresh_model(0)[1])(Views("tower", chosen, "train")[0]["pixels"])
    assert float(tokens.mean((0, 1)).abs().max()) < 1e-3
    assert float(tokens.std()) == pytest.approx(0.5, abs=0.01)


def test_heads_count_something_and_nothing_apart():
    heads = DenseHeads(8)
    batch = {name: torch.full((1, 2, 2), size) for name, size in HEADS.items()}
    batch["tag"] = torch.full((1, 2, 2, 4), HEADS["tag"] // 4)
    batch["is_close"] = torch.tensor([False])
    loss, right = heads(torch.randn(1, 4, 8), batch)
    assert not right
    batch["color"][0, 0, 0] = 1
    more, right = heads(torch.randn(1, 4, 8), batch)
    assert set(right) == {"color"}
    assert loss.item() > 0
    assert more.item() > 0


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_encoder("tower", settings(whole))
    shutil.copytree(whole, broken)
    for folder in (whole, broken):
        train_encoder("dino", settings(folder))
    after_four = torch.load(broken / "dino.pt", weights_only=True)["trained"]
    code = (
        "import recipes.embedded.vision as v, os, torch\n"
        "torch.set_num_threads(1)\n"  # as this process: sums of two threads round differently
        f"s = v.Settings({str(broken)!r}, steps=dict(tower=4, dino=4), batch_size=dict(dino=4), "
        "num_workers=0, save_steps=2)\n"
        "real = v._save\n"
        "v._save = lambda *a: (real(*a), os._exit(9))\n"
        "v.train_encoder('dino', s)\n"
    )
    (broken / "dino.pt").unlink()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert torch.load(broken / "dino.pt", weights_only=True)["step"] == 2
    train_encoder("dino", settings(broken))
    resumed = torch.load(broken / "dino.pt", weights_only=True)["trained"]
    expected = torch.load(whole / "dino.pt", weights_only=True)["trained"]
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert all(torch.equal(expected[name], after_four[name]) for name in expected)


def test_training_that_leaves_the_numbers_ends(tmp_path):
    with pytest.raises(NonFiniteError, match=r"tower: the loss of step . is nan; .* smaller learn"):
        train_encoder("tower", settings(tmp_path, learning_rate=1e30))


def test_the_model_is_put_together_when_every_encoder_is_finished(tmp_path):
    def finished(num_steps):
        wanted = settings(tmp_path, steps=dict.fromkeys(ENCODERS, num_steps))
        return [encoder for encoder in ENCODERS if is_finished(encoder, wanted)]

    for encoder in ("tower", "sam"):
        train_encoder(encoder, settings(tmp_path, steps=dict.fromkeys(ENCODERS, 1)))
    assert finished(1) == ["tower", "sam"]
    assert finished(2) == []


def test_branches_are_read_by_the_heads_of_the_tower(tmp_path):
    chosen = settings(tmp_path)
    with pytest.raises(ValueError, match="train it first \\(encoders=tower\\)"):
        train_encoder("sam", chosen)
    states = {}
    for encoder in ("tower", "sam"):
        train_encoder(encoder, chosen)
        states[encoder] = torch.load(tmp_path / f"{encoder}.pt", weights_only=True)["trained"]
    heads = [name for name in states["sam"] if name.startswith("heads.")]
    assert heads
    assert all(torch.equal(states["sam"][name], states["tower"][name]) for name in heads)
    stem = "view.projector.conv_feature.weight"
    assert not torch.equal(
        states["sam"][stem], fresh_model(1)[0].projector("sam").conv_feature.weight
    )


def test_the_parts_make_a_model_that_answers(tmp_path):
    chosen = settings(tmp_path, steps=dict.fromkeys(ENCODERS, 1))
    for encoder in ENCODERS:
        train_encoder(encoder, chosen)
    put_together(chosen)
    runtime = vpt.load(str(tmp_path), device="cpu")
    photo = Image.effect_noise((448, 448), 60).convert("RGB")
    for mode in ("region", "clip", "dino", "sam"):
        answer = runtime.ask(photo, "What is it?", perception=mode, max_calls=1, max_new_tokens=64)
        assert [call.outcome for call in answer.trace.calls][:1] == ["executed"]
    tokens = runtime.model.tower(*runtime.processor.preprocess_images([from_pixels(photo, "n")]))
    assert tokens.std() < 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stepps=3"], "unknown key 'stepps'; available: batch_size"),
        (["encoders=eye"], "unknown encoder 'eye'; available: tower, dino, sam"),
        (["seed"], "expected key=value, got 'seed'"),
    ],
)
def test_bad_settings_are_refused(tmp_path, words, message):
    file = tmp_path / "a.yaml"
    file.write_text(f"output_dir: {tmp_path}\n")
    with pytest.raises(ValueError, match=message):
        vision_settings(file, words)


def test_settings_can_be_set_on_the_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("output_dir: out\nseed: 1\n")
    read = vision_settings(file, ["seed=5", "encoders=[dino, sam]"])
    assert (read.seed, read.encoders) == (5, ("dino", "sam"))


@pytest.mark.parametrize(
    ("words", "said"),
    [(["missing.yaml"], "missing.yaml"), (["a.yaml", "encoders=sam"], "train it first")],
)
def test_a_command_that_cannot_start_ends_with_a_line(tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "a.yaml").write_text("output_dir: out\nsteps: {tower: 1, sam: 1}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vision", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err

"""``vpt init --content`` and ``vpt ask`` with a model that draws, through main()."""

import json

import pytest
import torch
from bases import save_base
from drawing import CONTENT, SHAPE, eager_model, noise
from tiny_model import tiny_model

from vpt.depth.tokenizer import DepthTokenizer, load_depth_tokenizer
from vpt.model.building import draw_embeddings
from vpt.model.modeling import read_model
from vpt.protocol.tokens import depth_tokens, pixel_tokens
from vpt.trace.records import Trace


@pytest.fixture
def scene(tmp_path):
    """The picture before which the model draws at once."""
    noise(0).save(tmp_path / "noise.png")
    return str(tmp_path / "noise.png")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth_tokenizer")
    DepthTokenizer(SHAPE.build(3), SHAPE).save(folder)
    return folder


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eager")
    model, processor = eager_model(CONTENT)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# --- init -------------------------------------------------------------------------------------


def test_init_makes_a_model_with_content_of_a_plain_one(
    run, base, scene, tokenizer_folder, tmp_path
):
    out_folder = tmp_path / "made"
    words = ("--content", "boxes,depth", "--depth-tokenizer", tokenizer_folder)
    code, out, err = run("init", "--base", base, "--branches", "", *words, "--out", out_folder)
    assert code == 0, err
    assert "  content     depth, boxes\n" in out
    assert f"  tokens      {18 + 10 + 336} for perception, untrained" in out
    settings = json.loads((out_folder / "config.json").read_text())
    assert settings["perception_content"] == ["depth", "boxes"]
    assert (settings["depth_num_codes"], settings["depth_num_cells"]) == (8, 4)
    assert load_depth_tokenizer(out_folder / "depth_tokenizer").config == SHAPE
    code, _, err = run("ask", scene, "q", "--model", out_folder, "--max-new-tokens", 3)
    assert code == 0, err


def test_init_gives_a_vpt_model_content_and_keeps_its_depth_tokenizer(
    run, tokenizer_folder, tmp_path
):
    model, processor = tiny_model(("clip",))
    first, second, third = (tmp_path / name for name in "abc")
    model.save_pretrained(first)
    processor.save_pretrained(first)
    words = ("--content", "depth", "--depth-tokenizer", tokenizer_folder)
    code, out, err = run("init", "--base", first, *words, "--out", second)
    assert code == 0, err
    assert "branches    crop, clip" in out and "tokens      10 for perception" in out
    code, out, err = run("init", "--base", second, "--content", "boxes", "--out", third)
    assert code == 0, err
    assert "content     depth, boxes\n" in out
    assert load_depth_tokenizer(third / "depth_tokenizer").config == SHAPE
    code, out, err = run("init", "--base", third, "--content", "boxes", "--out", tmp_path / "d")
    assert (code, out) == (4, "") and "has the tokens of boxes already" in err


def test_codes_begin_as_the_vectors_of_the_depth_tokenizer(run, tokenizer_folder, tmp_path):
    source, made = tmp_path / "source", tmp_path / "made"
    model, processor = tiny_model(("clip",))
    model.save_pretrained(source)
    processor.save_pretrained(source)
    words = ("--content", "depth,boxes", "--depth-tokenizer", tokenizer_folder, "--seed", 3)
    code, _, err = run("init", "--base", source, *words, "--out", made)
    assert code == 0, err
    num_old = len(processor.tokenizer)
    rows = read_model(str(made)).get_input_embeddings().weight.data[num_old:]
    codebook = load_depth_tokenizer(tokenizer_folder).network.codebook.vectors
    old = model.get_input_embeddings().weight.data[:num_old]
    tokens = [*depth_tokens(SHAPE.num_codes), *pixel_tokens()]
    assert torch.equal(rows[: len(tokens)], draw_embeddings(old, tokens, 3, codebook))


def test_init_without_a_depth_tokenizer_says_so(run, base, tmp_path):
    words = ("--branches", "clip", "--content", "depth", "--out", tmp_path / "made")
    code, out, err = run("init", "--base", base, *words)
    assert code == 0, err
    assert "content     depth; no depth tokenizer, so maps are codes only" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["--base", "b"],
            2,
            "give --branches to make a VPT model from a Qwen2-VL one, or --content",
        ),
        (["--base", "b", "--content", "maps"], 2, "unknown perception content 'maps'; available:"),
        (["--base", "/none", "--content", "boxes"], 4, "cannot load the base model /none"),
        (
            ["--base", "b", "--branches", "", "--depth-tokenizer", "x"],
            2,
            "--depth-tokenizer needs depth among --content",
        ),
        (
            ["--base", "b", "--branches", "", "--content", "depth", "--depth-tokenizer", "/none"],
            4,
            "there is no depth tokenizer /none",
        ),
        (["--base", "b", "--content", "boxes", "--dino", "x"], 2, "dino is not among --branches"),
    ],
)
def test_what_init_cannot_do_with_content_is_told(run, tmp_path, words, code, message):
    given, out, err = run("init", *words, "--out", tmp_path / "out")
    assert (given, out) == (code, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_init_of_a_plain_model_without_branches_says_what_to_do(run, base, tmp_path):
    code, _, err = run("init", "--base", base, "--content", "depth", "--out", tmp_path / "out")
    assert code == 4 and "is a plain qwen2_vl; name branches, or an empty list of them" in err


# --- ask --------------------------------------------------------------------------------------


def test_ask_draws_maps_and_boxes(run, eager, scene, tokenizer_folder, tmp_path):
    files = ("--picture", tmp_path / "p.png", "--trace", tmp_path / "t.json")
    code, _, err = run(
        *("ask", scene, "What?", "--model", eager, "--depth-tokenizer", tokenizer_folder),
        *(*files, "--max-new-tokens", 90),
    )
    assert code == 0, err
    trace = Trace.load(tmp_path / "t.json")
    whole = [one for one in trace.content if one.kind == "depth" and one.is_whole]
    assert whole and all(one.picture for one in whole)
    assert err.count("[drew: ") == len(trace.content)
    assert "no depth tokenizer" not in err and (tmp_path / "p.png").stat().st_size > 1000


def test_ask_says_that_maps_stay_codes_and_what_was_cut_off(run, eager, scene):
    code, _, err = run("ask", scene, "What?", "--model", eager, "--max-new-tokens", 90)
    assert code == 0
    assert "note: the depth map is kept as codes; this model has no depth tokenizer" in err
    trace = json.loads(
        run("ask", scene, "What?", "--model", eager, "--max-new-tokens", 90, "--json")[1]
    )
    first = next(one for one in trace["content"] if one["kind"] == "depth")
    limit = first["start"] + 2
    code, _, err = run("ask", scene, "What?", "--model", eager, "--max-new-tokens", limit)
    assert code == 0
    assert "depth map, cut off after 1 code of 4; allow more with --max-new-tokens" in err


def test_ask_with_a_depth_tokenizer_that_is_not_there(run, eager, scene):
    code, out, err = run("ask", scene, "q", "--model", eager, "--depth-tokenizer", "/none")
    assert (code, out) == (4, "") and "there is no depth tokenizer /none" in err

"""Benchmarks run, compare what must be equal and report it all; their times are not tested."""

import json
from dataclasses import replace
from unittest import mock

import backbones
import engine_costs
import pytest
import single_pass
import torch
import training_step
from peak_memory import peak_memory
from random_models import SIZES, build, plain_model
from training_rows import make_batch

from vpt.model.folder import BACKBONES


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "out.json"
    options = ["--size", "tiny", "--repeats", "1", "--new-tokens", "4", "--batch-size", "2"]
    single_pass.main([*options, "--json", str(file)])
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def tiny(report):
    return report["sizes"]["tiny"]


def test_report_names_versions_settings_and_all_sections(report, tiny):
    assert report["versions"].keys() == {"vpt", "torch", "transformers", "python"}
    assert report["settings"]["new_tokens"] == 4
    assert tiny.keys() == {
        "parameters",
        "judged_by",
        "single_pass",
        "plain_answer",
        "batching",
        "extension",
        "goals",
    }
    assert tiny["single_pass"].keys() == {"region", "clip", "dino"}
    assert len(tiny["goals"]) == 4


def test_costs_of_the_engine_are_measured_on_a_cpu_but_for_graphs(capsys):
    options = "--size tiny --repeats 1 --new-tokens 2 --batch-size 2 --prompts 2 --calls 2"
    options += " --lengths 64 96 --parts decoding prefill lengths calls follow-up"
    of = engine_costs.main(options.split())["sizes"]["tiny"]
    assert "CUDA graphs, and the shapes of 2B and 7B models, are not run" in capsys.readouterr().out
    assert of["decoding"][2]["tokens_equal"] and of["decoding"][2]["graph_gain"] is None
    assert all(section["tokens_equal"] for section in of["prefill"].values())
    assert of["follow-up"]["tokens_equal"]
    assert of["lengths"]["lengths"] == [64, 96] and len(of["calls"]["ms"]) == 2


@pytest.mark.slow
def test_each_backbone_writes_the_tokens_of_transformers_and_is_trained_both_ways():
    options = "--parts speed norms --size tiny --repeats 1 --new-tokens 3 --steps 2 --seeds 1"
    report = backbones.main(options.split())
    assert report["speed"].keys() == report["norms"].keys() == {*BACKBONES}
    assert all(section["tokens_equal"] for section in report["speed"].values())
    for section in report["norms"].values():
        released, scaled = (section[way][0] for way in backbones.WAYS)
        assert released["first_ratio"] == scaled["first_ratio"] > 10
        assert released["loss"] != scaled["loss"]
    assert 1 < report["shipped_ratio"] < 10


def test_all_contestants_write_the_same_tokens(tiny):
    sections = [*tiny["single_pass"].values(), tiny["plain_answer"], tiny["batching"]["2"]]
    assert all(section["tokens_equal"] is True for section in sections)


@pytest.mark.parametrize("mode", ["region", "clip", "dino"])
def test_one_pass_reads_fewer_tokens_and_copies_no_cache(tiny, mode):
    section = tiny["single_pass"][mode]
    assert section["llm_tokens_ratio"] > 1
    assert section["contestants"]["single_pass"]["kv_bytes_copied"] == 0
    assert section["contestants"]["two_pass"]["kv_bytes_copied"] > 0


def test_every_repeat_is_kept_and_peak_memory_is_measured_or_left_out(tiny):
    for contestant in tiny["single_pass"]["region"]["contestants"].values():
        assert contestant["peak_memory_bytes"] is None or contestant["peak_memory_bytes"] > 2**20
        for times in contestant["ms"].values():
            assert len(times["wall"]) == len(times["cpu"]) == 1
    assert len(tiny["extension"]["ms"]) == 5


def test_peak_memory_sees_what_is_freed_again():
    held = [bytearray(40_000) for _ in range(2000)]
    del held[:-1]  # 80 MB that the allocator may keep for later
    small, large = (peak_memory(lambda n=n: bytearray(n)) for n in (2**20, 50 * 2**20))
    if small is None:
        pytest.skip("this system does not tell how far memory rises")
    assert small < 20 * 2**20 < 45 * 2**20 < large


def test_peak_memory_of_what_fails_is_left_out():
    assert peak_memory(lambda: 1 / 0) is None


TINIEST = replace(
    SIZES["tiny"], text={**SIZES["tiny"].text, "num_hidden_layers": 2}, image_wh=(112, 84)
)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "out.json"
    names = ["clip, equal rows", "clip", "region"]
    options = ["--size", "tiny", "--repeats", "1", "--batches", *names]
    with mock.patch.dict(SIZES, tiny=TINIEST):
        training_step.main([*options, "--json", str(file)])
    tiny = json.loads(file.read_text())["sizes"]["tiny"]
    assert len(tiny["goals"]) == 7
    return tiny["batches"]


def test_training_steps_are_measured_with_and_without_checkpointing(batches):
    equal = {"clip, equal rows", "clip, equal rows, checkpointed"}
    assert batches.keys() == {*equal, "clip", "region"}
    for section in batches.values():
        for contestant in section["contestants"].values():
            assert (
                contestant["peak_memory_bytes"] is None or contestant["peak_memory_bytes"] > 2**20
            )
            assert len(contestant["ms"]["wall"]) == len(contestant["ms"]["cpu"]) == 1


def test_contestants_of_a_training_step_read_what_they_should(batches):
    assert batches["clip"]["tokens"] < batches["clip"]["padded_tokens"]
    for name, section in batches.items():
        read = {key: facts["llm_tokens"] for key, facts in section["contestants"].items()}
        assert read["sft"] == section["padded_tokens"]
        assert read["two passes"] == 2 * section["padded_tokens"]
        if name == "region":
            assert read["ours"] == section["padded_tokens"]
        else:
            assert read["ours"] == section["tokens"]
            assert section["tokens"] < read["ours, half masked"] < 1.5 * section["tokens"]


def test_the_training_baseline_takes_several_calls_and_a_difference_is_noticed():
    model, processor = build(TINIEST, torch.device("cpu"), torch.float32)
    model.config.para_mask_ratio = 0.5
    batch = make_batch("mixed", model, processor, TINIEST.image_wh)
    assert [look.branch for look in batch.looks] == ["reencode"] * 3 + ["dino"] * 2
    bench = training_step.Bench(model.train(), plain_model(model), batch, "float32", 1)
    found = bench.check_equal()
    assert found.keys() == {"ours", "ours, half masked"}
    batch.inputs["labels"][:, ::2] = -100
    batch.image_embeds.mul_(2)
    batch.looks[0].features.values.mul_(3)
    bench.check_equal()
    batch.looks.pop()
    with pytest.raises(SystemExit, match="ours differs from two passes"):
        bench.check_equal()

"""LLaMA-Factory reads the rows, and keeps the order of a curriculum."""

import warnings
from types import SimpleNamespace

import pytest
from aurora_samples import blocks

from vpt.data.content_rows import map_row, point_rows
from vpt.data.curriculum import Annealing, anneal
from vpt.data.points import Point
from vpt.data.rows import write_rows

pytest.importorskip("llamafactory")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A curriculum as the ``datasets`` package reads it, in parts of a few rows each."""
    from datasets import load_dataset

    folder = tmp_path_factory.mktemp("rows")
    drawn = blocks(0) * 0
    drawn[:40] = 0.75
    points = (Point("A", 50, 250, 0.1), Point("B", 250, 50, 0.95))
    codes = [5] * 100
    atomic = [map_row(f"{n}.jpg", codes, {}) for n in range(30)]
    others = [point_rows(f"{n}.jpg", points, codes, drawn, {})[1] for n in range(30)]
    rows = list(anneal(atomic, others, Annealing()))
    write_rows(rows, folder / "curriculum.jsonl")
    read = load_dataset(
        "json",
        data_files=str(folder / "curriculum.jsonl"),
        split="train",
        cache_dir=str(folder / "cache"),
        chunksize=4096,  # so that the first part holds atomic rows only
    )
    return rows, read


def test_datasets_reads_all_rows(dataset):
    rows, read = dataset
    assert [dict(row) for row in read] == rows


def test_the_converter_takes_them(dataset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba and rouge, when they are compiled
        from vpt.training.dataset import VPTDatasetConverter

    rows, read = dataset
    settings = {"media_dir": "", "streaming": False, "template": "vpt_qwen2_vl"}
    convert = VPTDatasetConverter(None, SimpleNamespace(**settings))
    [converted] = convert(read[0]).to_pylist()
    assert converted["_response"] == [rows[0]["messages"][1]]
    assert converted["_images"] == [{"kind": "image", "path": rows[0]["images"][0]}]


def test_disable_shuffling_keeps_the_order(dataset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba and rouge, when they are compiled
        from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from torch.utils.data import SequentialSampler

    _, read = dataset
    trainer = SimpleNamespace(
        finetuning_args=SimpleNamespace(disable_shuffling=True), train_dataset=read
    )
    sampler = CustomSeq2SeqTrainer._get_train_sampler(trainer)
    assert isinstance(sampler, SequentialSampler)
    assert list(sampler) == list(range(len(read)))

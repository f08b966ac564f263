"""Padding is counted as a batch has it, and grouping by length keeps every row."""

import json

import padding as bench
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


def test_padding_is_the_share_of_tokens_that_are_none():
    assert bench.padding([2, 4, 4, 4], range(4), 2) == pytest.approx(2 / 16)
    assert bench.padding([3, 3], range(2), 2) == 0


@given(st.lists(st.integers(1, 50), min_size=4, max_size=40), st.integers(1, 4))
def test_grouping_keeps_every_row_and_pads_no_more(lengths, size):
    order = list(range(len(lengths)))
    grouped = bench.grouped(lengths, order, size)
    assert sorted(grouped) == order
    whole = len(lengths) // size * size
    if whole == len(lengths):
        plain = bench.padding(lengths, order, size)
        assert bench.padding(lengths, grouped, size) <= plain + 1e-12


def test_rows_are_counted_with_their_calls(tmp_path, capsys):
    Image.new("RGB", (448, 448)).save(tmp_path / "a.png")
    turns = ["<image>\nWhat?", "<|clip_action_start|><|clip_action|><|clip_action_end|>"]
    turns += ["<clip_image>", "Red."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    called = {"messages": messages, "images": ["a.png"], "clip_images": ["a.png"]}
    direct = {"messages": [messages[0], messages[3]], "images": ["a.png"], "clip_images": []}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [called, direct] * 8))
    bench.main([str(file), "--images", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("16 rows, ") and "batches of 16: " in said
    assert "passes 2.00, packed into one row 9.00" in said.splitlines()[-1]

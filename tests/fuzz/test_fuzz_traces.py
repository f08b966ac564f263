"""Mutated traces: refused with words, or fit for everything that is done with a trace."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
from drawing import eager_model, noise
from fuzz.limits import within_limits
from tiny_model import tiny_model

import vpt
from vpt.demo.runs import box_to_edit, draw_views, shown_results
from vpt.errors import VPTError
from vpt.trace.records import Trace
from vpt.view.picture import draw
from vpt.view.timeline import timeline_html

ODD = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(10**400), 10**400, 0.5, 1e308, -1e308),
    *(float("inf"), float("-inf"), float("nan"), "", "0", "crop", "dino", "depth", "executed"),
    *("\x00\ud800\u202e", "<script>", "data:image/png;base64,AAAA", "x" * 10_000),
    *([], {}, [[]], [None], [0, 0, 0, 0], [1, 1, 2, 2], {"a": {"b": []}}, {"width": 3}, [1e999]),
)


@pytest.fixture(scope="module")
def traces():
    """JSON texts of runs with calls of each kind, maps and boxes."""
    texts, drawing = [], vpt.Runtime(*eager_model())
    looking, image = vpt.Runtime(*tiny_model()), vpt.load_image(noise(1))
    for runtime, perception in [
        *((looking, "region"), (looking, "dino"), (looking, "sam")),
        *((drawing, "region"), (drawing, "clip")),
    ]:
        trace = runtime.ask([image], "What?", perception=perception, max_new_tokens=24).trace
        trace.keep_thumbnails([image])
        for one in trace.content:
            one.keep_depth_map(lambda codes: np.linspace(0, 1, 64).reshape(8, 8))
        assert trace.calls
        texts.append(trace.to_json())
    assert all(f'"{kind}"' in texts[-1] for kind in ("depth", "boxes"))
    return texts


def places(content, path=()):
    """Paths of all values of a JSON object."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutate(content, chance):
    """Change one to three values, keys or lists in place."""
    for _ in range(chance.randint(1, 3)):
        *path, key = chance.choice(list(places(content)))
        holder = content
        for step in path:
            holder = holder[step]
        kind, old = chance.randrange(7), holder[key]
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = old
        elif kind == 2 and isinstance(old, list) and old:
            holder[key] = old * chance.choice((2, 30))
        elif kind == 3:
            for _ in range(chance.choice((1, 20, 250))):
                old = chance.choice(([old], {"a": old}))
            holder[key] = old
        elif kind == 4 and isinstance(old, int | float):
            holder[key] = old * chance.choice((-1, 0, 2, 100)) + chance.choice((-1, 0, 1, 0.5))
        elif kind == 5 and isinstance(old, str) and old:
            at = chance.randrange(len(old))
            holder[key] = old[:at] + chance.choice(("", "\0", "é", "A")) + old[at + 1 :]
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))


def use(path):
    """Everything that is done with a saved trace."""
    trace = Trace.load(path)
    assert Trace.from_dict(json.loads(trace.to_json())).to_json() == trace.to_json()
    trace.save(path)
    timeline_html(trace).encode()
    results = shown_results(trace)
    box_to_edit(trace)
    draw(trace)
    for number in [number for _, number in results] or [None]:
        draw_views(trace, number)


def check(traces, seeds, tmp_path):
    num_used = 0
    for seed in seeds:
        chance = random.Random(seed)
        content = json.loads(chance.choice(traces))
        mutate(content, chance)
        path = tmp_path / "t.json"
        path.write_text(json.dumps(content), encoding=chance.choice(("utf-8", "utf-8-sig")))
        with within_limits(f"trace {seed}"):
            try:
                use(path)
                num_used += 1
            except VPTError as exc:
                assert len(str(exc)) < 500, seed
            except Exception as exc:
                raise AssertionError(f"trace of seed {seed}") from exc
    assert 0.05 < num_used / len(seeds) < 0.95


def test_a_mutated_trace_is_refused_or_works(traces, tmp_path):
    check(traces, range(60), tmp_path)


@pytest.mark.slow
def test_many_mutated_traces_are_refused_or_work(traces, tmp_path):
    check(traces, range(2000), tmp_path)

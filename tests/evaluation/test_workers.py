"""Several workers give the same records and the same result as one process."""

import importlib.util

import pytest

from vpt.errors import PromptError
from vpt.evaluation.evaluate import evaluate, make_plan
from vpt.evaluation.records import RunFolder
from vpt.evaluation.runner import Decoding, LocalAsker
from vpt.evaluation.workers import RayAsker

DECODING = Decoding(max_new_tokens=12, max_calls=1)


def records_in(folder):
    records = RunFolder(folder).read_all()
    return {r.key: (r.prediction, r.scores, r.error, r.num_calls) for r in records}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_workers_are_one_process(runtime, own_split, random_model, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    (own_split.parent / "3.png").write_bytes(b"torn")
    plan = make_plan(splits=[str(own_split)], conditions=["none", "truth"], data=own_split.parent)

    def run(asker, name):
        return evaluate(asker, plan, DECODING, RunFolder(tmp_path / name), batch_size=2)

    one = run(LocalAsker(runtime), "one")
    try:
        two = run(RayAsker({"path_or_id": str(random_model), "device": "cpu"}, 2), "two")
    finally:
        ray.shutdown()
    assert records_in(tmp_path / "two") == records_in(tmp_path / "one")
    assert two["model"]["hash"] == one["model"]["hash"]
    for mine, theirs in zip(two["splits"], one["splits"], strict=True):
        for key in set(mine) - {"milliseconds"}:
            assert mine[key] == theirs[key], key


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_its_extra_is_named():
    with pytest.raises(PromptError, match=r'pip install -e "\.\[ray\]"'):
        RayAsker({"path_or_id": None}, 2)

"""Several models at once, on as many devices or hosts; Ray Data shards the samples."""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.errors import PromptError
from vpt.evaluation.records import Record
from vpt.evaluation.runner import (
    Condition,
    Decoding,
    LocalAsker,
    Work,
    by_sample,
    check_conditions,
    run_tasks,
)

if TYPE_CHECKING:
    from vpt.runtime import Runtime

_BATCHES_PER_SHARD = 4


class RayAsker:
    """An :class:`vpt.evaluation.evaluate.Asker` over models in worker processes, placed by Ray.

    Ray is started on this machine, unless ``RAY_ADDRESS`` names a cluster. Each worker loads the
    model once, on a GPU of its own if the device is one. A record is yielded when its shard of
    a few batches is done, so a kill loses no more than these.
    """

    def __init__(self, load_options: Mapping[str, Any], num_workers: int) -> None:
        try:
            import ray.data
        except ImportError as exc:
            raise PromptError('--workers needs Ray; install it: pip install -e ".[ray]"') from exc
        self._ray = ray
        self._load_options = dict(load_options)
        self._num_workers = num_workers
        if not ray.is_initialized():
            # On this machine: one processor more than workers, for Ray's own tasks.
            own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": num_workers + 1}
            ray.init(
                **own,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False,
                runtime_env={"env_vars": {"PYTHONPATH": _search_path()}},
            )
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._described: dict[str, Any] | None = None

    def describe(self) -> Mapping[str, Any]:
        """See :class:`vpt.evaluation.evaluate.Asker`; a worker loads the model for it."""
        return self._ask_a_worker()["described"]

    def check(self, conditions: Sequence[Condition]) -> None:
        """See :class:`vpt.evaluation.evaluate.Asker`."""
        check_conditions(conditions, self._ask_a_worker()["branches"])

    def ask(self, work: Sequence[Work], decoding: Decoding, batch_size: int) -> Iterator[Record]:
        """See :class:`vpt.evaluation.evaluate.Asker`; one sample after the other."""
        tasks = [one.task for one in work]
        rows = [
            {"task": tasks.index(task), "sample": pickle.dumps(sample)}
            for task, sample in by_sample(work)
        ]
        if not rows:
            return
        num_shards = math.ceil(len(rows) / (batch_size * _BATCHES_PER_SHARD))
        asked = self._ray.data.from_items(rows, override_num_blocks=num_shards).map_batches(
            _Worker,
            fn_constructor_args=(self._load_options, tasks, decoding, batch_size),
            batch_size=None,
            compute=self._ray.data.ActorPoolStrategy(size=self._num_workers),
            **self._resources(),
        )
        for row in asked.iter_rows():
            yield Record.from_line(row["record"])

    def _ask_a_worker(self) -> dict[str, Any]:
        if self._described is None:
            describe = self._ray.remote(**self._resources())(_describe)
            self._described = self._ray.get(describe.remote(self._load_options))
        return self._described

    def _resources(self) -> dict[str, Any]:
        """Resources of one worker."""
        import torch

        device = self._load_options.get("device")
        on_gpu = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
        return {"num_gpus": 1} if on_gpu else {"num_cpus": 1}


class _Worker:
    """Holds a model and runs shards over it."""

    def __init__(
        self,
        load_options: Mapping[str, Any],
        tasks: Sequence[Any],
        decoding: Decoding,
        batch_size: int,
    ) -> None:
        self.runtime = _load(load_options)
        self.tasks = tasks
        self.decoding = decoding
        self.batch_size = batch_size

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, list[str]]:
        pairs = zip(shard["task"], shard["sample"], strict=True)
        asked = [(self.tasks[int(number)], pickle.loads(sample)) for number, sample in pairs]
        records = run_tasks(self.runtime, asked, self.decoding, self.batch_size)
        return {"record": [record.to_line() for record in records]}


def _describe(load_options: Mapping[str, Any]) -> dict[str, Any]:
    asker = LocalAsker(_load(load_options))
    return {"described": asker.describe(), "branches": tuple(asker.runtime.vocabulary.branches)}


def _load(load_options: Mapping[str, Any]) -> Runtime:
    import vpt

    return vpt.load(**load_options)


def _search_path() -> str:
    """Path on which workers find this package: run as a script, it may not be installed."""
    own, others = str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(dict.fromkeys([own, *others.split(os.pathsep)]))

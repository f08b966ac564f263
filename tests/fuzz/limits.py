"""Bounds that every fuzzed input has to keep: CPU time, and memory at its peak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

MAX_CPU_S = 5.0
MAX_BYTES = 2 * 10**9

_STATUS = Path("/proc/self/status")


@contextlib.contextmanager
def within_limits(
    what: object, max_cpu_s: float = MAX_CPU_S, max_bytes: int = MAX_BYTES
) -> Iterator[None]:
    """Fail if the block takes more CPU time or, on Linux, more new memory than allowed.

    Args:
        what: names the input in the failure.
        max_cpu_s: CPU seconds of all threads of this process.
        max_bytes: of new memory.
    """
    before = _restart_peak()
    started = time.process_time()
    yield
    spent = time.process_time() - started
    grown = _status_bytes("VmHWM") - before
    assert spent < max_cpu_s, f"{what}: {spent:.1f} s of CPU"
    assert grown < max_bytes, f"{what}: {grown / 1e9:.2f} GB of memory"


def _restart_peak() -> int:
    """Let the kernel measure the peak from here on; returns the memory in use, in bytes."""
    if not _STATUS.exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    if not _STATUS.exists():
        return 0
    line = next(one for one in _STATUS.read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) * 1024

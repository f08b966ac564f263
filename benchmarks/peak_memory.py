"""How far memory rises while something runs on a CPU, measured in a child of its own."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")  # "5" resets the peak, see proc(5)
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which resident memory peaks above where it stood before ``run``.

    The child is forked, so weights are shared and not counted, and nothing that an earlier run
    has freed is at hand: it is given back first, and large blocks are taken one by one.

    Returns:
        The rise, or ``None`` where the system does not tell (it must be Linux) or ``run`` fails.
    """
    if not _RESET_PEAK.exists():
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # one thread only: fork is safe
        child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
            libc.malloc_trim(0)  # what the parent has freed would be used again uncounted
            _RESET_PEAK.write_text("5")
            before = _status("VmRSS")
            run()
            os.write(writer, str(_status("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return int(said) if said else None


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

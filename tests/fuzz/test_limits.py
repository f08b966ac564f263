import time

import pytest
from fuzz.limits import MAX_BYTES, within_limits


def test_little_work_is_within_limits():
    with within_limits("nothing"):
        pass


def test_too_much_time_is_named():
    with pytest.raises(AssertionError, match=r"loop: .* s of CPU"), within_limits("loop", 0.01):
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass


@pytest.mark.slow
def test_too_much_memory_is_named():
    with pytest.raises(AssertionError, match=r"array: .* GB"), within_limits("array"):
        bytearray(MAX_BYTES + 10**8)[::4096] = b"x" * (-(-(MAX_BYTES + 10**8) // 4096))

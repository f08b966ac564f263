"""One thread runs the model; requests come from any thread, and leave at any time."""

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from tiny_model import tiny_model

import vpt
from vpt.errors import RunError
from vpt.inference.events import ErrorEvent, StopEvent
from vpt.inference.request import Sampling


@pytest.fixture
def runtime():
    return vpt.Runtime(*tiny_model(), max_num_seqs=3)


ROOT = Path(__file__).parents[2]
QUESTIONS = [f"Question {n}?" for n in range(12)]


def test_threads_get_their_own_answers(runtime):
    expected = [runtime.ask([], question, max_new_tokens=12).text for question in QUESTIONS]
    with ThreadPoolExecutor(12) as pool:
        asked = pool.map(lambda q: runtime.ask([], q, max_new_tokens=12).text, QUESTIONS)
        assert list(asked) == expected
    assert runtime.engine.num_free_slots == 3


def test_requests_are_begun_in_the_order_in_which_they_come(runtime):
    worker, begun = runtime.worker, []
    done = SimpleQueue()

    def conversation(n):
        inner = runtime.converse(runtime.request([], f"{n}?", max_new_tokens=3)).run()
        begun.append(n)
        yield from inner

    for n in range(8):
        worker.submit(conversation(n), Sampling(), done.put)
    ended = 0
    while ended < 8:
        ended += isinstance(done.get(timeout=60), StopEvent)
    assert begun == list(range(8))


def test_a_cancelled_request_frees_its_slot_and_says_nothing_more(runtime):
    worker, events = runtime.worker, SimpleQueue()
    request = runtime.request([], "Long?", max_new_tokens=2000, temperature=1.0)
    key = worker.submit(runtime.converse(request).run(), request.sampling, events.put)
    events.get(timeout=60)
    worker.cancel(key)
    assert runtime.engine.num_free_slots == 3
    while not events.empty():
        assert not isinstance(events.get(), StopEvent)
    worker.cancel(key)  # again: nothing happens
    assert runtime.ask([], "And?", max_new_tokens=3).trace.tokens


def test_a_waiting_request_can_be_cancelled(runtime):
    worker, events = runtime.worker, SimpleQueue()
    request = runtime.request([], "Long?", max_new_tokens=2000, temperature=1.0)
    keys = [
        worker.submit(runtime.converse(request).run(), request.sampling, events.put)
        for _ in range(5)
    ]
    events.get(timeout=60)
    for key in reversed(keys):
        worker.cancel(key)
    assert (worker.num_running, worker.num_waiting) == (0, 0)
    assert runtime.engine.num_free_slots == 3


def test_an_error_of_the_thread_itself_answers_every_request(runtime, monkeypatch, caplog):
    def broken(self):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("vpt.inference.scheduler.Scheduler.round", broken)
    answers = runtime.ask_many(
        [{"images": [], "question": q} for q in QUESTIONS[:4]], on_error="return"
    )
    assert all(isinstance(answer, RunError) for answer in answers)
    assert "the model's thread has ended" in caplog.text
    with pytest.raises(RunError, match=r"the model's thread has ended: .*ZeroDivisionError: ours"):
        runtime.ask([], "And?")


def test_the_thread_ends_with_its_runtime():
    runtime = vpt.Runtime(*tiny_model())
    runtime.ask([], "What?", max_new_tokens=2)
    thread, gone = runtime.worker._thread, weakref.ref(runtime)
    del runtime
    gc.collect()
    assert gone() is None
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_closed_runtime_begins_a_new_thread(runtime):
    before = runtime.ask([], "What?", max_new_tokens=5).text
    thread = runtime.worker._thread
    runtime.close()
    assert not thread.is_alive()
    assert runtime.ask([], "What?", max_new_tokens=5).text == before


def test_gradients_and_threads_of_the_caller_are_left_alone(runtime):
    num_threads = torch.get_num_threads()
    runtime.ask([], "What?", max_new_tokens=2)
    assert torch.is_grad_enabled() and torch.get_num_threads() == num_threads


def endless(runtime, **options):
    request = runtime.request([], "Long?", max_new_tokens=10**5, temperature=1.0, **options)
    return runtime.converse(request).run(), request.sampling


def test_closing_the_runtime_ends_what_runs_and_waits_with_an_error(runtime):
    worker, events = runtime.worker, [SimpleQueue() for _ in range(5)]
    for queue in events:
        worker.submit(*endless(runtime), queue.put)
    events[0].get(timeout=60)
    runtime.close()
    for queue in events:
        last = None
        while not queue.empty():
            last = queue.get()
        assert isinstance(last, ErrorEvent)
        with pytest.raises(RunError, match="the runtime was closed before the request had ended"):
            raise last.error
    assert (worker.num_running, worker.num_waiting) == (0, 0)
    assert runtime.engine.num_free_slots == 3


def test_requests_and_closings_at_once_never_leave_a_request_without_an_end(runtime):
    def ask(number):
        if number % 4 == 3:
            runtime.close()
            return None
        return runtime.ask_many([{"images": [], "question": "?", "max_new_tokens": 3}], 1, "return")

    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(ask, range(80), timeout=60):
            assert answers is None or len(answers) == 1
    assert runtime.engine.num_free_slots == 3


def test_a_sink_that_raises_cancels_its_own_request(runtime, caplog):
    worker, events = runtime.worker, SimpleQueue()

    def broken(event):
        raise ZeroDivisionError("ours")

    worker.submit(*endless(runtime), broken)
    request = runtime.request([], "What?", max_new_tokens=5)
    worker.submit(runtime.converse(request).run(), request.sampling, events.put)
    while not isinstance(events.get(timeout=60), StopEvent):
        pass
    assert worker.error is None and (worker.num_running, worker.num_waiting) == (0, 0)
    assert "nobody takes the events of a request, which is cancelled" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_breaks_answers_every_request(runtime, monkeypatch):
    def broken(*args):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(runtime.engine.decoder, "prefill", broken)
    monkeypatch.setattr(runtime.engine.cache, "clear", broken)
    asked = [{"images": [], "question": question} for question in QUESTIONS[:5]]
    for answer in runtime.ask_many(asked, batch_size=5, on_error="return"):
        with pytest.raises(RunError, match="device-side assert"):
            raise answer


def test_an_iterator_half_read_keeps_the_runtime_until_it_is_gone():
    runtime = vpt.Runtime(*tiny_model())
    events = runtime.stream([], "Long?", max_new_tokens=10**5, temperature=1.0)
    next(events)
    thread, gone = runtime.worker._thread, weakref.ref(runtime)
    del runtime
    gc.collect()
    assert thread.is_alive() and next(events)
    del events
    gc.collect()
    thread.join(timeout=30)
    assert gone() is None and not thread.is_alive()


PROGRAM = """
import os, signal, sys, threading
import torch
from tiny_model import tiny_model
import vpt

torch.set_num_threads(1)
runtime = vpt.Runtime(*tiny_model(), max_num_seqs=3)
short = lambda: runtime.ask([], "What?", max_new_tokens=5).text
before = short()
events = runtime.stream([], "Long?", max_new_tokens=10**5, temperature=1.0)
next(events)

pid = os.fork()
if not pid:
    signal.alarm(60)
    idle = runtime.worker.num_running == 0 and runtime.engine.num_free_slots == 3
    os._exit(0 if idle and short() == before else 1)
assert os.waitpid(pid, 0)[1] == 0
assert runtime.worker.num_running == 1

threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    for _ in events:
        pass
    raise AssertionError("not interrupted")
except KeyboardInterrupt:
    assert runtime.worker.num_running == 0 and short() == before

events = runtime.stream([], "Long?", max_new_tokens=10**5, temperature=1.0)
next(events)
print("the end")
sys.exit(3)
"""


@pytest.mark.slow
def test_fork_interrupt_and_exit_with_a_request_under_way():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "the end\n", "")

"""One thread runs the model; requests come from any thread, and leave at any time."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
import torch
from tiny_model import tiny_model

import vpt
from vpt.errors import RunError
from vpt.inference.events import StopEvent
from vpt.inference.request import Sampling


@pytest.fixture
def runtime():
    return vpt.Runtime(*tiny_model(), max_num_seqs=3)


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
    runtime.close()
    assert not any(thread.name == "vpt-model" for thread in threading.enumerate())
    assert runtime.ask([], "What?", max_new_tokens=5).text == before


def test_gradients_and_threads_of_the_caller_are_left_alone(runtime):
    num_threads = torch.get_num_threads()
    runtime.ask([], "What?", max_new_tokens=2)
    assert torch.is_grad_enabled() and torch.get_num_threads() == num_threads

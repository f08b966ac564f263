"""Damaged requests: no 5xx, no hang, no traceback, and a server that is alive afterwards."""

import pytest
from served import ask, until
from serving_fuzz import fuzz


@pytest.mark.parametrize("number", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_requests_are_refused_or_answered(url, client, embedded, number):
    model = client.models.list().data[0].id
    statuses = fuzz(url, model, number)
    assert statuses.keys() >= {"200", "400"}
    answer = client.chat.completions.create(model=model, messages=ask())
    assert answer.choices[0].message.content == "3"
    until(lambda: embedded.worker.num_running == 0)

"""The scheduler on a tiny model: pages, order, failures. No HTTP."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.errors import FairyError
from fairy_compile.runtime import Model, SamplingParams
from fairy_compile.serve.invariance import invariant_rows
from fairy_compile.serve.request import Failed, Finished, Piece, QueueFullError, Request
from fairy_compile.serve.scheduler import Scheduler
from fairy_compile.serve.worker import EngineThread
from tests.runtime.conftest import make_engine, tiny  # noqa: F401 - fixtures

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def make_model(tiny, make_engine):  # noqa: F811
    def make(**options):
        return Model(tiny[0], make_engine(**options))

    return make


class Client:
    """Keeps the events of one request."""

    def __init__(self, prompt=(5, 6, 7), max_tokens=4, **options):
        self.events = []
        options.setdefault("sampling", GREEDY)
        self.request = Request(
            prompt=list(prompt), max_tokens=max_tokens, notify=self.events.append, **options
        )

    @property
    def text(self):
        return "".join(e.text for e in self.events if isinstance(e, Piece))

    @property
    def end(self):
        last = self.events[-1] if self.events else None
        return last if isinstance(last, (Finished, Failed)) else None


def run(scheduler, *clients, steps=500):
    for client in clients:
        scheduler.add(client.request)
    for _ in range(steps):
        if not scheduler.step():
            return
    raise AssertionError("it does not end")


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_answers_do_not_depend_on_rows_of_a_decode_call(make_model, rows):
    model = make_model()
    clients = [Client(range(1, 3 + 4 * i), 5 + i, continues_prompt=True) for i in range(6)]
    run(Scheduler(model, rows), *clients)
    for i, client in enumerate(clients):
        expected = model.generate(list(range(1, 3 + 4 * i)), 5 + i, temperature=0.0, stream=True)
        assert expected.read()
        assert client.text == expected.text
        assert client.end.completion_tokens == len(expected.tokens)
    assert model.engine.cache.used_pages == 0


def test_an_answer_waits_until_its_pages_are_free(make_model):
    """Four pages of 16 tokens; each answer can come to need two."""
    model = make_model(kv_tokens=64)
    scheduler = Scheduler(model, 4)
    clients = [Client(range(1, 11), 10) for _ in range(5)]
    for client in clients:
        scheduler.add(client.request)
    most = 0
    while scheduler.step():
        most = max(most, len(scheduler.running))
        assert model.engine.cache.used_pages <= scheduler.reserved_pages <= 4
    assert most == 2
    assert all(isinstance(client.end, Finished) for client in clients)
    assert scheduler.reserved_pages == 0


def test_requests_start_in_order_also_behind_a_large_one(make_model):
    model = make_model(kv_tokens=64)
    scheduler = Scheduler(model, 4)
    small, large, last = Client(max_tokens=5), Client(range(1, 40), 25), Client(max_tokens=1)
    order = []
    for name, client in (("small", small), ("large", large), ("last", last)):
        client.request.notify = lambda event, n=name: (
            order.append(n) if isinstance(event, Finished) else None
        )
        scheduler.add(client.request)
    while scheduler.step():
        pass
    assert order == ["small", "large", "last"]


def test_cancelled_requests_leave_without_a_trace(make_model):
    model = make_model()
    scheduler = Scheduler(model, 4)
    clients = [Client(max_tokens=40) for _ in range(6)]
    for client in clients:
        scheduler.add(client.request)
    scheduler.step()
    clients[0].request.cancelled = clients[5].request.cancelled = True  # running and waiting
    scheduler.step()
    assert clients[0].end.reason == clients[5].end.reason == "cancelled"
    for client in clients:
        client.request.cancelled = True
    assert not scheduler.step()
    assert model.engine.cache.sequences == []
    assert scheduler.reserved_pages == 0


def test_a_failing_answer_harms_no_other(make_model):
    model = make_model()
    bad = Client(sampling=SamplingParams(temperature=0.0, logit_bias={9999: 1.0}))
    good = Client()
    run(Scheduler(model, 4), bad, good)
    assert "9999" in bad.end.message
    assert good.end.completion_tokens == 4
    assert model.engine.cache.sequences == []


def test_a_failing_step_ends_its_answers_and_no_more(make_model, monkeypatch):
    model = make_model()
    scheduler = Scheduler(model, 4)
    clients = [Client(max_tokens=8) for _ in range(2)]
    for client in clients:
        scheduler.add(client.request)
    scheduler.step()

    def broken(*args, **kwargs):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "decode", broken)
        scheduler.step()
    assert all("secret" not in client.end.message for client in clients)
    after = Client()
    run(scheduler, after)
    assert isinstance(after.end, Finished)


def test_invariant_rows_are_measured(make_model, monkeypatch):
    engine = make_model().engine
    assert invariant_rows(engine) == 4
    decode = engine.decode
    monkeypatch.setattr(
        engine, "decode", lambda s, t, **_: decode(s, t) + np.float32(1e-3 * (len(s) > 2))
    )
    assert invariant_rows(engine) == 2
    monkeypatch.setattr(
        engine, "decode", lambda s, t, **_: decode(s, t) + np.float32(1e-3 * (len(s) > 1))
    )
    assert invariant_rows(engine) == 1
    assert engine.cache.sequences == []


def test_the_thread_bounds_its_queue_and_closes(make_model):
    thread = EngineThread(make_model, max_queue=1)
    with pytest.raises(QueueFullError, match="allowed: 5"):
        thread.submit([Client().request for _ in range(6)])
    clients = [Client(max_tokens=50) for _ in range(5)]
    thread.submit([client.request for client in clients])
    thread.close(10)
    assert not thread.alive
    assert all(client.end is not None for client in clients)
    with pytest.raises(FairyError, match="shutting down"):
        thread.submit([Client().request])


def test_a_model_that_does_not_load_is_told_where_the_thread_is_made():
    def load():
        raise FairyError("no such model")

    with pytest.raises(FairyError, match="no such model"):
        EngineThread(load)

"""Weights to engines, one of which hangs. The groups are stand-ins: no SGLang and no GPU is needed."""

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from l0fast.learner.broadcast import Broadcast

WAIT_S = 0.05
FLAT = torch.arange(4.0)


class Work:
    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Group:
    def __init__(self, broadcast):
        self.broadcast, self.sent, self.aborted = broadcast, 0, False

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def to(monkeypatch):
    """Weights on their way to engines whose groups do these things when they are broadcast to."""

    def broadcast(flat, *, src, group, async_op):
        group.sent += 1
        return group.broadcast()

    def to(*groups: Group) -> Broadcast:
        sending: Any = Broadcast.__new__(Broadcast)
        sending._wait_s, sending._groups = WAIT_S, dict(enumerate(groups))
        sending.failures = [None] * len(groups)
        return sending

    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: None)
    return to


def test_an_engine_that_is_gone_since_it_joined_holds_up_neither_the_learner_nor_the_others(to):
    """NCCL, which makes the communicator at the first broadcast, waits for it without end."""
    over = threading.Event()
    gone, other = Group(over.wait), Group(Work)
    sending, said = to(gone, other), []
    try:
        sending._send(FLAT, lambda doing, may_take_s: said.append(doing))
        sending._send(FLAT, lambda doing, may_take_s: said.append(doing))
    finally:
        over.set()
    assert sending.failures == [f"TimeoutError: it joined, and did not take its first bucket within {WAIT_S:g} s", None]
    assert (gone.sent, other.sent) == (1, 2)
    # NCCL is at work on it
    assert not gone.aborted
    # each may take as long, and says so anew
    assert len(said) == 3 + 2


def test_an_engine_whose_group_fails_is_lost_alone(to):
    def fails():
        raise RuntimeError("connection reset by peer")

    broken, other = Group(fails), Group(Work)
    sending = to(broken, other)
    sending._send(FLAT, lambda doing, may_take_s: None)
    assert sending.failures == ["RuntimeError: connection reset by peer", None]
    assert broken.aborted
    assert list(sending._groups) == [1]

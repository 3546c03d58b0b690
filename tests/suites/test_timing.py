"""Device times: turns without a device, what the host takes on one."""

from __future__ import annotations

import time

import pytest
import torch

from sparsebench.suites import timing
from sparsebench.suites.timing import event_times, host_time


class Clock:
    """A device event of a device that is never behind the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds)


def test_runs_take_turns_in_random_order(monkeypatch):
    empty, order = torch.empty, []
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(16, dtype=dtype))
    monkeypatch.setattr(timing, "timed_call", lambda run: (run(), 50.0))

    def run(name, seconds):
        order.append(name)
        time.sleep(seconds)

    fast, slow = event_times(lambda: run("fast", 1e-3), lambda: run("slow", 4e-3))
    assert len(fast) == len(slow) == 30 and fast.median() < slow.median() >= 4
    turns = [tuple(order[at : at + 2]) for at in range(len(order) - 2 * len(fast), len(order), 2)]
    assert set(turns) == {("fast", "slow"), ("slow", "fast")}
    assert event_times() == []


@pytest.mark.gpu
def test_what_the_host_takes_is_not_in_the_times():
    x = torch.ones(1 << 20, device="cuda")

    def slow():
        time.sleep(2e-3)
        x.add_(1)

    assert host_time(slow) > 2
    assert all(times.median() < 0.5 for times in event_times(slow, lambda: x.add_(1)))

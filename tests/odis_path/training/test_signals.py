"""A run hears the signals of a scheduler while it trains, and only then."""

from __future__ import annotations

import os
import signal
from threading import Thread

import pytest

from odis_path.training.signals import StopRequest, watch_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_stop_until_the_request_is_released(number: signal.Signals) -> None:
    heard: list[int] = []
    original = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        stop = watch_signals()
        os.kill(os.getpid(), number)
        assert (stop.requested, heard) == (True, [])
        stop.release()
        os.kill(os.getpid(), number)
        assert heard == [number]
    finally:
        signal.signal(number, original)


def test_another_thread_leaves_the_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    requests: list[StopRequest] = []
    thread = Thread(target=lambda: requests.append(watch_signals()))
    thread.start()
    thread.join()
    requests[0].release()
    assert signal.getsignal(signal.SIGTERM) is before

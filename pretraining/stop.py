"""An early end that a signal asks for, or a run that does not learn."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Whether an early end was asked for, and how."""

    signal: signal.Signals | None = None
    plateau: str | None = None
    """What the run's watch found, if that is to end the run."""

    def __bool__(self) -> bool:
        return self.signal is not None or self.plateau is not None

    def request(self, number: int, _: FrameType | None) -> None:
        """Handler; a second Ctrl-C does not wait for the step."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """While open, SIGTERM, SIGUSR1 (schedulers) and Ctrl-C end the run after the step at hand."""
    stop = Stop()
    before = {number: signal.signal(number, stop.request) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""SIGTERM and Ctrl-C: a run finishes the update that it is in, saves its state and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from part_fast import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE = 1  # below every signal above


class Stop:
    """In `with Stop() as stop`, signals are noted, and `asked` tells all processes of them at the same update.

    A second signal ends the process at once. Outside of the main thread signals stay what they are, since Python
    handles them there alone.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at_once = False

    def __enter__(self) -> Stop:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        at_once = self._at_once or self.signal
        self.signal = number
        if at_once:
            self.leave(number)

    def asked(self, due: bool) -> int:
        """SAVE, the number of a signal, or 0: what any process was asked for; every process gets the same answer.

        due: whether a state is to be saved in any case; the first process decides.
        """
        asked = self.signal or (SAVE if due and distributed.rank() == 0 else 0)
        return distributed.largest(asked)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal leaves at once. Not with several processes, which would wait for each other."""
        self._at_once = distributed.size() == 1
        try:
            if self._at_once and self.signal:
                self.leave(self.signal)
            yield
        finally:
            self._at_once = False

    @staticmethod
    def leave(number: int) -> NoReturn:
        """Raises KeyboardInterrupt for Ctrl-C, SystemExit(143) for SIGTERM."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

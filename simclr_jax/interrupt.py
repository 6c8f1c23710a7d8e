"""SIGTERM and Ctrl-C: a wish to stop, which the loop grants after saving; elsewhere the end, at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

from simclr_jax.logs import say

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_status(number: int | None) -> int:
    """Of a process that left in good order after a signal: 0, or 130 after Ctrl-C."""
    return 130 if number == signal.SIGINT else 0


@contextlib.contextmanager
def leaving(line: str) -> Iterator[None]:
    """While entered, SIGTERM or SIGINT ends the process at once: for where a kill loses nothing.

    A thread sees to it. The main thread takes no notice while it compiles, and an exception raised there
    would pass through libraries: Orbax took one for a damaged checkpoint.

    Args:
      line: said before the process ends.
    """
    told, teller = socket.socketpair()
    teller.setblocking(False)  # asked for by set_wakeup_fd

    def leave() -> None:
        while number := told.recv(1):
            if number[0] in _SIGNALS:
                try:
                    say(line)
                finally:
                    os._exit(exit_status(number[0]))

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(teller.fileno())
    previous = {number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        teller.close()
        thread.join()
        told.close()


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is remembered.

    After it Ctrl-C raises `KeyboardInterrupt`, for someone who will not wait. Another SIGTERM has no effect:
    schedulers send it to a process and to its group, or again after a while.
    """

    def __init__(self) -> None:
        """Nothing is caught before the context is entered."""
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}
        self._wakeup = -1

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self) -> None:
        """Asks for what SIGTERM asks for."""
        self.signal = self.signal or signal.SIGTERM

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(-1)  # or `leaving` would hear of it
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous = {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While entered, signals have the effect that they had before this context was entered."""
        if not self._previous:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

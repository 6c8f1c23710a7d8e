"""SIGTERM and Ctrl-C as a wish to stop, which the loop grants after saving."""

import signal
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is remembered; a second one has its usual effect."""

    def __init__(self) -> None:
        """Nothing is caught before the context is entered."""
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()

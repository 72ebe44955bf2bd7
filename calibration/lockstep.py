"""Forward passes that pause at every linear, so that a block can be quantized step by step in a single pass.

Quantizing q, k and v, then o, then gate and up, then down, each with statistics that see the ones before it, takes a
forward pass for every step if each pass starts anew. Instead every batch keeps its own pass open and waits in front of
the next linear until that is quantized. Only one of them runs at any time, so nothing about the numbers changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from fewbits.calibration.stats import OnInput


class Closed(Exception):
    """Raised inside a paused pass that nobody will resume."""


class PausedPass:
    """A forward pass in a thread of its own that stops in front of each of the named linears.

    Args:
        run: runs the pass, given a function to call with ``(name, x, tokens)`` for every input it sees.
        stops: names at which to pause.
    """

    def __init__(self, run: Callable[[OnInput], Tensor], stops: set[str]) -> None:
        self._run, self._stops = run, stops
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._input: tuple[Tensor, Tensor] | None = None
        self._output: Tensor | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._body, daemon=True)
        self._thread.start()

    def _body(self) -> None:
        self._go.acquire()
        try:
            if not self._closed:
                self._output = self._run(self._pause)
        except BaseException as error:  # whatever it is belongs to the thread that waits for us
            self._error = error
        self._input = None
        self._halted.release()

    def _pause(self, name: str, x: Tensor, tokens: Tensor) -> None:
        if name in self._stops:
            self._input = x, tokens
            self._halted.release()
            self._go.acquire()
            if self._closed:
                raise Closed

    def next_input(self) -> tuple[Tensor, Tensor]:
        """Run up to the next stop: the input of that linear ``(..., K)`` and the tokens that its rows are of."""
        self._resume()
        assert self._input is not None, "the pass ended before the linear it was to stop at"
        return self._input

    def finish(self) -> Tensor:
        """Run to the end: the output of the pass."""
        self._resume()
        assert self._output is not None, "the pass stopped at a linear it had seen before"
        return self._output

    def _resume(self) -> None:
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Abandon the pass, wherever it is."""
        self._closed = True
        self._go.release()
        self._thread.join()

"""One-shot wake-ups that cost no loop turn.

What lives here: `Waiter`, the awaitable by which a request sleeps until its
upstream, its client or its room in a queue is ready. What must not: knowledge
of HTTP. Heat: R.

Law: `wake()` runs the sleeping coroutine before it returns when an eager
driver (see `cycle.py`) drives that coroutine, and through an asyncio Future
when a Task does. The caller of `wake()` must therefore be done with its own
work: anything after the call sees a changed world.

Wakes inside wakes nest to a bound, then wait for the next loop turn: a queue in
which each sleeper wakes the next would else end in a RecursionError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any, ClassVar

_MAX_DEPTH = 16  # a wake is about four frames, of the interpreter's 1,000


class Waiter:
    """Sleep until `wake()`; at most one coroutine may await it.

    Cancellation: `CancelledError` may be thrown in while asleep; a later
    `wake()` is then without effect.
    """

    __slots__ = ("_future", "done", "resume")

    driven: ClassVar[bool] = False  # an eager driver runs a step just now
    _depth: ClassVar[int] = 0  # wakes under way, one inside the other

    def __init__(self) -> None:
        self.done = False
        self.resume: Callable[[], None] | None = None
        self._future: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the sleeper, once; later calls do nothing."""
        if self.done:
            return
        self.done = True
        if self.resume is not None:
            self._resume()
        elif self._future is not None and not self._future.done():
            self._future.set_result(None)

    def _resume(self) -> None:
        if Waiter._depth >= _MAX_DEPTH:
            asyncio.get_running_loop().call_soon(self._resume)
            return
        resume, self.resume = self.resume, None
        if resume is not None:  # else the sleeper was cancelled meanwhile
            Waiter._depth += 1
            try:
                resume()
            finally:
                Waiter._depth -= 1

    def __await__(self) -> Generator[Any, None, None]:
        if self.done:
            return
        if Waiter.driven:
            yield self
        else:
            self._future = asyncio.get_running_loop().create_future()
            yield from self._future.__await__()

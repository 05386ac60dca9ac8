"""One-shot wake-ups that cost no loop turn.

What lives here: `Waiter`, the awaitable by which a request sleeps until its
upstream, its client or its room in a queue is ready. What must not: knowledge
of HTTP. Heat: R.

Law: `wake()` runs the sleeping coroutine before it returns when an eager
driver (see `cycle.py`) drives that coroutine, and through an asyncio Future
when a Task does. The caller of `wake()` must therefore be done with its own
work: anything after the call sees a changed world.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any


class Waiter:
    """Sleep until `wake()`; at most one coroutine may await it.

    Cancellation: `CancelledError` may be thrown in while asleep; a later
    `wake()` is then without effect.
    """

    __slots__ = ("_future", "done", "resume")

    def __init__(self) -> None:
        self.done = False
        self.resume: Callable[[], None] | None = None
        self._future: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the sleeper, once; later calls do nothing."""
        if self.done:
            return
        self.done = True
        resume = self.resume
        if resume is not None:
            self.resume = None
            resume()
        elif self._future is not None and not self._future.done():
            self._future.set_result(None)

    def __await__(self) -> Generator[Any, None, None]:
        if self.done:
            return
        if asyncio.current_task() is None:
            yield self
        else:
            self._future = asyncio.get_running_loop().create_future()
            yield from self._future.__await__()

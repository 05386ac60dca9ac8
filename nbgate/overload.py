"""When a worker must take less: its memory and its loop's lag against marks.

What lives here: the decision, from numbers and a clock that are handed in.
What must not: measuring, logging, answers (`app` and `worker` do that). Heat:
ten times a second, and one attribute for each call.

Law: whoever is being served is never cut. Near the memory bound connections
are not kept; at it, and while the loop is late, new calls are refused.
Precedent: Envoy's overload manager.
"""

from __future__ import annotations

from typing import Final

NONE: Final = 0
NO_KEEPALIVE: Final = 1
REFUSING: Final = 2

# Shares of the memory bound at which a state begins; it ends EASE lower, so that it does not flicker.
MEMORY_MARKS: Final = {NO_KEEPALIVE: 0.92, REFUSING: 0.95}
EASE: Final = 0.02
LATE_S: Final = 0.2
CALM_S: Final = 0.1
FOR_S: Final = 1.0  # how long the loop must be late, or calm

_MEANING: Final = {NONE: "serving as ever", NO_KEEPALIVE: "no keep-alive", REFUSING: "refusing new calls"}


class Overload:
    """The state of one worker; `look` moves it."""

    def __init__(self, memory_bytes: int = 0) -> None:
        self.memory_bytes = memory_bytes  # the bound; 0 = none
        self.memory = NONE
        self.lag = NONE
        self._late_since = -1.0  # -1 = the last look was not late
        self._calm_since = -1.0

    @property
    def refusing(self) -> str:
        """Give the reason for refusing new calls, "" when there is none."""
        if self.memory == REFUSING:
            return "memory"
        return "lag" if self.lag == REFUSING else ""

    def look(self, now: float, lag_s: float, resident_bytes: int) -> list[str]:
        """Take new measures; return what to tell the operator, if anything."""
        told = []
        memory, lag = self._by_memory(resident_bytes), self._by_lag(now, lag_s)
        if memory != self.memory:
            self.memory = memory
            of = f"{resident_bytes >> 20:,} MiB of {self.memory_bytes >> 20:,} MiB"
            told.append(f"overload: memory is at {of}: {_MEANING[memory]}")
        if lag != self.lag:
            self.lag = lag
            told.append(f"overload: the event loop runs {lag_s * 1000:.0f} ms late: {_MEANING[lag]}")
        return told

    def _by_memory(self, resident_bytes: int) -> int:
        if not self.memory_bytes:
            return NONE
        share = resident_bytes / self.memory_bytes
        for state in (REFUSING, NO_KEEPALIVE):
            if share >= MEMORY_MARKS[state] - (EASE if self.memory >= state else 0.0):
                return state
        return NONE

    def _by_lag(self, now: float, lag_s: float) -> int:
        """Judge the lag; what counts is that each look of a second saw it.

        One long stall, such as a stopped process, is one look: it is over when it is seen.
        """
        if lag_s <= LATE_S:
            self._late_since = -1.0
        elif self._late_since < 0.0:
            self._late_since = now
        if lag_s >= CALM_S:
            self._calm_since = -1.0
        elif self._calm_since < 0.0:
            self._calm_since = now
        if self._late_since >= 0.0 and now - self._late_since >= FOR_S:
            return REFUSING
        if self._calm_since >= 0.0 and now - self._calm_since >= FOR_S:
            return NONE
        return self.lag

"""Time in control periods: which step of a plan is due."""

from __future__ import annotations

import math

from hf_vla_actions.errors import ExecutionError


class Ticks:
    """Counts control periods by the clock, not by calls: a loop that stalls finds itself later in the plan.

    A call belongs to the nearest tick. If that one has been used, it is the next one, ahead of its time, so that a loop
    that trembles loses nothing; but not by a whole period, and not within half a period of the last action: then it
    belongs to none. Ticks stay where they are in time, however the calls come.

    Args:
        rate_hz: ticks a second.

    Attributes:
        tick: the newest one; -1 before the first.
        missed: ticks for which nobody called.
    """

    def __init__(self, rate_hz: float):
        if isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, float)) or not 0 < rate_hz < math.inf:
            raise ExecutionError(f"rate_hz is a positive number, got {rate_hz!r}")
        self.period = 1.0 / rate_hz
        self.missed = 0
        self.restart()

    def restart(self) -> None:
        """Forget the time: an episode begins."""
        self.tick = -1
        self._grid = self._last = self._now = -math.inf  # the newest tick by the count, its action, the last call

    def read(self, now: float) -> int | None:
        """The tick of a call; None if it comes too early for one.

        Args:
            now: seconds.

        Raises:
            ExecutionError: time that goes backwards or is not finite.
        """
        if not math.isfinite(now) or now < self._now:
            raise ExecutionError(f"the clock went backwards, from {self._now} s to {now} s: use a monotonic one")
        self._now = now
        if self.tick < 0:
            self.begin(now)
            return self.tick
        due = self._nearest(now)
        if due < 1:
            if now - self._last < self.period / 2 or now <= self._grid:
                return None
            due = 1
        self._grid += due * self.period
        self.tick += due
        self.missed += due - 1
        self._last = now
        return self.tick

    def begin(self, now: float) -> None:
        """Let the first tick be now."""
        self.tick, self._grid, self._last, self._now = 0, now, now, now

    def of(self, time: float) -> int:
        """The tick nearest to a time; half a period counts as the later one."""
        return self.tick + self._nearest(time)

    def _nearest(self, time: float) -> int:
        # What is half a period in exact arithmetic may be a bit less in floating point.
        return math.floor((time - self._grid) / self.period + 0.5 + 1e-9)

"""Where inference runs while actions are sent: in a thread, or in a simulation of time."""

from __future__ import annotations

import abc
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from hf_vla_actions.errors import ExecutionError

Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one call.

    Args:
        value: what it returned; None if it failed.
        error: what it raised; None if it returned.
        seconds: from its start to its end, waiting for others included.
    """

    value: Any
    error: BaseException | None
    seconds: float


class Worker(abc.ABC):
    """Runs calls beside the control loop."""

    @property
    @abc.abstractmethod
    def under_way(self) -> int:
        """Calls that were begun, not discarded, and not in `finished` yet."""

    @abc.abstractmethod
    def start(self, call: Callable[[], Any]) -> None:
        """Begin a call; returns at once."""

    @abc.abstractmethod
    def finished(self) -> list[Outcome]:
        """What has ended since the last time this was asked, in the order in which it ended."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Return when a call that is under way has ended; at once if there is none."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Forget what is under way: it never appears in `finished`, unless it fails."""

    @abc.abstractmethod
    def close(self) -> None:
        """End; what is under way runs to its end first. May be called twice."""


class ThreadWorker(Worker):
    """Calls in threads of their own.

    Args:
        clock: seconds, read from several threads.
        threads: calls at the same time; more wait for their turn.
    """

    def __init__(self, clock: Clock, threads: int = 1):
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="inference")
        self._jobs: list[Future] = []
        self._discarded: list[Future] = []

    @property
    def under_way(self) -> int:
        """Calls begun and not asked for yet."""
        return len(self._jobs)

    def start(self, call: Callable[[], Any]) -> None:
        """Begin a call."""
        begin = self._clock()

        def timed() -> tuple[Any, float, float]:
            value = call()
            end = self._clock()
            return value, end, end - begin

        self._jobs.append(self._pool.submit(timed))

    def finished(self) -> list[Outcome]:
        """What has ended; of what was discarded only the errors."""
        forgotten = [job for job in self._discarded if job.done()]
        done = [job for job in self._jobs if job.done()]
        self._discarded = [job for job in self._discarded if job not in forgotten]
        self._jobs = [job for job in self._jobs if job not in done]
        errors = [job.exception() for job in (*forgotten, *done) if not job.cancelled()]
        ended = sorted((job.result() for job in done if job.exception() is None), key=lambda result: result[1])
        return [
            *(Outcome(value, None, seconds) for value, _, seconds in ended),
            *(Outcome(None, error, 0.0) for error in errors if error is not None),
        ]

    def wait(self) -> None:
        """Block until a call has ended."""
        if self._jobs:
            wait(self._jobs, return_when=FIRST_COMPLETED)

    def discard(self) -> None:
        """Forget what is under way; what has not begun never does."""
        self._discarded += [job for job in self._jobs if not job.cancel()]
        self._jobs = []

    def close(self) -> None:
        """End the threads; calls that have not begun never do."""
        self.discard()
        self._pool.shutdown(wait=True)


class SimulatedClock:
    """A clock that goes forward when it is told to.

    Args:
        now: seconds.
    """

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if not seconds >= 0:
            raise ExecutionError(f"time goes forward, got {seconds} s")
        self.now += seconds


class SimulatedWorker(Worker):
    """Calls that take a given time on a simulated clock, and no thread: what a policy does at a latency is repeatable.

    Args:
        clock: the clock of the simulation, the same that the policy reads.
        latency: seconds of each call: a number, or a function that is asked once a call.
    """

    def __init__(self, clock: SimulatedClock, latency: float | Callable[[], float]):
        self._clock = clock
        self._latency = latency if callable(latency) else lambda: latency
        self._jobs: list[tuple[float, Outcome]] = []

    @property
    def under_way(self) -> int:
        """Calls begun and not asked for yet."""
        return len(self._jobs)

    def start(self, call: Callable[[], Any]) -> None:
        """Make the call; its outcome appears when its time has passed. What it raises is raised here."""
        seconds = float(self._latency())
        if not seconds >= 0:
            raise ExecutionError(f"a latency is at least 0 s, got {seconds}")
        self._jobs.append((self._clock() + seconds, Outcome(call(), None, seconds)))

    def finished(self) -> list[Outcome]:
        """What has ended by now."""
        now = self._clock()
        done = sorted((job for job in self._jobs if job[0] <= now), key=lambda job: job[0])
        self._jobs = [job for job in self._jobs if job[0] > now]
        return [outcome for _, outcome in done]

    def wait(self) -> None:
        """Let time pass until a call has ended."""
        if self._jobs:
            # Not a sum of differences: the clock has to be at that very number.
            self._clock.now = max(self._clock.now, min(end for end, _ in self._jobs))

    def discard(self) -> None:
        """Forget what is under way."""
        self._jobs = []

    def close(self) -> None:
        """Forget what is under way."""
        self.discard()

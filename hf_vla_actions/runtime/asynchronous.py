"""Inference in a worker while the last chunk is carried out."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime.chunks import RecedingHorizon, first_steps
from hf_vla_actions.runtime.late import LateRule
from hf_vla_actions.runtime.overlap import Overlap
from hf_vla_actions.runtime.policy import (
    REMEMBERED,
    ChunkRunner,
    ChunkSource,
    Observation,
    Policy,
    check_steps,
    read_chunk,
    read_plain_chunk,
)
from hf_vla_actions.runtime.realtime import RealTimeChunking
from hf_vla_actions.runtime.report import AsyncReport
from hf_vla_actions.runtime.ticks import Ticks
from hf_vla_actions.runtime.workers import Clock, ThreadWorker, Worker

logger = logging.getLogger(__name__)

MEASURED = 10  # delays of which the longest is expected next time (algorithm 1 of arXiv:2506.07339 keeps such a queue)


@dataclass(frozen=True, eq=False)
class _Anchored:
    """A chunk of the n-th look and the tick of its observation; `frozen` steps of it are those of the chunk before."""

    actions: np.ndarray
    anchor: int
    look: int
    frozen: int | None = None

    @property
    def end(self) -> int:
        return self.anchor + len(self.actions)


class AsyncPolicy(ChunkRunner):
    """A policy that answers at once, from the newest chunk there is, while the next one is predicted.

    Call it once a control period. Step k of a chunk is for the time of its observation plus k periods: steps that lie in
    the past when the chunk arrives are skipped, and a chunk older than one that was used already, or altogether in the
    past, is dropped; both are counted in `report`. The first call of an episode waits for its chunk: the robot stands
    still meanwhile, so that chunk begins when it arrives. What the worker raises is raised by the next call.

    Args:
        policy: source of chunks in real units, called in the worker, or a policy made from one. Of `RecedingHorizon` the
            `execute_steps` are taken over; with `RealTimeChunking` each look is told what is left of the chunk under way
            (`prefix=`), as many steps frozen as the longest of the last ten delays.
        rate_hz: control periods a second; the space's if None.
        space: meaning of the numbers. Changes that are relative to the start of their chunk are refused: `at_anchor`
            decodes them against the state that made them.
        execute_steps: periods between the beginnings of two looks, at least. None: those of the policy given, else 1
            (look again as soon as the last look has ended).
        on_late: what is sent when no chunk has a step for now: "hold", "brake" or "last" (see `late.LateRule`).
        brake_steps: steps in which "brake" comes to rest.
        timestamp: observation to the time it was made, on the clock; None: the time of the call.
        clock: seconds, never going backwards.
        worker: where inference runs; a thread of its own if None. Closed with the policy.
        max_in_flight: looks at the same time.

    Raises:
        ExecutionError: a clock or an observation that goes backwards, a rate that is not the space's, something that is
            no chunk, a call after `close`.
    """

    def __init__(
        self,
        policy: ChunkSource | Policy,
        rate_hz: float | None = None,
        *,
        space: ActionSpace,
        execute_steps: int | None = None,
        on_late: str = "hold",
        brake_steps: int = 4,
        timestamp: Callable[[Observation], float] | None = None,
        clock: Clock = time.monotonic,
        worker: Worker | None = None,
        max_in_flight: int = 1,
    ):
        super().__init__(policy, continues=True)
        if self.every_step:
            raise ExecutionError(
                "this policy remembers a window of consecutive steps, and beside inference steps pass unseen: carry it out "
                "with RecedingHorizon"
            )
        inner = self._inner if isinstance(self._inner, RecedingHorizon) else None
        inherited = 1 if inner is None or inner.execute_steps is None else inner.execute_steps
        self.space, self.rate_hz = space, _read_rate(rate_hz, space)
        self.execute_steps = inherited if execute_steps is None else check_steps("execute_steps", execute_steps, 1)
        self._late_rule = LateRule(space, on_late, brake_steps)
        self._most = check_steps("max_in_flight", max_in_flight, 1)
        self._continues = isinstance(inner, RealTimeChunking)
        if self._continues and max_in_flight > 1:
            raise ExecutionError(
                "a chunk continues the one before it, so there is one look at a time: max_in_flight=1"
            )
        self._delays: deque[int] = deque(
            [inner.delay_steps] if isinstance(inner, RealTimeChunking) else [], maxlen=MEASURED
        )
        self._timestamp, self._clock = timestamp, clock
        self._counts: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=1000)
        self._waited = 0.0
        self._errors: list[BaseException] = []
        self._ticks = Ticks(self.rate_hz)
        self._closed = False
        self._forget()
        self._worker = ThreadWorker(clock, max_in_flight) if worker is None else worker

    def __call__(self, obs: Observation) -> np.ndarray:
        """Return the action (dof,) in real units for now."""
        if self._closed:
            raise ExecutionError("this policy is closed: its worker has ended")
        now = self._clock()
        tick = self._ticks.read(now)
        stamp = self._read_stamp(obs, now)
        if tick is None and self.executed:
            return self._early()
        tick = self._ticks.tick if tick is None else tick
        self._collect(tick)
        if self._chunk is None:
            tick = self._first(obs, tick)
        elif self._worker.under_way < self._most and tick - self._looked >= self.execute_steps:
            self._look(obs, tick, self._ticks.of(stamp))
        return self._act(tick)

    @property
    def report(self) -> AsyncReport:
        """What has happened so far."""
        missed = self._ticks.missed
        return AsyncReport(latencies=tuple(self._latencies), waited=self._waited, missed_ticks=missed, **self._counts)

    def reset(self) -> None:
        """Forget the chunk, what was done and what is under way; call it at the start of every episode."""
        super().reset()
        self._counts["discarded"] += self._worker.under_way
        self._worker.discard()
        self._ticks.restart()
        self._forget()

    def close(self) -> None:
        """End the worker; raises what it has raised and nobody has seen. May be called twice."""
        self._end()
        if self._errors:
            raise self._errors.pop(0)

    def __enter__(self) -> AsyncPolicy:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
            return
        self._end()  # what went wrong first is what the caller shall see
        for other in self._errors:
            logger.error("inference failed as well", exc_info=other)

    def _end(self) -> None:
        self._closed = True
        self._worker.close()
        self._errors += [outcome.error for outcome in self._worker.finished() if outcome.error is not None]

    def _forget(self) -> None:
        self._chunk: _Anchored | None = None
        self._looked = 0
        self._n_late = 0
        self._before: tuple[np.ndarray, ...] = ()
        self._sent: dict[int, np.ndarray] = {}
        self._sent_at: deque[int] = deque(maxlen=REMEMBERED)  # the tick of each action in `executed`
        self._stamp = -math.inf

    def _read_stamp(self, obs: Observation, now: float) -> float:
        """When an observation was made."""
        if self._timestamp is None:
            return now
        stamp = float(self._timestamp(obs))
        if not self._stamp <= stamp <= now:
            raise ExecutionError(
                f"an observation of {stamp} s, after one of {self._stamp} s, at {now} s: observations go forward in time and "
                "none comes from the future. timestamp= and clock= have to be the same clock"
            )
        self._stamp = stamp
        return stamp

    def _first(self, obs: Observation, tick: int) -> int:
        """Wait for the first chunk of an episode, which begins when it is there."""
        begin = self._clock()
        if not self._worker.under_way:
            self._look(obs, tick, tick)
        while self._chunk is None:
            self._worker.wait()
            self._collect(tick)
        now = self._clock()
        self._waited += now - begin
        self._ticks.begin(now)
        self._looked = 0
        self._chunk = _Anchored(self._chunk.actions, 0, self._chunk.look)
        return 0

    def _look(self, obs: Observation, tick: int, anchor: int) -> None:
        """Begin to predict a chunk."""
        # What was sent since the observation comes after the chunk's first step, not before it.
        since = sum(tick >= anchor for tick in self._sent_at)
        overlap, predict = self._overlap(anchor), self.predict_chunk
        before = self.executed[: len(self.executed) - since]
        continues, dof, number = self._continues, self.space.dof, self._counts["inferences"]

        def look() -> _Anchored:
            with self._executed.pinned(tuple(before)):
                chunk = predict(obs, prefix=overlap) if continues else predict(obs)
            if not continues:
                return _Anchored(first_steps(read_chunk(chunk, dof), None), anchor, number)
            actions = read_plain_chunk(chunk, dof, "RealTimeChunking")
            if overlap is None:
                return _Anchored(actions, anchor, number)
            return _Anchored(overlap.imposed_on(actions), anchor, number, overlap.frozen)

        self._worker.start(look)
        self._counts["inferences"] += 1
        self._looked = tick

    def _overlap(self, anchor: int) -> Overlap | None:
        """What is left of the chunk under way, from a tick on."""
        if not self._continues or self._chunk is None or not self._chunk.anchor <= anchor < self._chunk.end:
            return None
        left = self._chunk.actions[anchor - self._chunk.anchor :]
        return Overlap.of(left, min(max(self._delays), len(left)))

    def _collect(self, tick: int) -> None:
        """Take what the worker has finished; raise what went wrong."""
        for outcome in self._worker.finished():
            if outcome.error is not None:
                self._errors.append(outcome.error)
            else:
                self._latencies.append(outcome.seconds)
                self._take(outcome.value, tick)
        if self._errors:
            raise self._errors.pop(0)

    def _take(self, made: _Anchored, tick: int) -> None:
        """Use a chunk from now on, or drop it."""
        if self._chunk is None:
            self._chunk = made
            return
        delay = tick - made.anchor
        self._delays.append(delay)
        self._counts["overran"] += made.frozen is not None and delay > made.frozen
        if made.look < self._chunk.look:  # observations only go forward, two of them may be of one tick
            self._counts["dropped_stale"] += 1
        elif made.end <= tick:
            self._counts["dropped_passed"] += 1
        else:
            self._counts["skipped_steps"] += delay
            self._sent = {past: action for past, action in self._sent.items() if past >= made.anchor}
            # What has been done is a fact, whatever the chunk says: the next one continues from it.
            for past, action in self._sent.items():
                made.actions[past - made.anchor] = action
            self._chunk = made

    def _act(self, tick: int) -> np.ndarray:
        """The action of a tick, from the chunk or made up."""
        chunk = self._chunk
        if chunk is not None and chunk.anchor <= tick < chunk.end:
            action = chunk.actions[tick - chunk.anchor]
            self._n_late = 0
            self._before = (*self._before[-1:], action)
        else:
            if not self._counts["late_steps"]:
                logger.warning("inference is late: on_late=%r from here; see report", self._late_rule.on_late)
            self._n_late += 1
            self._counts["late_steps"] += 1
            action = self._late_rule.action(self._before, self._n_late)
        if self._continues:
            self._sent[tick] = action
        self._counts["actions"] += 1
        self._sent_at.append(tick)
        return self._send(action)

    def _early(self) -> np.ndarray:
        if not self._counts["early_calls"]:
            logger.warning("called again within half a control period of %.3g s: told to hold", self._ticks.period)
        self._counts["early_calls"] += 1
        self._counts["actions"] += 1
        self._sent_at.append(self._ticks.tick)
        return self._send(self._late_rule.hold(np.asarray(self.executed[-1])))


def _read_rate(rate_hz: float | None, space: ActionSpace) -> float:
    """The rate of the space, which nobody may contradict."""
    if rate_hz is None and space.rate_hz is None:
        raise ExecutionError("nobody has said at which rate the actions are carried out: pass rate_hz")
    if rate_hz is not None and space.rate_hz is not None and rate_hz != space.rate_hz:
        raise ExecutionError(
            f"rate_hz={rate_hz}, but the space says that its actions are meant for {space.rate_hz} Hz: changes from step to "
            "step at another rate are another speed"
        )
    return rate_hz if rate_hz is not None else float(space.rate_hz or 0)

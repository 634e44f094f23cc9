"""What each constraint means, written a second time: naive loops over the values, nothing shared with the package.

A specification here is a list of plain dictionaries, `{"kind": "Rate", "dim": 0, "max_step": 0.01}`, with the argument
names of the language and indices for dimensions; `random_specs.to_constraint` makes the package's objects of the same
dictionaries. Values are compared as they are. Only where sums could be taken in another order does a relative 1e-12
count as equal.
"""

import math
from dataclasses import dataclass, field

import numpy as np

SUM = 1e-12


@dataclass
class Known:
    """What a robot knows before a chunk: plain numbers by index of the dimension."""

    pose: dict = field(default_factory=dict)
    last: list | None = None
    held: int | None = None


@dataclass
class Robot:
    """As much of an action space as the oracle needs."""

    names: list
    delta: list
    half_bin: list  # (D,) tolerance of single values; 0 where values are continuous
    gripper: int | None = None
    opened: float = 1.0
    closed: float = 0.0
    rate_hz: float = 5.0


def satisfied(chunks, item, robot, known):
    """(N,) bool: which chunks (N, T, D) keep to one dictionary."""
    chunks = np.asarray(chunks, dtype=np.float64)
    return CHECKS[item["kind"]](chunks, item, robot, known)


def all_satisfied(chunks, items, robot, known):
    """(N,) bool: which chunks (N, T, D) keep to all dictionaries."""
    fine = np.full(len(chunks), True)
    for item in items:
        fine &= satisfied(chunks, item, robot, known)
    return fine


def violations(chunk, items, robot, known):
    """The dictionaries, as text, that one chunk (T, D) breaks."""
    return [str(item) for item in items if not satisfied(np.asarray(chunk)[None], item, robot, known)[0]]


def counted(item, horizon):
    """The steps that a dictionary speaks of."""
    steps = item.get("steps")
    if steps is None:
        return list(range(horizon))
    if isinstance(steps, int):
        return [steps % horizon]
    if isinstance(steps, slice):
        return list(range(horizon))[steps]
    return sorted({step % horizon for step in steps})


def at_most(value, bound, scale):
    """value <= bound, up to the order of a sum whose terms have the size `scale`."""
    return value <= bound + SUM * (scale + abs(bound))


# ---------------------------------------------------------------- one dimension


def check_range(x, item, robot, known):
    fine = np.full(len(x), True)
    for t in counted(item, x.shape[1]):
        v = x[:, t, item["dim"]]
        fine &= (v >= or_infinite(item["low"], -1)) & (v <= or_infinite(item["high"], 1))
    return fine


def check_forbid(x, item, robot, known):
    fine = np.full(len(x), True)
    for t in counted(item, x.shape[1]):
        v = x[:, t, item["dim"]]
        fine &= (v < or_infinite(item["low"], -1)) | (v > or_infinite(item["high"], 1))
    return fine


def check_in_set(x, item, robot, known):
    fine = np.full(len(x), True)
    for t in counted(item, x.shape[1]):
        fine &= near_one(x[:, t, item["dim"]], item["values"], item.get("tolerance"), robot.half_bin[item["dim"]])
    return fine


def check_fix(x, item, robot, known):
    value = {"open": robot.opened, "closed": robot.closed}.get(item["value"], item["value"])
    return check_in_set(x, {**item, "values": [value]}, robot, known)


def near_one(v, values, tolerance, half_bin):
    fine = np.full(len(v), False)
    for value in values:
        reach = half_bin if tolerance is None else tolerance
        fine |= np.abs(v - value) <= reach * (1 + 1e-9) + 4 * np.spacing(abs(value))
    return fine


def or_infinite(bound, sign):
    return sign * math.inf if bound is None else bound


# ---------------------------------------------------------------- from step to step


def check_rate(x, item, robot, known):
    fine, d = np.full(len(x), True), item["dim"]
    for t in counted(item, x.shape[1]):
        if t == 0:
            if item.get("from_last", True):
                fine &= np.abs(x[:, 0, d] - known.last[d]) <= item["max_step"]
        else:
            fine &= np.abs(x[:, t, d] - x[:, t - 1, d]) <= item["max_step"]
    return fine


def check_sticky(x, item, robot, known):
    d = item["dim"]
    now = np.full(len(x), is_open(known.last[d], robot))
    held = np.full(len(x), math.inf if known.held is None else known.held)
    changes = np.zeros(len(x))
    fine = np.full(len(x), True)
    for t in range(x.shape[1]):
        wanted = is_open(x[:, t, d], robot)
        change = wanted != now
        if t in counted(item, x.shape[1]):
            fine &= ~change | (held >= item.get("min_hold", 1))
            changes += change
        held = np.where(change, 1, held + 1)
        now = wanted
    most = item.get("max_switches")
    return fine if most is None else fine & (changes <= most)


def is_open(v, robot):
    return np.abs(v - robot.opened) <= np.abs(v - robot.closed)


# ---------------------------------------------------------------- sums


def check_move_by(x, item, robot, known):
    d, total = item["dim"], np.zeros(len(x))
    scale = np.zeros(len(x))
    for t in counted(item, x.shape[1]):
        total = total + x[:, t, d]
        scale = scale + np.abs(x[:, t, d])
    tolerance = item.get("tolerance")
    if tolerance is None:
        tolerance = robot.half_bin[d] or 1e-9 * max(1.0, abs(item["total"]))
        tolerance *= 1 + 1e-9
    return at_most(np.abs(total - item["total"]), tolerance, scale + abs(item["total"]))


def check_workspace(x, item, robot, known):
    fine = np.full(len(x), True)
    for d, low, high in zip(item["dims"], item["low"], item["high"], strict=True):
        low, high = or_infinite(low, -1), or_infinite(high, 1)
        if not robot.delta[d]:
            fine &= check_range(x, {"dim": d, "low": low, "high": high, "steps": item.get("steps")}, robot, known)
            continue
        if item.get("on_outside") == "recover":
            low, high = min(low, known.pose[d]), max(high, known.pose[d])
        position, scale = np.full(len(x), known.pose[d]), np.full(len(x), abs(known.pose[d]))
        for t in range(x.shape[1]):
            position, scale = position + x[:, t, d], scale + np.abs(x[:, t, d])
            if t in counted(item, x.shape[1]):
                fine &= (position <= high + SUM * scale) & (position >= low - SUM * scale)
    return fine


def check_speed(x, item, robot, known):
    fine, order = np.full(len(x), True), item.get("ord", 2)
    most = item["max"] / robot.rate_hz if item.get("per_second") else item["max"]
    for t in counted(item, x.shape[1]):
        length = np.zeros(len(x))
        for d in item["dims"]:
            v = np.abs(x[:, t, d])
            length = np.maximum(length, v) if order == math.inf else length + v**order
        if order == 2:
            length = np.sqrt(length)
        fine &= length <= most if order == math.inf or len(item["dims"]) == 1 else at_most(length, most, length)
    return fine


def check_linear(x, item, robot, known):
    fine = np.full(len(x), True)
    running = np.full(len(x), float(item.get("origin", 0.0)))
    scale = np.abs(running)
    for t in range(x.shape[1]):
        here, size = np.zeros(len(x)), np.zeros(len(x))
        for d, w in zip(item["dims"], item["weights"], strict=True):
            here, size = here + w * x[:, t, d], size + np.abs(w * x[:, t, d])
        running, scale = running + here, scale + size
        if t in counted(item, x.shape[1]):
            value, error = (running, scale) if item.get("cumulative") else (here, size)
            low, high = or_infinite(item.get("low"), -1), or_infinite(item.get("high"), 1)
            fine &= (value <= high + SUM * error) & (value >= low - SUM * error)
    return fine


# ---------------------------------------------------------------- a zone to keep out of


def check_keep_out(x, item, robot, known):
    margin = item.get("margin", 0.0)
    low = [edge - margin for edge in item["low"]]
    high = [edge + margin for edge in item["high"]]
    fine = np.full(len(x), True)
    before = np.tile([known.pose[d] for d in item["dims"]], (len(x), 1))
    for t in range(x.shape[1]):
        after = before.copy()
        for i, d in enumerate(item["dims"]):
            after[:, i] = before[:, i] + x[:, t, d] if robot.delta[d] else x[:, t, d]
        if t in counted(item, x.shape[1]):
            fine &= separated(before, after, low, high)
        before = after
    return fine


def separated(p, q, low, high):
    """(N,) bool: no point of the segment p-q, (N, n) each, lies in the closed box, by the separating axis theorem.

    Box and segment are disjoint exactly if they are along an axis of the box or along a direction that is orthogonal
    to the segment and to an axis. The box is taken smaller by the rounding of sums.
    """
    n = p.shape[1]
    size = np.maximum(np.abs(p), np.abs(q)).max(axis=1) + max(map(abs, [*low, *high]))
    center = np.array([(a + b) / 2 for a, b in zip(low, high, strict=True)])
    half = np.array([(b - a) / 2 for a, b in zip(low, high, strict=True)]) - (4 * SUM * size)[:, None]
    middle, reach = (p + q) / 2 - center, np.abs(q - p) / 2
    apart = np.full(len(p), False)
    for i in range(n):
        apart |= np.abs(middle[:, i]) > half[:, i] + reach[:, i]
    d = (q - p) / 2
    for i in range(n):
        for j in range(i + 1, n):  # along the normal of the segment within the plane of axes i and j
            cross = np.abs(middle[:, i] * d[:, j] - middle[:, j] * d[:, i])
            apart |= cross > half[:, i] * np.abs(d[:, j]) + half[:, j] * np.abs(d[:, i])
    return apart


# ---------------------------------------------------------------- of other constraints


def check_prefix(x, item, robot, known):
    fine = np.full(len(x), True)
    rows = item["actions"]
    hard = len(rows) if item.get("hard") is None else item["hard"]
    for t in range(hard):
        for d, value in enumerate(rows[t]):
            if not math.isnan(value):
                fine &= near_one(x[:, t, d], [value], None, robot.half_bin[d])
    return fine


def check_where(x, item, robot, known):
    return np.array(item["fn"](x), dtype=bool)


def check_any(x, item, robot, known):
    fine = np.full(len(x), False)
    for alternative in item["alternatives"]:
        fine |= all_satisfied(x, alternative, robot, known)
    return fine


def check_all(x, item, robot, known):
    return all_satisfied(x, item["parts"], robot, known)


CHECKS = {
    "Range": check_range,
    "Forbid": check_forbid,
    "InSet": check_in_set,
    "Fix": check_fix,
    "Rate": check_rate,
    "Sticky": check_sticky,
    "MoveBy": check_move_by,
    "Workspace": check_workspace,
    "Speed": check_speed,
    "Linear": check_linear,
    "KeepOut": check_keep_out,
    "Prefix": check_prefix,
    "Where": check_where,
    "Any": check_any,
    "All": check_all,
}

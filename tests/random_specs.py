"""Random robots, random specifications as plain dictionaries, and the package's objects made of the dictionaries."""

import math
from dataclasses import dataclass

import numpy as np
from oracle_constraints import Known, Robot

from hf_vla_actions import constraints as language
from hf_vla_actions.actions import ActionSpace, ActionStats, Gripper
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.tokenizers import ActionVocabulary, UniformActionTokenizer

NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "w"]
FIRST, END = 8, 2  # the lowest action id and the closing token
MM = 1e-3
KINDS = {
    "base": ("box", "band", "rate", "workspace", "norm"),
    "varying": ("box", "band", "rate", "workspace", "norm", "varying"),
    "keepout": ("keepout", "rate"),
    "rooms": ("keepout", "keepout", "rate", "workspace", "box", "band"),
    "moveby": ("moveby", "rate", "box"),
    "sticky": ("sticky", "box", "rate"),
    "linear": ("linear", "rate", "box"),
    "cumulative": ("plane", "rate", "box", "norm"),
    "prefix": ("prefix", "rate", "workspace"),
    "any": ("any", "rate", "box"),
    "where": ("where", "rate"),
    "absolute": ("absolute", "rate", "box", "band"),
    **{f"only {kind}": (kind,) for kind in ("box", "band", "rate", "workspace", "norm")},
    "all": (
        *("box", "band", "rate", "workspace", "norm", "varying", "keepout", "moveby", "sticky"),
        *("linear", "plane", "prefix", "any", "where", "set", "part"),
    ),
}


@dataclass
class Case:
    """A robot, what it has to keep to, and what it knows."""

    config: ActionConfig
    robot: Robot
    items: list
    known: Known
    name: str

    @property
    def values(self):
        return self.config.token_values()

    def continuous(self):
        """The robot for values that no grid limits: single values are exact."""
        return Robot(**{**self.robot.__dict__, "half_bin": [0.0] * len(self.robot.names)})

    def constraints(self):
        return [to_constraint(item, self.robot) for item in self.items]

    def context(self):
        return to_context(self.known, self.robot)


def to_constraint(item, robot):
    """The package's object of a dictionary; dimensions go by name."""
    kind = getattr(language, item["kind"])
    if item["kind"] == "Any":
        return kind(*[[to_constraint(part, robot) for part in parts] for parts in item["alternatives"]])
    if item["kind"] == "All":
        first, *others = [to_constraint(part, robot) for part in item["parts"]]
        for other in others:
            first = first & other
        return first
    arguments = {name: value for name, value in item.items() if name != "kind"}
    if "dim" in arguments:
        arguments["dim"] = robot.names[arguments["dim"]]
    if "dims" in arguments:
        arguments["dims"] = [robot.names[d] for d in arguments["dims"]]
    return kind(**arguments)


def to_context(known, robot):
    pose = {robot.names[d]: value for d, value in known.pose.items()} or None
    return language.Context(pose=pose, last_action=known.last, held_steps=known.held)


# ---------------------------------------------------------------- robots


def make_config(low, high, *, n_codes, horizon, delta, binary_gripper=None, scheme="uniform", limits=()):
    """`binary_gripper`: None for a robot without, else whether the last dimension, the gripper, is binary."""
    dof = len(low)
    names = NAMES[:dof] if binary_gripper is None else [*NAMES[: dof - 1], "gripper"]
    gripper = None if binary_gripper is None else Gripper("gripper", binary=binary_gripper)
    space = ActionSpace(names, ["m"] * dof, tuple(delta), frame="base", gripper=gripper, rate_hz=5.0)
    mask = [True] * dof if gripper is None else [True] * (dof - 1) + [False]
    stats = ActionStats.from_ranges(list(low), list(high), mask=mask)
    words = tuple(f"<act_{i:03d}>" for i in range(n_codes))
    return ActionConfig(
        tokenizer=UniformActionTokenizer(n_codes, scheme),
        vocabulary=ActionVocabulary(np.arange(FIRST, FIRST + n_codes), END, "append", words),
        norm_stats={"robot": {"action": stats}},
        spaces={"robot": space},
        horizon=horizon,
        limits=limits,
    )


def describe(config):
    """The robot of a configuration, for the oracle."""
    space, values = config.space(), config.token_values()
    half = [float(np.diff(np.unique(row)).max()) / 2 if len(np.unique(row)) > 1 else 0.0 for row in values]
    gripper = None if space.gripper is None else space.index(space.gripper.dim)
    return Robot(list(space.names), list(space.delta), half, gripper, rate_hz=space.rate_hz)


def random_case(rng, name="base", *, n_codes=None, dof=None, horizon=None):
    """A robot after research notes: -[5, 50]..[5, 50] mm a step, and a specification of the kinds of `name`."""
    kinds = KINDS[name]
    zone = "keepout" in kinds
    n_codes = n_codes or int(rng.choice([48] if zone and name != "all" else [16, 64, 256]))
    dof = dof or int(rng.integers(2, 8))
    horizon = horizon or int(rng.integers(1, 9))
    low, high = -rng.uniform(5, 50, dof) * MM, rng.uniform(5, 50, dof) * MM
    delta = [True] * dof
    binary = None
    if "sticky" in kinds:
        binary, delta[-1] = bool(rng.random() < 0.7), False
        low[-1], high[-1] = 0.0, 1.0
    if name in ("absolute", "all"):
        for d in range(dof - (binary is not None)):
            if rng.random() < (0.6 if name == "absolute" else 0.15):
                delta[d] = False
                shift = rng.uniform(-100, 100) * MM
                low[d], high[d] = low[d] + shift, high[d] + shift
    scheme = "openvla" if n_codes == 256 and rng.random() < 0.5 else "uniform"
    config = make_config(
        low, high, n_codes=n_codes, horizon=horizon, delta=delta, binary_gripper=binary, scheme=scheme
    )
    robot, values = describe(config), config.token_values()
    last = [float(rng.uniform(low[d], high[d]) if rng.random() < 0.7 else rng.choice(values[d])) for d in range(dof)]
    if binary is not None:
        last[-1] = float(rng.integers(0, 2)) if binary else float(rng.choice(values[-1]))
    pose = {d: float(rng.uniform(-100, 100)) * MM for d in range(dof) if d != robot.gripper}
    for d in pose:
        if not delta[d]:
            pose[d] = float(rng.uniform(low[d], high[d]))
    known = Known(pose, last, [None, 1, 2, 5][rng.integers(0, 4)])
    draw = Draw(rng, config, robot, known, horizon)
    items = []
    for kind in dict.fromkeys(kinds):
        if name != "all" or rng.random() < 0.3:
            items += getattr(draw, kind)()
    if name == "rooms":
        items += draw.keepout()
    if any(item["kind"] == "Sticky" for item in items):  # the two are refused together
        items = [item for item in items if item["kind"] != "Where"]
    order = rng.permutation(len(items))
    return Case(config, robot, [items[i] for i in order], known, name)


# ---------------------------------------------------------------- what a robot has to keep to


class Draw:
    """Each method draws dictionaries of one kind, with the probabilities of the research notes."""

    def __init__(self, rng, config, robot, known, horizon):
        self.rng, self.robot, self.known, self.horizon = rng, robot, known, horizon
        self.values = config.token_values()
        self.low, self.high = self.values.min(axis=1), self.values.max(axis=1)
        self.arm = [d for d in range(len(self.low)) if d != robot.gripper]
        self.moving = [d for d in self.arm if robot.delta[d]]

    def chance(self, p):
        return self.rng.random() < p

    def uniform(self, low, high):
        return float(self.rng.uniform(low, high))

    def span(self, d):
        return float(self.high[d] - self.low[d])

    def value(self, d):
        """A value of a dimension, as often one of a token as not."""
        return self.uniform(self.low[d], self.high[d]) if self.chance(0.5) else float(self.rng.choice(self.values[d]))

    def steps(self, item):
        """One time in five only some steps count."""
        if self.chance(0.2):
            a, b = sorted(int(t) for t in self.rng.integers(0, self.horizon, 2))
            item["steps"] = [slice(a, b + 1), a, [a, b]][self.rng.integers(0, 3)]
        return item

    def some(self, dims, least=1, most=3):
        """A few of the dimensions in random order; none where there are not enough."""
        if len(dims) < least:
            return []
        size = int(self.rng.integers(least, min(most, len(dims)) + 1))
        return [int(d) for d in self.rng.permutation(dims)[:size]]

    def box(self):
        items = []
        for d in self.arm:
            if self.chance(0.5):
                center = 0.0 if self.robot.delta[d] and self.chance(0.7) else self.value(d)
                low, high = center - self.uniform(0, 0.6) * self.span(d), center + self.uniform(0, 0.6) * self.span(d)
                item = {"kind": "Range", "dim": d, "low": low, "high": high}
                items.append(self.steps(item))
        return items

    def band(self):
        items = []
        for d in self.arm:
            if self.chance(0.3):
                center = self.value(d)
                item = {"kind": "Forbid", "dim": d, "low": center - 0.1 * self.span(d)}
                items.append(self.steps({**item, "high": center + 0.1 * self.span(d)}))
        return items

    def varying(self):
        items = []
        for d in self.moving:
            for t in range(self.horizon):
                if self.chance(0.3):
                    center = self.uniform(-20, 20) * MM
                    items.append(
                        {"kind": "Forbid", "dim": d, "low": center - 4 * MM, "high": center + 4 * MM, "steps": t}
                    )
        return items

    def set(self):
        d = int(self.rng.choice(self.arm))
        values = [self.value(d) for _ in range(int(self.rng.integers(1, 4)))]
        tolerance = None if self.chance(0.5) else 2 * self.robot.half_bin[d]
        return [self.steps({"kind": "InSet", "dim": d, "values": values, "tolerance": tolerance})]

    def rate(self):
        items = []
        for d in self.arm:
            if self.chance(0.5):
                step = self.uniform(1.01, 30) if self.chance(0.5) else self.uniform(1.01, 5)
                item = {"kind": "Rate", "dim": d, "max_step": 2 * self.robot.half_bin[d] * step}
                if self.chance(0.2):
                    item["from_last"] = False
                items.append(self.steps(item) if self.chance(0.5) else item)
        return items

    def workspace(self):
        dims = [d for d in self.arm if self.chance(0.6)]
        if not dims:
            return []
        low, high, recover = [], [], bool(self.chance(0.2))
        for d in dims:
            here = self.known.pose[d]
            inside = -5 if recover else 0
            low.append(here - self.uniform(inside, 60) * MM if self.chance(0.5) else None)
            high.append(here + self.uniform(inside, 60) * MM if self.chance(0.5) else None)
            if low[-1] is not None and high[-1] is not None and low[-1] > high[-1]:
                low[-1], high[-1] = high[-1], low[-1]
        item = {"kind": "Workspace", "dims": dims, "low": low, "high": high}
        return [{**item, "on_outside": "recover"} if recover else self.steps(item)]

    absolute = workspace

    def norm(self):
        items = []
        for dims, p in ((self.moving[:2], 0.6), (self.moving[2:5], 0.5)):
            if len(dims) > 1 and self.chance(p):
                order = [2, 2, 2, 1, math.inf][self.rng.integers(0, 5)]
                item = {"kind": "Speed", "dims": dims, "max": self.uniform(2, 50) * MM, "ord": order}
                if self.chance(0.3):
                    item.update(per_second=True, max=item["max"] * self.robot.rate_hz)
                items.append(self.steps(item))
        return items

    def keepout(self):
        dims = self.some(self.arm)
        if not dims:
            return []
        center = [self.known.pose[d] + self.uniform(-60, 60) * MM for d in dims]
        half = [self.uniform(3, 40) * MM for _ in dims]
        item = {
            "kind": "KeepOut",
            "dims": dims,
            "low": [c - h for c, h in zip(center, half, strict=True)],
            "high": [c + h for c, h in zip(center, half, strict=True)],
        }
        if self.chance(0.3):
            item["margin"] = self.uniform(0, 5) * MM
        return [self.steps(item) if self.chance(0.3) else item]

    def moveby(self):
        if not self.moving:
            return []
        d = int(self.rng.choice(self.moving))
        item = self.steps({"kind": "MoveBy", "dim": d})
        n = self.horizon if item.get("steps") is None else len(np.atleast_1d(np.arange(self.horizon)[item["steps"]]))
        item["total"] = n * self.uniform(0.7 * self.low[d], 0.7 * self.high[d])
        if self.chance(0.5):
            item["tolerance"] = self.uniform(1, 5) * 2 * self.robot.half_bin[d]
        return [item]

    def sticky(self):
        if self.robot.gripper is None:
            return []
        item = {"kind": "Sticky", "dim": self.robot.gripper, "min_hold": int(self.rng.integers(1, 5))}
        if self.chance(0.5):
            item["max_switches"] = int(self.rng.integers(0, 3))
        if self.chance(0.3):
            item["hysteresis"] = self.uniform(0.2, 0.9)  # the oracle ignores it; it must not end in a dead end
        return [item]

    def linear(self):
        dims = self.some(self.arm, least=2)
        if not dims:
            return []
        weights = [self.uniform(-1, 1) for _ in dims]
        middle = sum(w * self.value(d) for d, w in zip(dims, weights, strict=True)) * 0.5
        item = {"kind": "Linear", "dims": dims, "weights": weights}
        item["low"] = middle - self.uniform(2, 20) * MM if self.chance(0.6) else None
        item["high"] = middle + self.uniform(2, 20) * MM if self.chance(0.6) or item["low"] is None else None
        return [self.steps(item)]

    def plane(self):
        dims = self.some(self.moving, least=1)
        if not dims:
            return []
        weights = [self.uniform(-1, 1) for _ in dims]
        origin = self.uniform(-50, 50) * MM
        item = {"kind": "Linear", "dims": dims, "weights": weights, "cumulative": True, "origin": origin}
        item["low"] = origin - self.uniform(5, 40) * MM if self.chance(0.6) else None
        item["high"] = origin + self.uniform(5, 40) * MM if self.chance(0.6) or item["low"] is None else None
        return [self.steps(item)]

    def prefix(self):
        n = int(self.rng.integers(1, self.horizon + 1))
        actions = np.full((n, len(self.low)), math.nan)
        now = np.array(self.known.last)
        for t in range(n):
            now = 0.9 * now
            for d in self.arm:
                if self.chance(0.6):
                    actions[t, d] = float(np.clip(now[d], self.low[d], self.high[d]))
        item = {"kind": "Prefix", "actions": actions.tolist()}
        if self.chance(0.3):
            item.update(hard=int(self.rng.integers(0, n)), sigma=5 * MM, until=n)
        return [item]

    def any(self):
        pool = [self.box, self.keepout, self.linear, self.norm, self.moveby, self.workspace, self.rate, self.plane]
        alternatives = []
        for _ in range(int(self.rng.integers(2, 4))):
            parts = [item for i in self.rng.permutation(len(pool))[:2] for item in pool[i]()]
            if parts:
                alternatives.append(parts[:3])
        if not alternatives:
            return []
        return [{"kind": "Any", "alternatives": alternatives}]

    def part(self):
        parts = [*self.box(), *self.band()]
        return [{"kind": "All", "parts": parts}] if parts else []

    def where(self):
        dims = self.some(self.moving, most=7)
        if not dims:
            return []
        radius = self.uniform(20, 80) * MM

        def ball(chunks):
            return np.sqrt((chunks[:, :, dims].cumsum(axis=1) ** 2).sum(axis=2)).max(axis=1) <= radius

        backup = None if self.chance(0.5) else [math.nan] * len(self.low)
        item = {"kind": "Where", "fn": ball, "name": "ball"}
        return [item if backup is None else {**item, "backup": backup}]

"""Dataset transforms that know their action spaces: the published ones by name, and one's own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hf_vla_actions.actions.space import ActionSpace, Gripper
from hf_vla_actions.data.transforms import EpisodeArrays, bridge_orig, calvin, fractal, libero
from hf_vla_actions.errors import DatasetError

EULER = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
AXIS_ANGLE = ("x", "y", "z", "rx", "ry", "rz", "gripper")
METRIC = ("m", "m", "m", "rad", "rad", "rad", None)
CHANGES = (True,) * 6 + (False,)


@dataclass(frozen=True)
class Transform:
    """A rule for the numbers of one episode, with the action space it expects and the one it gives.

    Args:
        name: what it is called in messages.
        function: (actions (n, dof), states (n, state_dim) or None) to (actions, states, rows): those of the steps kept,
            and which steps these are, rising.
        source: what the actions must mean.
        result: what they mean afterwards.
    """

    name: str
    function: Callable[[np.ndarray, np.ndarray | None], EpisodeArrays]
    source: ActionSpace
    result: ActionSpace

    def __call__(self, actions: np.ndarray, states: np.ndarray | None = None) -> EpisodeArrays:
        """Apply the rule to one episode, and check what it gives."""
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim != 2 or actions.shape[1] != self.source.dof:
            raise DatasetError(
                f"{self.name} expects actions (n, {self.source.dof}), {list(self.source.names)}, got shape {actions.shape}"
            )
        if states is not None and (np.ndim(states) != 2 or len(states) != len(actions)):
            raise DatasetError(f"{self.name} got states of shape {np.shape(states)} with actions {actions.shape}")
        made, kept_states, rows = self.function(actions, states)
        made, rows = np.asarray(made, dtype=np.float64), np.asarray(rows)
        faults = {
            f"actions of shape {made.shape} for {len(rows)} rows of {self.result.dof} dimensions": made.shape
            != (len(rows), self.result.dof),
            f"rows {rows} that do not rise within 0..{len(actions) - 1}": rows.ndim != 1
            or (rows.dtype.kind not in "iu" and len(rows) > 0)
            or not all(0 <= row < len(actions) for row in (rows[:1].tolist() + rows[-1:].tolist()))
            or bool((np.diff(rows) <= 0).any()),
            "actions that are not finite": not np.isfinite(made).all(),
            "states without being given any, or the other way round": (states is None) != (kept_states is None),
            "states of another number of steps": kept_states is not None and len(kept_states) != len(rows),
        }
        for fault in [fault for fault, found in faults.items() if found][:1]:
            raise DatasetError(f"the transform {self.name} gave {fault}")
        return made, kept_states, rows.astype(np.int64)


def _spaces(names, units, frame, source: Gripper, rate_hz: float, **facts) -> tuple[ActionSpace, ActionSpace]:
    """What a published dataset holds, and the same with the gripper that all of OpenVLA's transforms end in."""
    before = ActionSpace(names, units, CHANGES, frame, source, rate_hz, **facts)
    return before, replace(before, gripper=Gripper("gripper", open=1.0, closed=0.0))


# Rates: BridgeData V2 (Walke et al. 2023) 5 Hz, RT-1 (Brohan et al. 2022) 3 Hz, LIBERO's environments 20 Hz, CALVIN (Mees
# et al. 2022) 30 Hz. LIBERO's numbers go through robosuite's OSC_POSE controller, in which 1 is 5 cm or 0.5 rad.
_BRIDGE = _spaces(EULER, METRIC, "base", Gripper("gripper", binary=False), 5.0)
_FRACTAL = _spaces(EULER, METRIC, "base", Gripper("gripper", open=-1.0, closed=1.0, relative=True), 3.0)
_LIBERO = _spaces(
    AXIS_ANGLE, ("0.05 m",) * 3 + ("0.5 rad",) * 3 + (None,), None, Gripper("gripper", open=-1.0, closed=1.0), 20.0
)
_CALVIN = _spaces(
    EULER, ("0.02 m",) * 3 + ("0.05 rad",) * 3 + (None,), "world", Gripper("gripper", open=1.0, closed=-1.0), 30.0
)
_METRIC_CALVIN = replace(_CALVIN[1], units=METRIC)

TRANSFORMS = {
    transform.name: transform
    for transform in (
        Transform("bridge_orig", bridge_orig, *_BRIDGE),
        Transform("bridge_orig_commanded", functools.partial(bridge_orig, relabel=False), *_BRIDGE),
        Transform("fractal", fractal, *_FRACTAL),
        Transform("libero", libero, *_LIBERO),
        Transform("calvin", calvin, *_CALVIN),
        Transform("calvin_metric", functools.partial(calvin, metric=True), _CALVIN[0], _METRIC_CALVIN),
    )
}


def find_transform(name: str) -> Transform:
    """A published transform by its name, or one's own as `module:attribute` (`my_robot.data:my_transform`)."""
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise DatasetError(
            f"no transform is named {name!r}; there are {list(TRANSFORMS)}, or give one's own as module:name"
        )
    try:
        found = vars(importlib.import_module(module))[attribute]
    except (ImportError, KeyError, ValueError) as error:
        raise DatasetError(f"the transform {name!r} cannot be imported: {error!r}") from error
    if not isinstance(found, Transform):
        raise DatasetError(f"{name!r} is {type(found).__name__}, expected hf_vla_actions.data.Transform")
    return found

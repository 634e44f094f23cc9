"""Rules that turn the numbers of published datasets into the ones that published policies learn from.

Each is a pure function of one episode: actions (n, dof) and states (n, state_dim) or None go in; actions and states of the
k steps that are kept come out, and rows (k,) int64, the steps they stand at. Sources: the standardization transforms of
OpenVLA (openvla/openvla, prismatic/vla/datasets/rlds/oxe/transforms.py and ../utils/data_utils.py; the same as Octo's) and,
for CALVIN, mees/calvin, dataset/README.md, with the gripper as Robot-VLAs/RoboVLMs has it. `transforms_table` says which
action space each expects and gives.
"""

from __future__ import annotations

import numpy as np

from hf_vla_actions.actions.gripper import Gripper, GripperMemory, commands_to_states, state_before
from hf_vla_actions.errors import DatasetError

EpisodeArrays = tuple[np.ndarray, np.ndarray | None, np.ndarray]

OPEN_ABOVE, CLOSED_BELOW = 0.95, 0.05
RT1_GRIPPER = Gripper(-1, open=-1.0, closed=1.0, relative=True)
CALVIN_STEP = (
    50.0,
    50.0,
    50.0,
    20.0,
    20.0,
    20.0,
)  # CALVIN's relative actions are m and rad times this, clipped to +-1


def bridge_orig(actions: np.ndarray, states: np.ndarray | None, *, relabel: bool = True) -> EpisodeArrays:
    """BridgeData V2: the first step, which holds no action, is dropped, and the gripper is decided (`decided_gripper`).

    Args:
        actions: (n, 7) commanded changes of x, y, z, roll, pitch, yaw, and how far open the gripper shall be.
        states: (n, at least 6) reached x, y, z, roll, pitch, yaw; may be None without `relabel`.
        relabel: replace the commands by the motions that were reached (`motions`); the last step, which reaches no
            next one, is dropped too. OpenVLA does.
    """
    actions, states, rows = _kept(actions, states, np.arange(1, len(actions)))
    actions[:, 6] = decided_gripper(actions[:, 6])
    if not relabel:
        return actions, states, rows
    if states is None or states.shape[1] < 6:
        raise DatasetError(
            f"relabelling needs states of at least 6 dimensions, got {None if states is None else states.shape[1]}; open "
            "the dataset with its state_key, or leave the commands as they are"
        )
    reached = motions(states[:, :6])
    actions, states, kept = _kept(actions, states, np.arange(len(reached)))
    actions[:, :6] = reached
    return actions, states, rows[kept]


def fractal(actions: np.ndarray, states: np.ndarray | None) -> EpisodeArrays:
    """RT-1's data (fractal20220817_data): the gripper's commands become states (`absolute_gripper`).

    Args:
        actions: (n, 7) world_vector, rotation_delta and gripper_closedness_action, joined in this order.
        states: passed on.
    """
    actions, states, rows = _kept(actions, states, np.arange(len(actions)))
    actions[:, 6] = absolute_gripper(actions[:, 6])
    return actions, states, rows


def libero(actions: np.ndarray, states: np.ndarray | None) -> EpisodeArrays:
    """LIBERO: the gripper goes from -1 open, 1 closed to 1 open, 0 closed (`libero_gripper`).

    Args:
        actions: (n, 7) the controller's numbers, each in [-1, 1].
        states: passed on.
    """
    actions, states, rows = _kept(actions, states, np.arange(len(actions)))
    actions[:, 6] = libero_gripper(actions[:, 6])
    return actions, states, rows


def calvin(actions: np.ndarray, states: np.ndarray | None, *, metric: bool = False) -> EpisodeArrays:
    """CALVIN's `rel_actions`: the gripper goes from -1 closed, 1 open to 0 closed, 1 open (`calvin_gripper`).

    Args:
        actions: (n, 7) changes in the world frame times 50 (position) and 20 (Euler angles), clipped to [-1, 1].
        states: passed on.
        metric: give meters and radians instead (`calvin_metric`); RoboVLMs keeps CALVIN's numbers.
    """
    actions, states, rows = _kept(actions, states, np.arange(len(actions)))
    actions[:, 6] = calvin_gripper(actions[:, 6])
    if metric:
        actions[:, :6] = calvin_metric(actions[:, :6])
    return actions, states, rows


def decided_gripper(values: np.ndarray) -> np.ndarray:
    """Opening of a gripper (1 open) with the way between open and closed cut out, for it is no command.

    Above 0.95 is open (1), below 0.05 is closed (0). In between stands the next decided value. Values at the end that no
    decided one follows become the episode's last value as it is, so they may stay in between: OpenVLA's rule
    (`binarize_gripper_actions`).

    Args:
        values: (n,) in the order of time.

    Returns:
        (n,) float64.
    """
    values = np.asarray(values, dtype=np.float64)
    is_open = values > OPEN_ABOVE
    steps = np.where(is_open | (values < CLOSED_BELOW), np.arange(len(values)), len(values))
    upcoming = np.minimum.accumulate(steps[::-1])[::-1]
    return np.append(is_open.astype(np.float64), values[-1:])[upcoming]


def absolute_gripper(values: np.ndarray) -> np.ndarray:
    """Commands (above 0.1 close, below -0.1 open, else keep) to states (1 open, 0 closed); see `relative_gripper`.

    Before its first command the gripper is in the opposite state, and open all along if none is given: OpenVLA's rule
    (`rel2abs_gripper_actions`).

    Args:
        values: (n,) of a whole episode.

    Returns:
        (n,) float64.
    """
    values = np.asarray(values, dtype=np.float64)
    before = state_before(values, RT1_GRIPPER, default=True) if len(values) else True
    states, _ = commands_to_states(values, RT1_GRIPPER, GripperMemory(before)) if len(values) else (values, None)
    return states.astype(np.float64)


def relative_gripper(values: np.ndarray, before: float) -> np.ndarray:
    """States (1 open, 0 closed) to commands (1 close, -1 open, 0 keep) given at the steps where the state changes.

    Args:
        values: (n,) states.
        before: the state before the first step.

    Returns:
        (n,) float64; `absolute_gripper` undoes it where there is a command at all, or the gripper is open.
    """
    return -np.diff(np.asarray(values, dtype=np.float64), prepend=before)


def libero_gripper(values: np.ndarray) -> np.ndarray:
    """LIBERO's -1 open, 1 closed to 1 open, 0 closed: clipped to [0, 1], then inverted, as OpenVLA does."""
    return 1.0 - np.clip(np.asarray(values, dtype=np.float64), 0.0, 1.0)


def libero_gripper_back(values: np.ndarray) -> np.ndarray:
    """1 open, 0 closed to what LIBERO's environments take, -1 open, 1 closed; inverse of `libero_gripper` at both ends."""
    return 1.0 - 2.0 * np.asarray(values, dtype=np.float64)


def calvin_gripper(values: np.ndarray) -> np.ndarray:
    """CALVIN's -1 closed, 1 open to 0 closed, 1 open."""
    return (np.asarray(values, dtype=np.float64) + 1.0) / 2.0


def calvin_gripper_back(values: np.ndarray) -> np.ndarray:
    """Inverse of `calvin_gripper`."""
    return 2.0 * np.asarray(values, dtype=np.float64) - 1.0


def calvin_metric(arm: np.ndarray) -> np.ndarray:
    """CALVIN's relative actions, (..., 6), to meters and radians; what its clipping to 2 cm and 0.05 rad took is lost."""
    return np.asarray(arm, dtype=np.float64) / CALVIN_STEP


def calvin_metric_back(arm: np.ndarray) -> np.ndarray:
    """Meters and radians to CALVIN's relative actions; inverse of `calvin_metric`. Not clipped."""
    return np.asarray(arm, dtype=np.float64) * CALVIN_STEP


def motions(poses: np.ndarray) -> np.ndarray:
    """From each pose to the next, (n, d) to (n - 1, d): differences, inverse of `poses_of`.

    Angles are subtracted like lengths, as OpenVLA's `relabel_bridge_actions` does: a step over +-pi gives a motion of
    almost 2 pi, which is why bridge_orig's statistics reach 6.28. The share of such steps is small, and they are kept.
    """
    return np.diff(np.asarray(poses, dtype=np.float64), axis=0)


def poses_of(start: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The poses that motions lead through from a start, (d,) and (n - 1, d) to (n, d); inverse of `motions`."""
    return np.cumsum(np.concatenate([np.asarray(start, dtype=np.float64)[None], steps]), axis=0)


def _kept(actions: np.ndarray, states: np.ndarray | None, rows: np.ndarray) -> EpisodeArrays:
    """The rows named; indexing by an array copies them."""
    return actions[rows], None if states is None else states[rows], rows

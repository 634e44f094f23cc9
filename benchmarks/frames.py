"""How far the small-angle rule of RoboVLMs is from the rotation in the frame of the tool, and what conversions cost.

    python benchmarks/frames.py --quick

The rule (`frames.to_tcp_robovlms`) takes a hundredth of a change of Euler angles, turns it into the frame of the tool and
multiplies by 100. Its sign is that of the old orientation seen from the new one; after turning it round the angle to the
exact rotation (`frames.to_tcp`) is printed, in degrees, over random orientations with all angles within 1 rad.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from hf_vla_actions.actions import ActionSpace, Gripper, PoseDims, frames
from hf_vla_actions.actions.rotations import from_matrix, to_matrix

SIZES = (0.1, 1, 2, 5, 10, 30, 60, 90)
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def errors(degrees: float, n: int) -> np.ndarray:
    """(n,) degrees between the exact rotation and that of the rule, for changes of one size."""
    rng = np.random.default_rng(0)
    here, turn = rng.uniform(-1, 1, (n, 3)), rng.normal(size=(n, 3))
    turn *= np.radians(degrees) / np.linalg.norm(turn, axis=-1, keepdims=True)
    actions = np.concatenate([np.zeros((n, 3)), turn], axis=-1)
    exact = to_matrix(frames.to_tcp(actions, here)[:, 3:], frames.CALVIN_FORM)
    rule = to_matrix(-frames.to_tcp_robovlms(actions, here)[:, 3:], frames.CALVIN_FORM)
    return np.degrees(np.linalg.norm(from_matrix(exact.swapaxes(-1, -2) @ rule, "axis_angle"), axis=-1))


def milliseconds(batch: int, repeats: int) -> dict[str, float]:
    """Median time of conversions of chunks of 8 steps, in ms."""
    pose = PoseDims(NAMES[:3], NAMES[3:6], "euler_xyz", "difference")
    facts = {"frame": "base", "gripper": Gripper("gripper"), "pose": pose, "anchor": "step"}
    delta = (True,) * 6 + (False,)
    source = ActionSpace(NAMES, ["m"] * 3 + ["rad"] * 3 + [None], delta, **facts)
    targets = {
        "units": ActionSpace(NAMES, ["mm"] * 3 + ["deg"] * 3 + [None], delta, **facts),
        "absolute pose, quaternion": ActionSpace(
            (*NAMES[:3], "qx", "qy", "qz", "qw", "gripper"), ["m"] * 3 + [None] * 5, False, "base", Gripper("gripper")
        ),
        "frame of the tool": ActionSpace(
            NAMES,
            source.units,
            delta,
            **{**facts, "frame": "tcp", "pose": PoseDims(NAMES[:3], NAMES[3:6], "euler_xyz")},
        ),
    }
    chunk, state = np.zeros((batch, 8, 7)) + 0.01, np.zeros((batch, 6)) + 0.3
    found = {}
    for name, target in targets.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            source.convert(chunk, target, state)
            times.append(time.perf_counter() - start)
        found[name] = 1e3 * float(np.median(times))
    return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="example: python benchmarks/frames.py --quick"
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer orientations and repeats")
    n, repeats = (2000, 20) if parser.parse_args().quick else (20_000, 200)
    print(f"{'change':>8} {'median':>9} {'99 %':>9}   (degrees, {n} orientations)")
    for size in SIZES:
        found = errors(size, n)
        print(f"{size:>7}° {np.median(found):>8.4f}° {np.quantile(found, 0.99):>8.4f}°")
    print(f"\n{'conversion of chunks of 8 steps':<34}" + "".join(f"{f'batch {b}':>12}" for b in (1, 256)))
    rows = [milliseconds(batch, repeats) for batch in (1, 256)]
    for name in rows[0]:
        print(f"{name:<34}" + "".join(f"{row[name]:>9.2f} ms" for row in rows))


if __name__ == "__main__":
    main()

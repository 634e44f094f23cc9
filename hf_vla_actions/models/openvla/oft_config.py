"""Constants of OpenVLA-OFT (arXiv 2502.19645): what its original chose from the text of the command line.

Here they are saved with the checkpoint (`oft` in `config.json`). Source of the presets: moojink/openvla-oft,
`prismatic/vla/constants.py`; numbers of pictures and FiLM: its LIBERO.md and ALOHA.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionStats, NormStats
from hf_vla_actions.errors import CheckpointError, StatsError

MODES = ("l1", "discrete", "diffusion")
BOUNDS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}
VECTORS = ("q01", "q99", "min", "max", "mean", "std")
MAX_IMAGES = 3
EPSILON = 1e-8  # the original divides by high - low + 1e-8, and multiplies by it again
PRESETS: dict[str, dict[str, Any]] = {
    "libero": {"horizon": 8, "dof": 7, "proprio_dim": 8, "normalization": "bounds_q99", "num_images": 2},
    "aloha": {
        "horizon": 25,
        "dof": 14,
        "proprio_dim": 14,
        "normalization": "bounds",
        "num_images": 3,
        "use_film": True,
    },
    "bridge": {"horizon": 5, "dof": 7, "proprio_dim": 7, "normalization": "bounds_q99"},
}


@dataclass(frozen=True)
class OFTOptions:
    """What makes an OpenVLA model an OFT policy; the content of `oft` in its configuration.

    Args:
        mode: "l1" (regression head), "discrete" (action tokens, all at once) or "diffusion" (denoising head).
        horizon: actions in a chunk.
        dof: numbers in an action.
        normalization: bounds that become [-1, 1], of actions and proprio: "bounds_q99" (q01, q99) or "bounds"
            (min, max).
        num_images: pictures of a sample, 1 to 3.
        proprio_dim: numbers in the robot's state; None for a policy that does not read it.
        use_film: the instruction modulates the vision towers.
        diffusion_train_steps: steps of the noise schedule ("diffusion" only).
        diffusion_steps: steps of denoising ("diffusion" only); by default all of the schedule.

    Raises:
        CheckpointError: a value that makes no sense.
    """

    mode: str
    horizon: int
    dof: int
    normalization: str
    num_images: int
    proprio_dim: int | None = None
    use_film: bool = False
    diffusion_train_steps: int = 50
    diffusion_steps: int | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise CheckpointError(f"oft: mode must be one of {list(MODES)}, got {self.mode!r}")
        if self.normalization not in BOUNDS:
            raise CheckpointError(f"oft: normalization must be one of {list(BOUNDS)}, got {self.normalization!r}")
        for name in ("horizon", "dof", "num_images", "diffusion_train_steps", "proprio_dim", "diffusion_steps"):
            value, optional = getattr(self, name), name in ("proprio_dim", "diffusion_steps")
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not whole and not (optional and value is None):
                raise CheckpointError(f"oft: {name} must be a whole number of at least 1, got {value!r}")
        if self.num_images > MAX_IMAGES:
            raise CheckpointError(f"oft: num_images must be 1 to {MAX_IMAGES}, got {self.num_images}")
        if not isinstance(self.use_film, bool):
            raise CheckpointError(f"oft: use_film must be true or false, got {self.use_film!r}")
        if self.steps > self.diffusion_train_steps:
            raise CheckpointError(
                f"oft: {self.diffusion_steps} steps of denoising for a schedule of {self.diffusion_train_steps}"
            )

    @property
    def n_slots(self) -> int:
        """Positions of the sequence that stand for the numbers of one chunk."""
        return self.horizon * self.dof

    @property
    def steps(self) -> int:
        """Steps of denoising."""
        return self.diffusion_steps or self.diffusion_train_steps

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], found: str = "") -> OFTOptions:
        """Read the `oft` of a configuration.

        Args:
            values: the fields; those without a default must be there.
            found: what else is known, for the message.

        Raises:
            CheckpointError: a field is missing or unknown; says what to pass.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise CheckpointError(f"oft: unknown fields {unknown}; known are {sorted(known)}")
        missing = [name for name, f in known.items() if f.default is dataclasses.MISSING and values.get(name) is None]
        if missing:
            raise CheckpointError(
                f"this OFT checkpoint does not say its {missing}{found}, and they cannot be told from the weights: pass "
                f"them, or the preset it was trained with ({'; '.join(f'{n!r}: {v}' for n, v in PRESETS.items())})"
            )
        return cls(**values)


def preset_values(preset: str | None) -> dict[str, Any]:
    """Constants of a named preset; none for None."""
    if preset is None:
        return {}
    if preset not in PRESETS:
        raise CheckpointError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    return dict(PRESETS[preset])


def oft_statistics(norm_stats: Mapping[str, Any], options: OFTOptions) -> NormStats:
    """Statistics as an OFT policy uses them: those of its number of dimensions, between its bounds.

    The upper bounds are wider by 1e-8, which gives the original's formulas: 0.5 (x + 1) (high - low + 1e-8) + low,
    and 2 (x - low) / (high - low + 1e-8) - 1 for the robot's state.

    Args:
        norm_stats: as in the configuration; datasets of another number of dimensions are left out.
        options: of the checkpoint.

    Raises:
        StatsError: the bounds are not there, or no dataset has as many dimensions.
    """
    entries: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    for key, entry in norm_stats.items():
        sizes[key] = next((len(entry["action"][name]) for name in VECTORS if entry["action"].get(name)), 0)
        if sizes[key] != options.dof:
            continue
        action = _widened(entry["action"], options.normalization, f"dataset {key!r}, action")
        proprio = None
        if options.proprio_dim is not None and entry.get("proprio"):
            proprio = _widened(entry["proprio"], options.normalization, f"dataset {key!r}, proprio")
        entries[key] = {"action": action, "proprio": proprio, "num_trajectories": entry.get("num_trajectories")}
    if not entries:
        raise StatsError(
            f"the policy predicts {options.dof} numbers a step and no dataset of its statistics has as many: {sizes}"
        )
    return NormStats(entries)


def _widened(values: Mapping[str, Any], normalization: str, where: str) -> ActionStats:
    low, high = BOUNDS[normalization]
    missing = [name for name in (low, high) if values.get(name) is None]
    if missing:
        raise StatsError(f"{where}: normalization {normalization!r} needs {missing}, there are {sorted(values)}")
    wide = {high: (np.asarray(values[high], dtype=np.float64) + EPSILON).tolist()}
    if high != "max" and values.get("min") is not None and values.get("max") is not None:
        # A dimension that never moved (a padded state) has no rule of its own here: the formula makes -1 of it.
        least, most = (np.asarray(values[name], dtype=np.float64) for name in ("min", "max"))
        wide["max"] = np.where(least == most, most + EPSILON, most).tolist()
    return ActionStats.from_dict({**values, **wide, "mode": normalization})

"""What a folder says about a policy, for its card; what it does not say stays unknown."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.actions.stats import NEEDED
from hf_vla_actions.config import FILE_NAME as ACTION_CONFIG_FILE
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.hub.inspect import inspect_checkpoint
from hf_vla_actions.hub.report import Dataset, Report
from hf_vla_actions.models.shim import FILE_NAME as SHIM_FILE

METRICS_FILE, TRAINING_FILE = "action_metrics.json", "training.json"
HELD_OUT, OF_TRAINING = "eval_", "train_"
# Of the machine and the moment, not of the policy.
NO_METRICS = ("runtime", "per_second", "preparation_time")
PICTURES = (".png", ".jpg", ".jpeg", ".svg")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
RANGES = {"bounds_q99": "q01 .. q99", "bounds": "min .. max", "normal": "mean - 2 std .. mean + 2 std"}


@dataclass(frozen=True)
class Row:
    """One number of an action, in words.

    Args:
        name: of the dimension.
        unit: "not recorded" where nobody has said.
        kind: "delta", "absolute" or "not recorded".
        values: its range in the training data.
    """

    name: str
    unit: str
    kind: str
    values: str


@dataclass(frozen=True)
class Facts:
    """Everything that a folder says.

    Args:
        report: what `inspect_checkpoint` found.
        config: None for a checkpoint of the original OpenVLA.
        metrics: finite numbers of `action_metrics.json`.
        training: content of `training.json`.
        adapter: content of `adapter_config.json`.
        pictures: names of the figures.
        shim: it has the file for `trust_remote_code=True`.
    """

    report: Report
    config: ActionConfig | None
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    shim: bool = False

    @property
    def keys(self) -> list[str]:
        """Every `unnorm_key`."""
        return list(self.report.datasets)

    def space(self, key: str) -> ActionSpace | None:
        """Meaning of its action, where there is an action config."""
        return None if self.config is None else self.config.spaces[key]

    def option(self, name: str) -> Any:
        """An option of the training; None if it is not recorded."""
        for part in (self.training, *(value for value in self.training.values() if isinstance(value, dict))):
            if part.get(name) not in (None, "", []):
                return part[name]
        return None

    def base_model(self) -> str | None:
        """Repository of the model that was fine-tuned."""
        names = (self.adapter.get("base_model_name_or_path"), self.option("model_name_or_path"))
        return next((name for name in names if is_repository(name)), None)

    def datasets(self) -> list[str]:
        """Repositories of the training data."""
        said = self.option("dataset") or self.option("datasets") or []
        return [name for name in ([said] if isinstance(said, str) else list(said)) if is_repository(name)]

    def dof(self, key: str) -> int | None:
        """Numbers in one action."""
        return self.report.datasets[key].dof


def read_facts(folder: str | Path) -> Facts:
    """Read what a card needs.

    Raises:
        CheckpointError: there is no policy in the folder, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    report = inspect_checkpoint(str(folder))
    if not report.policy or not report.datasets:
        said = "; ".join(report.problems) or "nothing says what its tokens mean"
        raise CheckpointError(f"{folder} holds a {report.kind}, of which no card can be written: {said}")
    own = (folder / ACTION_CONFIG_FILE).is_file()
    metrics = _json(folder / METRICS_FILE)
    return Facts(
        report=report,
        config=ActionConfig.from_pretrained(folder) if own else None,
        metrics={
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not any(word in name for word in NO_METRICS)
        },
        training=_json(folder / TRAINING_FILE),
        adapter=_json(folder / "adapter_config.json"),
        pictures=tuple(sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICTURES)),
        shim=(folder / SHIM_FILE).is_file(),
    )


def rows(facts: Facts, key: str) -> tuple[str, list[Row]]:
    """What the ranges are, and a row for each dimension of an `unnorm_key`."""
    space = facts.space(key)
    if space is None or facts.config is None:
        return "normalized range", [_without_space(dataset) for dataset in facts.report.datasets[key].dimensions]
    stats = facts.config.stats(key)
    kinds = {True: "delta", False: "absolute", None: "not recorded"}
    found = []
    for i, values in enumerate(_ranges(stats)):
        unit = space.units[i] or ("not recorded" if not space.named else "-")
        found.append(Row(space.names[i], unit, kinds[space.delta[i]], values))
    return RANGES[stats.mode] + ("" if stats.horizon is None else ", over all steps of a chunk"), found


def bounds(stats: ActionStats) -> tuple[np.ndarray, np.ndarray]:
    """(dof,) lowest and highest value that the statistics normalize; steps of a chunk are taken together."""
    low, high = (np.asarray(getattr(stats, name)) for name in NEEDED[stats.mode])
    if stats.mode == "normal":
        low, high = low - 2 * high, low + 2 * high
    low, high = (low, high) if low.ndim == 1 else (low.min(axis=0), high.max(axis=0))
    return low + 0.0, high + 0.0  # no -0


def is_repository(name: Any) -> bool:
    """Whether it is the name of a repository and no folder of this machine."""
    return isinstance(name, str) and REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def _ranges(stats: ActionStats) -> list[str]:
    low, high = bounds(stats)
    texts = []
    for i, normalized in enumerate(np.asarray(stats.mask)):
        text = f"{low[i]:.4g} .. {high[i]:.4g}" if low[i] != high[i] else f"constant {low[i]:.4g}"
        texts.append(text if normalized else f"{text} (not normalized)")
    return texts


def _without_space(dimension: Any) -> Row:
    values = f"{dimension.low:.4g} .. {dimension.high:.4g}" + ("" if dimension.normalized else " (not normalized)")
    return Row(dimension.name, dimension.unit or "not recorded", "not recorded", values)


def data_text(dataset: Dataset, trajectories: int | None) -> str:
    """How much data the statistics of one key come from."""
    steps = "steps not recorded" if dataset.transitions is None else f"{dataset.transitions:,} steps"
    return steps if trajectories is None else f"{trajectories:,} episodes, {steps}"


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} should hold an object, got {type(values).__name__}")
    return values

"""The last lines of a training: how well the policy predicts what was held out, and what it saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_vla_actions.config import ActionConfig

PARTS = {"eval": "held-out episodes", "train": "a sample of what it saw"}


def summary_of(metrics: Mapping[str, float], config: ActionConfig, unnorm_keys: Sequence[str]) -> str:
    """A line for each part of the data, for people; `action_metrics.json` has all numbers.

    Each token was predicted from the demonstrated ones before it; `hf-vla eval` asks the policy on its own. A continuous
    head is asked as in use.

    Args:
        metrics: as `fine_tune` returns them.
        config: of the policy, for names and units.
        unnorm_keys: of the dataset, or of all in a mixture.

    Returns:
        Lines; none for what was not measured.
    """
    how = "each token told those before" if config.head is None else "chunks of its head"
    lines = []
    for prefix, what in PARTS.items():
        for key in unnorm_keys:
            mixed = len(unnorm_keys) > 1
            start = f"{prefix}_{key}_" if mixed else f"{prefix}_"
            numbers = _numbers(
                {n.removeprefix(start): v for n, v in metrics.items() if n.startswith(start)}, config, key
            )
            if numbers:
                lines.append(f"{what}{f' of {key}' if mixed else ''}, {how}: {', '.join(numbers)}\n")
    return "".join(lines)


def _numbers(metrics: Mapping[str, float], config: ActionConfig, key: str) -> list[str]:
    space = config.space(key)
    found = []
    if "token_accuracy" in metrics:
        found.append(f"{metrics['token_accuracy']:.1%} of the tokens")
    for name, unit in zip(space.names, space.units, strict=True):
        value = metrics.get(f"l1/{name}", math.nan)
        if math.isfinite(value):
            found.append(f"{name} off by {value:.3g}{f' {unit}' if unit else ''}")
    return found

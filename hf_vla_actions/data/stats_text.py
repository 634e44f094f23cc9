"""What `hf-vla stats` prints: tables of statistics, and what a repair changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionStats
from hf_vla_actions.data.dataset_stats import Measured
from hf_vla_actions.data.lerobot_folder import BOOKKEEPING
from hf_vla_actions.data.number_stream import open_numbers
from hf_vla_actions.data.stats_repair import Repair, missing_pictures

SHOWN = ("mean", "std", "min", "q01", "q50", "q99", "max")
GRIPPER = "gripper"


def measured_text(part: Measured, entry: dict[str, Any]) -> str:
    """The table of one dataset with what one must know about it."""
    request, running = part.request, part.stats["action"]
    of = "actions" if request.horizon is None else f"chunks of {request.horizon} actions"
    if request.relative is not None:
        relative = [part.names[dim] if part.names else dim for dim in request.relative]
        of += f" relative to the state at their first step in {relative}"
    lines = [f"{request.key!r}: {running.count} {of}, {part.episodes} episodes, {part.rows} rows"]
    lines.append(
        "quantiles are exact"
        if running.exact
        else f"quantiles have the right rank within {running.rank_error:.1e} (sketch of {running.count} rows)"
    )
    if part.short:
        lines.append(f"{part.short} episodes are shorter than the horizon and gave no chunk")
    still = np.flatnonzero(entry["action"].constant.all(axis=0) if request.horizon else entry["action"].constant)
    if len(still):
        lines.append(f"constant dimensions: {[part.names[i] if part.names else int(i) for i in still]}")
    if part.names and GRIPPER in part.names and np.asarray(entry["action"].mask)[part.names.index(GRIPPER)]:
        lines.append(
            f"{GRIPPER!r} is normalized like the other dimensions; hf-vla train lets it pass through: --pass_through "
            f"{GRIPPER}"
        )
    text = "\n".join(lines) + "\n" + table(entry["action"], part.names)
    if entry["proprio"] is not None:
        text += "states\n" + table(entry["proprio"], part.state_names)
    return text


def table(stats: ActionStats, names: Sequence[str] | None) -> str:
    """One line a dimension; of chunks the first and the last step."""
    vectors = {name: getattr(stats, name) for name in SHOWN if name != "q50"}
    if stats.running is not None:
        vectors["q50"] = stats.running.quantile(0.5)
    shown = [name for name in SHOWN if name in vectors]
    labels = [str(name) for name in names or range(stats.dof)]
    steps = [None] if stats.horizon is None else sorted({0, stats.horizon - 1})
    lines = []
    for step in steps:
        if step is not None:
            lines.append(f"step {step} of 0 to {(stats.horizon or 0) - 1}")
        width = max(len(label) for label in [*labels, "dimension"])
        lines.append("dimension".ljust(width) + f"{'count':>11}" + "".join(f"{name:>12}" for name in shown))
        for dim, label in enumerate(labels):
            values = [vectors[name][dim] if step is None else vectors[name][step, dim] for name in shown]
            passes = "" if np.asarray(stats.mask)[dim] else "  not normalized"
            lines.append(
                label.ljust(width) + f"{stats.count:>11}" + "".join(f"{value:>12.5g}" for value in values) + passes
            )
    return "\n".join(lines) + "\n"


def repair_text(repair: Repair, path: str) -> str:
    """What was changed, with the widths of [q01, q99] before and after."""
    lines = [f"{repair.path} written" + (f", the old one is {repair.backup.name}" if repair.backup else "")]
    names = {key: open_numbers(path).names(key) for key in repair.after}
    for key, bounds in repair.after.items():
        if key in BOOKKEEPING:
            continue
        widening = repair.widening(key)
        if widening is None:
            lines.append(f"{key}: had no q01 and q99")
            continue
        lines.append(f"{key}: width of [q01, q99]")
        lines.append(f"  {'dimension':<16}{'before':>12}{'after':>12}{'before/after':>14}")
        before = np.ptp(repair.before[key], axis=0)
        labels = names[key] or range(len(before))
        for label, old, new, factor in zip(labels, before, np.ptp(bounds, axis=0), widening, strict=True):
            share = "constant" if np.isnan(factor) else f"{factor:.3f}"
            lines.append(f"  {label!s:<16}{old:>12.5g}{new:>12.5g}{share:>14}")
    lines.append(f"also written: {[key for key in repair.after if key in BOOKKEEPING]}")
    if repair.added:
        lines.append(f"new entries: {list(repair.added)}")
    if repair.kept:
        lines.append(f"left as they were: {list(repair.kept)}")
    without = missing_pictures(path)
    if without:
        lines.append(f"cameras without statistics, which are not computed here: {without}")
    if (repair.path.parent / "episodes_stats.jsonl").is_file():
        lines.append(
            "lerobot reads episodes_stats.jsonl of a v2.1 dataset, not this file; convert it to v3.0 to use it"
        )
    return "\n".join(lines) + "\n"

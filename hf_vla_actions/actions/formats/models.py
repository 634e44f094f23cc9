"""Statistics that belong to one model: openpi, Transformers' PI0Processor, RoboVLMs; and LingBot's, which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.actions.formats.document import (
    Document,
    Names,
    Reading,
    Wish,
    as_json,
    blocks_of,
    is_block,
    stats_of,
    vectors,
)
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.actions.stats import ActionStats
from hf_vla_actions.errors import StatsError

PI0_KEYS = ("actions_mean", "actions_std", "state_mean", "state_std")
# Other transforms of a RoboVLMs configuration, which the two scalars do not describe.
ROBOVLMS_TRANSFORMS = ("use_mu_law", "regular_action")


def is_openpi(document: Document) -> bool:
    """`{"norm_stats": {"state": {...}, "actions": {...}}}`."""
    entries = document.fields.get("norm_stats")
    return isinstance(entries, dict) and is_block(entries.get("actions"))


def asset_key(path: Path | None) -> str | None:
    """The dataset's name by openpi's layout, `assets/<asset id>/norm_stats.json`; an id may hold a slash."""
    if path is None or "assets" not in path.parts[:-2]:
        return None
    start = len(path.parts) - 1 - path.parts[:-2][::-1].index("assets") - 2
    return "/".join(path.parts[start + 1 : -1])


def read_openpi(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read openpi's vectors; the key is the asset's folder, unless the caller names another."""
    entries = document.fields["norm_stats"]
    parts = {}
    for part, name in (("action", "actions"), ("proprio", "state")):
        if entries.get(name) is None:
            continue
        where = f"{document}, {name!r}"
        found = vectors(entries[name], where)
        if "mean" not in found:
            raise StatsError(f"{where} has no mean and std, which every openpi file has: it is incomplete")
        parts[part] = stats_of(found, wish.mode, preferred, where)
    ignored = sorted(set(entries) - {"state", "actions"})
    notes = (f"not read: {ignored}",) if ignored else ()
    return Reading({None if wish.key else asset_key(document.path): parts}, notes=notes)


def write_openpi(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_openpi`."""
    (entry,) = stats.values()
    kept = ("mean", "std", "q01", "q99")
    parts = {"state": entry["proprio"], "actions": entry["action"]}
    content = {name: blocks_of(part, kept) for name, part in parts.items() if part is not None}
    return as_json({"norm_stats": content})


def is_pi0(document: Document) -> bool:
    """The settings of a PI0Processor, with statistics or still without."""
    return bool(set(PI0_KEYS) & set(document.fields)) or document.fields.get("processor_class") == "PI0Processor"


def read_pi0(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read the four lists of a Transformers PI0Processor (`processor.to_dict()` or processor_config.json)."""
    parts = {}
    for part, name in (("action", "actions"), ("proprio", "state")):
        block = {stat: document.fields.get(f"{name}_{stat}") for stat in ("mean", "std")}
        if part == "proprio" and block["mean"] is None and block["std"] is None:
            continue
        where = f"{document}, {name}_mean and {name}_std"
        parts[part] = stats_of(vectors(block, where), wish.mode, preferred, where)
    return Reading({None: parts})


def write_pi0(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_pi0`; the other settings of a processor_config.json that is there are kept."""
    (entry,) = stats.values()
    content: dict[str, Any] = {} if existing is None else {**existing.fields}
    for part, name in (("action", "actions"), ("proprio", "state")):
        block = {} if entry[part] is None else blocks_of(entry[part], ("mean", "std"))
        content.update({f"{name}_{stat}": block.get(stat) for stat in ("mean", "std")})
    return as_json(content)


def is_robovlms(document: Document) -> bool:
    """A RoboVLMs configuration: scalars norm_min and norm_max for all dimensions but the gripper."""
    return {"norm_min", "norm_max"} <= set(document.fields)


def read_robovlms(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read norm_min..norm_max: [-1, 1] for all dimensions but the last, the gripper, which passes through."""
    low, high = (document.fields[name] for name in ("norm_min", "norm_max"))
    for name, value in (("norm_min", low), ("norm_max", high)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise StatsError(f"{document}: {name} must be a number, got {value!r}")
    if not low < high:
        raise StatsError(f"{document}: norm_min {low} must be below norm_max {high}")
    others = [name for name in ROBOVLMS_TRANSFORMS if document.fields.get(name)]
    if others or document.fields.get("norm_action", True) is not True:
        raise StatsError(
            f"{document}: norm_action is {document.fields.get('norm_action', True)!r} and {others} are on, so the "
            "actions of this model are not those that norm_min and norm_max describe"
        )
    if wish.dof is None:
        raise StatsError(f"{document} holds scalars, norm_min and norm_max: pass dof= (7 for an arm with a gripper)")
    mask = np.arange(wish.dof) < wish.dof - 1
    found = {"min": np.full(wish.dof, low, dtype=float), "max": np.full(wish.dof, high, dtype=float)}
    action = stats_of(found, wish.mode, preferred, str(document), mask=mask)
    note = f"the last of {wish.dof} dimensions, the gripper, is not normalized, as in RoboVLMs"
    return Reading({None: {"action": action}}, warnings=(note,))


def write_robovlms(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_robovlms`; a configuration that is there keeps its other settings."""
    (entry,) = stats.values()
    action: ActionStats = entry["action"]
    arm = np.asarray(action.mask)
    if action.mode != "bounds" or not arm.any():
        raise StatsError(
            f"RoboVLMs' scalars are bounds of normalized dimensions; these statistics are {action.mode!r}"
        )
    low, high = np.unique(np.asarray(action.min)[arm]), np.unique(np.asarray(action.max)[arm])
    if low.size > 1 or high.size > 1:
        raise StatsError(f"RoboVLMs has one norm_min and one norm_max for all dimensions, got {action.range_text()}")
    content: dict[str, Any] = {} if existing is None else {**existing.fields}
    return as_json({**content, "norm_action": True, "norm_min": float(low[0]), "norm_max": float(high[0])})


def is_lingbot(document: Document) -> bool:
    """Statistics with q02/q98 somewhere."""

    def search(value: Any, depth: int) -> bool:
        if not isinstance(value, dict) or depth == 0:
            return False
        return bool({"q02", "q98"} & set(value)) or any(search(inner, depth - 1) for inner in value.values())

    return search(document.content, 4) or any(name.endswith((".q02", ".q98")) for name in document.fields)


def read_lingbot(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Refuse: the 2nd and 98th percentile are not the 1st and 99th, and no field here means them."""
    raise StatsError(
        f"{document} has q02/q98 (LingBot), which are not q01/q99 and would scale every action wrongly under that name. "
        "If bounds at q02 and q98 are what you want, say so with ActionStats.from_ranges(q02, q98); for q01/q99 run "
        "hf-vla stats on the dataset"
    )

"""Statistics of LeRobot datasets: `meta/stats.json` (v3.0, v2.0) and `meta/episodes_stats.jsonl` (v2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.actions.formats.document import (
    QUANTILES,
    Document,
    Entry,
    Names,
    Reading,
    Wish,
    as_json,
    blocks_of,
    is_block,
    stats_of,
    vectors,
    whole,
)
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.errors import StatsError

ACTION, STATE = "action", "observation.state"
PARTS = (("action", ACTION), ("proprio", STATE))
# Columns that every LeRobot dataset has statistics of, and no other format.
COLUMNS = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
ENVELOPE = (
    "q01/q99 in a LeRobot dataset may be envelopes over episodes (their lowest and highest quantile), which are too "
    "wide: run hf-vla stats on the dataset for true ones"
)


def is_lerobot(document: Document) -> bool:
    """`{"action": {...}, "observation.state": {...}, ...}`."""
    content = document.fields
    if is_block(content.get(STATE)):
        return True
    if not is_block(content.get(ACTION)) or {"proprio", "num_transitions"} & set(content):
        return False
    alone = set(content) <= {ACTION, "num_trajectories"}
    return not alone or not {"mask", "mode", "p01"} & set(content[ACTION])


def is_episodes(document: Document) -> bool:
    """Lines of `{"episode_index": ..., "stats": {...}}`."""
    rows = _rows(document)
    return bool(rows) and all(
        isinstance(row, dict) and "episode_index" in row and isinstance(row.get("stats"), dict) for row in rows
    )


def _rows(document: Document) -> list[Any]:
    return document.content if isinstance(document.content, list) else [document.content]


def dataset_name(path: Path | None) -> str | None:
    """The dataset folder's name, which `hf-vla train` uses as `unnorm_key` too; None outside a `meta` folder."""
    folder = None if path is None else path.resolve().parent
    return folder.parent.name or None if folder is not None and folder.name == "meta" else None


def read_lerobot(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Read the statistics of action and state; those of pictures and times are not needed for commands."""
    entry = read_parts(document.fields, wish, preferred, str(document))
    notes = (f"not read: {sorted(set(document.fields) - {ACTION, STATE})}",)
    warnings = (ENVELOPE,) if entry["action"].q01 is not None else ()
    return named_by_folder(document, wish, entry, feature_names(document), warnings, notes)


def named_by_folder(
    document: Document, wish: Wish, entry: Entry, names: Names, warnings: tuple[str, ...], notes: tuple[str, ...]
) -> Reading:
    """A Reading under the dataset folder's name, unless the caller names another."""
    key = None if wish.key else dataset_name(document.path)
    if key is not None:
        notes = (*notes, f"the key {key!r} is the dataset folder's name")
    return Reading({key: entry}, {key: names} if names else {}, warnings, notes)


def read_parts(content: Mapping[str, Any], wish: Wish, preferred: tuple[str, ...], where: str) -> Entry:
    """The entry of action and state of `{feature: statistics}`."""
    if not is_block(content.get(ACTION)):
        raise StatsError(f"{where} has no statistics of {ACTION!r}, only of {sorted(content)[:12]}")
    parts = {}
    for part, feature in PARTS:
        if feature not in content:
            continue
        place = f"{where}, {feature!r}"
        found = vectors(content[feature], place)
        count = whole(content[feature].get("count"), f"{place}: count")
        parts[part] = stats_of(found, wish.mode, preferred, place, count=count)
    return parts


def feature_names(document: Document) -> Names:
    """Names of the dimensions by `info.json`, where it has one for each."""
    info = document.beside("info.json")
    features = {} if info is None else info.fields.get("features")
    features = features if isinstance(features, dict) else {}
    found = {}
    for part, feature in PARTS:
        if not isinstance(features.get(feature), dict):
            continue
        names = features[feature].get("names")
        names = next(iter(names.values())) if isinstance(names, dict) and len(names) == 1 else names
        if isinstance(names, list) and [len(names)] == features[feature].get("shape"):
            found[part] = tuple(map(str, names))
    return found


def write_lerobot(stats: NormStats, names: Mapping[str, Names], existing: Document | None) -> bytes:
    """Inverse of `read_lerobot`; statistics of other features in a file that is there are kept."""
    (entry,) = stats.values()
    content = {} if existing is None else {**existing.fields}
    for part, feature in PARTS:
        if entry[part] is not None:
            content[feature] = feature_block(entry[part])
    return as_json(content)


def feature_block(stats) -> dict[str, Any]:
    """One feature of a stats.json."""
    return {**blocks_of(stats), **({} if stats.count is None else {"count": [stats.count]})}


def read_episodes(document: Document, wish: Wish, preferred: tuple[str, ...]) -> Reading:
    """Merge statistics of episodes: count, mean, std, min and max exactly; quantiles cannot be merged."""
    if wish.mode == "bounds_q99":
        raise StatsError(
            f"{document} holds statistics of single episodes, and quantiles of all frames do not follow from them: run "
            "hf-vla stats on the dataset, or pass mode='bounds' or 'normal'"
        )
    rows = _rows(document)
    indices = [_index(row["episode_index"], f"{document}, line {i + 1}") for i, row in enumerate(rows)]
    if len(set(indices)) < len(rows):
        twice = sorted({index for index in indices if indices.count(index) > 1})
        raise StatsError(f"{document} has the episodes {twice[:8]} twice: their frames would count double")
    entry: Entry = {"num_trajectories": len(rows)}
    for part, feature in PARTS:
        places = [f"{document}, line {i + 1}, {feature!r}" for i in range(len(rows))]
        blocks = [(place, row["stats"].get(feature)) for place, row in zip(places, rows, strict=True)]
        if part == "action" or any(block is not None for _, block in blocks):
            entry[part] = _merge(blocks, wish, preferred, f"{document}, {feature!r}")
    dropped = sorted({name for _, block in blocks for name in set(block or ()) & set(QUANTILES)})
    notes = (f"{len(rows)} episodes merged",) + ((f"quantiles of episodes not read: {dropped}",) if dropped else ())
    return named_by_folder(document, wish, entry, feature_names(document), (), notes)


def _index(value: Any, where: str) -> int:
    index = whole(value, f"{where}: episode_index")
    if index is None:
        raise StatsError(f"{where}: episode_index is missing")
    return index


def _merge(blocks: list[tuple[str, Any]], wish: Wish, preferred: tuple[str, ...], where: str):
    found, counts = [], []
    for place, block in blocks:
        parts = vectors(block, place)
        if "mean" not in parts or "min" not in parts:
            raise StatsError(f"{place} needs mean, std, min and max to be merged, it has {sorted(parts)}")
        count = whole(block.get("count"), f"{place}: count")
        if not count:
            raise StatsError(f"{place} has no count, without which it cannot be merged")
        found.append(parts)
        counts.append(count)
    sizes = {parts["mean"].shape for parts in found}
    if len(sizes) > 1:
        raise StatsError(f"{where} has episodes of different sizes: {sorted(sizes)}")
    mean, std, low, high = (np.stack([parts[name] for parts in found]) for name in ("mean", "std", "min", "max"))
    weights = np.asarray(counts, dtype=np.float64) / sum(counts)
    total = np.tensordot(weights, mean, axes=1)
    variance = np.tensordot(weights, std**2 + (mean - total) ** 2, axes=1)
    merged = {"mean": total, "std": np.sqrt(variance), "min": low.min(axis=0), "max": high.max(axis=0)}
    return stats_of(merged, wish.mode, preferred, where, count=sum(counts))

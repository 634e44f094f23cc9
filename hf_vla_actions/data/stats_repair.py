"""True quantiles for LeRobot's `meta/stats.json`, and the rule by which LeRobot fills it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hf_vla_actions.actions import RunningStats
from hf_vla_actions.data.lerobot_info import is_camera, read_json
from hf_vla_actions.data.lerobot_stats import QUANTILES
from hf_vla_actions.data.number_stream import LeRobotNumbers
from hf_vla_actions.errors import DatasetError


@dataclass(frozen=True)
class Repair:
    """What `repair_stats` did.

    Args:
        path: the file.
        backup: copy of what it was, None where there was none.
        before: [q01, q99] of each numeric feature as it was, (2, dof); features without quantiles are left out.
        after: the same of every numeric feature as it is now.
        added: features that had no entry.
        kept: features that were left as they were: pictures, and what is no vector of numbers in the parquet files.
    """

    path: Path
    backup: Path | None
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    added: tuple[str, ...]
    kept: tuple[str, ...]

    def widening(self, key: str) -> np.ndarray | None:
        """(dof,) how many times as wide [q01, q99] was as it is now; NaN where a dimension is constant now."""
        if key not in self.before:
            return None
        old, new = (np.ptp(bounds[key], axis=0) for bounds in (self.before, self.after))
        return np.divide(old, new, out=np.full(new.shape, np.nan), where=new > 0)


def envelope(episodes: Sequence[np.ndarray], quantiles: Sequence[float] = (0.01, 0.99)) -> np.ndarray:
    """What LeRobot stores as quantiles of a dataset: the outermost of its episodes' quantiles.

    For q up to 0.5 the smallest of the episodes' quantiles, above that the largest (huggingface/lerobot,
    `datasets/compute_stats.py`, `aggregate_feature_stats`, version 0.6). The share of the rows inside is larger than
    q says, and grows with the number of episodes.

    Args:
        episodes: (steps, dof) of each.
        quantiles: which ones.

    Returns:
        (len(quantiles), dof) float64.
    """
    each = np.stack([np.quantile(rows, quantiles, axis=0) for rows in episodes])
    return np.stack([each[:, i].min(axis=0) if q <= 0.5 else each[:, i].max(axis=0) for i, q in enumerate(quantiles)])


def repair_stats(root: str | Path, progress: bool = True) -> Repair:
    """Write `meta/stats.json` of a LeRobotDataset folder anew, with statistics of all rows of its numeric features.

    Only parquet columns are read. Entries of pictures stay as they are. The old file is copied beside the new one first,
    never over an older copy.

    Raises:
        DatasetError: the dataset or its file is damaged; nothing is changed then.
    """
    stream = LeRobotNumbers(root)
    path = stream.root / "meta" / "stats.json"
    old = read_json(path) if path.is_file() else {}
    numeric = [key for key, feature in stream.info["features"].items() if key in stream.lengths]
    stats = _measure(stream, numeric, progress)
    entries = {key: _entry(running) for key, running in stats.items()}
    before = {key: bounds for key in entries if (bounds := _bounds(old.get(key), stream.lengths[key])) is not None}
    content = {**old, **{key: _renewed(old.get(key), entry) for key, entry in entries.items()}}
    backup = _write(path, content)
    return Repair(
        path=path,
        backup=backup,
        before=before,
        after={key: np.array([entry["q01"], entry["q99"]]) for key, entry in entries.items()},
        added=tuple(key for key in entries if key not in old),
        kept=tuple(key for key in old if key not in entries),
    )


def missing_pictures(root: str | Path) -> list[str]:
    """Cameras without an entry in `meta/stats.json`, which are not computed here."""
    stream = LeRobotNumbers(root)
    path = stream.root / "meta" / "stats.json"
    have = read_json(path) if path.is_file() else {}
    return [key for key, feature in stream.info["features"].items() if is_camera(feature) and key not in have]


def _measure(stream: LeRobotNumbers, keys: Sequence[str], progress: bool) -> dict[str, RunningStats]:
    stats = {key: RunningStats(stream.lengths[key]) for key in keys}
    rows = 0
    with tqdm(total=stream.n_frames, unit="row", unit_scale=True, desc=stream.name, disable=not progress) as bar:
        for _, vectors in stream.episodes(stream.files, keys, (1, 1)):
            for key, values in vectors.items():
                stats[key].update(values)
            rows += len(vectors[keys[0]])
            bar.update(len(vectors[keys[0]]))
    if rows != stream.n_frames:
        raise DatasetError(
            f"{stream.root} is inconsistent: meta/info.json says {stream.n_frames} frames, its data files have {rows}"
        )
    return stats


def _entry(running: RunningStats) -> dict[str, Any]:
    """Statistics of one feature under LeRobot's names."""
    vectors = {name: getattr(running, name) for name in ("min", "max", "mean", "std")}
    vectors |= dict(zip(QUANTILES, running.quantile(list(QUANTILES.values())), strict=True))
    return {name: vector.tolist() for name, vector in vectors.items()} | {"count": [running.count]}


def _renewed(old: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """The new entry; a quantile that only the old one had would be the one wrong number left, so it goes."""
    rest = {} if not isinstance(old, dict) else {k: v for k, v in old.items() if not re.fullmatch(r"[pq]\d+", k)}
    return {**rest, **entry}


def _bounds(entry: Any, length: int) -> np.ndarray | None:
    """[q01, q99] of an old entry as (2, length); None where it has none, or others."""
    if not isinstance(entry, dict) or "q01" not in entry or "q99" not in entry:
        return None
    try:
        bounds = np.array([np.ravel(entry["q01"]), np.ravel(entry["q99"])], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return bounds if bounds.shape == (2, length) else None


def _write(path: Path, content: dict[str, Any]) -> Path | None:
    """Replace the file at once, and keep what it was; return where."""
    backup = None
    if path.is_file():
        names = (path.with_name(f"stats.before_repair{suffix}.json") for suffix in ["", *map(str, range(2, 1000))])
        backup = next(name for name in names if not name.exists())
        shutil.copy2(path, backup)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=4), encoding="utf-8")
    os.replace(temporary, path)
    return backup

"""Statistics of several datasets: `{unnorm_key: {"action": ActionStats, "proprio": ActionStats | None}}`."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_vla_actions.actions.stats import ActionStats
from hf_vla_actions.errors import StatsError, UnnormKeyError

FILE_NAME = "dataset_statistics.json"
logger = logging.getLogger(__name__)


class NormStats(Mapping):
    """Read-only mapping of dataset names (`unnorm_key`) to their statistics.

    An entry is a dict with "action" (ActionStats), "proprio" (ActionStats or None) and "num_trajectories" (int or
    None). The number of transitions is the `count` of the action's statistics.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]):
        self._entries: dict[str, dict[str, Any]] = {}
        for key, entry in entries.items():
            action = entry.get("action")
            if not isinstance(action, ActionStats):
                raise StatsError(f"entry {key!r} needs 'action' to be ActionStats, got {type(action).__name__}")
            known = {"action": action, "proprio": entry.get("proprio")}
            self._entries[key] = {**known, "num_trajectories": entry.get("num_trajectories")}
        if not self._entries:
            raise StatsError("statistics need at least one dataset")

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._entries[self.resolve(key)]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"NormStats({self.describe()})"

    def describe(self) -> str:
        """Every key with its dof and ranges, on one line."""
        return "; ".join(
            f"{key!r}: {e['action'].dof} dims {e['action'].range_text()}" for key, e in self._entries.items()
        )

    def is_close(self, other: NormStats, rtol: float = 1e-9) -> bool:
        """Whether both hold the same datasets with the same statistics up to rounding (`ActionStats.is_close`)."""
        if self._entries.keys() != other._entries.keys():
            return False
        for key, mine in self._entries.items():
            theirs = other._entries[key]
            pairs = [(mine[part], theirs[part]) for part in ("action", "proprio")]
            alike = all(
                (a is None and b is None) or (a is not None and b is not None and a.is_close(b, rtol))
                for a, b in pairs
            )
            if not alike or mine["num_trajectories"] != theirs["num_trajectories"]:
                return False
        return True

    def resolve(self, unnorm_key: str | None) -> str:
        """Return the key to use: the given one, or the only one there is. Anything else raises and lists them."""
        if unnorm_key is None:
            if len(self._entries) == 1:
                return next(iter(self._entries))
            raise UnnormKeyError(f"unnorm_key is needed, there are several datasets: {self.describe()}")
        if unnorm_key in self._entries:
            return unnorm_key
        near = difflib.get_close_matches(str(unnorm_key), list(self._entries), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnnormKeyError(f"unnorm_key {unnorm_key!r} is not among the statistics: {self.describe()}.{hint}")

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        key: str | None = None,
        format: str | None = None,
        mode: str | None = None,
        dof: int | None = None,
    ) -> NormStats:
        """Read any statistics file of the field, or that of a dataset, checkpoint or policy folder.

        Args:
            path: a file or a folder.
            key: the `unnorm_key` for a file that describes one dataset without naming it, or the one to read of several.
            format: one of `hf_vla_actions.actions.formats.FORMATS`; detected by content if None.
            mode: how the statistics are used, where the file does not say; what its users do by default if None, and the
                log says so.
            dof: dimensions, for formats of scalars.

        What must be known before use is logged as a warning; `read_stats` of that module returns it, with names.
        """
        from hf_vla_actions.actions.formats import read_stats

        file = read_stats(path, key=key, format=format, mode=mode, dof=dof)
        for text in file.warnings:
            logger.warning("%s: %s", path, text)
        for text in file.notes:
            logger.info("%s: %s", path, text)
        return file.stats

    @classmethod
    def from_dict(cls, content: Any, key: str | None = None, source: str = "the statistics") -> NormStats:
        """Read what `to_dict` wrote, OpenVLA's or Octo's datasets, also as `norm_stats` of a config.json.

        Args:
            content: the datasets, or one entry alone.
            key: the `unnorm_key` of one entry alone; an error for others.
            source: what `content` is, for messages.

        p01/p99 (Octo) are read as q01/q99. Statistics without "mask" normalize every dimension.
        """
        if isinstance(content, dict) and isinstance(content.get("norm_stats"), dict):
            content = content["norm_stats"]
        if not isinstance(content, dict) or not content:
            raise StatsError(f"{source} should hold an object with datasets, got {type(content).__name__}")
        if _is_entry(content):
            if key is None:
                raise StatsError(f"{source} describes one dataset without a name; pass key='...' to name it")
            return cls({key: _read_entry(content, f"{source}")})
        if key is not None:
            raise StatsError(
                f"{source} names its datasets {sorted(content)}; key={key!r} is only for files that do not"
            )
        if not all(isinstance(entry, dict) and _is_entry(entry) for entry in content.values()):
            raise StatsError(
                f"{source} is not in a known format: expected {{dataset: {{'action': {{'q01': [...], 'q99': [...]}}}}}}, "
                f"saw the keys {sorted(content)[:8]}"
            )
        return cls({name: _read_entry(entry, f"{source}, dataset {name!r}") for name, entry in content.items()})

    @classmethod
    def compute(
        cls,
        dataset: Any,
        key: str | None = None,
        *,
        mask: Any = None,
        mode: str = "bounds_q99",
        horizon: int | None = None,
        relative: Sequence[int] | bool = False,
    ) -> NormStats:
        """Statistics of an open dataset; arguments and errors are those of `compute_norm_stats`."""
        from hf_vla_actions.actions.compute import compute_norm_stats

        return compute_norm_stats(dataset, key, mask=mask, mode=mode, horizon=horizon, relative=relative)

    def to_dict(self) -> dict[str, Any]:
        """The content of OpenVLA's `dataset_statistics.json`; inverse of `from_dict`."""
        content: dict[str, Any] = {}
        for key, entry in self._entries.items():
            content[key] = {"action": _without_count(entry["action"])}
            if entry["proprio"] is not None:
                content[key]["proprio"] = _without_count(entry["proprio"])
            if entry["action"].count is not None:
                content[key]["num_transitions"] = entry["action"].count
            if entry["num_trajectories"] is not None:
                content[key]["num_trajectories"] = entry["num_trajectories"]
        return content

    def save(
        self, path: str | os.PathLike, format: str = "openvla", key: str | None = None, lossy: bool = False
    ) -> Path:
        """Write a statistics file of the field and return its path.

        Args:
            path: a file, or a folder, in which the format's own file name is used (`dataset_statistics.json`).
            format: one of `hf_vla_actions.actions.formats.FORMATS`; "hf_vla" holds everything.
            key: the dataset to write, for formats of one.
            lossy: write what the format can hold, and log what is lost, instead of an error.
        """
        from hf_vla_actions.actions.formats import write_stats

        return write_stats(self, path, format, key=key, lossy=lossy)[0]


def _is_entry(content: dict) -> bool:
    return isinstance(content.get("action"), dict) and any(
        name in content["action"] for name in ("q01", "p01", "min", "mean")
    )


def _without_count(stats: ActionStats) -> dict[str, Any]:
    return {name: value for name, value in stats.to_dict().items() if name != "count"}


def _read_entry(entry: dict, where: str) -> dict[str, Any]:
    try:
        count = entry.get("num_transitions")
        action = ActionStats.from_dict({"count": count, **entry["action"]})
        proprio = entry.get("proprio")
        proprio = ActionStats.from_dict({"count": count, **proprio}) if proprio else None
    except StatsError as error:
        raise StatsError(f"{where}: {error}") from None
    return {"action": action, "proprio": proprio, "num_trajectories": entry.get("num_trajectories")}

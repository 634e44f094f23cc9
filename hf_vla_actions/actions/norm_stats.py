"""Statistics of several datasets: `{unnorm_key: {"action": ActionStats, "proprio": ActionStats | None}}`."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_vla_actions.actions.stats import ActionStats
from hf_vla_actions.errors import StatsError, UnnormKeyError

FILE_NAME = "dataset_statistics.json"


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
    def from_file(cls, path: str | os.PathLike, key: str | None = None) -> NormStats:
        """Read OpenVLA's `dataset_statistics.json` or `config.json`, or one dataset's part of such a file.

        Args:
            path: the file, or a folder that holds `dataset_statistics.json`.
            key: the `unnorm_key` for a file that describes one dataset without naming it; an error for others.

        p01/p99 (Octo) are read as q01/q99. Statistics without "mask" normalize every dimension.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StatsError(f"no statistics file at {path}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StatsError(f"{path} cannot be read as JSON: {error}") from None
        return cls.from_dict(content, key=key, source=str(path))

    @classmethod
    def from_dict(cls, content: Any, key: str | None = None, source: str = "the statistics") -> NormStats:
        """Read the content of a statistics file; see `from_file`."""
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

    def save(self, path: str | os.PathLike) -> Path:
        """Write `dataset_statistics.json` as OpenVLA reads it, into a folder or to a file; return its path."""
        path = Path(path)
        path = path / FILE_NAME if path.suffix != ".json" else path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")
        os.replace(temporary, path)
        return path


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

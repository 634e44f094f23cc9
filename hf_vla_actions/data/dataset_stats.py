"""One pass over the numbers of a dataset, or over one part of it; parts merge to the whole, whoever computed them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_vla_actions.actions import RunningStats
from hf_vla_actions.actions.compute import chunks_of, relative_columns, to_relative
from hf_vla_actions.data.number_stream import NumberStream, open_numbers
from hf_vla_actions.errors import DatasetError, StatsError, VLAActionsError

FORMAT = "hf_vla_actions.stats_shard"


@dataclass(frozen=True)
class Request:
    """What is to be computed of a dataset.

    Args:
        key: the `unnorm_key` of the result; None for the dataset's name.
        action_key: feature that holds the actions; None for the usual one.
        horizon: statistics of every step of a chunk of this length; None for one for all actions.
        relative: dimensions of the chunks that are relative to the state at their first step; None for absolute ones.
        shard: (i, n), the i-th part of n of the episodes, from 1.
        exact_rows: see `RunningStats`.
        transform: what is done with the numbers first, see `open_dataset`.
    """

    key: str | None = None
    action_key: str | None = None
    horizon: int | None = None
    relative: tuple[int, ...] | None = None
    shard: tuple[int, int] = (1, 1)
    exact_rows: int = 1_000_000
    transform: str | None = None

    def __post_init__(self):
        i, n = self.shard
        if not 1 <= i <= n:
            raise StatsError(f"a shard is i/n with i from 1 to n, got {i}/{n}")
        if self.horizon is not None and self.horizon < 1:
            raise StatsError(f"horizon must be at least 1, got {self.horizon}")
        if self.relative is not None and self.horizon is None:
            raise StatsError("relative statistics are those of chunks: give --horizon too")


@dataclass(frozen=True)
class Measured:
    """Statistics of a dataset or of one shard of it.

    Args:
        request: what was asked for.
        n_frames: rows that the whole dataset has.
        rows: rows read.
        episodes: episodes read.
        short: those of them that are shorter than the horizon, and gave no chunk.
        names: names of the action's dimensions, or None.
        state_names: names of the state's columns, or None.
        stats: "action", and "proprio" where there is one.
    """

    request: Request
    n_frames: int
    rows: int
    episodes: int
    short: int
    names: tuple[str, ...] | None
    state_names: tuple[str, ...] | None
    stats: dict[str, RunningStats]

    @property
    def whole(self) -> bool:
        """Whether this is the complete dataset."""
        return self.request.shard == (1, 1)

    def merge(self, other: Measured) -> Measured:
        """Both together; the request is that of the first."""
        stats = {name: part.merge(other.stats[name]) for name, part in self.stats.items()}
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("rows", "episodes", "short")}
        return replace(self, stats=stats, **sums)

    def save(self, path: Path) -> None:
        """Write the whole state for a later merge, to a temporary name first."""
        content = {name: value for name, value in asdict(replace(self, stats={})).items() if name != "stats"}
        content["stats"] = {name: part.to_dict() for name, part in self.stats.items()}
        write_json(path, {"format": FORMAT, "version": 1, **content})

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what `save` wrote."""
        content = read_state(path)
        try:
            request = content["request"]
            request |= {"shard": tuple(request["shard"]), "relative": _tuple(request["relative"])}
            fields: dict[str, Any] = {name: int(content[name]) for name in ("n_frames", "rows", "episodes", "short")}
            fields |= {name: _tuple(content[name]) for name in ("names", "state_names")}
            stats = {name: RunningStats.from_dict(part) for name, part in content["stats"].items()}
            return cls(request=Request(**request), stats=stats, **fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = str(error) if isinstance(error, VLAActionsError) else repr(error)
            raise StatsError(f"{path} is damaged, compute that shard again: {what}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The JSON of a shard; another file raises and says what it holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StatsError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        seen = sorted(content)[:8] if isinstance(content, dict) else type(content).__name__
        raise StatsError(
            f"{path} is no shard of statistics, it holds {seen}: finished statistics cannot be merged, as quantiles do "
            "not follow from quantiles. Make shards with `hf-vla stats DATASET --shard i/n --output FILE`"
        )
    return content


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    os.replace(temporary, path)


def merge_shards(parts: Sequence[Measured]) -> list[Measured]:
    """Merge the shards of each dataset; every shard must be there once, computed with the same options.

    Returns:
        One for each dataset, in the order of the first shards.
    """
    groups: dict[str | None, list[Measured]] = defaultdict(list)
    for part in parts:
        groups[part.request.key].append(part)
    done = []
    for key, group in groups.items():
        alike = {
            (replace(part.request, shard=(1, part.request.shard[1])), part.n_frames, part.names) for part in group
        }
        if len(alike) > 1:
            raise StatsError(
                f"the shards of {key!r} were not computed from the same data with the same options: {alike}"
            )
        n = group[0].request.shard[1]
        given = sorted(part.request.shard[0] for part in group)
        missing = sorted(set(range(1, n + 1)) - set(given))
        if missing or len(given) != n:
            raise StatsError(
                f"{key!r} has {n} shards; given are {given}, missing {missing or 'none, but some came twice'}"
            )
        total = group[0]
        for part in group[1:]:
            total = total.merge(part)
        done.append(_complete(replace(total, request=replace(total.request, shard=(1, 1)))))
    return done


def _complete(measured: Measured) -> Measured:
    if measured.whole and measured.rows != measured.n_frames:
        raise DatasetError(
            f"{measured.request.key!r} is inconsistent: the dataset says {measured.n_frames} frames, its data files have "
            f"{measured.rows}; fetch the complete dataset"
        )
    return measured


def measure(path: str | Path, request: Request, workers: int = 1, progress: bool = True) -> Measured:
    """Read the actions and states of a dataset once, and nothing else of it.

    Args:
        path: folder of the dataset.
        request: what is to be computed.
        workers: processes, which share the files out among them.
        progress: show a progress bar on stderr.
    """
    stream = open_numbers(path, request.action_key, request.transform)
    request = replace(request, key=request.key or stream.name)
    if request.relative is not None:
        _columns(stream, request)  # raises before anything is read
    n_jobs = min(len(stream.files), 1 if workers <= 1 else 8 * workers)
    jobs = [list(stream.files[i::n_jobs]) for i in range(n_jobs)]
    total: Measured | None = None
    with tqdm(
        total=stream.n_frames // request.shard[1], unit="row", unit_scale=True, desc=request.key, disable=not progress
    ) as bar:
        if len(jobs) == 1:
            total = _measure_files(stream, stream.files, request, bar)
        else:
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                for future in as_completed([pool.submit(measure_files, str(path), files, request) for files in jobs]):
                    part = future.result()
                    total = part if total is None else total.merge(part)
                    bar.update(part.rows)
    if total is None or not total.episodes:
        raise DatasetError(f"{path} has no episode in shard {request.shard[0]}/{request.shard[1]}; use fewer shards")
    return _complete(total)


def measure_files(path: str, files: Sequence[Path], request: Request) -> Measured:
    """What one process does: statistics of some files of a dataset."""
    return _measure_files(open_numbers(path, request.action_key, request.transform), files, request, None)


def _columns(stream: NumberStream, request: Request) -> list[int | None]:
    state_key = stream.state_key
    state_names = None if state_key is None else stream.names(state_key)
    state_dim = None if state_key is None else stream.lengths[state_key]
    dof = stream.lengths[stream.action_key]
    return relative_columns(dof, state_dim, stream.names(stream.action_key), state_names, request.relative or None)


def _measure_files(stream: NumberStream, files: Sequence[Path], request: Request, bar: tqdm | None) -> Measured:
    action_key, state_key = stream.action_key, stream.state_key
    keys = [action_key] if state_key is None else [action_key, state_key]
    stats = {name: RunningStats(exact_rows=request.exact_rows) for name in ("action", "proprio")[: len(keys)]}
    columns = _columns(stream, request) if request.relative is not None else None
    rows = episodes = short = 0
    for _, vectors in stream.episodes(files, keys, request.shard):
        chunks = vectors[action_key] if request.horizon is None else chunks_of(vectors[action_key], request.horizon)
        if columns is not None and state_key is not None:
            chunks = to_relative(chunks, vectors[state_key][: len(chunks)], columns)
        stats["action"].update(chunks)
        if state_key is not None:
            stats["proprio"].update(vectors[state_key])
        rows += len(vectors[action_key])
        episodes += 1
        short += not len(chunks)
        if bar is not None:
            bar.update(len(vectors[action_key]))
    names = [None if key is None else _tuple(stream.names(key)) for key in (action_key, state_key)]
    return Measured(request, stream.n_frames, rows, episodes, short, names[0], names[1], stats)


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)

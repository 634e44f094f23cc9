"""Parquet files: columns as NumPy arrays, and pictures that stay encoded until they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hf_vla_actions.errors import DatasetError


def import_parquet() -> ModuleType:
    """Import `pyarrow.parquet`, which is needed only where data are read or written."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("LeRobot data need pyarrow, which is missing: pip install 'hf_vla_actions[data]'") from error
    return pyarrow.parquet


def pyarrow_errors() -> tuple[type[Exception], ...]:
    """All that pyarrow raises for a damaged file; some of its errors are neither OSError nor ValueError."""
    from pyarrow.lib import ArrowException

    return (OSError, ValueError, ArrowException)


def open_parquet(path: Path) -> Any:
    """Open a parquet file as `pyarrow.parquet.ParquetFile`; only its footer is read.

    Where the file has checksums of its pages, they are compared when pages are read.
    """
    parquet = import_parquet()
    if not path.is_file():
        raise DatasetError(f"{path} is missing, though the dataset names it; fetch the complete dataset")
    try:
        return parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except pyarrow_errors() as error:
        raise _corrupt(path, error) from error


def read_columns(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Any:
    """Read only the named columns of a parquet file.

    Args:
        path: the file.
        columns: names that must be there.
        optional: names that are read where they are there.

    Returns:
        `pyarrow.Table` with those columns.
    """
    with open_parquet(path) as file:
        present = file.schema_arrow.names
        for name in columns:
            if name not in present:
                raise DatasetError(f"{path} has no column {name!r}; it has {present}")
        chosen = [*columns, *(name for name in optional if name in present)]
        try:
            return file.read(chosen)
        except pyarrow_errors() as error:
            raise _corrupt(path, error, _locate(file, chosen)) from error


def column_vectors(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Split a column of numbers or of lists of numbers into its values and the length of each row.

    Args:
        column: `pyarrow.ChunkedArray` of (fixed-size) lists, or of plain numbers (rows of length 1).

    Returns:
        values: float64, all rows one after the other; a null is NaN.
        lengths: (n,) int64, numbers in each row; a null row has 0.
    """
    import pyarrow.compute as pc
    import pyarrow.types as types

    if types.is_floating(column.type) or types.is_integer(column.type):
        lengths = np.ones(len(column), dtype=np.int64)
    elif types.is_fixed_size_list(column.type) or types.is_list(column.type) or types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        column = pc.list_flatten(column)
    else:
        raise DatasetError(f"expected numbers or lists of numbers, got a column of type {column.type}")
    if not (types.is_floating(column.type) or types.is_integer(column.type)):
        raise DatasetError(f"expected numbers or lists of numbers, got lists of {column.type}")
    return column.to_numpy().astype(np.float64), lengths


class ParquetImages:
    """Encoded pictures in a struct{bytes, path} column that runs through several parquet files.

    A row group is the smallest piece a parquet file gives out. The ones read last are kept, encoded, up to
    `cache_bytes`, so that both a walk in order and shuffled access touch the disk seldom.

    Args:
        paths: the files, in row order.
        column: name of the struct column.
        cache_bytes: encoded pictures kept in memory, in bytes; the row group read last is always kept.
    """

    def __init__(self, paths: Sequence[Path], column: str, *, cache_bytes: int = 256 * 2**20):
        self.paths = tuple(paths)
        self.column = column
        self.cache_bytes = cache_bytes
        self._files = [open_parquet(path) for path in self.paths]
        for path, file in zip(self.paths, self._files, strict=True):
            names = file.schema_arrow.names
            if column not in names:
                raise DatasetError(f"{path} has no column {column!r}, though info.json promises it; it has {names}")
        groups = [(i, g) for i, file in enumerate(self._files) for g in range(file.num_row_groups)]
        rows = [self._files[i].metadata.row_group(g).num_rows for i, g in groups]
        self._groups = groups
        self._stops = np.cumsum(rows, dtype=np.int64)
        self._cache: OrderedDict[int, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def encoded(self, row: int) -> bytes:
        """The JPEG or PNG bytes of one row, counted through all files."""
        place = int(np.searchsorted(self._stops, row, side="right"))
        group = self._row_group(place)
        cell = group[row - int(self._stops[place]) + len(group)]
        if not cell.is_valid:
            raise DatasetError(f"row {row} of {self.column!r} holds no picture in {self._path(place)}")
        return cell.as_py()

    def where(self, row: int) -> str:
        """File, row group and place within it of a row, for messages."""
        place = int(np.searchsorted(self._stops, row, side="right"))
        file, group = self._groups[place]
        start = int(self._stops[place - 1]) if place else 0
        return f"{self.paths[file]}, row group {group}, row {row - start}"

    def _path(self, place: int) -> Path:
        return self.paths[self._groups[place][0]]

    def _row_group(self, place: int) -> Any:
        """Encoded pictures of one row group as `pyarrow.ChunkedArray` of binary."""
        import pyarrow.compute as pc

        if place not in self._cache:
            file, group = self._groups[place]
            try:
                # one thread: DataLoader workers are the parallelism here, and they may be forks
                struct = self._files[file].read_row_group(group, columns=[self.column], use_threads=False)
                pictures = pc.struct_field(struct[self.column], "bytes")
            except (LookupError, *pyarrow_errors()) as error:  # type: ignore[misc]
                where = _locate(self._files[file], [self.column]) or f"row group {group}"
                raise _corrupt(self._path(place), error, where) from error
            self._cache[place] = (pictures, pictures.nbytes)
            while len(self._cache) > 1 and sum(size for _, size in self._cache.values()) > self.cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(place)
        return self._cache[place][0]


def _locate(file: Any, columns: Sequence[str]) -> str:
    """The first part of a file that cannot be read: row group, rows, column and bytes; empty if each can by itself."""
    row = 0
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        for column in columns:
            try:
                file.read_row_group(group, columns=[column], use_threads=False)
            except pyarrow_errors():
                chunks = [facts.column(i) for i in range(facts.num_columns)]
                found = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
                start = min((_offset(chunk) for chunk in found), default=0)
                stop = max((_offset(chunk) + chunk.total_compressed_size for chunk in found), default=0)
                return f"row group {group} (rows {row} to {row + facts.num_rows}), column {column!r}, bytes {start} to {stop}"
        row += facts.num_rows
    return ""


def _offset(chunk: Any) -> int:
    return chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset


def _corrupt(path: Path, error: Exception, where: str = "") -> DatasetError:
    reason = " ".join(str(error).split())
    return DatasetError(f"{path} cannot be read as parquet, fetch it again: {f'{where}: ' if where else ''}{reason}")

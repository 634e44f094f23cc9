"""The files of a dataset: where they lie, and which there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_vla_actions.errors import DatasetError


class Files:
    """The files of a dataset in a folder.

    Args:
        root: the folder.

    Attributes:
        root: the folder.
        name: short name of the dataset: the folder's.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.name = self.root.resolve().name

    def exists(self, relative: str) -> bool:
        """Whether there is such a file; one that would have to be fetched first counts."""
        return (self.root / relative).is_file()

    def local(self, relative: str) -> Path:
        """Path of a file on this machine; whether it exists shows when it is opened."""
        return self.root / relative


def fill(template: str, where: Path, **values: Any) -> str:
    """A path from its template in meta/info.json, such as `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`."""
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(
            f"{where} names files by {template!r}, which cannot be filled in ({error!r}); it may use {sorted(values)}"
        ) from error

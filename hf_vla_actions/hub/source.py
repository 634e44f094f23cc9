"""The files of a checkpoint, in a folder or on the Hub: names, sizes, JSON, and the headers of safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from transformers.utils import cached_file

from hf_vla_actions.config import check_source
from hf_vla_actions.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
LENGTH = 8  # bytes in front of a header that say how long it is
Header = dict[str, tuple[str, tuple[int, ...]]]


class Source:
    """Files of a checkpoint.

    Args:
        path: folder, or repository of the Hub. Of a repository only names, sizes, small files and headers are read; one
            that cannot be reached is read from the cache of earlier downloads.
        hub: `revision`, `token`, `cache_dir`, ... of a repository.

    Attributes:
        sizes: bytes of each file by its name; None where the Hub does not say.
        folder: where the files lie; None for a repository.
        cached: it is a repository, of which only what was downloaded before can be seen.

    Raises:
        CheckpointError: there is no such folder or repository.
    """

    def __init__(self, path: str, **hub: Any):
        check_source(path)
        self.path, self.hub, self.cached = path, hub, False
        self.folder: Path | None = Path(path) if Path(path).is_dir() else None
        if self.folder is None:
            self.sizes = self._of_repository()
        else:
            self.sizes = _of_folder(self.folder)

    def _of_repository(self) -> dict[str, int | None]:
        options = {name: value for name, value in self.hub.items() if name in ("revision", "token")}
        try:
            if self.hub.get("local_files_only"):
                raise OfflineModeIsEnabled("local_files_only")
            info = HfApi().model_info(self.path, files_metadata=True, **options)
            return {file.rfilename: file.size for file in info.siblings or ()}
        except HFValidationError:
            raise CheckpointError(f"{self.path!r} is neither a folder nor the name of a repository") from None
        except OSError as error:
            known = {name: value for name, value in self.hub.items() if name in ("revision", "cache_dir")}
            try:
                self.folder = Path(snapshot_download(self.path, local_files_only=True, **known))
            except (LocalEntryNotFoundError, OSError):
                why = str(error).strip().splitlines()[0]
                raise CheckpointError(f"no folder and no repository to be had at {self.path!r}: {why}") from None
            self.cached = True
            return _of_folder(self.folder)

    def top(self, *endings: str) -> list[str]:
        """Names of the files that do not lie in a folder further down, with one of these endings."""
        return sorted(name for name in self.sizes if "/" not in name and name.endswith(endings or ("",)))

    def json(self, name: str) -> Any:
        """Content of a JSON file; None if there is none. A damaged one raises."""
        if name not in self.sizes:
            return None
        file = self.folder / name if self.folder is not None else Path(str(cached_file(self.path, name, **self.hub)))
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{name} of {self.path} cannot be read as JSON: {error}") from None

    def header(self, name: str) -> Header:
        """Name, dtype and shape of each tensor of a safetensors file; nothing else of it is read.

        Raises:
            CheckpointError: the file is cut off, or no safetensors file.
        """
        if self.folder is not None:
            return _read_header(self.folder / name)
        options = {option: value for option, value in self.hub.items() if option in ("revision", "token")}
        try:
            found = HfApi().parse_safetensors_file_metadata(self.path, name, **options)
        except (OSError, SafetensorsParsingError, NotASafetensorsRepoError) as error:
            raise CheckpointError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
        return {tensor: (info.dtype, tuple(info.shape)) for tensor, info in found.tensors.items()}


def _of_folder(folder: Path) -> dict[str, int | None]:
    files = [*folder.glob("*"), *folder.glob("*/*")]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files if file.is_file()}


def _read_header(file: Path) -> Header:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(LENGTH)
        length = struct.unpack("<Q", first)[0] if len(first) == LENGTH else MAX_HEADER + 1
        if length > min(MAX_HEADER, size - LENGTH):
            raise CheckpointError(f"{file.name} is no safetensors file, or cut off in its header")
        try:
            values = json.loads(stream.read(length))
            tensors = {name: value for name, value in values.items() if name != "__metadata__"}
            end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
            found = {name: (str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in tensors.items()}
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError):
            raise CheckpointError(f"{file.name} has a damaged header") from None
    if size != LENGTH + length + end:
        raise CheckpointError(
            f"{file.name} is cut off or damaged: its header promises {LENGTH + length + end} bytes, it has {size}"
        )
    return found

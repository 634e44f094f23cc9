"""Datasets of the Hugging Face Hub: the numbers are fetched at once, videos when a picture is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, IncompleteSnapshotError

from hf_vla_actions.data.files import Files
from hf_vla_actions.errors import DatasetError

NUMBERS = (
    "meta/*",
    "data/*.parquet",
    "dataset_info.json",
    "features.json",
    "*/dataset_info.json",
    "*/features.json",
    "*.tfrecord*",
)
REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
REFUSALS = (
    OSError,
    HTTPError,
    HFValidationError,
    IncompleteSnapshotError,
)  # all that huggingface_hub raises for these


class HubFiles(Files):
    """The files of a dataset repository on the Hub.

    Tables and numbers are fetched into the usual cache at once (pictures inside parquet files come with them), every
    video when it is first opened. All files are of the one commit that `revision` names at that moment. Without a
    connection, what was fetched before is read.

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit; the main branch if None.

    Attributes:
        commit: hash of the commit.

    Raises:
        DatasetError: there is no such repository or revision, it cannot be reached, or not be had without permission.
    """

    def __init__(self, repo_id: str, revision: str | None = None):
        self.repo_id = repo_id
        try:
            folder = snapshot_download(
                repo_id,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(NUMBERS),
                library_name="hf_vla_actions",
            )
        except REFUSALS as error:
            at = "" if revision is None else f" at revision {revision!r}"
            raise DatasetError(
                f"there is no folder {repo_id!r}, and no dataset repository of that name{at} to be had from the Hub: "
                f"{_reason(error)}"
            ) from error
        super().__init__(folder)
        self.name = repo_id.rpartition("/")[2]
        self.commit = self.root.name
        tree = get_cached_repo_tree(repo_id, repo_type="dataset", revision=self.commit)
        self._names = frozenset(file.path for file in tree)
        if not any(name == "meta/info.json" or Path(name).name == "dataset_info.json" for name in self._names):
            raise DatasetError(
                f"the dataset repository {repo_id} holds neither a LeRobotDataset (meta/info.json) nor RLDS "
                f"(dataset_info.json); it holds {sorted(self._names)[:8]}"
            )

    def exists(self, relative: str) -> bool:
        """Whether the repository has such a file."""
        return relative in self._names

    def local(self, relative: str) -> Path:
        """Path of a file on this machine, fetched first where it is not there yet."""
        path = super().local(relative)
        if path.is_file() or not self.exists(relative):
            return path
        try:
            return Path(
                hf_hub_download(
                    self.repo_id, relative, repo_type="dataset", revision=self.commit, library_name="hf_vla_actions"
                )
            )
        except REFUSALS as error:
            raise DatasetError(
                f"{relative} of the dataset {self.repo_id} at {self.commit} cannot be fetched: {_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

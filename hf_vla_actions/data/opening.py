"""One call that opens a dataset of any format, found out from what lies in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vla_actions.data.files import Files
from hf_vla_actions.data.lerobot import LeRobotDataset
from hf_vla_actions.data.lerobot_folder import LeRobotFolder
from hf_vla_actions.data.lerobot_info import read_info
from hf_vla_actions.data.lerobot_v2 import LeRobotV2Dataset
from hf_vla_actions.data.reader import EpisodeReader
from hf_vla_actions.data.transforms_dataset import TransformedDataset
from hf_vla_actions.data.transforms_table import Transform, find_transform
from hf_vla_actions.errors import DatasetError


def open_dataset(
    path: str | Path,
    *,
    cameras: Sequence[str] | None = None,
    action_key: str | None = None,
    state_key: str | None = "",
    revision: str | None = None,
    transform: Transform | str | None = None,
) -> EpisodeReader:
    """Open robot data: a LeRobotDataset v3.0, v2.1 or v2.0, or RLDS as TensorFlow Datasets stores it.

    Args:
        path: the dataset's folder, or `owner/name` of a dataset repository on the Hub, of which the numbers are fetched
            at once and each video when a picture of it is asked for.
        cameras: the cameras to use, by full or short name; all there are if None.
        action_key: feature that holds the actions; None for the usual one of the format.
        state_key: feature that holds the proprio; the default is the usual one of the format where there is one, and
            None reads none.
        revision: branch, tag or commit of a repository.
        transform: what to do with the numbers: one of `TRANSFORMS` by its name (`bridge_orig`), one's own as
            `module:attribute`, or a `Transform`. What comes back is a `TransformedDataset` then.

    Returns:
        The reader; numbers are read, pictures and videos are not.

    Raises:
        DatasetError: there is no such folder or repository, nothing in it is known, or what it holds is damaged.
    """
    if transform is not None:
        transform = find_transform(transform) if isinstance(transform, str) else transform
        dataset = open_dataset(path, cameras=cameras, action_key=action_key, state_key=state_key, revision=revision)
        return TransformedDataset(dataset, transform)
    files = find_files(path, revision)
    options: dict[str, Any] = {"cameras": cameras}
    if action_key is not None:
        options["action_key"] = action_key
    if state_key != "":
        options["state_key"] = state_key
    if not files.exists("meta/info.json"):
        from hf_vla_actions.data.rlds import RLDSDataset
        from hf_vla_actions.data.rlds_features import version_folder

        if version_folder(files.root) is not None:
            return RLDSDataset(files.root, **options)
    return lerobot_class(files.root)(files, **options)


def find_files(path: str | Path, revision: str | None = None) -> Files:
    """The files of a dataset by its folder, or by `owner/name` where there is no such folder."""
    if isinstance(path, str) and not Path(path).expanduser().exists():
        from hf_vla_actions.data.hub_files import REPOSITORY, HubFiles

        if REPOSITORY.fullmatch(path):
            return HubFiles(path, revision)
    if revision is not None:
        raise DatasetError(f"revision={revision!r} is for a repository owner/name of the Hub, {str(path)!r} is none")
    return Files(path)


def lerobot_class(root: Path) -> type[LeRobotFolder]:
    """The reader for the version that `meta/info.json` of a folder states."""
    version = str(read_info(root)["codebase_version"])
    major = version.removeprefix("v").split(".")[0]
    classes: dict[str, type[LeRobotFolder]] = {"2": LeRobotV2Dataset, "3": LeRobotDataset}
    if major not in classes:
        raise DatasetError(
            f"{root} is a LeRobotDataset {version}; what can be read are v2.0, v2.1 and v3.x: convert it with lerobot's "
            "own scripts"
        )
    return classes[major]

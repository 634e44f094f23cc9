"""One call that opens a dataset of any format, found out from what lies in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_vla_actions.data.files import Files
from hf_vla_actions.data.lerobot import LeRobotDataset
from hf_vla_actions.data.lerobot_folder import LeRobotFolder
from hf_vla_actions.data.lerobot_info import read_info
from hf_vla_actions.data.lerobot_v2 import LeRobotV2Dataset
from hf_vla_actions.data.reader import EpisodeReader
from hf_vla_actions.errors import DatasetError

RLDS_FILES = ("dataset_info.json", "features.json")


def open_dataset(
    path: str | Path,
    *,
    cameras: Sequence[str] | None = None,
    action_key: str | None = None,
    state_key: str | None = "",
) -> EpisodeReader:
    """Open the robot data of a folder: LeRobotDataset v3.0, v2.1 or v2.0, or RLDS as TensorFlow Datasets stores it.

    Args:
        path: the dataset's folder.
        cameras: the cameras to use, by full or short name; all there are if None.
        action_key: feature that holds the actions; None for the usual one of the format.
        state_key: feature that holds the proprio; the default is the usual one of the format where there is one, and
            None reads none.

    Returns:
        The reader; numbers are read, pictures and videos are not.

    Raises:
        DatasetError: there is no such folder, nothing in it is known, or what it holds is damaged.
    """
    root = Path(path).expanduser()
    options = {} if action_key is None else {"action_key": action_key}
    states = {} if state_key == "" else {"state_key": state_key}
    if all((root / name).is_file() for name in RLDS_FILES):
        from hf_vla_actions.data.rlds import RLDSDataset

        return RLDSDataset(root, cameras=cameras, **options, **states)
    return lerobot_class(root)(Files(root), cameras=cameras, **options, **states)


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

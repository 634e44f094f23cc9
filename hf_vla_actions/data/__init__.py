"""Robot data: readers, chunks and writers. Parquet and video libraries are imported only where data are opened."""

from hf_vla_actions.data.chunks import ChunkDataset
from hf_vla_actions.data.lerobot import LeRobotDataset
from hf_vla_actions.data.lerobot_v2 import LeRobotV2Dataset
from hf_vla_actions.data.lerobot_writer import LeRobotWriter
from hf_vla_actions.data.live import LiveDataset
from hf_vla_actions.data.mixture import MixtureDataset, MixtureSampler
from hf_vla_actions.data.opening import open_dataset
from hf_vla_actions.data.reader import Episode, EpisodeReader
from hf_vla_actions.data.rlds import RLDSDataset
from hf_vla_actions.data.transforms_dataset import TransformedDataset
from hf_vla_actions.data.transforms_table import TRANSFORMS, Transform, find_transform

__all__ = [
    "TRANSFORMS",
    "ChunkDataset",
    "Episode",
    "EpisodeReader",
    "LeRobotDataset",
    "LeRobotV2Dataset",
    "LeRobotWriter",
    "LiveDataset",
    "MixtureDataset",
    "MixtureSampler",
    "RLDSDataset",
    "Transform",
    "TransformedDataset",
    "find_transform",
    "open_dataset",
]

"""Robot data: readers, chunks and writers. Parquet and video libraries are imported only where data are opened."""

from hf_vla_actions.data.chunks import ChunkDataset
from hf_vla_actions.data.lerobot import LeRobotDataset
from hf_vla_actions.data.lerobot_v2 import LeRobotV2Dataset
from hf_vla_actions.data.lerobot_writer import LeRobotWriter
from hf_vla_actions.data.mixture import MixtureDataset, MixtureSampler
from hf_vla_actions.data.opening import open_dataset
from hf_vla_actions.data.reader import Episode, EpisodeReader

__all__ = [
    "ChunkDataset",
    "Episode",
    "EpisodeReader",
    "LeRobotDataset",
    "LeRobotV2Dataset",
    "LeRobotWriter",
    "MixtureDataset",
    "MixtureSampler",
    "open_dataset",
]

"""Robot data: readers, chunks and writers. Parquet and video libraries are imported only where data are opened."""

from hf_vla_actions.data.chunks import ChunkDataset
from hf_vla_actions.data.lerobot import Episode, LeRobotDataset
from hf_vla_actions.data.lerobot_writer import LeRobotWriter

__all__ = ["ChunkDataset", "Episode", "LeRobotDataset", "LeRobotWriter"]

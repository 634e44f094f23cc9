"""What the numbers of an action mean: spaces, statistics and bin grids. NumPy only."""

from hf_vla_actions.actions.bins import BinGrid
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.actions.running import RunningStats
from hf_vla_actions.actions.space import ActionSpace, Gripper
from hf_vla_actions.actions.stats import ActionStats

__all__ = ["ActionSpace", "ActionStats", "BinGrid", "Gripper", "NormStats", "RunningStats"]

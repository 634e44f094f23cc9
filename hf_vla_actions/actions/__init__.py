"""What the numbers of an action mean: spaces, statistics and bin grids. NumPy only."""

from hf_vla_actions.actions.bins import BinGrid
from hf_vla_actions.actions.convert import Actions
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.actions.pose import PoseDims
from hf_vla_actions.actions.running import RunningStats
from hf_vla_actions.actions.space import ActionSpace, Gripper
from hf_vla_actions.actions.stats import ActionStats

__all__ = ["ActionSpace", "ActionStats", "Actions", "BinGrid", "Gripper", "NormStats", "PoseDims", "RunningStats"]

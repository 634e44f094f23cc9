"""What may be asked of an action, in real units: the constraint language, its feasibility check and projection."""

from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.bind import bind, project, with_limits
from hf_vla_actions.constraints.bound import BoundConstraints
from hf_vla_actions.constraints.combined import All, Any, Prefix, Soft, Where
from hf_vla_actions.constraints.context import Context
from hf_vla_actions.constraints.coupled import Linear, MoveBy, Rate, Speed, Sticky
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.kinds import constraint_from_dict
from hf_vla_actions.constraints.language import Fix, Forbid, InSet, Range, Target
from hf_vla_actions.constraints.places import KeepOut, Workspace
from hf_vla_actions.constraints.retime import RetimedChunk, retime
from hf_vla_actions.constraints.slower import retime_within
from hf_vla_actions.constraints.text import parse_constraints

__all__ = [
    "All",
    "Any",
    "BoundConstraints",
    "Constraint",
    "Context",
    "Fix",
    "Forbid",
    "InSet",
    "IntervalSet",
    "KeepOut",
    "Linear",
    "MoveBy",
    "Prefix",
    "Range",
    "Rate",
    "RetimedChunk",
    "Soft",
    "Speed",
    "Sticky",
    "Target",
    "Where",
    "Workspace",
    "bind",
    "constraint_from_dict",
    "parse_constraints",
    "project",
    "retime",
    "retime_within",
    "with_limits",
]

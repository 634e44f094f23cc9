"""What may be asked of an action, in real units: the constraint language, its feasibility check and projection."""

from hf_vla_actions.constraints.bind import BoundConstraints, bind, project
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.language import (
    Constraint,
    Fix,
    Forbid,
    InSet,
    Range,
    Target,
    constraint_from_dict,
)

__all__ = [
    "BoundConstraints",
    "Constraint",
    "Fix",
    "Forbid",
    "InSet",
    "IntervalSet",
    "Range",
    "Target",
    "bind",
    "constraint_from_dict",
    "project",
]

"""All kinds of constraints by name, and how to read them from JSON."""

from __future__ import annotations

import typing

from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.combined import All, Any, Prefix, Soft, Where
from hf_vla_actions.constraints.coupled import Linear, MoveBy, Rate, Speed, Sticky
from hf_vla_actions.constraints.language import Fix, Forbid, InSet, Range, Target
from hf_vla_actions.constraints.places import KeepOut, Workspace
from hf_vla_actions.errors import ConstraintError

ONE_DIMENSION = (Range, Forbid, InSet, Fix, Target)
COUPLED = (Rate, Workspace, MoveBy, Speed, Linear, KeepOut, Sticky)
COMBINED = (Prefix, Any, All, Soft)
TYPES: dict[str, type[Constraint]] = {kind.__name__: kind for kind in (*ONE_DIMENSION, *COUPLED, *COMBINED)}


def constraint_from_dict(values: dict[str, typing.Any]) -> Constraint:
    """Read what `to_dict` of any constraint wrote."""
    if isinstance(values, dict) and values.get("type") == Where.__name__:
        raise ConstraintError("Where holds a function of yours: it cannot be read from JSON, make it in Python")
    if not isinstance(values, dict) or values.get("type") not in TYPES:
        raise ConstraintError(f"a constraint is an object whose 'type' is one of {sorted(TYPES)}, got {values!r}")
    fields = {name: _read(value) for name, value in values.items() if name != "type"}
    try:
        return TYPES[values["type"]].from_json_fields(fields)
    except TypeError as error:
        raise ConstraintError(f"not the description of {values['type']} ({error}): {values}") from None


def _read(value):
    if isinstance(value, dict):
        if "type" in value:
            return constraint_from_dict(value)
        return slice(value.get("start"), value.get("stop"), value.get("step"))
    return [_read(entry) for entry in value] if isinstance(value, list) else value

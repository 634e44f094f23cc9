"""Units of lengths and angles."""

from __future__ import annotations

import math

from hf_vla_actions.errors import ActionSpaceError

LENGTHS = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254, "ft": 0.3048}
ANGLES = {"rad": 1.0, "deg": math.pi / 180, "turn": 2 * math.pi}


def factor(unit: str | None, to: str | None, dim: str) -> float:
    """What numbers of one unit are multiplied with to be numbers of another.

    Args:
        unit: unit they are in; None if they have none.
        to: unit they shall be in.
        dim: dimension in words, for messages.

    Raises:
        ActionSpaceError: an unknown unit, or a length for an angle.
    """
    if unit == to:
        return 1.0
    for kind in (LENGTHS, ANGLES):
        if unit in kind and to in kind:
            return kind[unit] / kind[to]
    known = f"lengths {list(LENGTHS)}, angles {list(ANGLES)}"
    raise ActionSpaceError(f"{dim}: nobody can turn {unit or 'no unit'} into {to or 'no unit'}; there are {known}")

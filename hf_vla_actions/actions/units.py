"""Units of lengths and angles: `m`, `deg`, and multiples of them such as `0.05 m`, in which a command of 1 is 5 cm."""

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
    (one, name), (other, to_name) = _split(unit), _split(to)
    for kind in (LENGTHS, ANGLES):
        if name in kind and to_name in kind:
            return one * kind[name] / (other * kind[to_name])
    known = f"lengths {list(LENGTHS)}, angles {list(ANGLES)}, and multiples such as '0.05 m'"
    raise ActionSpaceError(f"{dim}: nobody can turn {unit or 'no unit'} into {to or 'no unit'}; there are {known}")


def is_known(unit: str) -> bool:
    """Whether a unit is one of lengths or angles, a multiple of one (`0.05 m`), or that in a time (`m/s`, `rad/s^2`)."""
    name, slash, time = str(_split(unit)[1]).partition("/")
    return (name in LENGTHS or name in ANGLES) and (not slash or time in ("s", "s^2"))


def is_angle(unit: str | None) -> bool:
    """Whether a unit is one of angles, or a multiple of one."""
    return _split(unit)[1] in ANGLES


def _split(unit: str | None) -> tuple[float, str | None]:
    """`0.05 m` to (0.05, "m"), `m` to (1.0, "m"); what is no positive multiple stays whole."""
    number, _, name = (unit or "").partition(" ")
    try:
        size = float(number)
    except ValueError:
        return 1.0, unit
    return (size, name) if name and 0 < size < math.inf else (1.0, unit)

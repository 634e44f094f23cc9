"""Constraints written on a command line: `Range(x, -0.005, 0.005)`, several joined by `;`."""

from __future__ import annotations

import ast
import inspect
import math

from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.kinds import TYPES, constraint_from_dict
from hf_vla_actions.errors import ConstraintError

__all__ = ["TYPES", "constraint_from_dict", "parse_constraints"]
NUMBERS = {"inf": math.inf, "nan": math.nan}


def parse_constraints(text: str) -> list[Constraint]:
    """Read constraints as they would be written in Python; bare words are names.

    Args:
        text: such as `Range(x, -0.005, 0.005); Fix(gripper, open)` or `Any(Range(x, 0), Speed([x, y], 0.02))`.

    Nothing is executed: only names of constraints, numbers, words, None, slices and lists of them are understood.
    """
    constraints = [_read(part.strip()) for part in text.split(";") if part.strip()]
    if not constraints:
        raise ConstraintError(f"no constraint in {text!r}; write for example Range(x, -0.005, 0.005)")
    return constraints


def _read(text: str) -> Constraint:
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ConstraintError(f"{text!r} is no constraint; write for example Range(x, -0.005, 0.005)") from None
    constraint = _call(call, text) if isinstance(call, ast.Call) else None
    if not isinstance(constraint, Constraint):
        raise ConstraintError(f"{text!r} is no constraint; there are {sorted(TYPES)}")
    return constraint


def _call(call: ast.Call, text: str):
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name != "slice" and name not in TYPES:
        raise ConstraintError(f"{ast.unparse(call)!r} is no constraint; there are {sorted(TYPES)}")
    kind = slice if name == "slice" else TYPES[str(name)]
    arguments = [_value(argument, text) for argument in call.args]
    keywords = {str(keyword.arg): _value(keyword.value, text) for keyword in call.keywords}
    try:
        return kind(*arguments, **keywords)
    except TypeError as error:
        how = "slice(start, stop)" if kind is slice else f"{name}{inspect.signature(kind)}"
        raise ConstraintError(f"{ast.unparse(call)!r}: {error}; it is {how}") from None


def _value(node: ast.expr, text: str):
    if isinstance(node, ast.Name):
        return NUMBERS.get(node.id, node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element, text) for element in node.elts]
    if isinstance(node, ast.Call):
        return _call(node, text)
    if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-inf":
        return -math.inf
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ConstraintError(f"{text!r}: {ast.unparse(node)!r} is no number, name or list of them") from None

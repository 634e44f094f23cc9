"""Constraints written on a command line: `Range(x, -0.005, 0.005)`, several joined by `;`."""

from __future__ import annotations

import ast
import inspect

from hf_vla_actions.constraints.language import TYPES, Constraint
from hf_vla_actions.errors import ConstraintError


def parse_constraints(text: str) -> list[Constraint]:
    """Read constraints as they would be written in Python; bare words are names.

    Args:
        text: such as `Range(x, -0.005, 0.005); Fix(gripper, open)`.

    Nothing is executed: only names of constraints, numbers, words and lists of them are understood.
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
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in TYPES:
        raise ConstraintError(f"{text!r} is no constraint; there are {sorted(TYPES)}")
    kind = TYPES[call.func.id]
    arguments = [_value(argument, text) for argument in call.args]
    keywords = {keyword.arg: _value(keyword.value, text) for keyword in call.keywords if keyword.arg}
    try:
        return kind(*arguments, **keywords)
    except TypeError as error:
        raise ConstraintError(f"{text!r}: {error}; it is {call.func.id}{inspect.signature(kind.__init__)}") from None


def _value(node: ast.expr, text: str):
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element, text) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ConstraintError(f"{text!r}: {ast.unparse(node)!r} is no number, name or list of them") from None

"""Constraints as a training loss: the expected squared violation under the predicted bins, in real units squared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_vla_actions.constraints import bind
from hf_vla_actions.constraints.terms import Predicate
from hf_vla_actions.decoding.masks import penalties as code_costs
from hf_vla_actions.errors import ConstraintError

if TYPE_CHECKING:
    from hf_vla_actions.config import ActionConfig


def taco_loss(
    logits: torch.Tensor,
    penalties,
    pad_mask: torch.Tensor | None = None,
    *,
    ids: torch.Tensor | None = None,
    n_steps: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Expected penalty of the bin that would be drawn: summed over dimensions, mean over the real steps of all rows.

    Args:
        logits: (rows, horizon * dof, n_codes) logits by code; or (rows, horizon * dof, vocabulary) with `ids`.
        penalties: (rows or 1, horizon, dof, n_codes) squared violation if that code is taken, as
            `TACOLoss.penalties` makes it.
        pad_mask: (rows, horizon) bool, True = real; None if every step is.
        ids: (horizon * dof, n_codes) or (n_codes,) int64 token id of each code.
        n_steps: real steps to divide by, where the batch is a part of a larger one; None: those of `pad_mask`.

    Returns:
        () differentiable in the logits: m^2 for a limit in meters. A bin 1 cm outside counts 1e-4, so weights of 1e3 to
        1e5 make it comparable with a cross entropy.
    """
    penalties = torch.as_tensor(penalties)
    if penalties.ndim != 4 or logits.ndim != 3:
        raise ConstraintError(
            "expected logits (rows, horizon * dof, n_codes) and penalties (rows, horizon, dof, n_codes), got "
            f"{tuple(logits.shape)} and {tuple(penalties.shape)}"
        )
    _, horizon, dof, n_codes = penalties.shape
    rows, n = logits.shape[:2]
    if ids is not None:
        logits = logits.gather(-1, torch.as_tensor(ids).to(logits.device).expand(rows, n, n_codes))
    if logits.shape[1:] != (horizon * dof, n_codes) or len(penalties) not in (1, rows):
        raise ConstraintError(
            f"logits of {tuple(logits.shape)} do not fit penalties of {tuple(penalties.shape)}: (rows, horizon * dof, "
            "n_codes) and (rows or 1, horizon, dof, n_codes); pass ids to pick the action tokens of a vocabulary"
        )
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).view(rows, horizon, dof, n_codes)
    expected = (p * penalties.to(p)).sum(dim=(2, 3))
    if pad_mask is None:
        pad_mask = torch.ones_like(expected, dtype=torch.bool)
    if pad_mask.shape != expected.shape:
        raise ConstraintError(f"pad_mask has shape {tuple(expected.shape)}, got {tuple(pad_mask.shape)}")
    total = torch.where(pad_mask.to(p.device), expected, 0.0).sum()
    return total / (pad_mask.sum().clamp(min=1) if n_steps is None else n_steps)


class TACOLoss:
    """`taco_loss` of constraints: what each code would cost after the demonstrated ones before it.

    A code is charged for the squared excess that it adds to each constraint. Constraints of one dimension cost the same
    whatever came before. Of alternatives (`Any`) the one that the demonstration is closest to counts. Soft constraints
    and `Where` cost nothing: there is no distance to what they allow.

    Args:
        constraints: list of constraints in real units, for every row; None for the robot's permanent limits
            (`action_config.limits`), which are added in any case.
        action_config: what turns tokens into robot commands.
        unnorm_key: which statistics and action space; may be omitted when there is one.
        context: what the robot knows, the same for every row.

    Raises:
        ConstraintError: a constraint that does not fit, one list per sample, or nothing that could be violated.
        InfeasibleConstraintError: constraints that no action can satisfy.
    """

    def __init__(self, constraints, action_config: ActionConfig, unnorm_key: str | None = None, context=None):
        key = action_config.resolve(unnorm_key)
        self.values = action_config.token_values(key)
        self.horizon = action_config.horizon
        bound = bind(
            constraints,
            action_config.space(key),
            self.values,
            self.horizon,
            limits=tuple(action_config.limits),
            grid=False,
            context=context,
        )
        if bound.per_sample:
            raise ConstraintError("a training loss takes one list of constraints (and one context) for all rows")
        if not any(way.sets or any(not isinstance(t, Predicate) for t in way.terms) for way in bound.branches[0]):
            raise ConstraintError(
                "there is no constraint that an action could violate: give at least one, such as Range"
            )
        self._ways = [replace(bound, branches=[[way]]) for way in bound.branches[0]]
        self._costs: dict[torch.device, list[Callable[[torch.Tensor], torch.Tensor]]] = {}
        self._tables: dict[torch.device, torch.Tensor] = {}

    @property
    def is_static(self) -> bool:
        """True if penalties do not depend on the demonstration."""
        return len(self._ways) == 1 and not self._ways[0].branches[0][0].terms

    def __getstate__(self) -> dict:
        # What was worked out for a device is worked out again where it arrives.
        return {**self.__dict__, "_costs": {}, "_tables": {}}

    def __call__(
        self,
        logits: torch.Tensor,
        codes,
        pad_mask: torch.Tensor | None = None,
        *,
        ids: torch.Tensor | None = None,
        n_steps: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Expected squared violation; arguments and result as of `taco_loss`.

        Args:
            logits: (rows, horizon * dof, n_codes), or (..., vocabulary) with `ids`.
            codes: (rows, horizon * dof) demonstrated codes; any code on padding, which is at the end.
            pad_mask: (rows, horizon) bool, True = real.
            ids: see `taco_loss`.
            n_steps: see `taco_loss`.
        """
        device = torch.device("cpu") if logits.device.type == "mps" else logits.device  # MPS has no float64
        penalties = self.penalties(torch.as_tensor(codes).to(device))
        return taco_loss(logits, penalties, pad_mask, ids=ids, n_steps=n_steps)

    def penalties(self, codes: torch.Tensor) -> torch.Tensor:
        """(rows, horizon, dof, n_codes) float64: what each code costs at each place, after the codes before it.

        Args:
            codes: (rows, horizon * dof) int64: the demonstration. The result is on its device.
        """
        shape = (self.horizon, *self.values.shape)
        if codes.ndim != 2 or codes.shape[1] != shape[0] * shape[1] or codes.is_floating_point():
            raise ConstraintError(
                f"codes are whole numbers of shape (rows, {shape[0] * shape[1]}), got {codes.dtype} {tuple(codes.shape)}"
            )
        if self.is_static:
            if codes.device not in self._tables:
                self._tables[codes.device] = self._along(0, codes[:1]).view(1, *shape)
            return self._tables[codes.device].expand(len(codes), *shape)
        each = torch.stack([self._along(i, codes).view(-1, *shape) for i in range(len(self._ways))])
        if len(each) == 1:
            return each[0]
        chunks = self.values[np.arange(shape[1]), codes.cpu().numpy().reshape(-1, *shape[:2])]
        excess = np.stack([way.branches[0][0].excess(chunks).sum(axis=1) for way in self._ways])  # (ways, rows)
        closest = torch.as_tensor(excess.argmin(axis=0), device=codes.device)
        return each[closest, torch.arange(len(codes), device=codes.device)]

    def _along(self, way: int, codes: torch.Tensor) -> torch.Tensor:
        """(rows, horizon * dof, n_codes) costs at each position."""
        if codes.device not in self._costs:
            self._costs[codes.device] = [code_costs(bound, codes.device) for bound in self._ways]
        cost = self._costs[codes.device][way]
        return torch.stack([cost(codes[:, :position]) for position in range(codes.shape[1])], dim=1)

"""Constraints as a training loss: the expected squared violation under the predicted bins, in real units squared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_vla_actions.constraints import bind
from hf_vla_actions.errors import ConstraintError

if TYPE_CHECKING:
    from hf_vla_actions.config import ActionConfig

SLAB = 4_000_000  # numbers of candidate chunks looked at in one go


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
    """`taco_loss` of constraints: what an action token costs, given the demonstrated chunk around it.

    For each step and dimension every code is tried in place of the demonstrated one, and the excess of each constraint
    at that step is squared and summed. Constraints of one dimension cost the same whatever the demonstration; coupled
    ones (Rate, Workspace, ...) are worked out for each batch on the CPU. Of alternatives (`Any`) the one that the
    demonstration is closest to counts. Soft constraints cost nothing: they forbid nothing.

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
        self._ways = bound.branches[0]
        if not any(way.sets or way.terms for way in self._ways):
            raise ConstraintError(
                "there is no constraint that an action could violate: give at least one, such as Range"
            )
        self._apart = [self._alone(way.sets) for way in self._ways]
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @property
    def is_static(self) -> bool:
        """True if penalties do not depend on the demonstration."""
        return len(self._ways) == 1 and not self._ways[0].terms

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
        if not self.is_static:
            codes = codes.cpu().numpy() if isinstance(codes, torch.Tensor) else codes
            return taco_loss(logits, self.penalties(codes), pad_mask, ids=ids, n_steps=n_steps)
        if logits.device not in self._on_device:
            table = torch.from_numpy(self._apart[0][None])
            self._on_device[logits.device] = table.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
        return taco_loss(logits, self._on_device[logits.device], pad_mask, ids=ids, n_steps=n_steps)

    def penalties(self, codes) -> np.ndarray:
        """(rows, horizon, dof, n_codes) float64: squared violation at each place if that code is taken there.

        Args:
            codes: (rows, horizon * dof) whole numbers: the demonstration that all other places keep to.
        """
        dof = len(self.values)
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.horizon * dof or codes.dtype.kind not in "iu":
            raise ConstraintError(f"codes are whole numbers of shape (rows, {self.horizon * dof}), got {codes.shape}")
        chunks = self.values[np.arange(dof), codes.reshape(-1, self.horizon, dof)]
        excess = np.stack([way.excess(chunks).sum(axis=1) for way in self._ways])  # (ways, rows)
        closest = excess.argmin(axis=0)
        out = np.empty((len(chunks), *self._apart[0].shape))
        for i, way in enumerate(self._ways):
            mine = np.flatnonzero(closest == i)
            out[mine] = self._apart[i]
            for term in way.terms:
                self._add(out, term, chunks, mine)
        return out

    def _alone(self, sets) -> np.ndarray:
        """(horizon, dof, n_codes) squared distance of each code's value to what constraints of one dimension leave."""
        out = np.zeros((self.horizon, *self.values.shape))
        for (step, dim), members in sets.items():
            out[step, dim] = (self.values[dim] - members.nearest(self.values[dim])) ** 2
        return out

    def _add(self, out: np.ndarray, term, chunks: np.ndarray, rows: np.ndarray) -> None:
        """Add the squared excess of a coupled term at each step, for every code of each of its dimensions."""
        n_codes = self.values.shape[1]
        each = max(1, SLAB // (n_codes * chunks[0].size))
        for begin in range(0, len(rows), each):
            here = rows[begin : begin + each]
            for dim in term.dims:
                for step in range(self.horizon):
                    tried = np.repeat(chunks[here], n_codes, axis=0)
                    tried[:, step, dim] = np.tile(self.values[dim], len(here))
                    out[here, step, dim] += term.excess(tried)[:, step].reshape(len(here), n_codes) ** 2

"""Where the patches of the pictures stand in the sequence: behind the first token of each row."""

from __future__ import annotations

import torch

from hf_vla_actions.errors import VLAActionsError


class PatchInsertion:
    """Lengthens what belongs to the tokens of a batch by the patches, row by row.

    OpenVLA's sequence is the first token (BOS), the patches, the other tokens. With padding on the left the first
    token stands in another column in each row; it is the first column that the attention mask shows.

    Args:
        attention_mask: (batch, length of the text), or None where nothing is padded.
        length: length of the text.
        patches: how many patches to insert.
    """

    def __init__(self, attention_mask: torch.Tensor | None, length: int, patches: int):
        if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] != length):
            raise VLAActionsError(
                f"with pixel_values the attention mask belongs to the text: (batch, {length}), got "
                f"{tuple(attention_mask.shape)}; the patches' part is added inside"
            )
        self.patches = patches
        self._index: torch.Tensor | None = None
        if attention_mask is not None:
            first = attention_mask.to(torch.int64).argmax(dim=1, keepdim=True)
            column = torch.arange(length + patches, device=attention_mask.device)[None]
            text = torch.where(column <= first, column, column - patches).clamp(0, length - 1)
            inside = (column > first) & (column <= first + patches)
            self._first = first
            # Indices into the text followed by the patches.
            self._index = torch.where(inside, length + column - first - 1, text)

    def __call__(self, values: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) of the text and (batch, patches, ...) to (batch, length + patches, ...)."""
        if self._index is None:
            return torch.cat([values[:, :1], patches, values[:, 1:]], dim=1)
        rows = torch.arange(len(values), device=values.device)[:, None]
        return torch.cat([values, patches], dim=1)[rows, self._index.to(values.device)]

    def fill(self, values: torch.Tensor, value: int) -> torch.Tensor:
        """Like a call with the same value at all patches: masks (1) and labels (-100)."""
        return self(values, values.new_full((len(values), self.patches), value))

    def positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions of the text (batch or 1, length) to those of the whole sequence.

        The patches count on from the first token; the tokens behind them move on.
        """
        column = torch.arange(position_ids.shape[1], device=position_ids.device)[None]
        first = torch.zeros_like(column[:, :1]) if self._index is None else self._first.to(position_ids.device)
        rows = max(len(position_ids), len(first))
        moved = (position_ids + self.patches * (column > first)).expand(rows, -1)
        start = position_ids.expand(rows, -1).gather(1, first.expand(rows, 1))
        return self(moved, start + 1 + torch.arange(self.patches, device=position_ids.device)[None])

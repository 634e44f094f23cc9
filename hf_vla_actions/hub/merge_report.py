"""What merging an adapter did, in numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_vla_actions.hub.probe import Comparison

REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class MergeReport:
    """A merged policy that was found to be the adapter's.

    Args:
        adapter: name of its folder or repository.
        base: of its base model.
        variant: "LoRA", "rsLoRA" or "DoRA".
        rank: of the adapter.
        alpha: scale of the adapter is alpha / rank (rsLoRA: alpha / sqrt(rank)).
        dtype: of the merged weights.
        tensors: tensors of the merged policy, all read back as they were written.
        untouched: of these, bit-identical to the base; embeddings count if their other rows are.
        rows: rows of action tokens that came from the adapter, by weight.
        comparison: answers of the merged policy, loaded from disk, against those of the adapter policy.
        qlora: for an adapter trained on 4-bit weights: the weights it went into.
        from_quantized: for "original", the adapter on these weights against the policy that was trained.
    """

    adapter: str
    base: str
    variant: str
    rank: int
    alpha: float
    dtype: str
    tensors: int
    untouched: int
    rows: Mapping[str, int]
    comparison: Comparison
    qlora: str | None = None
    from_quantized: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of `merge_report.json`."""
        # Only its name: a path says nothing to others, and too much.
        return {**asdict(self), "base": Path(self.base).name if Path(self.base).is_absolute() else self.base}

    def save(self, file: Path) -> None:
        """Write `merge_report.json`."""
        file.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    def text(self) -> str:
        """A few lines for people."""
        rows = ", ".join(f"{count} of {name}" for name, count in self.rows.items()) or "none"
        lines = [
            f"merged {self.adapter} ({self.variant}, rank {self.rank}, alpha {self.alpha:g}) into {self.base}",
            f"saved as {self.dtype}, loaded again: {self.comparison.text()}",
            f"tensors: {self.tensors}, all as written; {self.untouched} that the adapter does not touch are the base's to "
            "the bit",
            f"rows of action tokens from the adapter: {rows}",
        ]
        if self.qlora == "dequantized":
            lines.append("trained on 4-bit weights, merged into what they stand for: the policy that was trained")
        if self.from_quantized is not None:
            lines.append(
                "trained on 4-bit weights, merged into the base's own: against the policy that was trained, "
                + self.from_quantized.text()
            )
        return "\n".join(lines) + "\n"

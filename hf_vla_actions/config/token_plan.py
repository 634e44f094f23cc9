"""Which action tokens a published policy has, as far as its preset says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_vla_actions.config.codes import ActionTokenizer
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.tokenizers import FASTActionTokenizer, UniformActionTokenizer, VQActionTokenizer

CLASSES: dict[str, type] = {"bins": UniformActionTokenizer, "fast": FASTActionTokenizer, "vq": VQActionTokenizer}
HOW = {
    "fast": "FASTActionTokenizer.from_pretrained(...) or FASTActionTokenizer.fit(chunks, {n_codes}, scale={scale:g})",
    "vq": "a fitted VQActionTokenizer(dof, horizon, codebook_size={size}, n_codebooks={n_codebooks})",
}


@dataclass(frozen=True)
class TokenPlan:
    """The tokens of a preset.

    Args:
        kind: "bins", "fast" or "vq".
        n_codes: bins of a number, words of the FAST vocabulary at most, or codes of all codebooks together.
        layout: where the original has their ids, a layout of `ActionVocabulary`; None where it has no language model.
        scheme: of the bins, "uniform" or "openvla"; None for other kinds.
        scale: of FAST; None for other kinds.
        n_codebooks: of VQ; None for other kinds.
    """

    kind: str
    n_codes: int
    layout: str | None = None
    scheme: str | None = None
    scale: float | None = None
    n_codebooks: int | None = None

    def __post_init__(self):
        if self.kind not in CLASSES:
            raise VLAActionsError(f"kind of tokens is one of {list(CLASSES)}, got {self.kind!r}")
        needed = {"bins": "scheme", "fast": "scale", "vq": "n_codebooks"}
        given = [name for name in needed.values() if getattr(self, name) is not None]
        if given != [needed[self.kind]]:
            raise VLAActionsError(f"tokens of kind {self.kind!r} have {needed[self.kind]!r} alone, got {given}")

    def text(self) -> str:
        """In words, for reading."""
        where = f", layout {self.layout!r}" if self.layout else ""
        what = {
            "bins": f"{self.n_codes} bins a number ({self.scheme})",
            "fast": f"FAST, scale {self.scale or 0:g}, up to {self.n_codes} words",
            "vq": f"VQ, {self.n_codebooks} codebooks of {self.n_codes // (self.n_codebooks or 1)}",
        }[self.kind]
        return what + where

    def tokenizer(self, given: ActionTokenizer | None) -> ActionTokenizer:
        """The action tokenizer: bins are made, the others have to be given and must be what the preset says.

        Raises:
            VLAActionsError: it is missing, or another one.
        """
        if given is None and self.kind == "bins":
            return UniformActionTokenizer(self.n_codes, self.scheme or "uniform")
        wanted = f"the preset has {self.text()}"
        if given is None:
            size = self.n_codes // (self.n_codebooks or 1)
            how = HOW[self.kind].format(
                n_codes=self.n_codes, scale=self.scale or 0.0, size=size, n_codebooks=self.n_codebooks
            )
            raise VLAActionsError(f"{wanted}, which is learned from data: pass tokenizer={how}")
        if not isinstance(given, CLASSES[self.kind]):
            raise VLAActionsError(f"{wanted}, got a {type(given).__name__}: pass a {CLASSES[self.kind].__name__}")
        found = self._of(given)
        if found != {name: getattr(self, name) for name in found} or given.n_codes > self.n_codes:
            said = {**found, "n_codes": given.n_codes}
            raise VLAActionsError(
                f"{wanted}, the tokenizer that was given has {said}: pass one that fits, or say the difference with "
                "dataclasses.replace(preset, tokens=...)"
            )
        return given

    def _of(self, tokenizer: Any) -> dict[str, Any]:
        """What an action tokenizer of this kind has, by the names of the fields here."""
        if self.kind == "bins":
            return {"scheme": tokenizer.grid.scheme, "n_codes": tokenizer.n_codes}
        if self.kind == "fast":  # a vocabulary may be smaller where there was little data
            return {"scale": tokenizer.scale}
        return {"n_codebooks": tokenizer.shape.n_codebooks, "n_codes": tokenizer.n_codes}

"""FAST: chunks as the frequencies of their motion, rounded and packed by byte-pair encoding (arXiv 2501.09747)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.tokenizers import fast_files
from hf_vla_actions.tokenizers.fast_bytes import TokenBytes, can_spell, read_bpe
from hf_vla_actions.tokenizers.fast_dct import check_scale, coefficient_limit, from_coefficients, to_coefficients
from hf_vla_actions.tokenizers.fast_read import CoefficientReader, Repair

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FASTActionTokenizer:
    """Writes a chunk as a sequence of codes whose length depends on how smooth the motion is.

    A chunk (horizon, dof) of values in [-1, 1] becomes the orthonormal DCT-II of each dimension along time, rounded
    to `round(scale * coefficient)`. The integers stand frequency by frequency (the first `dof` are the means of the
    chunk), each as one character of code point `coefficient - min_token`, and a BPE packs them. The values come back
    up to the rounding, whose size `scale` decides. A code says nothing about where the chunk ends: `decode` checks
    that exactly horizon * dof coefficients are there, and `FASTLogitsProcessor` lets a model emit nothing else.

    Args:
        bpe: content of a `tokenizer.json`: a byte-level BPE as the reference writes it, or one on whole characters.
        scale: steps that a coefficient of size 1 is divided into; more is finer and longer.
        min_token: coefficient of the character with code point 0 (the reference's name for it).

    Format: physical-intelligence/fast, `processing_action_tokenizer.py`.
    """

    bpe: str = field(repr=False)
    scale: float
    min_token: int
    _backend: Tokenizer = field(init=False, repr=False)
    tokens: TokenBytes = field(init=False, repr=False)
    byte_level: bool = field(init=False)
    _reader: CoefficientReader = field(init=False, repr=False)
    _spellable: dict[int, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self):
        check_scale(self.scale)
        if not isinstance(self.min_token, (int, np.integer)) or isinstance(self.min_token, bool):
            raise ActionTokenError(f"min_token must be a whole number, got {self.min_token!r}")
        backend, tokens, byte_level = read_bpe(self.bpe)
        values: dict[str, Any] = {
            "bpe": backend.to_str(),
            "scale": float(self.scale),
            "min_token": int(self.min_token),
        }
        values |= {"_backend": backend, "tokens": tokens, "byte_level": byte_level, "_spellable": {}}
        values["_reader"] = CoefficientReader(tokens, int(self.min_token))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **hub_arguments) -> FASTActionTokenizer:
        """Read a tokenizer from a folder or a repository of the Hub; no code of it is run.

        Args:
            path: holds what `save_pretrained` wrote, or the reference's files: `processor_config.json` with
                `tokenizer.json` beside it or in `bpe_tokenizer/`.
            hub_arguments: `revision`, `token`, `cache_dir`, ... as in Transformers.

        Raises:
            CheckpointError: files are missing or damaged.
            ActionTokenError: the BPE is of another kind.
        """
        return cls.from_dict(fast_files.read(path, **hub_arguments))

    @classmethod
    def fit(
        cls, chunks, vocab_size: int = 1024, scale: float = 10.0, *, progress: bool = False
    ) -> FASTActionTokenizer:
        """Make a tokenizer for some data: BPE on whole coefficients, over every value that a chunk can have.

        Unlike the reference's, it can spell every chunk of at most the longest horizon given, seen or not, and each
        token stands for a fixed number of coefficients.

        Args:
            chunks: (n, horizon, dof) normalized, or a list of (horizon, dof) of different horizons.
            vocab_size: codes at most; fewer where the data repeats too little.
            scale: see the class; `scale_for` finds one for a wanted precision.
            progress: show a progress bar on stderr.
        """
        from hf_vla_actions.tokenizers.fast_fit import fit_bpe

        bpe, min_token = fit_bpe(chunks, vocab_size, scale, progress)
        return cls(bpe, scale, min_token)

    @property
    def n_codes(self) -> int:
        """How many different codes there are."""
        return self.tokens.highest + 1

    def limit(self, horizon: int) -> int:
        """The largest absolute coefficient of any chunk of values in [-1, 1] (and 1 % beyond)."""
        return coefficient_limit(horizon, self.scale)

    def encode(self, normalized) -> list[np.ndarray]:
        """Codes of chunks.

        Args:
            normalized: (..., horizon, dof) values in [-1, 1].

        Returns:
            one (n,) int64 array for each chunk, n different for each; leading axes are flattened.

        Raises:
            ActionTokenError: NaN, or values so far beyond [-1, 1] that no code stands for them.
        """
        coefficients = self.coefficients(normalized)
        if not coefficients.size:
            return []
        n = coefficients.shape[1] * coefficients.shape[2]
        text = (coefficients - self.min_token).astype("<u4").tobytes().decode("utf-32-le")
        strings = [text[i : i + n] for i in range(0, len(text), n)]
        encoded = self._backend.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]

    def coefficients(self, normalized) -> np.ndarray:
        """(n, horizon, dof) int64: the rounded coefficients of chunks (..., horizon, dof), checked to be spellable."""
        rounded = to_coefficients(normalized, self.scale)
        limit = self.limit(rounded.shape[1])
        if limit not in self._spellable:
            self._spellable[limit] = np.array([self.can_spell(c) for c in range(-limit, limit + 1)])
        has = self._spellable[limit][rounded + limit]
        if not has.all():
            at = tuple(int(i) for i in np.argwhere(~has)[0])
            missing = np.unique(rounded[~has]).tolist()
            raise ActionTokenError(
                f"chunk {at[0]} has the coefficients {missing[:8]}, for which this tokenizer has no characters (the first "
                f"at frequency {at[1]}, dimension {at[2]}); fit one with FASTActionTokenizer.fit, which has them all"
            )
        return rounded

    def can_spell(self, coefficient: int) -> bool:
        """Whether the tokenizer has a way to write a coefficient."""
        return can_spell(self.tokens, self.byte_level, coefficient - self.min_token)

    def decode(self, sequences, horizon: int, dof: int, *, strict: bool = True) -> np.ndarray:
        """Chunks of codes: (n, horizon, dof) float64 normalized.

        Args:
            sequences: list of n sequences of codes, each of any length.
            horizon: actions in a chunk.
            dof: numbers in an action.
            strict: raise if a sequence does not spell a chunk. Otherwise it is repaired (see `repair`), with a warning
                that says what was done.

        Raises:
            FASTDecodeError: a sequence spells too many or too few coefficients, broken UTF-8, or a coefficient that no
                normalized chunk has. Not strict: only if it does not even hold the mean of each dimension.
        """
        if not strict:
            chunks, repairs = self.repair(sequences, horizon, dof)
            for done in repairs:
                if done is not None:
                    logger.warning("repaired FAST codes, %s", done)
            return chunks
        rows, n, limit = self._checked(sequences, horizon, dof)
        coefficients = self._reader.read_batch(rows, n, limit)
        if coefficients is None:
            faults = (self._reader.diagnose(i, ids, n, limit) for i, ids in enumerate(rows))
            raise next(fault for fault in faults if fault is not None)
        return self._values(coefficients, horizon, dof)

    def repair(self, sequences, horizon: int, dof: int) -> tuple[np.ndarray, list[Repair | None]]:
        """Chunks of codes, with what is broken made good: not what the model meant, but near its lowest frequencies.

        Superfluous coefficients are cut off, missing ones and broken characters are 0, those out of range are clipped.

        Args:
            sequences: as in `decode`.
            horizon: actions in a chunk.
            dof: numbers in an action.

        Returns:
            (n, horizon, dof) float64 normalized, and for each what was done, or None.

        Raises:
            FASTDecodeError: a sequence does not spell the first `dof` coefficients, the means of the dimensions.
        """
        rows, n, limit = self._checked(sequences, horizon, dof)
        coefficients, repairs = np.zeros((len(rows), n), dtype=np.int64), []
        for i, ids in enumerate(rows):
            whole = self._reader.read_batch([ids], n, limit)
            coefficients[i], done = (
                (whole[0], None) if whole is not None else self._reader.repair(i, ids, n, limit, dof)
            )
            repairs.append(done)
        return self._values(coefficients, horizon, dof), repairs

    def _checked(self, sequences, horizon: int, dof: int) -> tuple[list[np.ndarray], int, int]:
        for name, value in (("horizon", horizon), ("dof", dof)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ActionTokenError(f"{name} must be a whole number of at least 1, got {value!r}")
        try:
            rows = [np.asarray(ids) for ids in sequences]
        except (TypeError, ValueError):
            raise ActionTokenError(
                f"decode takes a list of sequences of codes, got {type(sequences).__name__}"
            ) from None
        for i, ids in enumerate(rows):
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise ActionTokenError(
                    f"decode takes a list of sequences of codes; sequence {i} is of shape {ids.shape} and dtype {ids.dtype}"
                )
        return [ids.astype(np.int64, copy=False) for ids in rows], horizon * dof, self.limit(horizon)

    def _values(self, coefficients: np.ndarray, horizon: int, dof: int) -> np.ndarray:
        return from_coefficients(coefficients.reshape(-1, horizon, dof), self.scale)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description, complete in itself; inverse of `from_dict`."""
        return {"type": "fast", "scale": self.scale, "min_token": self.min_token, "bpe": self.bpe}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FASTActionTokenizer:
        """Read what `to_dict` wrote."""
        if values.get("type") != "fast":
            raise ActionTokenError(f"action tokenizers that can be read here: ['fast'], got {values.get('type')!r}")
        return cls(values["bpe"], values["scale"], values["min_token"])

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `fast_tokenizer.json` into a folder and return its path."""
        return fast_files.write(folder, self.to_dict())

    def export_reference(self, folder: str | os.PathLike) -> Path:
        """Write the files of the reference (`processor_config.json`, `bpe_tokenizer/`) into a folder and return it.

        Its processor reads them as they are, tokenizers made by `fit` too: those are characters of a high code point,
        which `min_token` takes into account. The reference's own code is not written.
        """
        return fast_files.write_reference(folder, self.to_dict(), self.n_codes)

    def __eq__(self, other) -> bool:
        return isinstance(other, FASTActionTokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.bpe, self.scale, self.min_token))

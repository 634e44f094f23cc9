"""A few codes a chunk, learned from data: residual vector quantization of whole chunks."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.errors import ActionTokenError, CheckpointError
from hf_vla_actions.tokenizers.vq_files import (
    TYPE,
    WEIGHTS_NAME,
    find_files,
    from_bytes,
    read_bytes,
    read_json,
    to_bytes,
    write_files,
)
from hf_vla_actions.tokenizers.vq_fit import FitHistory, FitSettings, fit_network
from hf_vla_actions.tokenizers.vq_network import VQNetwork, VQShape
from hf_vla_actions.tokenizers.vq_report import VQReport, make_report

logger = logging.getLogger(__name__)

BLOCK = 8192  # rows worked on at once: bounds the memory of the distances


class VQActionTokenizer:
    """Turns a normalized chunk into `n_codebooks` codes, with codebooks that `fit` learns from chunks.

    An encoder makes one vector of the chunk, residual codebooks quantize it, a decoder makes a chunk of the sum of the
    chosen entries (VQ-VAE, arXiv 1711.00937; residual as in VQ-BeT, arXiv 2403.03181).

    Each position has codes of its own: the code at position p is `p * codebook_size + entry`, so that `n_codes` is
    `n_codebooks * codebook_size` and no token of a language model has to mean two things. `code_ranges` says which codes
    are valid where; any choice of them decodes to a chunk within [-1, 1].

    Encoding and decoding take and return NumPy arrays and run in float64 on the CPU.

    Args:
        dof: numbers in one action.
        horizon: actions in one chunk; chunks of another length cannot be encoded.
        code_dim: length of the vector that is quantized.
        codebook_size: entries of each codebook, at least 2.
        n_codebooks: codes of one chunk.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.

    Raises:
        ActionTokenError: a size that is no whole number, or too small.
    """

    def __init__(
        self,
        dof: int,
        horizon: int,
        *,
        code_dim: int = 32,
        codebook_size: int = 256,
        n_codebooks: int = 4,
        hidden: Sequence[int] = (256, 128),
    ):
        self.shape = VQShape(dof, horizon, code_dim, codebook_size, n_codebooks, hidden)  # type: ignore[arg-type]
        self._network: VQNetwork | None = None
        self._bytes = b""  # the content of the weights' file; empty before the fit

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.shape.to_dict().items())
        return f"VQActionTokenizer({sizes}, fitted={self.fitted})"

    def __eq__(self, other) -> bool:
        return isinstance(other, VQActionTokenizer) and (self.shape, self._bytes) == (other.shape, other._bytes)

    __hash__ = None  # type: ignore[assignment]

    @property
    def fitted(self) -> bool:
        """Whether it can encode and decode."""
        return self._network is not None

    @property
    def n_codes(self) -> int:
        """How many different codes there are: n_codebooks * codebook_size."""
        return self.shape.n_codebooks * self.shape.codebook_size

    @property
    def n_tokens(self) -> int:
        """Codes of one chunk: one of each codebook."""
        return self.shape.n_codebooks

    @property
    def code_ranges(self) -> np.ndarray:
        """(n_codebooks, 2) int64: first valid code of each position, and the one behind its last."""
        first = np.arange(self.shape.n_codebooks, dtype=np.int64) * self.shape.codebook_size
        return np.stack([first, first + self.shape.codebook_size], axis=1)

    @property
    def codebooks(self) -> np.ndarray:
        """(n_codebooks, codebook_size, code_dim) float64 copy of the entries."""
        return self._ready().codebooks.vectors.numpy().copy()

    def fit(self, chunks, *, held_out: float | np.ndarray = 0.1, progress: bool = True, **settings) -> FitHistory:
        """Learn encoder, codebooks and decoder from chunks, from the start; what was learned before is dropped.

        Args:
            chunks: (n, horizon, dof) normalized; clipped to [-1, 1].
            held_out: chunks (m, horizon, dof) that are not learned from, best of other episodes; or a share of
                `chunks`, taken as one run of neighbors (chunks of the same episode overlap). Their error decides which
                weights are kept. 0 holds out none and keeps the last weights.
            progress: show a bar on stderr.
            settings: `steps`, `batch_size`, `lr`, `seed`, `commitment`, `update`, `decay`, `reset_below` of
                `FitSettings`.

        Returns:
            Errors and utilization along the way.

        Raises:
            ActionTokenError: chunks of another shape, with NaN, or too few.
            TrainingError: settings that cannot be, or a loss that is not finite.
        """
        asked = FitSettings(**settings)
        rows = self._rows(chunks)
        if isinstance(held_out, (int, float)):
            rows, others = _split(rows, float(held_out), asked.seed)
        else:
            others = self._rows(held_out)
        if not len(rows):
            raise ActionTokenError("there are no chunks to fit a tokenizer to")
        if len(rows) < self.shape.codebook_size:
            logger.warning(
                "%d chunks cannot use %d entries of a codebook: take more data or a smaller codebook_size",
                len(rows),
                self.shape.codebook_size,
            )
        with torch.random.fork_rng(
            devices=[]
        ):  # the layers draw weights, which `fit_network` draws anew from its seed
            network = VQNetwork(self.shape)
        history = fit_network(
            network, torch.from_numpy(rows).float(), torch.from_numpy(others).float(), asked, progress
        )
        self._take(network, to_bytes(network))
        return history

    def encode(self, normalized) -> np.ndarray:
        """Codes of chunks: (..., horizon, dof) normalized to (..., n_codebooks) int64; clips to [-1, 1].

        Raises:
            ActionTokenError: another horizon or dof, values that are not finite, or a tokenizer that is not fitted.
        """
        network, rows = self._ready(), self._rows(normalized)
        entries = np.empty((len(rows), self.shape.n_codebooks), dtype=np.int64)
        with torch.no_grad():
            for start in range(0, len(rows), BLOCK):
                part = slice(start, start + BLOCK)
                entries[part] = network.entries(torch.from_numpy(rows[part])).numpy()
        codes = entries + self.code_ranges[:, 0]
        return codes.reshape(*np.shape(normalized)[:-2], self.shape.n_codebooks)

    def decode(self, codes, horizon: int, dof: int) -> np.ndarray:
        """Chunks of codes: (..., n_codebooks) int to (..., horizon, dof) float64, within [-1, 1].

        Raises:
            ActionTokenError: another horizon or dof than the tokenizer was made for, another number of codes, a code
                that is not valid at its position, or a tokenizer that is not fitted.
        """
        network = self._ready()
        if (horizon, dof) != (self.shape.horizon, self.shape.dof):
            raise ActionTokenError(
                f"this tokenizer makes chunks of {self.shape.horizon} x {self.shape.dof}, not of {horizon} x {dof}; "
                "fit one for them"
            )
        codes = np.asarray(codes)
        entries = self._entries(codes)
        rows = np.empty((len(entries), horizon * dof))
        with torch.no_grad():
            for start in range(0, len(rows), BLOCK):
                part = slice(start, start + BLOCK)
                rows[part] = network.chunks(torch.from_numpy(entries[part])).numpy()
        return np.clip(rows, -1.0, 1.0).reshape(*codes.shape[:-1], horizon, dof)

    def report(
        self, actions, stats: ActionStats, *, space: ActionSpace | None = None, pad_mask: np.ndarray | None = None
    ) -> VQReport:
        """How well the codebooks are used, and what becomes of real chunks on the way to codes and back.

        Args:
            actions: (n, horizon, dof) in real units.
            stats: what normalizes them. What they clip counts as error too, and is listed by itself.
            space: names and units for the report; its binary gripper is settled as in use.
            pad_mask: (n, horizon) bool, True = real; padded steps are left out of the errors. All are real if None.

        Raises:
            ActionTokenError: actions of another shape, or none.
        """
        return make_report(self, actions, stats, space, pad_mask)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description that names the file of the weights and its SHA-256; see `from_dict`."""
        self._ready()
        sha256 = hashlib.sha256(self._bytes).hexdigest()
        return {"type": TYPE, **self.shape.to_dict(), "file": WEIGHTS_NAME, "sha256": sha256}

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: str | os.PathLike) -> VQActionTokenizer:
        """Read what `to_dict` described, with the weights that `save_pretrained` wrote into `folder`.

        Raises:
            ActionTokenError: the description of another kind of tokenizer, or one with sizes that cannot be.
            CheckpointError: the file is missing, damaged, or not the one described.
        """
        if values.get("type") != TYPE:
            raise ActionTokenError(f"action tokenizers that can be read here: [{TYPE!r}], got {values.get('type')!r}")
        if values.get("file") != WEIGHTS_NAME:
            raise CheckpointError(
                f"the weights of a VQ tokenizer lie in {WEIGHTS_NAME}, not in {values.get('file')!r}"
            )
        others = ("type", "file", "sha256", "format_version")
        sizes = {name: value for name, value in values.items() if name not in others}
        try:
            tokenizer = cls(**sizes)
        except TypeError as error:
            raise CheckpointError(f"not the description of a VQ tokenizer: {error}") from None
        content = read_bytes(Path(folder), values.get("sha256"))
        tokenizer._take(from_bytes(content, tokenizer.shape, folder), content)
        return tokenizer

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Write `vq_tokenizer.safetensors` and `vq_tokenizer.json` into a folder and return the folder."""
        return write_files(Path(save_directory), self.to_dict(), self._bytes)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **hub_arguments) -> VQActionTokenizer:
        """Read what `save_pretrained` wrote: a folder, or a repository of the Hub.

        Args:
            path: folder or repository id.
            hub_arguments: `revision`, `token`, `cache_dir`, ... as in Transformers.

        Raises:
            CheckpointError: a file is missing, damaged, or of something else.
        """
        folder = find_files(path, hub_arguments)
        return cls.from_dict(read_json(folder), folder)

    def _take(self, network: VQNetwork, content: bytes) -> None:
        self._network = network.double().requires_grad_(False)
        self._bytes = content

    def _ready(self) -> VQNetwork:
        if self._network is None:
            raise ActionTokenError(
                "this VQ tokenizer is not fitted: call fit(chunks), or load one with from_pretrained"
            )
        return self._network

    def _rows(self, normalized) -> np.ndarray:
        """(rows, horizon * dof) float64 within [-1, 1] of chunks (..., horizon, dof)."""
        x = np.asarray(normalized)
        if x.dtype.kind not in "fiu" or x.shape[-2:] != (self.shape.horizon, self.shape.dof):
            raise ActionTokenError(
                f"a chunk for this tokenizer has shape (..., {self.shape.horizon}, {self.shape.dof}), got {x.dtype} "
                f"{x.shape}; a tokenizer is fitted to one horizon and dof"
            )
        if not np.isfinite(x).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise ActionTokenError(
                f"the chunks have NaN or infinite values, first at index {index}; look for missing values in the actions"
            )
        return np.clip(x.astype(np.float64), -1.0, 1.0).reshape(-1, self.shape.horizon * self.shape.dof)

    def _entries(self, codes: np.ndarray) -> np.ndarray:
        """(rows, n_codebooks) int64 entries of codes (..., n_codebooks)."""
        n, size = self.shape.n_codebooks, self.shape.codebook_size
        if codes.dtype.kind not in "iu" or codes.ndim == 0 or codes.shape[-1] != n:
            raise ActionTokenError(
                f"a chunk is {n} codes (..., {n}) of whole numbers, got {codes.dtype} {codes.shape}"
            )
        ranges = self.code_ranges
        astray = (codes < ranges[:, 0]) | (codes >= ranges[:, 1])
        if astray.any():
            place = int(np.argwhere(astray)[0, -1])
            bad = codes[astray].reshape(-1)[:5].tolist()
            raise ActionTokenError(
                f"codes {bad} are not valid where they stand: position {place} takes {ranges[place, 0]} to "
                f"{ranges[place, 1] - 1} ({size} codes a position); allow each position its own, as code_ranges has them"
            )
        return (codes.astype(np.int64) - ranges[:, 0]).reshape(-1, n)


def _split(rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and one run of neighbors to hold out; where the run starts follows from the seed."""
    if not 0.0 <= share < 1.0:
        raise ActionTokenError(f"held_out is chunks, or a share from 0 to below 1, got {share}")
    n = int(np.ceil(share * len(rows)))
    if not n:
        return rows, rows[:0]
    start = int(np.random.default_rng(seed).integers(len(rows) - n + 1))
    return np.delete(rows, np.s_[start : start + n], axis=0), rows[start : start + n]

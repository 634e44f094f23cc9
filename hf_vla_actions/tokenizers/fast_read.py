"""From FAST tokens to coefficients: quickly where they are valid, with a diagnosis or a repair where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.errors import ActionTokenError, FASTDecodeError
from hf_vla_actions.tokenizers.fast_bytes import REPLACEMENT, TokenBytes


@dataclass(frozen=True)
class Repair:
    """What was done to one sequence that spelled no chunk.

    Args:
        sequence: index within the batch.
        skipped: tokens left out because they spell nothing.
        broken: characters of broken UTF-8, taken as coefficient 0.
        clipped: coefficients beyond the largest possible, clipped to it.
        cut: coefficients beyond the end, left out.
        added: coefficients missing at the end (the highest frequencies), taken as 0.
    """

    sequence: int
    skipped: int = 0
    broken: int = 0
    clipped: int = 0
    cut: int = 0
    added: int = 0

    def __str__(self) -> str:
        words = {
            "tokens that spell nothing left out": self.skipped,
            "broken characters taken as 0": self.broken,
            "coefficients clipped": self.clipped,
            "coefficients cut off": self.cut,
            "coefficients completed with 0": self.added,
        }
        return f"sequence {self.sequence}: " + ", ".join(f"{n} {what}" for what, n in words.items() if n)


@dataclass(frozen=True)
class CoefficientReader:
    """Reads coefficients from token ids.

    Args:
        tokens: what the tokens spell.
        min_token: coefficient of the character with code point 0.
    """

    tokens: TokenBytes
    min_token: int

    def read_batch(self, sequences: Sequence[np.ndarray], n: int, limit: int) -> np.ndarray | None:
        """(len(sequences), n) int64 coefficients; None if any sequence is not valid (`diagnose` says why)."""
        lengths = [len(ids) for ids in sequences]
        ids = np.concatenate(sequences) if sequences else np.zeros(0, np.int64)
        if not ids.size or min(lengths) == 0:
            return np.zeros((0, n), np.int64) if not sequences else None
        if ids.min() < 0 or ids.max() > self.tokens.highest or not self.tokens.usable[ids].all():
            return None
        starts = np.cumsum([0, *lengths[:-1]])
        # Valid as one string and cut at beginnings of characters only: then each sequence is valid by itself.
        if self.tokens.continues[ids[starts]].any() or (np.add.reduceat(self.tokens.begun[ids], starts) != n).any():
            return None
        of = self.tokens.of
        try:
            text = b"".join([of[i] for i in ids.tolist()]).decode("utf-8")  # type: ignore[misc]
        except UnicodeDecodeError:
            return None
        coefficients = _code_points(text) + self.min_token
        if coefficients.min() < -limit or coefficients.max() > limit:
            return None
        return coefficients.reshape(len(sequences), n)

    def diagnose(self, sequence: int, ids: np.ndarray, n: int, limit: int) -> FASTDecodeError | None:
        """What is wrong with one sequence of ids, all of it; None if nothing is.

        Args:
            sequence: index within the batch, for the message.
            ids: (n_tokens,) int64.
            n: coefficients of a chunk.
            limit: largest absolute coefficient.
        """
        found: list[tuple[str, int | None, str]] = []
        usable = self._usable(ids)
        if not usable.all():
            at = int(np.argmin(usable))
            highest = self.tokens.highest
            found.append(
                ("token", at, f"id {ids[at]} at token {at} is none of the codes 0..{highest} that spell something")
            )
        raw = [self.tokens.of[i] or b"" for i in ids[usable].tolist()]
        ends = np.cumsum([len(piece) for piece in raw])
        place = np.flatnonzero(usable)
        whole = b"".join(raw)
        text = whole.decode("utf-8", "replace")
        points = _code_points(text)
        broken = points == REPLACEMENT
        if broken.any():
            byte = _first_broken_byte(whole)
            at = int(place[np.searchsorted(ends, byte, side="right")])
            many = f" and {broken.sum() - 1} more" if broken.sum() > 1 else ""
            found.append(("utf-8", at, f"broken UTF-8 at token {at}, coefficient {int(np.argmax(broken))}{many}"))
        coefficients = points + self.min_token
        beyond = (np.abs(coefficients) > limit) & ~broken
        if beyond.any():
            first = int(np.argmax(beyond))
            byte = len(text[:first].encode("utf-8"))
            where: int | None = int(place[np.searchsorted(ends, byte, side="right")]) if not broken.any() else None
            words = "" if where is None else f", token {where}"
            found.append(
                (
                    "range",
                    where,
                    f"coefficient {first}{words} is {coefficients[first]}, possible are {-limit}..{limit}",
                )
            )
        if len(points) != n:
            found.append(("length", None, f"{len(points)} coefficients instead of {n}"))
        if not found:
            return None
        kinds, positions, details = zip(*found, strict=True)
        places = [p for p in positions if p is not None]
        return FASTDecodeError(
            sequence=sequence, kinds=kinds, position=min(places) if places else None, details=details
        )

    def repair(self, sequence: int, ids: np.ndarray, n: int, limit: int, needed: int) -> tuple[np.ndarray, Repair]:
        """(n,) int64 coefficients made of what one sequence spells, and what was done to it.

        Args:
            sequence: index within the batch.
            ids: (n_tokens,) int64.
            n: coefficients of a chunk.
            limit: largest absolute coefficient.
            needed: raise if fewer coefficients than these are there: nothing would be known of some dimension.
        """
        usable = self._usable(ids)
        raw = b"".join(self.tokens.of[i] or b"" for i in ids[usable].tolist())
        points = _code_points(raw.decode("utf-8", "replace"))
        broken = points == REPLACEMENT
        if (~broken[:needed]).sum() < needed:
            raise self.diagnose(sequence, ids, n, limit) or ActionTokenError("nothing to repair")
        coefficients = np.where(broken, 0, points + self.min_token)
        clipped = np.clip(coefficients, -limit, limit)
        done = Repair(
            sequence,
            skipped=int((~usable).sum()),
            broken=int(broken[:n].sum()),
            clipped=int((clipped != coefficients)[:n].sum()),
            cut=max(len(points) - n, 0),
            added=max(n - len(points), 0),
        )
        return np.pad(clipped[:n], (0, done.added)), done

    def _usable(self, ids: np.ndarray) -> np.ndarray:
        inside = (ids >= 0) & (ids <= self.tokens.highest)
        return inside & self.tokens.usable[np.where(inside, ids, 0)]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)


def _first_broken_byte(raw: bytes) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        spelled = raw[: error.start].find(chr(REPLACEMENT).encode("utf-8"))
        return spelled if spelled >= 0 else error.start
    return raw.find(chr(REPLACEMENT).encode("utf-8"))

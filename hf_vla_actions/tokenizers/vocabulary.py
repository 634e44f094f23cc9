"""Codes of an action tokenizer to ids of a language model's vocabulary: an explicit map, saved, never computed again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken

from hf_vla_actions.errors import ActionTokenError

LAYOUTS = ("append", "tail")


@dataclass(frozen=True, eq=False)
class ActionVocabulary:
    """Which token id stands for which code, and which id closes an action.

    Args:
        token_ids: (n_codes,) id of each code, in the order of the codes.
        end_token_id: id that ends an action: the tokenizer's end of sequence.
        layout: "append" (new tokens behind the vocabulary) or "tail" (OpenVLA: the last ids, counted backwards).
        tokens: text of each action token, checked against the tokenizer when a checkpoint is loaded.
    """

    token_ids: np.ndarray
    end_token_id: int
    layout: str
    tokens: tuple[str, ...] = field(repr=False)

    def __post_init__(self):
        ids = np.array(self.token_ids, dtype=np.int64)
        if ids.ndim != 1 or not ids.size or (ids < 0).any() or len(np.unique(ids)) != len(ids):
            raise ActionTokenError("token_ids must be different ids that are not negative, one a code")
        if len(self.tokens) != len(ids):
            raise ActionTokenError(f"{len(ids)} token ids with {len(self.tokens)} token texts")
        if self.end_token_id in ids:
            raise ActionTokenError(f"the end token {self.end_token_id} is also an action token")
        if self.layout not in LAYOUTS:
            raise ActionTokenError(f"layout must be one of {list(LAYOUTS)}, got {self.layout!r}")
        ids.setflags(write=False)
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        code_of_id = np.full(ids.max() + 1, -1, dtype=np.int64)
        code_of_id[ids] = np.arange(len(ids))
        object.__setattr__(self, "_code_of_id", code_of_id)

    @classmethod
    def append(cls, tokenizer, n_codes: int = 256) -> ActionVocabulary:
        """Add `<act_000>`, `<act_001>`, ... behind the vocabulary of `tokenizer` (changed in place).

        They are single tokens wherever they stand and survive `skip_special_tokens`. On a tokenizer that has them
        already (from a checkpoint) the same ids are found again.

        The embeddings of the model must grow to match: `to_vla` does it.
        """
        width = max(3, len(str(n_codes - 1)))
        tokens = [f"<act_{code:0{width}d}>" for code in range(n_codes)]
        vocabulary = tokenizer.get_vocab()
        known = [token for token in tokens if token in vocabulary]
        more = f"<act_{n_codes:0{width}d}>" in vocabulary
        if known and (len(known) < n_codes or more):
            raise ActionTokenError(
                f"the tokenizer already has action tokens, but not exactly the {n_codes} wanted; "
                "start from the original tokenizer or ask for the number it was extended with"
            )
        if not known:
            # normalized=False keeps runs of action tokens whole on Llama-style vocabularies, where the normalizer
            # would put a space piece in front of each; special=False keeps them in decoded text.
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        ids = tokenizer.convert_tokens_to_ids(tokens)
        return cls(np.array(ids), _end_id(tokenizer), "append", tuple(tokens))

    @classmethod
    def tail(cls, tokenizer, n_codes: int = 256) -> ActionVocabulary:
        """OpenVLA's layout: code k is the id `vocab_size - 1 - k`, on words that the model must not need otherwise.

        `vocab_size` is that of the original vocabulary, without added tokens such as padding.
        """
        size = tokenizer.vocab_size
        if not 0 < n_codes < size:
            raise ActionTokenError(f"{n_codes} action tokens do not fit into a vocabulary of {size}")
        ids = size - 1 - np.arange(n_codes)
        return cls(ids, _end_id(tokenizer), "tail", tuple(tokenizer.convert_ids_to_tokens(ids.tolist())))

    @property
    def n_codes(self) -> int:
        """How many codes have an id."""
        return len(self.token_ids)

    def to_ids(self, codes) -> np.ndarray:
        """Token ids of codes, int64 of the same shape; a code that does not exist raises."""
        codes = np.asarray(codes)
        if codes.dtype.kind not in "iu" or (codes.size and (codes.min() < 0 or codes.max() >= self.n_codes)):
            raise ActionTokenError(f"codes are whole numbers from 0 to {self.n_codes - 1}, got {codes!r}")
        return self.token_ids[codes]

    def to_codes(self, ids) -> np.ndarray:
        """Codes of token ids, int64 of the same shape; an id that is no action token raises."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise ActionTokenError(f"token ids are whole numbers, got dtype {ids.dtype}")
        table: np.ndarray = self._code_of_id  # type: ignore[attr-defined]
        inside = (ids >= 0) & (ids < len(table))
        codes = np.where(inside, table[np.where(inside, ids, 0)], -1)
        if (codes < 0).any():
            bad = ids[codes < 0].reshape(-1)[:5].tolist()
            low, high = self.token_ids.min(), self.token_ids.max()
            raise ActionTokenError(
                f"ids {bad} are no action tokens (those are {self.n_codes} ids within {low}..{high}); "
                "generate with TACOLogitsProcessor, which allows nothing else"
            )
        return codes

    def check(self, tokenizer) -> None:
        """Raise if the tokenizer gives other text to the action ids, or another id to the end of a sequence."""
        found = tokenizer.convert_ids_to_tokens(self.token_ids.tolist())
        wrong = [i for i, (a, b) in enumerate(zip(found, self.tokens, strict=True)) if a != b]
        if wrong:
            i = wrong[0]
            raise ActionTokenError(
                f"the tokenizer does not belong to this action vocabulary: id {self.token_ids[i]} is {found[i]!r}, "
                f"not {self.tokens[i]!r} ({len(wrong)} of {self.n_codes} differ); load the tokenizer of the checkpoint"
            )
        if _end_id(tokenizer) != self.end_token_id:
            raise ActionTokenError(
                f"actions end with id {self.end_token_id}, the tokenizer's end of sequence is {tokenizer.eos_token_id}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; inverse of `from_dict`."""
        ids, tokens = self.token_ids.tolist(), list(self.tokens)
        return {"layout": self.layout, "end_token_id": self.end_token_id, "token_ids": ids, "tokens": tokens}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionVocabulary:
        """Read what `to_dict` wrote."""
        return cls(np.array(values["token_ids"]), values["end_token_id"], values["layout"], tuple(values["tokens"]))

    def __eq__(self, other) -> bool:
        return isinstance(other, ActionVocabulary) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _end_id(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ActionTokenError("the tokenizer has no end-of-sequence token, which closes an action; set eos_token")
    return int(tokenizer.eos_token_id)

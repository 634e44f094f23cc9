"""Codes of an action tokenizer to ids of a language model's vocabulary: an explicit map, saved, never computed again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tokenizers import AddedToken

from hf_vla_actions.errors import ActionTokenError

_ACTION_TOKEN = re.compile(r"<act_(\d+_)?\d+>")
_PLACE = re.compile(r"<loc\d{4}>")
LAYOUTS = ("append", "tail", "per_dimension", "spare", "pi0_fast", "named")
PALIGEMMA_LAST, PALIGEMMA_SKIPPED = "<seg127>", 128  # openpi leaves the last 128 tokens out: those of segmentation


@dataclass(frozen=True, eq=False)
class ActionVocabulary:
    """Which token id stands for which code, and which id closes an action.

    Args:
        token_ids: (n_codes,) id of each code, in the order of the codes; or (dof, n_codes) where each dimension of
            the action has ids of its own.
        end_token_id: id that ends an action: the tokenizer's end of sequence, or that of `end_token`.
        layout: how it was made: "append" (new tokens behind the vocabulary), "per_dimension" (the same, a block for
            each dimension, as in RT-2), "tail" (OpenVLA: the last ids, counted backwards), "spare" (ids from a list),
            "pi0_fast" (pi0-FAST: PaliGemma's places and last words, counted backwards) or "named" (tokens that are
            numbered by name, as starVLA's).
        tokens: text of each action token, in the order of `token_ids` flattened, checked against the tokenizer when a
            checkpoint is loaded; "" where the tokenizer has none.
        end_token: text of the token that ends an action, checked likewise; None for the tokenizer's end of sequence.
    """

    token_ids: np.ndarray
    end_token_id: int
    layout: str
    tokens: tuple[str, ...] = field(repr=False)
    end_token: str | None = None

    def __post_init__(self):
        ids = np.array(self.token_ids)
        if ids.ndim not in (1, 2) or not ids.size or ids.dtype.kind not in "iu":
            raise ActionTokenError(
                f"token_ids are whole numbers of shape (n_codes,) or (dof, n_codes), got {ids.dtype} {ids.shape}"
            )
        ids = ids.astype(np.int64)
        if (ids < 0).any() or len(np.unique(ids)) != ids.size:
            raise ActionTokenError("token_ids must be different ids that are not negative, one a code")
        if len(self.tokens) != ids.size:
            raise ActionTokenError(f"{ids.size} token ids with {len(self.tokens)} token texts")
        if self.end_token_id in ids:
            raise ActionTokenError(f"the end token {self.end_token_id} is also an action token")
        if self.layout not in LAYOUTS:
            raise ActionTokenError(f"layout must be one of {list(LAYOUTS)}, got {self.layout!r}")
        if self.layout == "per_dimension" and ids.ndim != 2:
            raise ActionTokenError(f"the layout 'per_dimension' has ids of shape (dof, n_codes), got {ids.shape}")
        ids.setflags(write=False)
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        place = np.full(ids.max() + 1, -1, dtype=np.int64)
        place[ids.reshape(-1)] = np.arange(ids.size)
        object.__setattr__(self, "_place_of_id", place)

    @classmethod
    def append(cls, tokenizer, n_codes: int = 256) -> ActionVocabulary:
        """Add `<act_000>`, `<act_001>`, ... behind the vocabulary of `tokenizer` (changed in place).

        They are single tokens wherever they stand and survive `skip_special_tokens`. On a tokenizer that has them
        already (from a checkpoint) the same ids are found again.

        The embeddings of the model must grow to match: `to_vla` does it.
        """
        return cls._added(tokenizer, (n_codes,), "append")

    @classmethod
    def per_dimension(cls, tokenizer, n_codes: int = 256, dof: int = 7) -> ActionVocabulary:
        """RT-2's layout with tokens of their own: `<act_0_000>` ... , one block of `n_codes` for each dimension.

        `n_codes` * `dof` tokens are added behind the vocabulary of `tokenizer` (changed in place). A bin of x and the
        same bin of the gripper then share nothing, and `TACOLogitsProcessor` allows each position its own block only.
        """
        return cls._added(tokenizer, (dof, n_codes), "per_dimension")

    @classmethod
    def tail(cls, tokenizer, n_codes: int = 256) -> ActionVocabulary:
        """OpenVLA's layout: code k is the id `vocab_size - 1 - k`, on words that the model must not need otherwise.

        `vocab_size` is that of the original vocabulary, without added tokens such as padding; special tokens at its
        end (GPT-2 has one) are left out. Where such words can stand in a prompt, `to_vla` warns: the model would read
        them as actions.
        """
        size = tokenizer.vocab_size
        ids = np.setdiff1d(np.arange(size), tokenizer.all_special_ids)[::-1][:n_codes]
        if not 0 < n_codes == len(ids):
            raise ActionTokenError(f"{n_codes} action tokens do not fit into a vocabulary of {size}")
        return cls(ids, _end_id(tokenizer), "tail", _texts(tokenizer, ids))

    @classmethod
    def spare(cls, tokenizer, ids: Sequence[int] | np.ndarray) -> ActionVocabulary:
        """Use ids that a vocabulary has to spare: `<unused0>`, reserved tokens, embedding rows without a token.

        Args:
            tokenizer: left as it is.
            ids: (n_codes,) in the order of the codes, or (dof, n_codes). Special tokens of the tokenizer raise.
        """
        flat = np.asarray(ids).reshape(-1).tolist()
        _refuse_special(tokenizer, flat)
        return cls(np.asarray(ids), _end_id(tokenizer), "spare", _texts(tokenizer, flat))

    @classmethod
    def pi0_fast(
        cls, tokenizer, n_codes: int = 2048, *, vocab_size: int | None = None, end_token: str | None = "|"
    ) -> ActionVocabulary:
        """pi0-FAST's layout on PaliGemma: code c is the id `vocab_size - 1 - 128 - c`, and `|` closes the chunk.

        The first 1024 codes take the place of `<loc1023>` ... `<loc0000>`, the others that of the last words of Gemma,
        which the model must not need otherwise: `to_vla` warns where such a word can stand in a prompt. openpi puts an
        end of sequence behind the `|`, which its own decoding never reads.

        Args:
            tokenizer: PaliGemma's; left as it is.
            n_codes: codes of the FAST tokenizer.
            vocab_size: of the vocabulary without tokens that were added later (257152 for PaliGemma). None: found in the
                tokenizer, as the id behind `<seg127>`; a tokenizer of another kind raises.
            end_token: token that closes a chunk; None for the tokenizer's end of sequence.

        Source: openpi, `models/tokenizer.py`, `FASTTokenizer`.
        """
        size = _paligemma_size(tokenizer) if vocab_size is None else vocab_size
        ids = size - 1 - PALIGEMMA_SKIPPED - np.arange(n_codes)
        if n_codes < 1 or ids.min() < 0 or size > len(tokenizer):
            raise ActionTokenError(
                f"{n_codes} codes in front of the last {PALIGEMMA_SKIPPED} tokens do not fit into a vocabulary of {size} "
                f"(the tokenizer has {len(tokenizer)} tokens): use a smaller FAST tokenizer, or the layout 'append'"
            )
        texts = _texts(tokenizer, ids)
        # Places may be marked as special in a tokenizer; to take them is what this layout is about.
        _refuse_special(tokenizer, [i for i, text in zip(ids, texts, strict=True) if not _PLACE.fullmatch(text)])
        return cls(ids, _end_id(tokenizer, end_token), "pi0_fast", texts, end_token)

    @classmethod
    def named(
        cls, tokenizer, n_codes: int = 2048, pattern: str = "<robot_action_{}>", *, add: bool = False
    ) -> ActionVocabulary:
        """Tokens numbered by name, wherever the tokenizer has them: starVLA's `<robot_action_0>` and the like.

        Args:
            tokenizer: left as it is unless `add`.
            n_codes: how many are wanted, from 0 on.
            pattern: text of a token, `{}` in the place of the code; `{:03d}` for one with leading zeros.
            add: put those that the tokenizer lacks behind its vocabulary, instead of raising with their names.

        Source: starVLA, `QwenFast.py`, which has the range of their ids written down for two tokenizers; here they are
        looked up.
        """
        tokens = numbered(pattern, n_codes)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in tokens if token not in vocabulary]
        if missing and not add:
            raise ActionTokenError(
                f"the tokenizer lacks {len(missing)} of the {n_codes} action tokens, such as {missing[:3]}: load the "
                "tokenizer that was extended with them, give their pattern, or pass add=True for new ones"
            )
        if missing:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in missing])
        ids = np.array(tokenizer.convert_tokens_to_ids(tokens))
        return cls(ids, _end_id(tokenizer), "named", tuple(tokens))

    def ending_with(self, tokenizer, end_token: str | None) -> ActionVocabulary:
        """The same tokens with another one that closes an action; None for the tokenizer's end of sequence."""
        return replace(self, end_token_id=_end_id(tokenizer, end_token), end_token=end_token)

    @classmethod
    def _added(cls, tokenizer, shape: tuple[int, ...], layout: str) -> ActionVocabulary:
        if min(shape) < 1:
            raise ActionTokenError(f"an action vocabulary has at least one token, got the sizes {shape}")
        width = max(3, len(str(shape[-1] - 1)))
        places = list(np.ndindex(*shape))
        tokens = ["<act_" + "".join(f"{i}_" for i in block) + f"{code:0{width}d}>" for *block, code in places]
        vocabulary = tokenizer.get_vocab()
        known = [token for token in tokens if token in vocabulary]
        # Another number of codes or blocks would find some of its tokens, or others besides them.
        others = {token for token in vocabulary if _ACTION_TOKEN.fullmatch(token)} - set(tokens)
        if others or (known and len(known) < len(tokens)):
            raise ActionTokenError(
                f"the tokenizer already has action tokens, but not exactly the {len(tokens)} wanted; "
                "start from the original tokenizer or ask for the number it was extended with"
            )
        if not known:
            # normalized=False keeps runs of action tokens whole on Llama-style vocabularies, where the normalizer
            # would put a space piece in front of each; special=False keeps them in decoded text.
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        ids = np.array(tokenizer.convert_tokens_to_ids(tokens)).reshape(shape)
        return cls(ids, _end_id(tokenizer), layout, tuple(tokens))

    @property
    def n_codes(self) -> int:
        """How many codes there are for one number of an action."""
        return self.token_ids.shape[-1]

    @property
    def dof(self) -> int | None:
        """How many dimensions have ids of their own; None where all share them."""
        return self.token_ids.shape[0] if self.token_ids.ndim == 2 else None

    @property
    def in_prompts(self) -> bool:
        """Whether the ids are words that a prompt may contain; elsewhere a prompt with one of them is refused."""
        return self.layout in ("tail", "pi0_fast")

    def table(self, dof: int) -> np.ndarray:
        """(dof, n_codes) id of each code in each dimension of an action."""
        if self.dof not in (None, dof):
            raise ActionTokenError(f"the action vocabulary has ids for {self.dof} dimensions, the action has {dof}")
        return np.broadcast_to(self.token_ids, (dof, self.n_codes))

    def to_ids(self, codes) -> np.ndarray:
        """Token ids of codes, int64 of the same shape; a code that does not exist raises.

        Args:
            codes: (..., horizon * dof), dimension after dimension, step after step; any shape where all dimensions
                share their ids.
        """
        codes = np.asarray(codes)
        if codes.dtype.kind not in "iu" or (codes.size and (codes.min() < 0 or codes.max() >= self.n_codes)):
            raise ActionTokenError(f"codes are whole numbers from 0 to {self.n_codes - 1}, got {codes!r}")
        if self.dof is None:
            return self.token_ids[codes]
        return self.token_ids[self._dimensions(codes), codes]

    def to_codes(self, ids) -> np.ndarray:
        """Codes of token ids, int64 of the same shape.

        Args:
            ids: as `to_ids` returns them.

        Raises:
            ActionTokenError: an id is no action token, or one of another dimension.
        """
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise ActionTokenError(f"token ids are whole numbers, got dtype {ids.dtype}")
        table: np.ndarray = self._place_of_id  # type: ignore[attr-defined]
        inside = (ids >= 0) & (ids < len(table))
        place = np.where(inside, table[np.where(inside, ids, 0)], -1)
        if (place < 0).any():
            bad = ids[place < 0].reshape(-1)[:5].tolist()
            low, high = self.token_ids.min(), self.token_ids.max()
            raise ActionTokenError(
                f"ids {bad} are no action tokens (those are {self.token_ids.size} ids within {low}..{high}); "
                "generate with TACOLogitsProcessor, which allows nothing else"
            )
        if self.dof is None:
            return place
        block, codes = np.divmod(place, self.n_codes)
        astray = block != self._dimensions(ids)
        if astray.any():
            raise ActionTokenError(
                f"ids {ids[astray].reshape(-1)[:5].tolist()} are action tokens of another dimension than the one they "
                "stand for; generate with TACOLogitsProcessor, which allows each position its own block only"
            )
        return codes

    def _dimensions(self, values: np.ndarray) -> np.ndarray:
        """The dimension of each place of the last axis."""
        if not values.ndim or values.shape[-1] % self.token_ids.shape[0]:
            raise ActionTokenError(
                f"each of {self.dof} dimensions has ids of its own: pass whole actions (..., horizon * {self.dof}), "
                f"got shape {values.shape}"
            )
        return np.arange(values.shape[-1]) % self.token_ids.shape[0]

    def check(self, tokenizer) -> None:
        """Raise if the tokenizer gives other text to the action ids, or another id to the end of a sequence."""
        ids = self.token_ids.reshape(-1)
        found = _texts(tokenizer, ids)
        wrong = [i for i, (a, b) in enumerate(zip(found, self.tokens, strict=True)) if a != b]
        if wrong:
            i = wrong[0]
            raise ActionTokenError(
                f"the tokenizer does not belong to this action vocabulary: id {ids[i]} is {found[i]!r}, "
                f"not {self.tokens[i]!r} ({len(wrong)} of {len(ids)} differ); load the tokenizer of the checkpoint"
            )
        end = _end_id(tokenizer, self.end_token)
        if end != self.end_token_id:
            what = "end of sequence" if self.end_token is None else repr(self.end_token)
            raise ActionTokenError(f"actions end with id {self.end_token_id}, the tokenizer's {what} is {end}")

    def check_instruction(self, instruction: str) -> None:
        """Raise if a user's sentence contains the text of an added action token: it would become an action."""
        if self.layout not in ("append", "per_dimension", "named"):
            return  # words and reserved tokens are found by their ids, once the prompt is made of ids
        hidden = [token for token in self.tokens if token in instruction]
        if hidden:
            raise ActionTokenError(f"the instruction {instruction!r} contains the action token {hidden[0]!r}")

    def find(self, ids) -> np.ndarray:
        """Which of some token ids are action tokens: bool of the same shape."""
        return np.isin(np.asarray(ids), self.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; inverse of `from_dict`."""
        ids, tokens = self.token_ids.tolist(), list(self.tokens)
        values = {"layout": self.layout, "end_token_id": self.end_token_id, "token_ids": ids, "tokens": tokens}
        return values if self.end_token is None else {**values, "end_token": self.end_token}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionVocabulary:
        """Read what `to_dict` wrote."""
        ids, tokens = np.array(values["token_ids"]), tuple(values["tokens"])
        return cls(ids, values["end_token_id"], values["layout"], tokens, values.get("end_token"))

    def __eq__(self, other) -> bool:
        return isinstance(other, ActionVocabulary) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _texts(tokenizer, ids) -> tuple[str, ...]:
    """Text of each id; "" for ids of embedding rows that the tokenizer has no token for."""
    return tuple(text or "" for text in tokenizer.convert_ids_to_tokens([int(i) for i in ids]))


def _end_id(tokenizer, end_token: str | None = None) -> int:
    if end_token is not None:
        found = tokenizer.get_vocab().get(end_token)
        if found is None:
            raise ActionTokenError(f"the tokenizer has no token {end_token!r} to close an action with")
        return int(found)
    if tokenizer.eos_token_id is None:
        raise ActionTokenError("the tokenizer has no end-of-sequence token, which closes an action; set eos_token")
    return int(tokenizer.eos_token_id)


def _refuse_special(tokenizer, ids) -> None:
    special = sorted(set(tokenizer.all_special_ids) & {int(i) for i in ids})
    if special:
        raise ActionTokenError(
            f"ids {special[:5]} are special tokens ({tokenizer.convert_ids_to_tokens(special[:5])}), not to spare"
        )


def _paligemma_size(tokenizer) -> int:
    """Size of PaliGemma's own vocabulary: up to `<seg127>`, with 1024 places in front of the 128 segmentation tokens."""
    known = tokenizer.get_vocab()
    last = known.get(PALIGEMMA_LAST)
    if last is None or known.get("<loc1023>") != last - PALIGEMMA_SKIPPED or known.get("<loc0000>") != last - 1151:
        raise ActionTokenError(
            f"this is not PaliGemma's tokenizer ({PALIGEMMA_LAST} with <loc0000>..<loc1023> in front of it are not where "
            "they belong): pass vocab_size, or use the layout 'append'"
        )
    return int(last) + 1


def numbered(pattern: str, n_codes: int) -> list[str]:
    """Texts of the tokens 0 to n_codes - 1 by a pattern such as '<robot_action_{}>'; another kind of pattern raises."""
    try:
        tokens = [pattern.format(code) for code in range(n_codes)]
    except (IndexError, KeyError, ValueError, AttributeError):
        tokens = []
    if n_codes < 1 or len(set(tokens)) != n_codes:
        raise ActionTokenError(
            f"a pattern has one {{}} for the number of a code, such as '<robot_action_{{}}>', got {pattern!r} for "
            f"{n_codes} codes"
        )
    return tokens

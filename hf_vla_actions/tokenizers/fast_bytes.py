"""What each token of a FAST tokenizer spells, in bytes: nothing here goes through text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from hf_vla_actions.errors import ActionTokenError

MAX_CODE_POINT, SURROGATES = 0x10FFFF, range(0xD800, 0xE000)
REPLACEMENT = 0xFFFD  # what broken UTF-8 decodes to


def byte_of_symbol() -> dict[str, int]:
    """The 256 symbols that byte-level BPE writes bytes with (GPT-2's map): printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of every token id.

    Args:
        of: bytes of each id from 0 to the highest; None for ids that spell nothing (gaps, added tokens).
        literal: ids that are read as their own text, but that a byte-level BPE never writes.

    Attributes:
        usable: (n_codes,) bool, spells something.
        begun: (n_codes,) int64, characters whose first byte it holds.
        continues: (n_codes,) bool, begins inside a character.
        single: the tokens of at most one character's length that can be written.
    """

    of: tuple[bytes | None, ...]
    literal: frozenset[int] = frozenset()
    usable: np.ndarray = field(init=False, repr=False)
    begun: np.ndarray = field(init=False, repr=False)
    continues: np.ndarray = field(init=False, repr=False)
    single: frozenset[bytes] = field(init=False, repr=False)

    def __post_init__(self):
        if not any(self.of):
            raise ActionTokenError("the BPE has no token that spells anything")
        first = np.array([raw[0] if raw else 0x80 for raw in self.of])
        begun = [sum(byte & 0xC0 != 0x80 for byte in raw or b"") for raw in self.of]
        tables = {
            "usable": np.array([bool(raw) for raw in self.of]),
            "begun": np.array(begun, dtype=np.int64),
            "continues": first & 0xC0 == 0x80,
            "single": frozenset(
                raw for i, raw in enumerate(self.of) if raw and len(raw) <= 4 and i not in self.literal
            ),
        }
        for name, value in tables.items():
            object.__setattr__(self, name, value)

    @property
    def highest(self) -> int:
        """The highest id."""
        return len(self.of) - 1


def read_bpe(text: str) -> tuple[Tokenizer, TokenBytes, bool]:
    """Parse the content of a `tokenizer.json` and work out what its tokens spell.

    Args:
        text: JSON of the `tokenizers` library: a BPE, byte-level or on whole characters.

    Returns:
        the tokenizer, the bytes of its tokens, and whether it is byte-level.

    Raises:
        ActionTokenError: it is something else, or changes what it is given (normalizer, prefix space, dropout, ...).
    """
    try:
        values = json.loads(text)
        model, vocabulary = values["model"], dict(values["model"]["vocab"])
        kind = model["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ActionTokenError(f"not a tokenizer.json with a BPE ({type(error).__name__}: {error})") from None
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # nothing narrower: the library raises bare Exception for what it cannot parse
        raise ActionTokenError(f"not a tokenizer.json that the tokenizers library can read: {error}") from None
    decoder, splitter = values.get("decoder") or {}, values.get("pre_tokenizer") or {}
    byte_level = decoder.get("type") == "ByteLevel"
    refused = {
        f"a model of type {kind!r}": kind != "BPE",
        "a normalizer": values.get("normalizer") is not None,
        "a prefix space": bool(splitter.get("add_prefix_space")),
        "a pre-tokenizer that its decoder does not undo": splitter.get("type")
        != ("ByteLevel" if byte_level else None),
        f"a decoder of type {decoder.get('type')!r}": decoder.get("type") not in (None, "Fuse", "ByteLevel"),
        "marks for pieces of words": bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
        "dropout": bool(model.get("dropout")),
        "an unknown token": model.get("unk_token") is not None,
    }
    found = [what for what, there in refused.items() if there]
    if found:
        raise ActionTokenError(
            f"a FAST tokenizer is a plain BPE on bytes or characters; this one has {' and '.join(found)}"
        )
    added = {token["id"] for token in values.get("added_tokens") or ()}
    symbols = byte_of_symbol() if byte_level else {}
    of: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index not in added:
            of[index] = _spell(token, symbols)
    # The reference's fit leaves such tokens: a byte that has no other would silently be dropped in encoding.
    literal = frozenset(index for token, index in vocabulary.items() if symbols and not symbols.keys() >= set(token))
    return backend, TokenBytes(tuple(of), literal), byte_level


def _spell(token: str, symbols: dict[str, int]) -> bytes:
    """Bytes of a token; one with any symbol outside the map is taken literally, as the library's decoder does."""
    if symbols and all(symbol in symbols for symbol in token):
        return bytes(symbols[symbol] for symbol in token)
    return token.encode("utf-8")


def can_spell(tokens: TokenBytes, byte_level: bool, code_point: int) -> bool:
    """Whether a character can be written whatever the merges are: by a token of its own, or byte by byte."""
    if not 0 <= code_point <= MAX_CODE_POINT or code_point in SURROGATES or code_point == REPLACEMENT:
        return False
    raw = chr(code_point).encode("utf-8")
    if byte_level:
        return all(bytes([byte]) in tokens.single for byte in raw)
    return raw in tokens.single

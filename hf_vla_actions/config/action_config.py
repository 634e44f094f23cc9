"""`ActionConfig`: the one object that turns token ids into robot commands, saved beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats, NormStats
from hf_vla_actions.config.checks import check_config
from hf_vla_actions.config.codes import files_beside, read_tokenizer, tokenizer_to_dict
from hf_vla_actions.config.source import check_source
from hf_vla_actions.constraints import Constraint, constraint_from_dict
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.heads import HeadConfig, head_config_from_dict
from hf_vla_actions.tokenizers import (
    ActionVocabulary,
    FASTActionTokenizer,
    UniformActionTokenizer,
    VQActionTokenizer,
)
from hf_vla_actions.tokenizers.fast_length import most_codes

if TYPE_CHECKING:
    from hf_vla_actions.config.presets import Preset

FILE_NAME = "action_config.json"
FORMAT_VERSION = 1
PASS_THROUGH_TOLERANCE = 0.01  # dimensions that are not normalized may exceed [-1, 1] by measurement noise
DEFAULT_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"


@dataclass(frozen=True, eq=False)
class ActionConfig:
    """Everything between the token ids of a model and the commands of a robot.

    Args:
        tokenizer: action tokenizer: chunk of normalized actions to codes and back. Bins have one code a number; the
            codes of `FASTActionTokenizer` and `VQActionTokenizer` stand for a whole chunk. None for a policy that only
            has a continuous head.
        vocabulary: codes to ids of the language model's tokenizer and back; None where there is no tokenizer.
        norm_stats: statistics of each dataset or robot, by `unnorm_key`.
        spaces: meaning of the action of each `unnorm_key`; keys that are left out get `ActionSpace.unnamed`.
        horizon: actions predicted at once.
        prompt: what the model sees; must contain `{instruction}` once.
        limits: constraints of the robot that hold always, whatever a call asks for (real units).
        cameras: names of the pictures that the policy was trained on, in their order; empty if nobody has said.
        chat: put the prompt into the chat template of the model's processor, if it has one.
        token_budget: with FAST, the most action tokens of a chunk that a policy may take, by `unnorm_key`: what the
            chunks of its training (up to 20,000 of them) took, and some more (`tokenizers.fast_length.code_budget`). A key that is left out may take as many as any chunk can (`most_codes`).
        head: continuous head that says the actions (`hf_vla_actions.heads`); None for a policy whose actions are tokens.
            With a head and a tokenizer the model learns both, and `predict_action` asks the head.

    All of it is checked when it is made, saved as `action_config.json` and read again by `from_pretrained`.
    """

    tokenizer: Any
    vocabulary: Any
    norm_stats: NormStats | Mapping[str, Any]
    spaces: Mapping[str, ActionSpace] = field(default_factory=dict)
    horizon: int = 1
    prompt: str = DEFAULT_PROMPT
    limits: Sequence[Constraint] = ()
    cameras: Sequence[str] = ()
    chat: bool = True
    token_budget: Mapping[str, int] = field(default_factory=dict)
    head: HeadConfig | None = None

    def __post_init__(self):
        stats = self.norm_stats if isinstance(self.norm_stats, NormStats) else NormStats(self.norm_stats)
        spaces = {key: self.spaces.get(key) or ActionSpace.unnamed(stats[key]["action"].dof) for key in stats}
        values: dict[str, Any] = {"norm_stats": stats, "spaces": {**self.spaces, **spaces}, "_tables": {}}
        values |= {"limits": tuple(self.limits), "cameras": tuple(self.cameras)}
        values |= {"token_budget": dict(self.token_budget)}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check_config(self)

    @staticmethod
    def preset(name: str) -> Preset:
        """What a published policy decided ("pi0", "smolvla", "octo", ...); `.text()` says it, `.config(norm_stats)` takes it.

        Raises:
            VLAActionsError: an unknown name; the message lists those there are.
        """
        from hf_vla_actions.config.presets import find_preset

        return find_preset(name)

    @property
    def is_per_number(self) -> bool:
        """True if each number of a chunk has a token of its own (bins), False if tokens stand for the chunk."""
        return isinstance(self.tokenizer, UniformActionTokenizer)

    def resolve(self, unnorm_key: str | None = None) -> str:
        """The `unnorm_key` to use; may be omitted when there is one. Otherwise raises and lists them."""
        return self.norm_stats.resolve(unnorm_key)  # type: ignore[union-attr]

    def space(self, unnorm_key: str | None = None) -> ActionSpace:
        """Meaning of the action of one dataset."""
        return self.spaces[self.resolve(unnorm_key)]

    def stats(self, unnorm_key: str | None = None) -> ActionStats:
        """Statistics of the action of one dataset."""
        return self.norm_stats[self.resolve(unnorm_key)]["action"]

    def n_tokens(self, unnorm_key: str | None = None) -> int:
        """Action tokens of one chunk, without the closing token."""
        if isinstance(self.tokenizer, VQActionTokenizer):
            return self.tokenizer.n_tokens
        self._need_numbers("chunks have a fixed number of tokens")
        return self.horizon * self.space(unnorm_key).dof

    def max_tokens(self, unnorm_key: str | None = None) -> int:
        """Most action tokens of one chunk, without the closing token.

        Where their number varies: `token_budget`, or else as many as any chunk can take.
        """
        if isinstance(self.tokenizer, FASTActionTokenizer):
            key = self.resolve(unnorm_key)
            return int(self.token_budget.get(key, most_codes(self.tokenizer, self.horizon, self.spaces[key].dof)))
        return self.n_tokens(unnorm_key)

    def _need_tokens(self, what: str) -> None:
        if self.tokenizer is None:
            kind = "continuous" if self.head is None else repr(self.head.kind)
            raise VLAActionsError(
                f"this policy says its actions with a {kind} head and has no action tokens to {what}: use predict_action, or "
                "normalize() and unnormalize()"
            )

    def _need_numbers(self, what: str) -> None:
        self._need_tokens("count")
        if not self.is_per_number:
            raise VLAActionsError(
                f"only with bins {what}; this policy has {type(self.tokenizer).__name__}, whose tokens stand for whole "
                "chunks: use predict_action"
            )

    def token_values(self, unnorm_key: str | None = None) -> np.ndarray:
        """(dof, n_codes) float64: the value in real units that each code stands for in each dimension.

        `decode` reads its results from this very table, and constraints are tested on it: what is allowed and what
        is carried out cannot differ.
        """
        self._need_numbers("each token has a value in real units")
        key = self.resolve(unnorm_key)
        tables: dict[str, np.ndarray] = self._tables  # type: ignore[attr-defined]
        if key not in tables:
            dof = self.spaces[key].dof
            codes = np.arange(self.tokenizer.n_codes)
            normalized = self.tokenizer.decode(np.repeat(codes[:, None], dof, axis=1), 1, dof)[:, 0]
            table = self.spaces[key].settle(self.stats(key).unnormalize(normalized)).T.copy()
            table.setflags(write=False)
            tables[key] = table
        return tables[key]

    def encode(self, actions, unnorm_key: str | None = None) -> Any:
        """Token ids of chunks in real units.

        Args:
            actions: (..., horizon, dof).
            unnorm_key: which statistics and action space.

        Returns:
            (..., n_tokens) int64; for FAST, whose chunks have different numbers of tokens, a list of int64 arrays.
        """
        self._need_tokens("encode")
        actions = np.asarray(actions, dtype=np.float64)
        dof = self.space(unnorm_key).dof
        if actions.shape[-2:] != (self.horizon, dof):
            raise VLAActionsError(f"a chunk has shape (..., {self.horizon}, {dof}), got {actions.shape}")
        normalized = self.stats(unnorm_key).normalize(actions)
        if (np.abs(normalized) > 1 + PASS_THROUGH_TOLERANCE).any():
            dim = int(np.argwhere(np.abs(normalized) > 1 + PASS_THROUGH_TOLERANCE)[0, -1])
            raise VLAActionsError(
                f"{self.space(unnorm_key).describe(dim)} is not normalized (its mask is False) and holds "
                f"{np.abs(normalized[..., dim]).max():.4g}; bins end at 1. Give it statistics and mask True"
            )
        codes = self.tokenizer.encode(normalized)
        if isinstance(self.tokenizer, FASTActionTokenizer):
            return [self.vocabulary.to_ids(row) for row in codes]
        return self.vocabulary.to_ids(codes)

    def decode_codes(self, codes, unnorm_key: str | None = None) -> np.ndarray:
        """Codes of whole chunks (a list of arrays, one a chunk) to (n, horizon, dof) normalized."""
        dof = self.space(unnorm_key).dof
        if isinstance(self.tokenizer, FASTActionTokenizer):
            return self.tokenizer.decode(codes, self.horizon, dof)
        return self.tokenizer.decode(np.stack(codes), self.horizon, dof)

    def decode(self, ids, unnorm_key: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids to a pair of chunks (..., horizon, dof): normalized, and in real units.

        Args:
            ids: (..., horizon * dof) with bins, (..., n_tokens) with VQ, a list of int64 arrays with FAST.
            unnorm_key: which statistics and action space.
        """
        self._need_tokens("decode")
        if not self.is_per_number:
            many = isinstance(self.tokenizer, FASTActionTokenizer)
            if not many and (not np.size(ids) or np.shape(ids)[-1:] != (self.n_tokens(unnorm_key),)):
                n = self.n_tokens(unnorm_key)
                raise VLAActionsError(f"chunks of this VQ tokenizer are ids of shape (..., {n}), got {np.shape(ids)}")
            rows = ids if many else np.asarray(ids).reshape(-1, np.shape(ids)[-1])
            normalized = self.decode_codes([self.vocabulary.to_codes(row) for row in rows], unnorm_key)
            if not many:
                normalized = normalized.reshape(*np.shape(ids)[:-1], *normalized.shape[1:])
            return normalized, self.space(unnorm_key).settle(self.stats(unnorm_key).unnormalize(normalized))
        dof = self.space(unnorm_key).dof
        codes = self.vocabulary.to_codes(ids)
        normalized = self.tokenizer.decode(codes, self.horizon, dof)
        grid = codes.reshape(normalized.shape)
        return normalized, self.token_values(unnorm_key)[np.arange(dof), grid]

    def normalize(self, actions, unnorm_key: str | None = None) -> np.ndarray:
        """What a continuous head learns: chunks in real units to normalized ones.

        Args:
            actions: (..., horizon, dof of the space).
            unnorm_key: which statistics and action space.

        Returns:
            (..., horizon, dof of the head) float64, zeros in the dimensions that the robot does not have.
        """
        actions = np.asarray(actions, dtype=np.float64)
        dof = self.space(unnorm_key).dof
        if actions.shape[-2:] != (self.horizon, dof):
            raise VLAActionsError(f"a chunk has shape (..., {self.horizon}, {dof}), got {actions.shape}")
        return _padded(self.stats(unnorm_key).normalize(actions), self._head_config().dof)

    def unnormalize(self, normalized, unnorm_key: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What a continuous head says, to a pair of chunks (..., horizon, dof): normalized, and in real units.

        Args:
            normalized: (..., horizon, dof of the head); dimensions that the robot does not have are trimmed.
            unnorm_key: which statistics and action space.
        """
        space, wanted = self.space(unnorm_key), (self.horizon, self._head_config().dof)
        normalized = np.asarray(normalized, dtype=np.float64)
        if normalized.shape[-2:] != wanted:
            raise VLAActionsError(
                f"the head's chunks have shape (..., {wanted[0]}, {wanted[1]}), got {normalized.shape}"
            )
        normalized = normalized[..., : space.dof]
        return normalized, space.settle(self.stats(unnorm_key).unnormalize(normalized))

    def normalize_proprio(self, proprio, unnorm_key: str | None = None) -> np.ndarray:
        """The robot's state (..., numbers) in real units, as the head reads it: (..., `head.proprio_dim`) float64."""
        stats, width = self.norm_stats[self.resolve(unnorm_key)]["proprio"], self._head_config().proprio_dim
        if width is None or stats is None:
            raise VLAActionsError("this policy was not built to read proprio; pass proprio=None")
        return _padded(stats.normalize(proprio), width)

    def _head_config(self) -> HeadConfig:
        if self.head is None:
            raise VLAActionsError(
                "this policy says its actions as tokens and has no continuous head: use encode() and decode()"
            )
        return self.head

    def prompt_for(self, instruction: str) -> str:
        """The prompt of one instruction. Text of action tokens inside it raises: it would become actions."""
        if not isinstance(instruction, str) or not instruction.strip():
            raise VLAActionsError(f"an instruction is a sentence, got {instruction!r}")
        if self.vocabulary is not None:
            self.vocabulary.check_instruction(instruction)
        return self.prompt.format(instruction=instruction.strip())

    def to_dict(self) -> dict[str, Any]:
        """The content of `action_config.json`; inverse of `from_dict`."""
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer_to_dict(self.tokenizer),
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_dict(),
            "norm_stats": self.norm_stats.to_dict(),  # type: ignore[union-attr]
            "spaces": {key: space.to_dict() for key, space in self.spaces.items()},
            "horizon": int(self.horizon),
            "prompt": self.prompt,
            "limits": [limit.to_dict() for limit in self.limits],
            "cameras": list(self.cameras),
            "chat": bool(self.chat),
            "token_budget": {key: int(budget) for key, budget in self.token_budget.items()},
            **({} if self.head is None else {"head": self.head.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: str | os.PathLike | None = None) -> ActionConfig:
        """Read what `to_dict` wrote.

        Args:
            values: content of `action_config.json`.
            folder: where the files of a FAST or VQ tokenizer lie; bins have none.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{FILE_NAME} has format_version {version!r}, this release reads {FORMAT_VERSION}")
        return cls(
            tokenizer=read_tokenizer(values["tokenizer"], folder, FILE_NAME),
            vocabulary=None if values["vocabulary"] is None else ActionVocabulary.from_dict(values["vocabulary"]),
            norm_stats=NormStats.from_dict(values["norm_stats"]),
            spaces={key: ActionSpace.from_dict(space) for key, space in values["spaces"].items()},
            horizon=values["horizon"],
            prompt=values["prompt"],
            limits=[constraint_from_dict(limit) for limit in values["limits"]],
            cameras=values["cameras"],
            chat=values.get("chat", False),  # policies saved before there was a choice were trained without
            token_budget=values.get("token_budget", {}),
            head=None if values.get("head") is None else head_config_from_dict(values["head"]),
        )

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Write `action_config.json` into a folder and return its path."""
        path = Path(save_directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None and not isinstance(self.tokenizer, UniformActionTokenizer):
            self.tokenizer.save_pretrained(path.parent)
        temporary = path.with_name(FILE_NAME + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        os.replace(temporary, path)
        return path

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Publish it alone; options (`private`, `revision`, ...) and errors are those of `hub.push.push_action_config`."""
        return import_module("hf_vla_actions.hub.push").push_action_config(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **hub_arguments) -> ActionConfig:
        """Read `action_config.json` of a checkpoint: a folder, or a repository of the Hub.

        Args:
            path: folder or repository id.
            hub_arguments: `revision`, `token`, `cache_dir`, ... as in Transformers.
        """
        from transformers.utils import cached_file

        check_source(str(path))
        if Path(path).is_dir():
            file = Path(path) / FILE_NAME
        else:
            try:
                file = Path(str(cached_file(str(path), FILE_NAME, **hub_arguments)))
            except OSError as error:
                raise CheckpointError(f"no {FILE_NAME} to be had from {str(path)!r}: {error}") from None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if not Path(path).is_dir():
                for name in files_beside(values["tokenizer"]):
                    cached_file(str(path), name, **hub_arguments)  # to the same folder of the cache
            return cls.from_dict(values, file.parent)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} holds no {FILE_NAME}: it is no checkpoint of a policy. Train one, or make an ActionConfig and "
                "call to_vla(model, processor, config)"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from None

    def __eq__(self, other) -> bool:
        return isinstance(other, ActionConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    """(..., n) to (..., width), zeros behind."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])

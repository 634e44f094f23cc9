"""`predict_action` of OpenVLA: a drop-in for the original, on the same machinery as every other policy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import cached_file

from hf_vla_actions.actions import NormStats
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.models.families import OPENVLA, TEXT_ONLY, ModelFamily
from hf_vla_actions.models.mixin import ActionPredictionMixin
from hf_vla_actions.models.openvla.components import find_components
from hf_vla_actions.models.openvla.configuration import OpenVLAConfig
from hf_vla_actions.models.openvla.oft_config import oft_statistics
from hf_vla_actions.models.output import ActionOutput
from hf_vla_actions.models.prompts import PromptBuilder
from hf_vla_actions.tokenizers import ActionVocabulary, UniformActionTokenizer

SPACE_ID = 29871  # Llama's lone space piece: what "Out: " ends with when an action follows, as in training
STATISTICS_FILE = "dataset_statistics.json"
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
V01_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What action should the robot take to {instruction}? ASSISTANT:"
)


def action_config_of(config: OpenVLAConfig, tokenizer=None) -> ActionConfig:
    """Everything between the action tokens of an OpenVLA checkpoint and the commands of its robots.

    Code k has the id `first_unused_id - 1 - k`; bins, statistics and masks are those of the config. What the numbers
    mean (names, units, frames) stands nowhere in a checkpoint: dimensions are known by index only.

    Args:
        config: the checkpoint's configuration.
        tokenizer: its tokenizer; names the action tokens, so that another tokenizer is noticed later.

    Raises:
        CheckpointError: there are no statistics.
    """
    if not config.norm_stats:
        raise CheckpointError(
            f"the checkpoint {config.name_or_path!r} has no statistics (neither norm_stats in config.json nor "
            f"{STATISTICS_FILE}): its tokens cannot be turned into commands. Copy {STATISTICS_FILE} of the training "
            "into its folder"
        )
    ids = config.first_unused_id - 1 - np.arange(config.n_action_bins)
    end = config.text_config.eos_token_id  # type: ignore[union-attr]
    end = end[0] if isinstance(end, Sequence) else end
    if tokenizer is None:
        texts = [f"<{i}>" for i in ids]
    else:
        if int(ids[0]) >= len(tokenizer):
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens, actions are the ids {ids[-1]}..{ids[0]}: it belongs to "
                "another checkpoint"
            )
        texts = tokenizer.convert_ids_to_tokens(ids.tolist())
    options = config.oft_options
    return ActionConfig(
        tokenizer=UniformActionTokenizer(config.n_action_bins, "openvla"),
        vocabulary=ActionVocabulary(ids, end, "tail", tuple(texts)),
        norm_stats=(
            NormStats.from_dict(config.norm_stats, source="norm_stats")
            if options is None
            else oft_statistics(config.norm_stats, options)
        ),
        horizon=1 if options is None else options.horizon,
        prompt=V01_PROMPT if "v01" in str(config.name_or_path) else PROMPT,
        chat=False,
    )


class OpenVLAPrompts(PromptBuilder):
    """OpenVLA's prompts: the instruction in lower case, no mark for the picture.

    Args:
        processor: PrismaticProcessor.
        config: holds the prompt's wording.
        family: as for `PromptBuilder`.
    """

    def __init__(self, processor, config: ActionConfig, family: ModelFamily = OPENVLA):
        # As for a text-only model: a processor with pictures would be asked for the token that stands for one.
        super().__init__(processor.tokenizer, config, TEXT_ONLY)
        self.processor, self.family = processor, family

    def build(self, images, instruction, padding_side: str = "left") -> dict[str, Any]:
        """Tensors of one sample or of a batch; see `PromptBuilder.build`."""
        lower = instruction.lower() if isinstance(instruction, str) else [sentence.lower() for sentence in instruction]
        return super().build(images, lower, padding_side)


class NoProcessor:
    """Stands where the prompts of a policy are, as long as the model has no processor."""

    family = OPENVLA

    def build(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Raise, and say what to do."""
        raise VLAActionsError(
            "the model has no processor yet: load it with AutoModelForActionPrediction.from_pretrained, call "
            "model.attach(AutoProcessor.from_pretrained(path)), or call the processor yourself"
        )


class OpenVLAPolicyMixin(ActionPredictionMixin):
    """What makes an OpenVLA model a policy as soon as it is loaded, with the methods of the original.

    Attributes:
        action_config: ActionConfig; made from the model's configuration unless one was set.
        processor: PrismaticProcessor; None until `attach` (AutoModelForActionPrediction does it).
        prompts: the builder of its prompts; can build none until then.
    """

    config: OpenVLAConfig
    processor: Any = None
    prompts: Any = NoProcessor()
    _action_config: ActionConfig | None = None
    _loose_parts: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in Transformers. Statistics of a fine-tuning (`dataset_statistics.json`) replace those of the config.

        A folder or repository with an adapter loads with its base model.
        """
        names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        # The Auto classes pass the base model's path on, and say here where the adapter is.
        adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        stats = read_statistics(adapter or pretrained_model_name_or_path, **hub)
        if stats is None and adapter is not None:
            stats = read_statistics(pretrained_model_name_or_path)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if stats is not None:
            model.norm_stats = stats
        if model.config.oft is None and Path(pretrained_model_name_or_path).is_dir():
            model._loose_parts = tuple(find_components(pretrained_model_name_or_path))
        return loaded

    def load_adapter(self, *args, **kwargs):
        """As in Transformers, which would only warn of tensors that are missing or find no place: here both raise."""
        info = super().load_adapter(*args, **kwargs)  # type: ignore[misc]
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            keys = sorted(map(str, getattr(info, what)))
            if keys:
                raise CheckpointError(f"the adapter does not fit the model: {what}: {len(keys)}, such as {keys[:2]}")
        return info

    @property
    def action_config(self) -> ActionConfig:  # type: ignore[override]
        """Everything that turns token ids into robot commands."""
        if self._action_config is None:
            tokenizer = None if self.processor is None else self.processor.tokenizer
            self._action_config = action_config_of(self.config, tokenizer)
        return self._action_config

    @action_config.setter
    def action_config(self, value: ActionConfig | None) -> None:
        self._action_config = value

    @property
    def norm_stats(self) -> dict[str, Any]:
        """Statistics by `unnorm_key`, as in the config; may be set, as the original's scripts do."""
        return self.config.norm_stats or {}

    @norm_stats.setter
    def norm_stats(self, value: Mapping[str, Any]) -> None:
        self.config.norm_stats = dict(value)
        self._action_config = None

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Statistics of the action of one dataset, as they stand in the config."""
        return self.norm_stats[self.action_config.resolve(unnorm_key)]["action"]

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Numbers in one action of one dataset."""
        return self.action_config.space(unnorm_key).dof

    def attach(self, processor, action_config: ActionConfig | None = None):
        """Give the model its processor, so that `prepare` and `policy` work; returns the model.

        Args:
            processor: PrismaticProcessor of the checkpoint.
            action_config: instead of the one that follows from the model's configuration.
        """
        config = action_config or action_config_of(self.config, processor.tokenizer)
        config.vocabulary.check(processor.tokenizer)
        self.processor, self.action_config = processor, config
        self.prompts = OpenVLAPrompts(processor, config, OPENVLA)
        return self

    def predict_action(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        unnorm_key: str | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = False,
        chunks: bool = False,
        **kwargs,
    ) -> np.ndarray | ActionOutput:
        """Generate one action per row, in real units.

        Args:
            input_ids: (batch, length) prompt, padded on the left. Id 29871 is appended where a row does not end with
                it, as training had it.
            unnorm_key: which statistics; may be left out when there is one dataset.
            attention_mask: (batch, length); lengthened together with the ids.
            return_dict: return an ActionOutput, whose arrays are (batch, 1, dof).
            chunks: return (batch, 1, dof), as other policies do.
            kwargs: `pixel_values`, `constraints`, `context`, `mode` and options of `generate`; see
                `ActionPredictionMixin.predict_action`.

        Returns:
            float64: (dof,) for one sample, (batch, dof) for several.

        Raises:
            UnnormKeyError: the key is missing, unknown or ambiguous; lists the keys.
            InfeasibleConstraintError: no action within reach satisfies the constraints.
        """
        if input_ids is not None:
            input_ids, attention_mask = close_prompt(input_ids, attention_mask, self.config.pad_token_id or 0)
        out = super().predict_action(
            input_ids, unnorm_key=unnorm_key, attention_mask=attention_mask, return_dict=return_dict, **kwargs
        )
        if isinstance(out, ActionOutput) or chunks:
            return out
        actions = out[:, 0]
        return actions[0] if len(actions) == 1 else actions

    def policy(self, *args, **kwargs):
        """A policy for one robot; see `ActionPredictionMixin.policy`."""
        return super().policy(*args, chunks=True, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):  # type: ignore[override]
        """Save the weights under the keys of the original; a policy's processor and action config stand beside them."""
        if kwargs.pop("remote_code_shim", False):
            raise VLAActionsError(
                "remote_code_shim is for models that Transformers knows; it does not know 'openvla': load the checkpoint "
                "after `import hf_vla_actions`"
            )
        if self.processor is None:
            return super(ActionPredictionMixin, self).save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        return super().save_pretrained(save_directory, **kwargs)


def close_prompt(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let every row end with id 29871; returns ids and mask.

    Args:
        input_ids: (batch, length), padded on the left.
        attention_mask: (batch, length); None if nothing is padded.
        pad_token_id: what to put in front of rows that end with it already while others get one more.
    """
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise VLAActionsError("prompts must be padded on the left: the action follows the last column")
    open_rows = input_ids[:, -1] != SPACE_ID
    if not bool(open_rows.any()):
        return input_ids, attention_mask
    closed = torch.cat([input_ids, torch.full_like(input_ids[:, :1], SPACE_ID)], dim=1)
    if bool(open_rows.all()):
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
        return closed, attention_mask
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    shifted = torch.cat([torch.full_like(input_ids[:, :1], pad_token_id), input_ids], dim=1)
    end, front = torch.ones_like(mask[:, :1]), torch.zeros_like(mask[:, :1])
    rows = open_rows[:, None]
    return (
        torch.where(rows, closed, shifted),
        torch.where(rows, torch.cat([mask, end], dim=1), torch.cat([front, mask], dim=1)),
    )


def read_statistics(path: str | os.PathLike, **hub_arguments: Any) -> dict[str, Any] | None:
    """Content of `dataset_statistics.json` of a fine-tuned checkpoint or adapter; None if it has none."""
    file = local_file(path, STATISTICS_FILE, **hub_arguments)
    if file is None:
        return None
    # Checked here, kept as it stands: what the file says beyond the actions is saved again.
    NormStats.from_file(file)
    return json.loads(file.read_text(encoding="utf-8"))


def local_file(path: str | os.PathLike, name: str, **hub_arguments: Any) -> Path | None:
    """A file of a folder or of a repository of the Hub; None if it has none of that name."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    found = cached_file(
        str(path),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        **hub_arguments,
    )
    return None if found is None else Path(found)

"""Policies whose actions come from a continuous head, not from tokens."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.utils import ModelOutput

from hf_vla_actions.constraints import BoundConstraints, Context, bind
from hf_vla_actions.decoding.moved import moved_report
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.heads import ActionHead, Features, Guidance
from hf_vla_actions.heads.guidance import Chain, Repaint, SoftPrefix
from hf_vla_actions.heads.transfusion import transfusion_loss
from hf_vla_actions.models.checks import SENTENCE, SENTENCES
from hf_vla_actions.models.features import check_inputs, features_of, unsaid
from hf_vla_actions.models.generation import check_style
from hf_vla_actions.models.head_checks import head_reads_instruction, head_sees_image
from hf_vla_actions.models.head_files import head_taken_off, save_head, split_state
from hf_vla_actions.models.memory import Memory
from hf_vla_actions.models.mixin import ActionPredictionMixin
from hf_vla_actions.models.output import ActionOutput, commanded
from hf_vla_actions.runtime import Overlap

logger = logging.getLogger(__name__)


@dataclass
class ActionLoss(ModelOutput):
    """What a policy with a head returns when it is given chunks to learn.

    Args:
        loss: scalar; action loss, and with labels the language loss beside it.
        action_loss: scalar, mean error over real numbers.
        language_loss: scalar, mean cross entropy over the labels; None without them.
        logits: (batch, length, vocabulary) of the language model; None without labels.
    """

    loss: torch.Tensor | None = None
    action_loss: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class HeadPolicyMixin(ActionPredictionMixin):
    """`prepare`, `predict_action` and `policy` for a model with a continuous head; made by `to_vla(..., head=...)`.

    Attributes:
        action_head: the head, a submodule: it is trained, moved and saved with the model.
    """

    action_head: ActionHead

    def prepare(self, images, instruction, proprio=None) -> dict[str, Any]:
        """Build the prompt and call the processor.

        Args:
            images: see `ActionPredictionMixin.prepare`.
            instruction: a sentence, or a list of them for a batch.
            proprio: (numbers,) or (batch, numbers) state of the robot in real units, where the head reads it.

        Returns:
            Arguments for `predict_action`, on the model's device.
        """
        wanted = self.action_config.head.proprio_dim  # type: ignore[union-attr]
        if wanted is None or proprio is None:
            if wanted is not None:
                raise VLAActionsError("this policy reads the robot's state: pass proprio=(numbers,) in real units")
            return super().prepare(images, instruction, proprio)
        state = np.asarray(proprio, dtype=np.float64)
        rows = 1 if isinstance(instruction, str) else len(instruction)
        if state.ndim == 1:
            state = np.tile(state, (rows, 1))
        if state.ndim != 2 or len(state) != rows or not np.isfinite(state).all():
            raise VLAActionsError(
                f"proprio has finite numbers of shape (numbers,) or ({rows}, numbers), got shape {np.shape(proprio)}"
            )
        return {**self.prepare_prompts(images, instruction), "proprio": torch.from_numpy(state)}

    def prepare_prompts(self, images, instruction) -> dict[str, Any]:
        """As `prepare`, without the robot's state."""
        return super().prepare(images, instruction)

    def features(
        self,
        input_ids: torch.Tensor,
        *,
        normalized_proprio: torch.Tensor | None = None,
        past: torch.Tensor | None = None,
        past_mask: torch.Tensor | None = None,
        **inputs,
    ) -> Features:
        """What the head is given for some prompts; with gradients, if they are on.

        Args:
            input_ids: (batch, length). For a head with a history and no `past`, (batch * window, length): the window of
                each sample, the oldest first.
            normalized_proprio: (batch, `proprio_dim`).
            past: (batch, window - 1, n_slots, width) what earlier steps gave, as in `Features`.
            past_mask: (batch, window - 1) bool, True = real.
            inputs: the rest of the prompt's tensors.
        """
        return self._features({"input_ids": input_ids, **inputs}, normalized_proprio, past, past_mask)[0]

    def heard(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(batch, numbers): what the self tests compare, of the tensors of some prompts."""
        found, _ = features_of(self, self.action_head, inputs)
        return found.hidden[:, -1] if found.slots is None else found.slots.flatten(1)

    def _features(self, inputs, proprio, past, past_mask) -> tuple[Features, Any]:
        found, said = features_of(self, self.action_head, inputs)
        window = self.action_head.window
        if window > 1 and past is None:
            if len(found) % window or past_mask is None:
                raise VLAActionsError(
                    f"a head with a history of {window} steps needs {window} prompts a sample and past_mask, got "
                    f"{len(found)} prompts"
                )
            slots = found.slots.unflatten(0, (-1, window))  # type: ignore[union-attr]
            last = slice(window - 1, None, window)
            mask = None if found.mask is None else found.mask[last]
            found = replace(found, hidden=found.hidden[last], mask=mask, slots=slots[:, -1])
            past = slots[:, :-1]
        return replace(found, proprio=proprio, past=past, past_mask=past_mask), said

    def learn(
        self,
        normalized: torch.Tensor,
        inputs: dict[str, Any],
        *,
        action_pad_mask: torch.Tensor | None = None,
        normalized_proprio: torch.Tensor | None = None,
        past_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        n_items: Any = None,
        n_labels: Any = None,
        action_weight: float = 1.0,
        insulate: bool = False,
    ) -> ActionLoss:
        """The loss of normalized chunks; what `forward(**inputs, normalized=...)` returns.

        Args:
            normalized: (batch, horizon, dof of the head), see `ActionConfig.normalize`.
            inputs: tensors of the prompts, padded on the left.
            action_pad_mask: (batch, horizon) or (batch, horizon, dof) bool, True = real.
            normalized_proprio: (batch, `proprio_dim`), see `ActionConfig.normalize_proprio`.
            past_mask: (batch, window - 1) bool, True = real, for a head with a history.
            labels: (batch, length) ids that the language model is to say, -100 where it is not asked: the Transfusion
                loss, language and action in one forward (arXiv 2408.11039). The head does not see these places.
            n_items: real numbers of the whole step over all processes and batches, by which the sum of errors is divided.
            n_labels: the same for labels.
            action_weight: of the action loss beside the language loss.
            insulate: no gradient goes from the head into the vision-language model (knowledge insulation, arXiv
                2505.23705).
        """
        check_inputs(self, inputs)
        if labels is not None and self.action_head.n_slots:
            raise VLAActionsError(
                f"a {self.action_head.config.kind!r} head has learned embeddings behind the prompt, which would read the words "
                "that the model is to say: with labels use a head without them (flow, diffusion)"
            )
        given = inputs if labels is None else {**inputs, "labels": labels}
        features, said = self._features(given, normalized_proprio, None, past_mask)
        if labels is not None:
            features = unsaid(features, labels)
        features = features.detach() if insulate else features
        action = self.action_head.loss(features, normalized, action_pad_mask, n_items=n_items)
        if labels is None:
            return ActionLoss(loss=action_weight * action, action_loss=action)
        both = transfusion_loss(said.logits, labels, action, weight=action_weight, n_tokens=n_labels)
        return ActionLoss(both.loss, action, both.language, said.logits)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        unnorm_key: str | None = None,
        constraints=None,
        context: Context | None = None,
        mode: str = "project",
        style: str = "direction",
        on_infeasible: str = "raise",
        return_dict: bool = False,
        proprio: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance: Guidance | str | Sequence[Guidance | str] | None = None,
        memory: Memory | None = None,
        **inputs,
    ) -> np.ndarray | ActionOutput:
        """Predict one chunk per row and return it in real units, within all constraints.

        Args:
            input_ids: (batch, length) from `prepare`, passed on as `**inputs`.
            unnorm_key: see `ActionPredictionMixin.predict_action`, as `constraints`, `context`, `style`, `on_infeasible`
                and `return_dict`.
            mode: "project": what the head says is moved into the allowed set, and certified. The other modes need
                probabilities of tokens.
            proprio: (batch, numbers) state of the robot in real units, where the head reads it.
            noise: (batch, horizon, dof of the head) what a generative head starts from.
            generator: draws the noise.
            num_steps: steps of integration or denoising; None for those of the config.
            guidance: "constraints" keeps them at every step of a generative head already (the estimate of the finished
                chunk is projected), so that less is moved afterwards; or a `heads.Guidance` of your own, or several in their order.
            memory: what a head with a history saw in the steps before; `policy()` keeps one. None: an episode begins.
            inputs: the rest of `prepare`'s result.

        Returns:
            (batch, horizon, dof) float64 in the units of the action space.

        Raises:
            UnnormKeyError: the key is missing, unknown or ambiguous.
            InfeasibleConstraintError: no chunk satisfies the constraints (before the first forward).
            ConstraintError: a constraint does not fit, or needs a context that was not given.
        """
        config = self.action_config
        key = config.resolve(unnorm_key)
        if mode != "project":
            raise VLAActionsError(
                f"mode {mode!r} works on the probabilities of tokens, and a {self.action_head.config.kind!r} head predicts "
                "numbers: use mode='project', which keeps the same constraints"
            )
        if input_ids is None:
            raise VLAActionsError("predict_action needs the tensors of prepare(): predict_action(**inputs)")
        check_style(style)
        check_inputs(self, inputs)
        bound = bind(
            constraints,
            config.space(key),
            None,
            config.horizon,
            limits=tuple(config.limits),
            grid=False,
            context=context,
            on_infeasible=on_infeasible,
        )
        bound.check_batch(len(input_ids))
        features = self._seen(input_ids, inputs, proprio, key, memory)
        chunks = self.action_head.sample(
            features,
            noise=noise,
            generator=generator,
            num_steps=num_steps,
            guidance=self._guidance(guidance, bound, key, style),
        )
        normalized, decoded = config.unnormalize(chunks.double().cpu().numpy(), key)
        actions = commanded(bound, decoded, "project", style)
        if memory is not None:
            memory.add(features.slots)
        if not return_dict:
            return actions
        return ActionOutput(
            actions=actions,
            normalized=normalized,
            token_ids=np.empty((len(actions), 0), dtype=np.int64),
            log_prob=np.full(len(actions), np.nan),
            unnorm_key=key,
            moved=actions - decoded,
            fallbacks=bound.fallbacks,
            report=partial(moved_report, decoded, actions, config.space(key), constraints, config.limits, context),
        )

    def _seen(self, input_ids, inputs, proprio, key: str, memory: Memory | None) -> Features:
        """Features of one look, with what the memory holds."""
        head = self.action_head
        state = None
        if proprio is not None:
            real = torch.as_tensor(proprio).double().cpu().numpy()
            values = self.action_config.normalize_proprio(real, key)
            state = torch.from_numpy(values).to(self.device, head.dtype)  # type: ignore[attr-defined]
        past, past_mask = None, None
        if head.window > 1:
            past, past_mask = (memory or Memory(head.window)).past(len(input_ids), head.n_slots, head.width)
            past, past_mask = past.to(self.device), past_mask.to(self.device)  # type: ignore[attr-defined]
        return self.features(input_ids, normalized_proprio=state, past=past, past_mask=past_mask, **inputs)

    def _guidance(self, guidance, bound: BoundConstraints, key: str, style: str) -> Guidance | None:
        if guidance is None or isinstance(guidance, Guidance):
            return guidance
        if isinstance(guidance, (list, tuple)) and guidance:
            return Chain(*(self._guidance(one, bound, key, style) for one in guidance))  # type: ignore[arg-type]
        if guidance != "constraints":
            raise VLAActionsError(
                f"guidance is 'constraints', a heads.Guidance, a list of these or None, got {guidance!r}"
            )
        config, dof = self.action_config, self.action_config.space(key).dof

        def into_the_allowed(clean: torch.Tensor) -> torch.Tensor:
            _, real = config.unnormalize(clean.double().cpu().numpy(), key)
            moved = bound.project(real, style)
            # Where nothing is moved the estimate stays: a gripper half open, or a value beyond the bounds of the statistics.
            there = torch.from_numpy(config.normalize(moved, key)[..., :dof]).to(clean)
            kept = torch.from_numpy(moved == real).to(clean.device)
            return torch.cat([torch.where(kept, clean[..., :dof], there), clean[..., dof:]], dim=-1)

        return Repaint(into_the_allowed)

    def _continuing(self, prefix: Overlap | None, key: str, options: dict[str, Any]) -> dict[str, Any]:
        """A generative head draws the steps that are not frozen to those of the last chunk as well."""
        if prefix is None or not self.action_head.takes_guidance:
            return options
        config, n = self.action_config, len(prefix.actions)
        whole = np.concatenate([prefix.actions, np.tile(prefix.actions[-1:], (config.horizon - n, 1))])
        weights = torch.zeros(config.horizon)
        weights[:n] = torch.from_numpy(prefix.weights)
        target = torch.from_numpy(config.normalize(whole, key)).float()
        asked = options.get("guidance")
        return {**options, "guidance": [SoftPrefix(target, weights), *([] if asked is None else [asked])]}

    def _memory(self) -> Memory | None:
        window = self.action_head.window
        return Memory(window) if window > 1 else None

    def _observed(self) -> tuple[str, ...]:
        reads_state = self.action_config.head.proprio_dim is not None  # type: ignore[union-attr]
        return (*super()._observed(), "proprio") if reads_state else super()._observed()

    def check_sees_image(self, instruction: str = SENTENCE) -> float:
        """Raise SelfTestError unless black, white and noise pictures change what the head is given.

        Args:
            instruction: the sentence beside the pictures.

        Returns:
            The smallest change of any pair of pictures.
        """
        return head_sees_image(self, instruction)

    def check_reads_instruction(self, instructions: Sequence[str] = SENTENCES) -> float:
        """Raise SelfTestError unless different instructions change what the head is given.

        Args:
            instructions: two or more; by default the same words in another order.

        Returns:
            The smallest change of any pair of sentences.
        """
        return head_reads_instruction(self, instructions)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        is_main_process: bool = True,
        remote_code_shim: bool = False,
        **kwargs,
    ):
        """As `ActionPredictionMixin.save_pretrained`, with the head in `action_head.safetensors` beside the weights.

        Args:
            save_directory: where to.
            is_main_process: as in Transformers.
            remote_code_shim: as in `ActionPredictionMixin.save_pretrained`.
            kwargs: as in Transformers.
        """
        head = self.action_head.state_dict()
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"], head = split_state(kwargs["state_dict"])
        if is_main_process:
            save_head(head, save_directory)
        with head_taken_off(self):
            super().save_pretrained(
                save_directory, is_main_process=is_main_process, remote_code_shim=remote_code_shim, **kwargs
            )


def forward_of(native: type) -> Any:
    """The `forward` of a policy with a head on a native model.

    It keeps the native one's signature, which `generate` reads.
    """
    native_forward: Any = native.forward  # type: ignore[attr-defined]

    @functools.wraps(native_forward)
    def forward(self, *args, normalized=None, **kwargs):
        if normalized is None:
            return native_forward(self, *args, **kwargs)
        if args:
            raise VLAActionsError("pass the tensors of prompts by their names")
        names = ("action_pad_mask", "normalized_proprio", "past_mask", "labels", "n_items", "n_labels")
        options = {name: kwargs.pop(name) for name in (*names, "action_weight", "insulate") if name in kwargs}
        return self.learn(normalized, kwargs, **options)

    return forward

"""The methods that make a Transformers model a robot policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.constraints import Context, with_limits
from hf_vla_actions.constraints.retime import RetimedChunk
from hf_vla_actions.constraints.slower import retime_within
from hf_vla_actions.decoding import TACOLogitsProcessor
from hf_vla_actions.decoding.along import report_on
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.checks import SENTENCE, SENTENCES, check_reads_instruction, check_sees_image
from hf_vla_actions.models.generation import (
    MODES,
    RESERVED,
    beam_rows,
    check_choices,
    check_generation,
    check_style,
    guesses,
    log_prob,
    neutral,
)
from hf_vla_actions.models.memory import Memory
from hf_vla_actions.models.output import ActionOutput, commanded
from hf_vla_actions.models.prompts import PromptBuilder
from hf_vla_actions.models.push_up import push_up
from hf_vla_actions.models.shim import remove_shim, shim_in_config, write_shim
from hf_vla_actions.models.whole_chunks import predict_whole_chunks
from hf_vla_actions.runtime import Overlap, RecedingHorizon, remembered


def native_class_of(model) -> type:
    """The class that a model had before `to_vla`; its own if it is no policy."""
    return next(one for one in type(model).__mro__ if not issubclass(one, ActionPredictionMixin))


class ActionPredictionMixin:
    """`prepare`, `predict_action` and `policy` for a model with `generate()`; made by `to_vla`.

    Attributes:
        action_config: ActionConfig of this policy.
        processor: the model's processor (for a text-only model its tokenizer).
        prompts: PromptBuilder, the same one that training uses.
    """

    action_config: ActionConfig
    processor: Any
    prompts: PromptBuilder

    def prepare(self, images, instruction, proprio=None) -> dict[str, Any]:
        """Build the prompt and call the processor.

        Args:
            images: a picture, or a list of pictures (one a camera); for a list of instructions one such entry each.
            instruction: the user's sentence, or a list of them for a batch (padded on the left).
            proprio: not used by the models there are; anything but None raises.

        Returns:
            Arguments for `predict_action` and `generate`, on the model's device.
        """
        if proprio is not None:
            raise VLAActionsError("this policy was not built to read proprio; pass proprio=None")
        inputs = self.prompts.build(images, instruction, padding_side="left")
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)  # type: ignore[attr-defined]
            for name, value in inputs.items()
        }

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
        **kwargs,
    ) -> np.ndarray | ActionOutput:
        """Generate the tokens of one chunk per row and return it in real units.

        Args:
            input_ids: (batch, length) from `prepare`, passed on as `**inputs`.
            unnorm_key: which statistics and action space; may be omitted when there is one.
            constraints: list of constraints in real units for every sample, or one list per sample; the robot's
                permanent limits (`action_config.limits`) are added to each.
            context: what the robot knows now (`Context(pose=..., last_action=...)`), for constraints that need it.
            mode: "project" (decode freely, then move the result into the allowed set), "transport" (the probability
                of each forbidden bin moves to the nearest allowed one), "mask" (forbidden bins get none) or "mixture"
                (as "mask" where the policy gives allowed bins at least half of its mass, free elsewhere, then
                projected). All of them keep every hard constraint; they differ in what is left of the policy's
                intention.
            style: of the projection: "direction" shortens a step that is too long as a whole, and moves what is left
                number by number; "axis" moves each number by itself from the start.
            on_infeasible: for a sample whose constraints cannot all hold: "raise"; "hold" (tell the robot to stay as
                it is) or "nearest" (leave out as few constraints as needed, permanent limits last). Both are flagged
                in `ActionOutput.fallback` and logged.
            return_dict: return an ActionOutput instead of the actions alone.
            kwargs: the rest of `prepare`'s result, and options of `generate` such as `do_sample`, `temperature`,
                `num_beams`, `num_return_sequences`; VQ: `candidates` (16), chunks to look at where the first is not allowed.

        Returns:
            (batch, horizon, dof) float64 in the units of the action space; with `num_return_sequences` n, batch * n
            rows.

        Raises:
            UnnormKeyError: the key is missing, unknown or ambiguous.
            InfeasibleConstraintError: no chunk within reach satisfies the constraints (before the first forward).
            ConstraintError: a constraint does not fit, or needs a context that was not given.
        """
        key = self.action_config.resolve(unnorm_key)
        if mode not in MODES:
            raise VLAActionsError(f"mode must be one of {list(MODES)}, got {mode!r}")
        reserved = [name for name in RESERVED if name in kwargs]
        if reserved:
            raise VLAActionsError(f"predict_action decides {reserved} itself; call generate() for full control")
        if input_ids is None:
            raise VLAActionsError("predict_action needs the tensors of prepare(): predict_action(**inputs)")
        if not self.action_config.is_per_number:
            asked = {"constraints": constraints, "context": context, "mode": mode, "style": check_style(style)}
            out = predict_whole_chunks(self, input_ids, key, {**asked, "on_infeasible": on_infeasible}, kwargs)
            return out if return_dict else out.actions
        taco = TACOLogitsProcessor(
            constraints,
            self.action_config,
            unnorm_key=key,
            prompt_length=input_ids.shape[1],
            context=context,
            mode=mode,
            on_infeasible=on_infeasible,
            temperature=(kwargs.get("temperature") or 1.0) if kwargs.get("do_sample") else 1.0,
            speculative=guesses(kwargs),
        )
        taco.bound.check_batch(len(input_ids))
        check_style(style)
        n_tokens = self.action_config.n_tokens(key)
        out = self.generate(  # type: ignore[attr-defined]
            input_ids=input_ids,
            logits_processor=LogitsProcessorList([taco]),
            **{**neutral(kwargs), "pad_token_id": self.action_config.vocabulary.end_token_id, **kwargs},
            max_new_tokens=n_tokens,
            return_dict_in_generate=True,
            output_logits=return_dict,
        )
        token_ids = out.sequences[:, input_ids.shape[1] :].cpu().numpy()
        if token_ids.shape[1] != n_tokens:
            raise VLAActionsError(
                f"generation stopped after {token_ids.shape[1]} of the {n_tokens} tokens of a chunk: leave max_time, "
                "stopping_criteria and stop_strings out"
            )
        normalized, decoded = self.action_config.decode(token_ids, key)
        actions = commanded(taco.bound, decoded, mode, style)
        if not return_dict:
            return actions
        return ActionOutput(
            actions=actions,
            normalized=normalized,
            token_ids=token_ids,
            log_prob=log_prob(out, token_ids),
            unnorm_key=key,
            moved=actions - decoded,
            fallbacks=taco.bound.fallbacks,
            report=partial(report_on, taco, out.logits, token_ids, actions, beam_rows(out, n_tokens)),
        )

    def policy(
        self,
        unnorm_key: str | None = None,
        constraints=None,
        *,
        context: Callable[[Mapping[str, Any]], Context] | Context | None = None,
        execute_steps: int | None = None,
        mode: str = "project",
        style: str = "direction",
        on_infeasible: str = "raise",
        **generate_options,
    ) -> RecedingHorizon:
        """A policy for one robot: `policy(obs) -> action (dof,)`, `policy.reset()` at the start of an episode.

        Args:
            unnorm_key: see `predict_action`.
            constraints: list of constraints, or a function of the observation that returns one (limits that depend
                on where the robot is). It is called when a chunk is predicted and holds for all of its steps: with a
                horizon above 1 it must be true of all of them, or be limited with `steps=`.
            context: what the robot knows when a chunk is predicted: a function of the observation that returns a
                `Context`. The action carried out last is known to the policy: where a constraint needs it and nobody
                gives it, its own last one is taken, from the second chunk of an episode on.
            execute_steps: actions carried out before the next prediction; the whole chunk if None.
            mode: see `predict_action`.
            style: see `predict_action`; also "retime": the decoded path in as many more steps as the limits on single
                steps ask for (`execute_steps` then counts decoded steps).
            on_infeasible: see `predict_action`.
            generate_options: passed on to `generate`.

        An observation is a mapping with "images" and "instruction", as for `prepare` (and "proprio" where the policy
        reads it); other entries are for `constraints`. What it returns can be given to every executor of
        `hf_vla_actions.runtime`, `RealTimeChunking` and `AsyncPolicy` among them.
        """
        key = self.action_config.resolve(unnorm_key)
        space = self.action_config.space(key)
        check_choices(mode=mode, style=style, on_infeasible=on_infeasible)

        memory = self._memory()
        remembering = {} if memory is None else {"memory": memory}

        def predict_chunk(obs: Mapping[str, Any], prefix: Overlap | None = None) -> np.ndarray | RetimedChunk:
            missing = [name for name in self._observed() if name not in obs]
            if missing:
                raise VLAActionsError(f"an observation needs {missing}; it has {sorted(obs)}")
            wanted = constraints(obs) if isinstance(constraints, Callable) else constraints  # type: ignore[arg-type]
            known: Any = context(obs) if isinstance(context, Callable) else context  # type: ignore
            if not runner.executed:
                runner.first_context = known
                if memory is not None:
                    memory.clear()
            if prefix is not None:  # what is carried out while this is predicted
                wanted = with_limits(wanted, tuple(prefix.constraints()))
            told = remembered(known, runner.executed, space, runner.first_context)
            inputs = self.prepare(*(obs[name] for name in self._observed()))
            options = self._continuing(prefix, key, {**generate_options, **remembering})
            predict = partial(self.predict_action, **inputs, unnorm_key=key, **options)
            if style == "retime":
                # Soft constraints act while decoding; the hard ones are for the longer chunk.
                free: Any = predict(constraints=wanted, context=told, on_infeasible="nearest", return_dict=True)
                return retime_within(
                    (free.actions - free.moved)[0],
                    wanted,
                    space,
                    limits=self.action_config.limits,
                    context=told,
                    on_infeasible=on_infeasible,
                )
            chunks: Any = predict(
                constraints=wanted, context=told, mode=mode, style=style, on_infeasible=on_infeasible
            )
            return chunks[0]

        runner = RecedingHorizon(predict_chunk, execute_steps, every_step=memory is not None)
        return runner

    def _memory(self) -> Memory | None:
        """What a policy remembers of the steps before; None where it needs nothing."""
        return None

    def _continuing(self, prefix: Overlap | None, key: str, options: dict[str, Any]) -> dict[str, Any]:
        """Options of `predict_action` for a chunk that goes on from another one; its frozen steps are constraints already."""
        return options

    def _observed(self) -> tuple[str, ...]:
        """Entries of an observation that `prepare` is given, in its order."""
        return "images", "instruction"

    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        synced_gpus=None,
        assistant_model=None,
        *args,
        **kwargs,
    ):
        """`generate` of the native model; what would silently go wrong with actions is refused first."""
        check_generation(
            self.prompts.family,
            prompt=kwargs.get("input_ids", inputs),
            generation_config=generation_config,
            logits_processor=logits_processor,
            options={**kwargs, "assistant_model": assistant_model},
        )
        return super().generate(  # type: ignore[misc]
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            synced_gpus,
            assistant_model,
            *args,
            **kwargs,
        )

    def generate_batch(self, *args, **kwargs):
        """Refused: continuous batching drops LogitsProcessors silently, so its actions would be unconstrained."""
        raise VLAActionsError("generate_batch ignores logits processors; use predict_action or generate with a batch")

    def check_sees_image(self, instruction: str = SENTENCE) -> float:
        """Raise SelfTestError unless black, white and noise pictures change the action logits, cached steps included.

        Args:
            instruction: the sentence beside the pictures.

        Returns:
            The smallest change of any pair of pictures at any step, in logits.
        """
        return check_sees_image(self, instruction)

    def check_reads_instruction(self, instructions: Sequence[str] = SENTENCES) -> float:
        """Raise SelfTestError unless different instructions change the action logits, cached steps included.

        Args:
            instructions: two or more; by default the same words in another order.

        Returns:
            The smallest change of any pair of sentences at any step, in logits.
        """
        return check_reads_instruction(self, instructions)

    def self_test(self):
        """Run the checks that apply; `AutoModelForActionPrediction` does so once on loading."""
        if self.prompts.family.takes_images:
            self.check_sees_image()
        self.check_reads_instruction()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        is_main_process: bool = True,
        remote_code_shim: bool = False,
        **kwargs,
    ):
        """Save weights as the native model does, with the processor and `action_config.json` beside them.

        Args:
            save_directory: where to.
            is_main_process: as in Transformers.
            remote_code_shim: add one file that makes `from_pretrained(..., trust_remote_code=True)` of the plain Auto
                classes return a policy (it needs this package). Without it a shim of an earlier save is removed. Only
                policies can be saved again: a model loaded from such a folder by plain Transformers, without
                `trust_remote_code`, would keep the file's name in its config and leave the file behind.
            kwargs: as in Transformers (`state_dict`, `max_shard_size`, `push_to_hub`, ...).
        """
        images = self.prompts.family.takes_images
        auto_class = "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"
        with shim_in_config(self.config, auto_class if remote_code_shim else None):  # type: ignore[attr-defined]
            if is_main_process:
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                (write_shim if remote_code_shim else remove_shim)(save_directory)
                # Before the weights, because push_to_hub uploads what is there when they are saved.
                self.processor.save_pretrained(save_directory)
                self.action_config.save_pretrained(save_directory)
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process=is_main_process, **kwargs
            )

    def push_to_hub(self, repo_id: str, **options):
        """Publish the policy with processor, `action_config.json`, action tokenizer and card, in one commit.

        Args:
            repo_id: owner/name; created if it is missing.
            options: `private`, `revision`, `commit_message`, `create_pr`, `token`, `max_shard_size`, `remote_code_shim` as
                in Transformers and `save_pretrained`; `dry_run`; `records` (folder of the training, whose metrics and
                recipe go along); `license`, `base_model`, `datasets` and `name` for the card.

        Returns:
            `hub.push.PushReport`.

        Raises:
            HubError: no token, no permission or no network. Nothing is visible then, and it can be run again.
            CheckpointError: something speaks against running it; `hf-vla inspect` says the same of a saved policy.
        """
        return push_up(self, repo_id, **options)

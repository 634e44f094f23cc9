"""`prepare`, `predict_action`, `policy` and the self-tests of an OpenVLA-OFT policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from hf_vla_actions.actions import ActionStats
from hf_vla_actions.constraints import bind
from hf_vla_actions.constraints.projection import STYLES
from hf_vla_actions.decoding import TACOLogitsProcessor
from hf_vla_actions.decoding.along import report_on
from hf_vla_actions.decoding.moved import moved_report
from hf_vla_actions.errors import CheckpointError, SelfTestError, VLAActionsError
from hf_vla_actions.models.checks import NOISE_FACTOR, RELATIVE_CHANGE, SENTENCE, SENTENCES, SIZE
from hf_vla_actions.models.generation import MODES
from hf_vla_actions.models.openvla.oft import OFTForward
from hf_vla_actions.models.openvla.oft_config import OFTOptions
from hf_vla_actions.models.openvla.policy import OpenVLAPolicyMixin
from hf_vla_actions.models.output import ActionOutput, commanded


class OFTPolicyMixin(OFTForward, OpenVLAPolicyMixin):
    """Takes over where the model's configuration has `oft`; everything else stays as it is for OpenVLA."""

    def prepare(self, images, instruction, proprio=None) -> dict[str, Any]:
        """Build the prompt and call the processor; see `ActionPredictionMixin.prepare`.

        Args:
            images: for one instruction a picture or a list of `num_images` of them, in the order of the training.
            instruction: a sentence, or a list of them for a batch.
            proprio: (proprio_dim,) state of the robot in real units, or (batch, proprio_dim) for a batch; needed if
                the policy reads it.
        """
        if self.config.oft is None:
            return super().prepare(images, instruction, proprio)
        options = self._options()
        inputs = super().prepare(images, instruction)
        if proprio is None and options.proprio_dim is not None:
            raise VLAActionsError(f"this policy reads the robot's state: pass proprio ({options.proprio_dim} numbers)")
        if proprio is not None:
            # float64 until it is normalized, as the original does it.
            inputs["proprio"] = torch.as_tensor(np.array(proprio, dtype=np.float64))
        return inputs

    @torch.no_grad()
    def predict_action(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        unnorm_key: str | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        proprio=None,
        normalize_proprio: bool = True,
        constraints=None,
        context=None,
        mode: str = "project",
        style: str = "direction",
        on_infeasible: str = "raise",
        do_sample: bool = False,
        noise: torch.Tensor | None = None,
        return_dict: bool = False,
        chunks: bool = False,
        **kwargs,
    ) -> np.ndarray | ActionOutput:
        """Predict one chunk per row in real units; for OpenVLA as it was see `OpenVLAPolicyMixin.predict_action`.

        Args:
            input_ids: (batch, length) prompt, padded on the left; 29871 is appended where it is missing.
            unnorm_key: which statistics; may be left out when there is one dataset.
            attention_mask: (batch, length).
            pixel_values: (batch, 3 * towers * num_images, size, size).
            proprio: (batch, proprio_dim) state of the robot in real units; (proprio_dim,) for one sample.
            normalize_proprio: False if `proprio` is normalized already, as the original's method wants it.
            constraints: list of constraints in real units for every sample, or one list per sample.
            context: what the robot knows now, for constraints that need it.
            mode: "project" (move the predicted chunk into the allowed set). The "discrete" head has tokens, so it
                knows "mixture", "mask" and "transport" too.
            style: of the projection: "axis" or "direction".
            on_infeasible: "raise", "hold" or "nearest"; see `ActionPredictionMixin.predict_action`.
            do_sample: only False: there is nothing to sample from but the noise of diffusion, which is drawn anyway.
            noise: (batch, horizon, dof) that denoising starts from ("diffusion" only); drawn if None.
            return_dict: return an ActionOutput. Continuous heads give no tokens: `token_ids` is (batch, 0), and
                `log_prob` NaN.
            chunks: return (batch, horizon, dof) for one sample too, as other policies do.
            kwargs: none.

        Returns:
            float64: (horizon, dof) for one sample, (batch, horizon, dof) for several.

        Raises:
            UnnormKeyError: the key is missing, unknown or ambiguous; lists the keys.
            InfeasibleConstraintError: no action satisfies the constraints (before the forward pass).
            VLAActionsError: pictures, proprio or options that do not fit the policy.
        """
        asked = {"constraints": constraints, "context": context, "mode": mode, "style": style}
        asked |= {"on_infeasible": on_infeasible}
        if self.config.oft is None:
            self._check_parts()
            given = {"pixel_values": pixel_values, **asked}
            if proprio is not None or noise is not None or not normalize_proprio:
                raise VLAActionsError("proprio and noise are for OFT policies; this model's config has no `oft`")
            return super().predict_action(
                input_ids,
                unnorm_key,
                attention_mask=attention_mask,
                return_dict=return_dict,
                chunks=chunks,
                do_sample=do_sample,
                **given,
                **kwargs,
            )
        options = self._options()
        if kwargs or do_sample:
            refused = sorted(kwargs) + (["do_sample=True"] if do_sample else [])
            raise VLAActionsError(
                f"an OFT policy predicts a chunk in one pass and generates nothing: refused {refused}"
            )
        if input_ids is None or pixel_values is None:
            raise VLAActionsError("predict_action needs the tensors of prepare(): predict_action(**inputs)")
        key = self.action_config.resolve(unnorm_key)
        if mode not in MODES:
            raise VLAActionsError(f"mode must be one of {list(MODES)}, got {mode!r}")
        if style not in STYLES:
            raise VLAActionsError(f"style must be one of {list(STYLES)}, got {style!r}")
        state = self._state(options, proprio, key, normalize_proprio)
        inputs = {"attention_mask": attention_mask, "pixel_values": pixel_values, "proprio": state, "noise": noise}
        predict = self._tokens if options.mode == "discrete" else self._numbers
        out = predict(options, input_ids, inputs, key, asked)
        if return_dict:
            return out
        return out.actions[0] if len(out.actions) == 1 and not chunks else out.actions

    def _numbers(self, options, input_ids, inputs, key, asked) -> ActionOutput:
        """Chunks of a continuous head."""
        if asked["mode"] != "project":
            raise VLAActionsError(
                f"mode {asked['mode']!r} works on the probabilities of tokens, and the {options.mode!r} head predicts numbers: "
                "use mode='project', which keeps the same constraints"
            )
        config, rows = self.action_config, len(input_ids)
        bound = bind(
            asked["constraints"],
            config.space(key),
            None,
            config.horizon,
            limits=tuple(config.limits),
            grid=False,
            context=asked["context"],
            on_infeasible=asked["on_infeasible"],
        )
        bound.check_batch(rows)
        predicted = self.predict_chunk(input_ids, **inputs).normalized
        normalized = predicted.double().cpu().numpy()  # type: ignore[union-attr]
        decoded = config.space(key).settle(config.stats(key).unnormalize(normalized))
        actions = commanded(bound, decoded, "project", asked["style"])
        return ActionOutput(
            actions=actions,
            normalized=normalized,
            token_ids=np.empty((rows, 0), dtype=np.int64),
            log_prob=np.full(rows, np.nan),
            unnorm_key=key,
            moved=actions - decoded,
            fallbacks=bound.fallbacks,
            report=partial(
                moved_report,
                decoded,
                actions,
                config.space(key),
                asked["constraints"],
                config.limits,
                asked["context"],
            ),
        )

    def _tokens(self, options, input_ids, inputs, key, asked) -> ActionOutput:
        """Chunks of the discrete head: of each slot the best action token that the constraints allow."""
        length = input_ids.shape[1]
        taco = TACOLogitsProcessor(
            asked["constraints"],
            self.action_config,
            key,
            prompt_length=length,
            context=asked["context"],
            mode=asked["mode"],
            on_infeasible=asked["on_infeasible"],
        )
        taco.bound.check_batch(len(input_ids))
        logits: Any = self.predict_chunk(input_ids, **inputs).logits
        chosen: list[torch.Tensor] = []
        for slot in range(options.n_slots):
            ids: Any = torch.cat([input_ids, *[token[:, None] for token in chosen]], dim=1)
            chosen.append(taco(ids, logits[:, slot].float()).argmax(dim=-1))
        tokens = torch.stack(chosen, dim=1)
        log_p = torch.log_softmax(logits.float(), dim=-1).gather(2, tokens[..., None])[..., 0]
        token_ids = tokens.cpu().numpy()
        normalized, decoded = self.action_config.decode(token_ids, key)
        actions = commanded(taco.bound, decoded, asked["mode"], asked["style"])
        return ActionOutput(
            actions=actions,
            normalized=normalized,
            token_ids=token_ids,
            log_prob=log_p.double().sum(dim=1).cpu().numpy(),
            unnorm_key=key,
            moved=actions - decoded,
            fallbacks=taco.bound.fallbacks,
            report=partial(report_on, taco, logits.unbind(1), token_ids, actions),
        )

    def _state(self, options: OFTOptions, proprio, key: str, normalize: bool) -> torch.Tensor | None:
        if proprio is None or options.proprio_dim is None:
            return None if proprio is None else torch.as_tensor(proprio)  # refused by predict_chunk
        state = np.asarray(proprio, dtype=np.float64)
        if not np.isfinite(state).all():
            raise VLAActionsError("proprio has NaN or infinite values")
        if not normalize:
            return torch.from_numpy(state)
        stats: ActionStats | None = self.action_config.norm_stats[key]["proprio"]
        if stats is None or stats.dof != options.proprio_dim or state.shape[-1:] != (stats.dof,):
            found = "none" if stats is None else f"of {stats.dof} numbers"
            raise VLAActionsError(
                f"the policy reads a state of {options.proprio_dim} numbers, proprio has shape {state.shape}, statistics "
                f"of {key!r} to normalize it: {found}"
            )
        # Clipped again: a dimension that is not normalized passes through its statistics as it is.
        return torch.from_numpy(np.clip(stats.normalize(state), -1.0, 1.0))

    def _observed(self) -> tuple[str, ...]:
        options = self.config.oft_options
        reads_state = options is not None and options.proprio_dim is not None
        return (*super()._observed(), "proprio") if reads_state else super()._observed()

    def generate(self, *args, **kwargs):
        """As in Transformers; refused for an OFT policy, which was trained to see all tokens at once."""
        if self.config.oft is not None:
            raise VLAActionsError("an OFT policy predicts a whole chunk in one pass: use predict_action or forward")
        self._check_parts()
        return super().generate(*args, **kwargs)

    def attach(self, processor, action_config=None):
        """See `OpenVLAPolicyMixin.attach`; another horizon than that of an OFT policy raises."""
        options = self.config.oft_options
        if action_config is not None and options is not None and action_config.horizon != options.horizon:
            raise VLAActionsError(
                f"the policy predicts {options.horizon} actions at once, the action config says {action_config.horizon}"
            )
        return super().attach(processor, action_config)

    def _check_parts(self) -> None:
        if self._loose_parts:
            raise CheckpointError(
                f"this is half an OFT policy: its parts {list(self._loose_parts)} lie beside the checkpoint and were not "
                "loaded. load_oft(path, preset) of hf_vla_actions.models.openvla loads all of it"
            )

    def check_sees_image(self, instruction: str = SENTENCE) -> float:
        """Raise SelfTestError unless black, white and noise pictures change the prediction; returns the change."""
        if self.config.oft is None:
            return super().check_sees_image(instruction)
        noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        pictures = {"black": np.zeros_like(noise), "white": np.full_like(noise, 255), "noise": noise}
        return self._smallest_change(list(pictures.values()), [instruction] * 3, list(pictures), "picture")

    def check_reads_instruction(self, instructions: Sequence[str] = SENTENCES) -> float:
        """Raise SelfTestError unless different instructions change the prediction; returns the change."""
        if self.config.oft is None:
            return super().check_reads_instruction(instructions)
        if len(set(instructions)) < 2:
            raise VLAActionsError(f"two different instructions are needed, got {list(instructions)}")
        noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        names = [repr(sentence) for sentence in instructions]
        return self._smallest_change([noise] * len(names), list(instructions), names, "instruction")

    @torch.no_grad()
    def _smallest_change(self, pictures: list, sentences: list[str], names: list[str], what: str) -> float:
        """The smallest change of the prediction between two rows; the first row is there twice, to know rounding."""
        options = self._options()
        images = [[picture] * options.num_images for picture in [*pictures, pictures[0]]]
        inputs = super().prepare(images, [*sentences, sentences[0]])
        rows = len(images)
        if options.proprio_dim is not None:
            inputs["proprio"] = torch.zeros(rows, options.proprio_dim)
        if options.mode == "diffusion":  # the noise predicted in one pass tells as much as all of them
            noise = torch.randn(1, options.horizon, options.dof, generator=torch.Generator().manual_seed(0))
            inputs["noise"] = noise.expand(rows, -1, -1)
            inputs["timesteps"] = torch.full((rows,), options.diffusion_train_steps // 2)
        out = self.predict_chunk(**inputs)
        ids = torch.from_numpy(np.unique(self.action_config.vocabulary.token_ids))
        answer: Any = out.normalized if out.logits is None else out.logits[..., ids.to(out.logits.device)]
        values = answer.float().flatten(1).cpu().numpy()
        if not np.isfinite(values).all():
            raise SelfTestError(
                "what this policy predicts is not finite: its weights are broken, or its dtype too narrow"
            )
        floor = np.abs(values[-1] - values[0]).max()
        threshold = max(NOISE_FACTOR * floor, RELATIVE_CHANGE * np.abs(values).max())
        pairs = [(np.abs(values[i] - values[j]).max(), i, j) for i in range(len(names)) for j in range(i)]
        change, i, j = min(pairs)
        if not change > threshold:
            raise SelfTestError(
                f"the {what} does not change what this policy does: {names[j]} and {names[i]} give the same chunk (it "
                f"differs by at most {change:.2g}, rounding explains {threshold:.2g}). Do not let it move a robot; "
                "self_test=False loads it all the same"
            )
        return float(change)

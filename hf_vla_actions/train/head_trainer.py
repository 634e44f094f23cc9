"""The trainer of a policy with a continuous head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.hf_argparser import string_to_bool
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.evaluate.sampled import head_metrics, sample_chunks
from hf_vla_actions.models.collator import IGNORED
from hf_vla_actions.models.head_collator import HeadCollator
from hf_vla_actions.models.head_files import load_head
from hf_vla_actions.train.arguments import HEAD_LEARNING_RATE
from hf_vla_actions.train.trainer import VLATrainer

NOT_LEARNED = ("actions", "sample_ids")


class HeadTrainer(VLATrainer):
    """Trainer for a policy with a head, or for a PEFT model around one.

    The loss of a step is divided by all of its real numbers (and its labelled tokens, where there are any), so that it
    does not depend on how the step was split over processes and batches. In an evaluation each sample's noise follows
    from the seed and from where it is in the dataset: two evaluations of the same weights say the same.

    Args:
        model: as for `VLATrainer`.
        args: as for `VLATrainer`; `head_insulate` and `transfusion_weight` of `VLATrainingArguments` are used.
        unnorm_key: as for `VLATrainer`.
        kwargs: as for `VLATrainer`.
    """

    with_head = True

    def __init__(self, model, args, *, unnorm_key: str | Sequence[str] | None = None, **kwargs: Any):
        if string_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")) or is_deepspeed_zero3_enabled():
            raise TrainingError(
                "FSDP and ZeRO-3 gather weights where a module's forward runs, and a continuous head is asked for its loss and "
                "for chunks instead: train it with processes that each hold all weights (`hf-vla launch-config multi_gpu`)"
            )
        super().__init__(model, args, unnorm_key=unnorm_key, **kwargs)
        weight = getattr(args, "transfusion_weight", None)
        self._how = {
            "insulate": bool(getattr(args, "head_insulate", False)),
            "action_weight": 1.0 if weight is None else float(weight),
        }
        self._n_labels: torch.Tensor | int | None = None
        self._parts: torch.Tensor | None = None  # language and action loss since the last line of the log
        self._parts_since = 0

    def _collator(self, keys: Sequence[str]) -> HeadCollator:
        return HeadCollator(self.policy.prompts, keys, window=self.policy.action_head.window)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As Trainer's, with a learning rate of its own for the head, which began at random."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate, head = head_learning_rate(self.args), {id(p) for p in self.policy.action_head.parameters()}
        groups = []
        for group in optimizer.param_groups:
            for of_head, lr in ((False, group["lr"]), (True, rate)):
                chosen = [p for p in group["params"] if (id(p) in head) == of_head]
                groups += [{**group, "params": chosen, "lr": lr}] if chosen else []
        optimizer.param_groups[:] = groups
        return optimizer

    def _evaluation(self) -> dict[str, Any]:
        return {"compute_metrics": self._metrics}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Real numbers of the chunks of a step, over all processes; Trainer counts whatever is called labels."""
        count = super()._get_num_items_in_batch
        tokens = [{"labels": batch["labels"][:, 1:]} for batch in batch_samples if "labels" in batch]
        self._n_labels = count(tokens, device)
        return count([{"labels": _as_labels(batch["action_pad_mask"])} for batch in batch_samples], device)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The policy's own loss; it goes through `forward`, where gradients of several processes are averaged."""
        learned = {name: value for name, value in inputs.items() if name not in NOT_LEARNED}
        outputs = model(**learned, **self._how, n_items=num_items_in_batch, n_labels=self._n_labels)
        loss = outputs["loss"]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Divided by the numbers of all processes, over which gradients are then averaged.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if torch.is_grad_enabled() and outputs.get("language_loss") is not None:
            parts = torch.stack([outputs["language_loss"].detach(), outputs["action_loss"].detach().float()])
            if self._parts is None:
                self._parts, self._parts_since = torch.zeros_like(parts), self.state.global_step
            self._parts = self._parts + parts
        return (loss, outputs) if return_outputs else loss

    def sums(self) -> dict[str, Any]:
        """See `VLATrainer.sums`."""
        parts = None if self._parts is None else self._parts.tolist()
        return {**super().sums(), "parts": parts, "parts_since": self._parts_since}

    def take_sums(self, sums: dict[str, Any]) -> None:
        """See `VLATrainer.take_sums`."""
        super().take_sums(sums)
        if sums.get("parts") is not None:
            self._parts = torch.tensor(sums["parts"], device=self.args.device)
            self._parts_since = sums["parts_since"]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with `language_loss` and `action_loss` (before its weight) where the model learns both."""
        if self._parts is not None and "loss" in logs:
            mean = self.accelerator.reduce(self._parts, reduction="mean")
            parts = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            steps = max(1, self.state.global_step - self._parts_since)
            logs["language_loss"], logs["action_loss"] = (parts * mean / steps).tolist()
            self._parts = None
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """One step of evaluation: the loss, chunks drawn as in use, and the demonstrated ones."""
        inputs = self._prepare_inputs(inputs)
        self._n_labels = None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        chunks = sample_chunks(self.policy, inputs, inputs["sample_ids"], self.args.seed)
        rows = torch.ones(len(chunks), device=chunks.device)
        parts = tuple(
            rows * outputs[name].float() for name in ("action_loss", "language_loss") if outputs.get(name) is not None
        )
        real = inputs["action_pad_mask"].any(dim=-1).int()
        return loss.detach(), (chunks.float(), *parts), (inputs["actions"], real)

    def _metrics(self, prediction) -> dict[str, float]:
        """Metrics of drawn chunks, and with action tokens both losses."""
        chunks, *parts = prediction.predictions
        actions, real = prediction.label_ids
        metrics = head_metrics(self.policy.action_config, self.unnorm_key, chunks, actions, real.astype(bool))
        if len(parts) > 1:
            metrics |= {"action_loss": float(parts[0].mean()), "language_loss": float(parts[1].mean())}
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_head(self.policy.action_head, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_head(self.policy.action_head, str(self.state.best_model_checkpoint))


def head_learning_rate(args) -> float:
    """What the head learns with: as asked, or at least `HEAD_LEARNING_RATE`, below which a random head hardly moves."""
    asked = getattr(args, "head_learning_rate", None)
    return max(float(args.learning_rate), HEAD_LEARNING_RATE) if asked is None else float(asked)


def check_transfusion(config: ActionConfig, args) -> None:
    """Refuse training options about a head that the policy does not have, or about tokens that it does not have."""
    weight, insulate = getattr(args, "transfusion_weight", None), getattr(args, "head_insulate", False)
    if config.head is None and getattr(args, "head_learning_rate", None) is not None:
        raise TrainingError("head_learning_rate is of a continuous head, and the policy has none")
    if insulate and config.head is None:
        raise TrainingError(
            "head_insulate keeps gradients of a continuous head from the model, and the policy has none"
        )
    if weight is not None and (config.head is None or config.tokenizer is None):
        raise TrainingError("transfusion_weight is for a policy that has a continuous head and action tokens")


def _as_labels(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 0, IGNORED)

"""Transformers' Trainer with the loss, the metrics and the checkpoints of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.constraints.text import parse_constraints
from hf_vla_actions.decoding import TACOLoss
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.evaluate.teacher_forced import ids_by_place, likeliest, metrics_of
from hf_vla_actions.models import ActionPredictionMixin, load_model, save_adapter
from hf_vla_actions.train.arguments import VLATrainingArguments
from hf_vla_actions.train.collator import IGNORED, ActionCollator, action_loss
from hf_vla_actions.train.resume import ResumableTrainer
from hf_vla_actions.train.throughput import Throughput


class VLATrainer(ResumableTrainer):
    """Trainer for a policy made by `to_vla`, or for a PEFT model around one.

    Args:
        model: what to train.
        args: VLATrainingArguments (or TrainingArguments with `remove_unused_columns=False`).
        unnorm_key: which statistics and action space the dataset belongs to; several for a mixture.
        kwargs: as for Trainer (`train_dataset`, `eval_dataset`, `callbacks`, ...).
    """

    with_head = False

    def __init__(self, model, args, *, unnorm_key: str | Sequence[str] | None = None, **kwargs: Any):
        policy: Any = model if isinstance(model, ActionPredictionMixin) else model.get_base_model()
        self.policy: Any = policy
        keys = ActionCollator(policy.prompts, unnorm_key).unnorm_keys
        has_head = policy.action_config.head is not None
        if has_head != self.with_head:
            raise TrainingError(
                f"a policy {'with' if has_head else 'without'} a continuous head is trained by "
                f"{'HeadTrainer' if has_head else 'VLATrainer'}"
            )
        self.unnorm_key = keys[0]  # in an evaluation: of the dataset that is evaluated
        self.taco_loss = taco_loss_of(policy.action_config, args, keys)
        self._violation: torch.Tensor | None = None  # summed up since the last line of the log
        self._violation_since = 0
        super().__init__(
            model,
            args,
            data_collator=self._collator(keys),
            compute_loss_func=self._loss,
            **self._evaluation(),
            **kwargs,
        )
        # Trainer would not count the first label of each row, as if labels still were to be shifted; here every one is
        # a target, and the loss is divided by their number.
        self._loss_shifts_labels = False
        self.throughput = Throughput()
        self.add_callback(self.throughput)
        self._ids = None if has_head else torch.tensor(ids_by_place(policy.action_config, self.unnorm_key))

    def _collator(self, keys: Sequence[str]) -> ActionCollator:
        return ActionCollator(self.policy.prompts, keys)

    def _evaluation(self) -> dict[str, Any]:
        return {"compute_metrics": self._metrics, "preprocess_logits_for_metrics": self._codes}

    def _loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Cross entropy, and with `taco_loss_weight` the expected violation beside it, in training and evaluation."""
        loss = action_loss(outputs, labels, num_items_in_batch)
        if self.taco_loss is None:
            return loss
        logits, labels = outputs["logits"][:, -labels.shape[1] - 1 : -2], labels[:, :-1]
        ids = self._ids.to(logits.device)  # type: ignore[union-attr]
        dof = len(self.taco_loss.values)
        violation = self.taco_loss(
            logits,
            (labels[..., None] == ids).long().argmax(dim=-1),  # 0 on padding
            labels[:, ::dof] != IGNORED,
            ids=ids,
            # As the cross entropy is divided, so that nothing depends on how a step was split; the closing token counts
            # as a dof-th of a step.
            n_steps=None if num_items_in_batch is None else num_items_in_batch / dof,
        )
        if torch.is_grad_enabled():
            if self._violation is None:
                self._violation, self._violation_since = torch.zeros_like(violation), self.state.global_step
            self._violation = self._violation + violation.detach()
        return loss + self.args.taco_loss_weight * violation  # type: ignore[attr-defined]

    def get_batch_samples(self, *args, **kwargs):
        """The batches of one step; the time until they are there is measured."""
        with self.throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def sums(self) -> dict[str, Any]:
        """What this process has summed up since the last line of the log, as JSON."""
        violation = None if self._violation is None else self._violation.item()
        return {**super().sums(), "violation": violation, "violation_since": self._violation_since}

    def take_sums(self, sums: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        super().take_sums(sums)
        if sums["violation"] is not None:
            self._violation = torch.tensor(sums["violation"], device=self.args.device)
            self._violation_since = sums["violation_since"]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with `samples_per_second` and `data_wait` (share of the time) beside the loss.

        With `taco_loss_weight` also the mean expected violation as `taco_loss` (before its weight).
        """
        if self._violation is not None and "loss" in logs:
            mean = self.accelerator.reduce(self._violation, reduction="mean")
            # As the loss: where it is divided by the labels of all processes, each holds a part of it.
            parts = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            logs["taco_loss"] = parts * mean.item() / max(1, self.state.global_step - self._violation_since)
            self._violation = None
        if "loss" in logs:
            logs.update(self.throughput.numbers(self.args.world_size, since_shown=True))
        super().log(logs, *args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """One step; a loss that is not finite raises and names the samples, before the weights change."""
        sample_ids = inputs.pop("sample_ids")
        self.throughput.count(len(sample_ids))
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            samples = [tuple(pair) for pair in sample_ids.tolist()]
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step} for the batch of (episode, step) "
                f"{samples}; the weights were not changed. Lower the learning rate or look at these samples"
            )
        return loss

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """As Trainer's; in a dict of datasets, as a mixture has, the names are their `unnorm_key`."""
        named = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(named, dict):
            prefix = kwargs.pop("metric_key_prefix", "eval")
            metrics: dict[str, float] = {}
            for key, dataset in named.items():
                self.unnorm_key = self.policy.action_config.resolve(key)
                metrics.update(super().evaluate(dataset, *args, metric_key_prefix=f"{prefix}_{key}", **kwargs))
            return metrics
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """One step of evaluation."""
        inputs = {name: value for name, value in inputs.items() if name != "sample_ids"}
        if kwargs.get("ignore_keys") is None:
            # Trainer adds to a list; a config may hold a tuple.
            names = getattr(self.policy.config, "keys_to_ignore_at_inference", ("past_key_values",))
            kwargs["ignore_keys"] = list(names)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _codes(self, logits, labels: torch.Tensor) -> torch.Tensor:
        """What `likeliest` says of the logits, which some models return with more beside them."""
        return likeliest(logits[0] if isinstance(logits, tuple) else logits, labels, self._ids)  # type: ignore[arg-type]

    def _metrics(self, prediction) -> dict[str, float]:
        """Metrics of teacher-forced predictions."""
        return metrics_of(self.policy.action_config, self.unnorm_key, prediction.predictions, prediction.label_ids)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # Trainer would give the file's weight names to the model as they are. Where Transformers converts names on
        # loading (LLaVA does), none fits, and training would go on from the weights it started with.
        if not self._whole_policy(model or self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, _ = load_model(resume_from_checkpoint, dtype=self.policy.dtype)
        self.policy.load_state_dict(saved.state_dict(), strict=not self.with_head)  # a head has a file of its own

    def _load_best_model(self) -> None:
        if self._whole_policy(self.model):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
            return
        super()._load_best_model()

    def _whole_policy(self, model) -> bool:
        """Whether `model` is the policy itself, in one piece: no adapter around it, not cut over processes."""
        return model is self.policy and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:
            return  # else all processes would write the same files at once
        folder = Path(str(output_dir or self.args.output_dir))
        model = self.accelerator.unwrap_model(self.model)
        if model is self.policy:
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            save_adapter(model, folder, state_dict=state_dict)


def taco_loss_of(config: ActionConfig, args, unnorm_keys: Sequence[str]) -> TACOLoss | None:
    """The auxiliary loss that the training arguments ask for, checked; None if they ask for none."""
    if not isinstance(args, VLATrainingArguments) or not args.taco_loss_weight:
        return None
    if config.head is not None:
        raise TrainingError(
            "taco_loss_weight is about the probabilities of tokens, and this policy acts with a "
            f"{config.head.kind!r} head: leave it out; predict_action(constraints=...) keeps constraints all the same"
        )
    if len(unnorm_keys) > 1:
        raise TrainingError(
            f"taco_loss_weight is for one dataset, whose units the constraints are in; this is a mixture of "
            f"{list(unnorm_keys)}: leave it out"
        )
    if args.taco_constraints is None and not config.limits:
        raise TrainingError(
            "taco_loss_weight needs constraints, and the policy has no permanent limits: pass --taco_constraints, such as "
            "'Range(x, -0.005, 0.005)'"
        )
    constraints = None if args.taco_constraints is None else parse_constraints(args.taco_constraints)
    return TACOLoss(constraints, config, unnorm_keys[0])

"""Fine-tune a policy: the one piece of code behind the command, the demo and the notebooks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset
from transformers.trainer_utils import get_last_checkpoint

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.families import OPENVLA_TYPE
from hf_vla_actions.train.arguments import LoraArguments, VLATrainingArguments
from hf_vla_actions.train.freeze import Frozen, freeze_parts
from hf_vla_actions.train.lora import add_lora
from hf_vla_actions.train.record import FILE_NAME as TRAINING_FILE
from hf_vla_actions.train.trainer import VLATrainer, taco_loss_of

TRAIN_SAMPLE = 64
METRICS_FILE = "action_metrics.json"
OWN_FILES = (
    *("checkpoint-*", "adapter_*", "model*.safetensors*", "config.json", "action_config.json", METRICS_FILE),
    *("fast_tokenizer.json", "vq_tokenizer.*"),
    TRAINING_FILE,
    "dataset_statistics.json",  # of an earlier adapter: it would take the place of the statistics in config.json
)


def fine_tune(
    policy,
    train_dataset,
    args: VLATrainingArguments,
    *,
    lora: LoraArguments | None = None,
    eval_dataset=None,
    unnorm_key: str | None = None,
    callbacks=None,
) -> tuple[Any, dict[str, float]]:
    """Train a policy and save it to `args.output_dir`, with its metrics in `action_metrics.json`.

    Args:
        policy: model made by `to_vla`; trained in place.
        train_dataset: ChunkDataset.
        args: as for Transformers' Trainer.
        lora: train an adapter instead of all weights.
        eval_dataset: ChunkDataset of held-out episodes.
        unnorm_key: which statistics and action space the datasets belong to.
        callbacks: for the Trainer.

    Returns:
        The trained model (a PeftModel with LoRA) and the metrics: those of held-out episodes start with `eval_`,
        those of a sample of the training data with `train_`.
    """
    taco_loss_of(policy.action_config, args, policy.action_config.resolve(unnorm_key))  # before an old run is removed
    checkpoint = prepare_output(args)
    if checkpoint is not None:
        check_same_config(policy.action_config, checkpoint)
    elif args.should_save:
        _remove_old_run(Path(str(args.output_dir)))
    model = policy
    if lora is not None and lora.use_peft:
        model = add_lora(policy, lora)
    else:
        frozen = Frozen(args.freeze_vision, args.freeze_language_model, args.freeze_text_embeddings)
        freeze_parts(policy, frozen, weight_decay=args.weight_decay)
    if policy.config.model_type == OPENVLA_TYPE and args.ddp_find_unused_parameters is None:
        # Some of its weights never run (a tower's last block, SigLIP's pooling), and without this several processes
        # would wait for their gradients. Trainer turns it off where activations are checkpointed.
        args.ddp_find_unused_parameters = True
    trainer = VLATrainer(
        model,
        args,
        unnorm_key=unnorm_key,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics: dict[str, float] = {"world_size": args.world_size}
    if eval_dataset is not None:
        metrics.update(trainer.evaluate(eval_dataset, metric_key_prefix="eval"))
    metrics.update(trainer.evaluate(_sample(train_dataset, args.seed), metric_key_prefix="train"))
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_json(Path(str(args.output_dir)) / METRICS_FILE, metrics)
    return model, metrics


def prepare_output(args: VLATrainingArguments) -> str | None:
    """Refuse a folder that would be overwritten; return the checkpoint to resume from, if any."""
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"output_dir {folder} is a file")
    resume = args.resume_from_checkpoint
    if resume not in (None, False, "False", "false"):
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if resume in (True, "True", "true"):
            if last is None:
                raise TrainingError(f"there is no checkpoint to resume from in {folder}")
            return last
        if not Path(resume).is_dir():
            raise TrainingError(f"there is no checkpoint to resume from at {resume}")
        return str(resume)
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite_output_dir:
        raise TrainingError(
            f"output_dir {folder} is not empty: choose another, or pass --resume_from_checkpoint true to go on, or "
            "--overwrite_output_dir to train anew"
        )
    return None


def check_same_config(config: ActionConfig, checkpoint: str) -> None:
    """Refuse to resume with options under which the tokens of the checkpoint mean something else."""
    before = ActionConfig.from_pretrained(checkpoint)
    saved, now = before.to_dict(), config.to_dict()
    # How many tokens a chunk may take changes nothing about what they mean, and earlier releases did not say it.
    free = {"token_budget"}
    if before.norm_stats.is_close(config.norm_stats):  # type: ignore[union-attr, arg-type]
        free.add("norm_stats")  # earlier releases rounded sums differently
    differ = [name for name in now if now[name] != saved.get(name) and name not in free]
    if differ:
        raise TrainingError(
            f"the checkpoint {checkpoint} was trained with other {differ} in its action config; resume with the same "
            "dataset and options, or train into a new --output_dir"
        )


def _remove_old_run(folder: Path) -> None:
    """Remove what an earlier run left where a new one will save: its adapter or weights would be loaded instead."""
    if not folder.is_dir():
        return
    for pattern in OWN_FILES:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sample(dataset, seed: int) -> Dataset:
    rows = np.random.default_rng(seed).permutation(len(dataset))[:TRAIN_SAMPLE]
    return Subset(dataset, sorted(rows.tolist()))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(temporary, path)

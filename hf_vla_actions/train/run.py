"""Fine-tune a policy: the one piece of code behind the command, the demo and the notebooks."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from torch.utils.data import Subset

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.data.mixture import MixtureDataset
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.families import OPENVLA_TYPE
from hf_vla_actions.models.head_files import HEAD_FILE
from hf_vla_actions.train.arguments import LoraArguments, VLATrainingArguments
from hf_vla_actions.train.checkpoints import UNFINISHED, last_whole, read_seal, remove_unfinished, saving, write_json
from hf_vla_actions.train.collator import ActionCollator
from hf_vla_actions.train.freeze import Frozen, freeze_parts
from hf_vla_actions.train.head_trainer import HeadTrainer, check_transfusion
from hf_vla_actions.train.lora import add_lora, every_adapter_runs
from hf_vla_actions.train.record import FILE_NAME as TRAINING_FILE
from hf_vla_actions.train.trainer import VLATrainer, taco_loss_of

logger = logging.getLogger(__name__)

TRAIN_SAMPLE = 64
METRICS_FILE = "action_metrics.json"
OWN_FILES = (
    *(
        UNFINISHED,
        "checkpoint-*",
        "adapter_*",
        HEAD_FILE,
        "model*.safetensors*",
        "config.json",
        "action_config.json",
        METRICS_FILE,
    ),
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
    unnorm_key: str | Sequence[str] | None = None,
    callbacks=None,
) -> tuple[Any, dict[str, float]]:
    """Train a policy and save it to `args.output_dir`, with its metrics in `action_metrics.json`.

    Args:
        policy: model made by `to_vla`; trained in place.
        train_dataset: ChunkDataset, or a MixtureDataset.
        args: as for Transformers' Trainer.
        lora: train an adapter instead of all weights.
        eval_dataset: ChunkDataset of held-out episodes; for a mixture a dict of them by `unnorm_key`.
        unnorm_key: which statistics and action space the datasets belong to; for a mixture those of all its parts.
        callbacks: for the Trainer.

    Returns:
        The trained model (a PeftModel with LoRA) and the metrics: those of held-out episodes start with `eval_`,
        those of a sample of the training data with `train_`; of a mixture each dataset's with `eval_KEY_`, `train_KEY_`.
        `eval_l1/x` is in the unit of x; `eval_l1` is the mean over all dimensions, in mixed units (see `agreement`).
    """
    # Before an old run is removed:
    taco_loss_of(policy.action_config, args, ActionCollator(policy.prompts, unnorm_key).unnorm_keys)
    check_transfusion(policy.action_config, args)
    checkpoint = prepare_output(args)
    _check_same_checkpoint(checkpoint, args)
    if checkpoint is not None:
        check_same_config(policy.action_config, checkpoint)
        _tidy_up(checkpoint, args)
    elif args.should_save:
        _remove_old_run(Path(str(args.output_dir)))
    model = model_of(policy, args, lora)
    has_head = policy.action_config.head is not None
    if (policy.config.model_type == OPENVLA_TYPE or has_head) and args.ddp_find_unused_parameters is None:
        # Some of its weights never run (a tower's last block, SigLIP's pooling; with a head the output layer), and without this several processes
        # would wait for their gradients. Trainer turns it off where activations are checkpointed.
        args.ddp_find_unused_parameters = True
    elif lora is not None and every_adapter_runs(policy, lora) and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # Trainer would look for unused ones around every PEFT model
    trainer = (HeadTrainer if has_head else VLATrainer)(
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
        with saving("the metrics", Path(str(args.output_dir))):
            write_json(Path(str(args.output_dir)) / METRICS_FILE, metrics)
    return model, metrics


def model_of(policy, args: VLATrainingArguments, lora: LoraArguments | None = None) -> Any:
    """What is trained of a policy: a PEFT model around it, or the policy itself with its frozen parts."""
    frozen = Frozen(args.freeze_vision, args.freeze_language_model, args.freeze_text_embeddings)
    if lora is not None and lora.use_peft:
        frozen.refuse()
        return add_lora(policy, lora)
    freeze_parts(policy, frozen, weight_decay=args.weight_decay)
    return policy


def prepare_output(args: VLATrainingArguments) -> str | None:
    """Refuse a folder that would be overwritten; return the checkpoint to resume from, if any."""
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"output_dir {folder} is a file")
    resume = args.resume_from_checkpoint
    if resume not in (None, False, "False", "false"):
        if resume in (True, "True", "true"):
            last, skipped = last_whole(folder) if folder.is_dir() else (None, [])
            if last is None:
                why = f" ({'; '.join(skipped)})" if skipped else ""
                raise TrainingError(
                    f"there is no checkpoint to resume from in {folder}{why}: leave --resume_from_checkpoint out, with "
                    "--overwrite_output_dir if the folder is not empty, to train anew"
                )
            return str(last)
        if not Path(resume).is_dir():
            raise TrainingError(f"there is no checkpoint to resume from at {resume}")
        read_seal(resume)
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
    differ = [name for name in {**saved, **now} if now.get(name) != saved.get(name) and name not in free]
    if differ:
        raise TrainingError(
            f"the checkpoint {checkpoint} was trained with other {differ} in its action config; resume with the same "
            "dataset and options, or train into a new --output_dir"
        )


def _check_same_checkpoint(checkpoint: str | None, args: VLATrainingArguments) -> None:
    """Refuse processes that would go on from different checkpoints, as on machines without a common folder."""
    names = gather_object([None if checkpoint is None else Path(checkpoint).name]) if args.world_size > 1 else []
    if len(set(names)) > 1:
        raise TrainingError(
            f"the processes find different checkpoints {names} in {args.output_dir}: it must be a folder that all of them "
            "see"
        )


def _tidy_up(checkpoint: str, args: VLATrainingArguments) -> None:
    """Remove what an interrupted save left, and say what the run goes on from."""
    folder = Path(str(args.output_dir))
    if args.resume_from_checkpoint in (True, "True", "true") and args.should_log:
        for defect in last_whole(folder)[1]:
            logger.warning("passed over %s", defect)
    if args.should_save and folder.is_dir():
        left = remove_unfinished(folder)
        if left:
            logger.warning("removed what an interrupted run left unfinished: %s", ", ".join(left))
    if args.should_log:
        logger.info("going on from %s", checkpoint)


def _remove_old_run(folder: Path) -> None:
    """Remove what an earlier run left where a new one will save: its adapter or weights would be loaded instead."""
    if not folder.is_dir():
        return
    for pattern in OWN_FILES:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sample(dataset, seed: int) -> Any:
    if isinstance(dataset, MixtureDataset):
        return {part.unnorm_key: _sample(part, seed) for part in dataset.parts}
    rows = np.random.default_rng(seed).permutation(len(dataset))[:TRAIN_SAMPLE]
    return Subset(dataset, sorted(rows.tolist()))

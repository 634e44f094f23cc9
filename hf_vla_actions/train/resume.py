"""Transformers' Trainer that goes on after an interruption as if there had been none."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.train.checkpoints import (
    UNFINISHED,
    drop_old,
    move_in,
    publish,
    read_seal,
    saving,
    seal,
    write_json,
)
from hf_vla_actions.train.order import DrawnDataset, TrainingOrder, kept_randomness, seed_all

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are whole, and whose resumed runs equal uninterrupted ones.

    What it adds to Trainer's own resuming (optimizer, schedule, random numbers of each process):
        - the order of the data and what items decide by chance follow from the seed and the place in the sequence
          (`train.order`), in every epoch and for any number of processes and workers;
        - evaluation has random numbers of its own;
        - sums since the last line of the log are saved, so the next line is what it would have been;
        - a run that ended right after its last checkpoint is not trained a step further;
        - a checkpoint gets its name when it is complete (`train.checkpoints`).
    """

    def __init__(self, model, args, *, train_dataset=None, callbacks=None, **kwargs: Any):
        self._order: TrainingOrder | None = None
        if train_dataset is not None:
            seed = args.seed if args.data_seed is None else args.data_seed
            self._order = TrainingOrder(train_dataset, seed, shuffled=_is_shuffled(args))
            train_dataset = DrawnDataset(train_dataset, seed)
        self._saving = False
        self._sums: dict[str, Any] = {}  # of the log, as the checkpoint has them
        callbacks = [*(callbacks or []), _GoOn(self)]
        super().__init__(model, args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)

    def sums(self) -> dict[str, Any]:
        """What this process has summed up since the last line of the log, as JSON."""
        mean = self.accelerator.gather(self._tr_loss.reshape(1)).mean().item()
        return {"loss": self._tr_loss.item(), "mean_loss": mean, "logged": self._globalstep_last_logged}

    def take_sums(self, sums: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        self._tr_loss.fill_(sums["loss"])
        self._total_loss_scalar -= sums["mean_loss"]  # the mean at the end is over the steps of this run alone
        self._globalstep_last_logged = sums["logged"]

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As Trainer's; a checkpoint that is not whole, or of another order of the data, raises."""
        if isinstance(resume_from_checkpoint, str):
            self._check_same_order(resume_from_checkpoint)
            file = Path(resume_from_checkpoint) / _sums_file(self.args.process_index)
            self._sums = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "processes": self.args.world_size,
            "samples_per_step": self._samples_per_step(),
            "resumable": not self.args.save_only_model,
        }
        return facts if self._order is None else {**facts, "order": self._order.facts()}

    def _samples_per_step(self) -> int:
        args = self.args
        return self._train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _check_same_order(self, checkpoint: str) -> None:
        saved, now = read_seal(checkpoint), self._facts()
        if not (self.args.ignore_data_skip or self.args.auto_find_batch_size):
            what = {"samples_per_step": "batch size x accumulation x processes", "order": "order of the data"}
            differ = [
                f"{text} was {saved.get(name)}, is {now.get(name)}"
                for name, text in what.items()
                if saved.get(name) != now.get(name)
            ]
            if differ:
                raise TrainingError(
                    f"the data cannot go on where {checkpoint} left them: {'; '.join(differ)}. Resume with the same "
                    "dataset, seed and samples a step, or pass --ignore_data_skip to begin with the data anew"
                )
        if saved["processes"] != now["processes"] and self.args.should_log:
            logger.warning(
                "%s was saved by %d processes and goes on with %d: the data go on where they were, but random numbers "
                "(dropout) are others than without the interruption",
                *(checkpoint, saved["processes"], now["processes"]),
            )

    def _get_train_sampler(self, *args, **kwargs):
        return self._order

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer asks whether it is done after a step only, so a run resumed from its last checkpoint would go too far.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As Trainer's, with random numbers of its own: what comes before it does not matter, nor does it to the rest."""
        with kept_randomness():
            seed_all([self.args.seed])
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy under another name first, then move it into the folder."""
        folder = Path(output_dir or str(self.args.output_dir))
        if UNFINISHED in folder.parts:
            super().save_model(str(folder), _internal_call=True)
            return
        staging = folder / UNFINISHED / "policy"
        with saving("the policy", folder):
            self._make(staging)
            super().save_model(str(staging), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_in(staging, folder)
                _remove_if_empty(folder / UNFINISHED)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(super()._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        staging = folder / UNFINISHED / target.name
        with saving(f"the checkpoint of step {self.state.global_step}", folder):
            self._make(staging)
            try:
                self._write_checkpoint(model, trial, staging, target)
            finally:
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)  # gone already if it was published
                    _remove_if_empty(folder / UNFINISHED)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(target))

    def _write_checkpoint(self, model, trial, staging: Path, target: Path) -> None:
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        write_json(staging / _sums_file(self.args.process_index), self.sums())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = None
            if self.state.best_global_step:
                best = target.with_name(f"checkpoint-{self.state.best_global_step}")
                if best == target or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
                    self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            seal(staging, {"step": self.state.global_step, **self._facts()})
            publish(staging, target)
            drop_old(target.parent, self.args.save_total_limit, {target} if best is None else {target, best})
        self.accelerator.wait_for_everyone()

    def _make(self, staging: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # else it is not whole yet; `_save_checkpoint` publishes it afterwards
            super()._push_from_checkpoint(checkpoint_folder)


class _GoOn(TrainerCallback):
    """Brings a resumed trainer to the epoch and the sums of its checkpoint."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer._order is not None and not args.ignore_data_skip:
            # With several processes, a loader that skips batches passes no epoch on to its sampler.
            trainer._order.set_epoch(int(state.epoch or 0))
        if trainer._sums:
            trainer.take_sums(trainer._sums)
            trainer._sums = {}


def _sums_file(process: int) -> str:
    return f"log_sums_{process}.json"


def _is_shuffled(args) -> bool:
    strategy = str(getattr(args, "train_sampling_strategy", "random"))
    if strategy not in ("random", "sequential"):
        raise TrainingError(
            f"train_sampling_strategy is 'random' or 'sequential' here, got {strategy!r}: samples have no lengths before "
            "they are batches"
        )
    return strategy == "random"


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

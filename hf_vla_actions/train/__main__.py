"""`accelerate launch -m hf_vla_actions.train`: see `main`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from torch.utils.data import ConcatDataset
from transformers import HfArgumentParser, IntervalStrategy, set_seed
from transformers.trainer_utils import HubStrategy

from hf_vla_actions.errors import TrainingError, one_line_errors
from hf_vla_actions.models.native import load_outline
from hf_vla_actions.train.arguments import (
    LORA_LEARNING_RATE,
    DataArguments,
    LoraArguments,
    ModelArguments,
    VLATrainingArguments,
)
from hf_vla_actions.train.config_file import ConfigFile, take_config, unknown_option
from hf_vla_actions.train.head_arguments import check_head, check_no_head
from hf_vla_actions.train.head_trainer import check_transfusion
from hf_vla_actions.train.lora import quantized_loading
from hf_vla_actions.train.overfit import overfit_one_batch
from hf_vla_actions.train.parts import mixture_of, parts_of
from hf_vla_actions.train.plan import check_possible, make_plan
from hf_vla_actions.train.recipes import Recipe, asked_recipe, log_differences
from hf_vla_actions.train.record import FILE_NAME as TRAINING_FILE
from hf_vla_actions.train.record import Steps, training_record
from hf_vla_actions.train.run import fine_tune, model_of, prepare_output, write_json
from hf_vla_actions.train.setup import chunk_datasets, config_of, load_policy, open_dataset
from hf_vla_actions.train.summary import summary_of
from hf_vla_actions.train.trainer import taco_loss_of

DESCRIPTION = """\
Fine-tune a vision-language model into a robot policy on a dataset (LeRobot v2.0 to v3.0, or RLDS).

example, LoRA on every GPU of the machine:
  accelerate launch -m hf_vla_actions.train --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset ./my_robot \\
    --output_dir ./policy --use_peft --lora_r 64 --lora_alpha 16 --lora_dropout 0.05 --bf16 \\
    --action_units m m m rad rad rad none --action_kind delta

example, OpenVLA with its published LoRA recipe, first only what it would do:
  accelerate launch -m hf_vla_actions.train --model_name_or_path openvla/openvla-7b --recipe openvla-lora \\
    --dataset ./my_robot --cameras image_0 --output_dir ./policy --dry_run

example, options in a YAML or JSON file (lines such as "lora_r: 64"); those of the command line win:
  hf-vla train config.yaml --learning_rate 1e-4

example, a mixture of datasets, 70 % of the samples from the first:
  accelerate launch -m hf_vla_actions.train --model_name_or_path ./tiny --dataset ./kitchen ./desk \\
    --dataset_weights 0.7 0.3 --output_dir ./policy

example, two processes on CPU:
  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \\
    --dynamo_backend no -m hf_vla_actions.train --model_name_or_path ./tiny --dataset ./my_robot --output_dir ./policy

example, chunks of 8 actions from a head that is trained by flow matching:
  accelerate launch -m hf_vla_actions.train --model_name_or_path ./tiny --dataset ./my_robot --output_dir ./policy \\
    --horizon 8 --head flow --head_width 256 --head_depth 4 --head_heads 4 --head_proprio

example, chunks of 8 actions as FAST tokens that are fitted to the data first:
  accelerate launch -m hf_vla_actions.train --model_name_or_path ./tiny --dataset ./my_robot --output_dir ./policy \\
    --horizon 8 --action_tokenizer fast --fast_scale 20

Without --use_peft all weights are trained. Every option of Transformers' TrainingArguments can be given too.
"""

NOT_GIVEN = object()


class Parser(HfArgumentParser):
    """Says what is wrong in one line, instead of naming every option first."""

    def error(self, message: str):
        """Refuse."""
        raise TrainingError(message)


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Args:
        model: which model.
        data: which dataset.
        lora: which adapter.
        args: how it is trained.
        recipe: the published training it starts from.
        published: options of the recipe.
        config_file: where options were read from.
        options: those of the recipe, the file and the command line, by name.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    args: VLATrainingArguments
    recipe: Recipe | None
    published: dict[str, Any]
    config_file: ConfigFile | None
    options: dict[str, Any]


def parse(argv: Sequence[str]) -> Asked:
    """Read a command line, and the file of options that it may begin with.

    Raises:
        TrainingError: an option that does not exist, or a value that is not possible.
    """
    groups = [ModelArguments, DataArguments, LoraArguments, VLATrainingArguments]
    parser = Parser(
        groups,  # type: ignore[arg-type]
        prog="hf-vla train",
        usage="hf-vla train [CONFIG.yaml | CONFIG.json] [--OPTION VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = [f.name for group in groups for f in fields(group) if f.init]
    argv, config_file = take_config(argv, known)
    asked = asked_recipe(argv)
    recipe, published = (None, {}) if asked is None else asked
    parser.set_defaults(**published)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except TrainingError:
        raise
    except ValueError as error:  # of TrainingArguments, such as bf16 on a device that has none
        raise TrainingError(" ".join(str(error).split())) from None
    for word in rest:
        if word.startswith("--") or rest[0] is word:
            raise TrainingError(unknown_option(word.lstrip("-").partition("=")[0].replace("-", "_"), known))
    model, data, lora, args = parsed
    parser.set_defaults(**dict.fromkeys(known, NOT_GIVEN))
    said = {name for name, value in vars(parser.parse_args(argv)).items() if value is not NOT_GIVEN}
    given = {f.name: getattr(group, f.name) for group in parsed for f in fields(group) if f.name in said}
    return Asked(model, data, lora, args, recipe, published, config_file, {**published, **given})


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Parse the options, fine-tune, save; what is wrong with the options ends in one line and exit status 2."""
    asked = parse(sys.argv[1:] if argv is None else argv)
    args = asked.args
    _refuse_idle(asked)
    _check_head(asked)
    logging.basicConfig(level=args.get_process_log_level(), format="%(levelname)s %(name)s: %(message)s")
    if args.log_level == "passive" and args.should_log:
        logging.getLogger("hf_vla_actions").setLevel(logging.INFO)  # what is fitted and found, before the first step
    if asked.recipe is not None:
        log_differences(asked.recipe, asked.published, (asked.model, asked.data, asked.lora, args))
    if asked.lora.use_peft and not args.learning_rate_was_given:
        args.learning_rate = LORA_LEARNING_RATE
    set_seed(args.seed)
    prepare_output(args)
    if Path(asked.model.model_name_or_path).resolve() == Path(str(args.output_dir)).resolve():
        raise TrainingError("output_dir is the folder of the model itself; train into another one")
    asked.model.dtype = asked.model.dtype or ("auto" if asked.lora.use_peft else "float32")
    parts = [(part, open_dataset(part)) for part in parts_of(asked.data, asked.model)]
    if args.overfit_one_batch and len(parts) > 1:
        raise TrainingError("overfit_one_batch is for one dataset: name one of them")
    for part, dataset in parts:
        check_possible(dataset, part.horizon, part.skip_first)
    return _plan(asked, parts) if args.dry_run else _train(asked, parts)


def _refuse_idle(asked: Asked) -> None:
    """Refuse options that would do nothing, and an evaluation of nothing."""
    idle = [f"--{name}" for name in asked.options if name.startswith("lora_")]
    if idle and not asked.lora.use_peft:
        raise TrainingError(
            f"{', '.join(idle)} without --use_peft: all weights would be trained. Add --use_peft for an adapter, or leave "
            f"{'them' if len(idle) > 1 else 'it'} out"
        )
    _check_hub(asked)
    when = IntervalStrategy(asked.args.eval_strategy).value
    if when != "no" and not asked.data.eval_fraction:
        raise TrainingError(f"--eval_strategy {when} without --eval_fraction: no episode is held out to evaluate on")


def _check_hub(asked: Asked) -> None:
    """Refuse options about the Hub that do nothing, and a push without a token."""
    args = asked.args
    idle = [
        f"--{n}" for n in ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision") if n in asked.options
    ]
    if idle and not args.push_to_hub:
        raise TrainingError(f"{', '.join(idle)} without --push_to_hub true: nothing would be published")
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise TrainingError(
            "--push_to_hub without a token: log in with `hf auth login`, or set HF_TOKEN; or train first and publish with "
            "`hf-vla push`, which checks the policy and writes its card"
        )


def _published(args: VLATrainingArguments) -> str | None:
    """What Transformers' Trainer publishes, as it names the repository; None for nothing."""
    if not args.push_to_hub:
        return None
    named = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    who = {None: "as private as its owner's settings say", True: "private", False: "public"}[args.hub_private_repo]
    strategy = HubStrategy(args.hub_strategy).value
    what = "at the end" if strategy == "end" else f"at each save and at the end ({strategy})"
    return f"{named if '/' in named else named + ' of the owner of the token'}, {who}, {what}, unchecked"


def _check_head(asked: Asked) -> None:
    """Refuse options about a head that nothing has, or that do not go together."""
    args, mode = asked.args, asked.data.norm_mode
    idle = asked.model.said()
    idle |= {} if args.transfusion_weight is None else {"--transfusion_weight": args.transfusion_weight}
    idle |= {"--head_insulate": True} if args.head_insulate else {}
    idle |= {} if args.head_learning_rate is None else {"--head_learning_rate": args.head_learning_rate}
    if asked.model.head is not None:
        check_head(asked.model, mode, weighted=args.transfusion_weight is not None)
    elif idle or mode == "normal":
        old = config_of(asked.model.model_name_or_path)
        if old is None or old.head is None:
            check_no_head(idle, mode)


def _load(asked: Asked, parts, model_args: ModelArguments, **options: Any) -> tuple[Any, Any, Any, list[str]]:
    """The policy, what it is trained and evaluated on, and the `unnorm_key` of each dataset."""
    (data, dataset), *others = parts
    options |= quantized_loading(asked.lora, asked.args)
    policy, key = load_policy(model_args, data, dataset, asked.args.seed, others=others, **options)
    horizon = policy.action_config.horizon
    history = 0 if policy.action_config.head is None else policy.action_head.window - 1
    if not others:
        return policy, *chunk_datasets(dataset, data, horizon, asked.args.seed, history), [key]
    train_dataset, eval_dataset = mixture_of(parts, asked.data.dataset_weights, horizon, asked.args.seed, history)
    return policy, train_dataset, eval_dataset, [part.unnorm_key for part in train_dataset.parts]


def _train(asked: Asked, parts) -> int:
    args = asked.args
    policy, train_dataset, eval_dataset, keys = _load(asked, parts, asked.model)
    key = keys[0] if len(keys) == 1 else keys
    if args.overfit_one_batch:
        return overfit_one_batch(policy, train_dataset, args, lora=asked.lora, unnorm_key=keys[0])
    steps = Steps()
    _, metrics = fine_tune(
        policy, train_dataset, args, lora=asked.lora, eval_dataset=eval_dataset, unnorm_key=key, callbacks=[steps]
    )
    if args.process_index == 0:
        record = training_record(
            asked.options,
            [asked.model, asked.data, asked.lora, args],
            recipe=asked.recipe,
            config_file=asked.config_file,
            steps=steps.done,
            unnorm_key=key,
        )
        write_json(Path(str(args.output_dir)) / TRAINING_FILE, record)
        sys.stdout.write(f"{summary_of(metrics, policy.action_config, keys)}saved to {args.output_dir}\n")
    return 0


def _plan(asked: Asked, parts) -> int:
    """Write what the training would do. Everything is checked as it would be, on a model without weights."""
    args, model_args = asked.args, asked.model
    if model_args.action_tokenizer == "vq":
        model_args = replace(model_args, vq_steps=1)  # how well it fits changes no number of the plan
    lora = replace(asked.lora, lora_init=None)  # some ways to start need the weights
    policy, chunks, held_out, keys = _load(asked, parts, model_args, load=load_outline)
    if isinstance(held_out, dict):
        held_out = ConcatDataset(list(held_out.values()))
    taco_loss_of(policy.action_config, args, keys)
    check_transfusion(policy.action_config, args)
    model = model_of(policy, args, lora)
    plans = [
        make_plan(model, policy, key, dataset, chunks, held_out, args, lora, skip_first=part.skip_first)
        for key, (part, dataset) in zip(keys, parts, strict=True)
    ]
    shares = dict(zip(keys, chunks.shares.tolist(), strict=True)) if len(keys) > 1 else {}
    plan = replace(plans[0], datasets=tuple(report for each in plans for report in each.datasets), shares=shares)
    published = _published(args)
    if args.process_index == 0:
        sys.stdout.write(plan.text())
        sys.stdout.write("" if published is None else f"publishes: {published} (hf-vla push checks it first)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

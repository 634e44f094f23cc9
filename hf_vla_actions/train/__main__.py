"""`accelerate launch -m hf_vla_actions.train`: see `main`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from transformers import HfArgumentParser, set_seed

from hf_vla_actions.errors import TrainingError, one_line_errors
from hf_vla_actions.train.arguments import (
    LORA_LEARNING_RATE,
    DataArguments,
    LoraArguments,
    ModelArguments,
    VLATrainingArguments,
)
from hf_vla_actions.train.lora import quantized_loading
from hf_vla_actions.train.recipes import asked_recipe, log_differences
from hf_vla_actions.train.run import fine_tune, prepare_output
from hf_vla_actions.train.setup import chunk_datasets, load_policy, open_dataset

DESCRIPTION = """\
Fine-tune a vision-language model into a robot policy on a dataset (LeRobot v2.0 to v3.0, or RLDS).

example, LoRA on every GPU of the machine:
  accelerate launch -m hf_vla_actions.train --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset ./my_robot \\
    --output_dir ./policy --use_peft --lora_r 64 --lora_alpha 16 --lora_dropout 0.05 --bf16 \\
    --action_units m m m rad rad rad none --action_kind delta

example, OpenVLA with its published LoRA recipe:
  accelerate launch -m hf_vla_actions.train --model_name_or_path openvla/openvla-7b --recipe openvla-lora \\
    --dataset ./my_robot --cameras image_0 --output_dir ./policy

example, two processes on CPU:
  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \\
    --dynamo_backend no -m hf_vla_actions.train --model_name_or_path ./tiny --dataset ./my_robot --output_dir ./policy

example, chunks of 8 actions as FAST tokens that are fitted to the data first:
  accelerate launch -m hf_vla_actions.train --model_name_or_path ./tiny --dataset ./my_robot --output_dir ./policy \\
    --horizon 8 --action_tokenizer fast --fast_scale 20

Without --use_peft all weights are trained. Every option of Transformers' TrainingArguments can be given too.
"""


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Parse the options, fine-tune, save; what is wrong with the options ends in one line and exit status 2."""
    from argparse import RawDescriptionHelpFormatter

    parser = HfArgumentParser(
        [ModelArguments, DataArguments, LoraArguments, VLATrainingArguments],  # type: ignore[list-item]
        prog="hf-vla train",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    argv = sys.argv[1:] if argv is None else argv
    asked = asked_recipe(argv)
    if asked is not None:
        parser.set_defaults(**asked[1])
    model_args, data_args, lora_args, args = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(level=args.get_process_log_level(), format="%(levelname)s %(name)s: %(message)s")
    if args.log_level == "passive" and args.should_log:
        logging.getLogger("hf_vla_actions").setLevel(logging.INFO)  # what is fitted and found, before the first step
    if asked is not None:
        log_differences(*asked, (model_args, lora_args, args))
    if lora_args.use_peft and not args.learning_rate_was_given:
        args.learning_rate = LORA_LEARNING_RATE
    set_seed(args.seed)
    prepare_output(args)
    if Path(model_args.model_name_or_path).resolve() == Path(str(args.output_dir)).resolve():
        raise TrainingError("output_dir is the folder of the model itself; train into another one")
    dataset = open_dataset(data_args)
    model_args.dtype = model_args.dtype or ("auto" if lora_args.use_peft else "float32")
    policy, key = load_policy(model_args, data_args, dataset, args.seed, **quantized_loading(lora_args, args))
    train_dataset, eval_dataset = chunk_datasets(dataset, data_args, policy.action_config.horizon, args.seed)
    fine_tune(policy, train_dataset, args, lora=lora_args, eval_dataset=eval_dataset, unnorm_key=key)
    return 0


if __name__ == "__main__":
    sys.exit(main())

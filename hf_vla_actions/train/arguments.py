"""The options of `hf_vla_actions.train`, as Transformers' argument parser reads them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.train.head_arguments import HeadArguments
from hf_vla_actions.train.recipes import RECIPES

LORA_INITS, NITER = ("gaussian", "orthogonal", "olora", "pissa"), re.compile("pissa_niter_[1-9][0-9]*")
"""Those of PEFT that need the weights at most; EVA, CorDA and LoRA-GA start from data, LoftQ from a quantization."""
FULL_LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 5e-4
HEAD_LEARNING_RATE = 1e-4  # SmolVLA's, whose expert begins at random too


@dataclass
class ModelArguments(HeadArguments):
    """What is trained, and how actions become tokens."""

    model_name_or_path: str = field(
        metadata={"help": "Model of the Hub or folder: a vision-language model, a text-only one, or a policy."}
    )
    recipe: str | None = field(
        default=None,
        metadata={
            "help": "Start from a published training: 'openvla-lora' (rank 32, alpha 16, learning rate 5e-4, every linear "
            "layer), 'openvla-full' (2e-5), 'robovlms-lora' (rank 64, alpha 16, 2e-5, chunks of 10), 'robovlms-full' (with "
            "--freeze_vision and --freeze_text_embeddings as its switches), 'fast-default' (FAST tokens and an adapter; "
            "give --horizon). 'oft-libero' and 'oft-aloha' say how such checkpoints are trained, which this command "
            "cannot. bfloat16 where the device can. Options that are given win over it.",
            "choices": list(RECIPES),
        },
    )
    n_bins: int | None = field(
        default=None, metadata={"help": "Bins a dimension, and action tokens of the vocabulary. Default: 256."}
    )
    action_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "'uniform' (bins), 'fast' or 'vq' (fitted to the training episodes first), or the folder of a FAST or VQ "
            "tokenizer, as `hf-vla fit-fast` and `hf-vla fit-vq` write them (or of the reference's FAST). Default: uniform."
        },
    )
    fast_scale: float | None = field(
        default=None,
        metadata={
            "help": "For --action_tokenizer fast: steps in a coefficient of 1; finer and longer. Default: 10. `hf-vla "
            "fit-fast --max-error 2mm` finds one for a wanted precision."
        },
    )
    fast_vocab: int | None = field(
        default=None, metadata={"help": "For --action_tokenizer fast: codes at most. Default: 1024."}
    )
    vq_steps: int | None = field(
        default=None, metadata={"help": "For --action_tokenizer vq: batches to learn from. Default: 3000."}
    )
    action_layout: str | None = field(
        default=None,
        metadata={
            "help": "Where action tokens stand: 'append' adds new ones behind the vocabulary, 'per_dimension' does so for "
            "each dimension of the action, 'tail' overwrites its last ids as OpenVLA does (with OpenVLA's bins), 'spare' "
            "takes ids that it does not use, from --spare_from on, 'pi0_fast' those of pi0-FAST in PaliGemma, 'named' the "
            "tokens that the model has by --named_tokens. Default: append.",
            "choices": ["append", "per_dimension", "tail", "spare", "pi0_fast", "named"],
        },
    )
    named_tokens: str | None = field(
        default=None,
        metadata={"help": "For --action_layout named: their pattern, such as '<robot_action_{}>' (starVLA)."},
    )
    spare_from: int | None = field(
        default=None,
        metadata={"help": "For --action_layout spare: the first of --n_bins consecutive ids that nothing else uses."},
    )
    chat: bool = field(
        default=True, metadata={"help": "Put the prompt into the chat template of the model, if it has one."}
    )
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "What the model sees; must contain {instruction}. Default: OpenVLA's prompt; PI0's own for PI0."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Weights are loaded as this: 'auto', 'float32', 'bfloat16', 'float16'. Default: float32 where all "
            "of them are trained (small steps vanish in half precision; add --bf16 for speed), auto with LoRA."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'sdpa', 'eager', 'flash_attention_2'; the model's own default if not given."}
    )


@dataclass
class DataArguments:
    """Which datasets, and what their numbers mean.

    A list of one is the same as its one value, and is kept as that.
    """

    dataset: list[str] = field(
        metadata={"help": "Folder of a dataset: LeRobot v2.0 to v3.0, or RLDS. Several are trained on as a mixture."}
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "For several datasets: the share of the samples that each gives, such as 0.7 0.2 0.1. Default: by "
            "their sizes."
        },
    )
    unnorm_key: list[str] | None = field(
        default=None,
        metadata={
            "help": "Name of the statistics in the checkpoint, one for each dataset. Default: the folder's name."
        },
    )
    cameras: list[str] | None = field(
        default=None, metadata={"help": "Cameras to use, such as image_0. Default: all."}
    )
    action_key: str = field(
        default="action",
        metadata={
            "help": "Column of the actions; several of an RLDS dataset with commas, to be joined in this order."
        },
    )
    transform: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to do with the dataset's numbers first (several datasets: one for each, 'none' for nothing, or "
            "one for all): bridge_orig (as OpenVLA: first step dropped, gripper "
            "decided, actions from reached states), bridge_orig_commanded, fractal, libero, calvin, calvin_metric, or your "
            "own as module:name. It says what the actions mean, so leave out --action_* and --gripper*; in a mixture they are "
            "about the datasets with 'none'."
        },
    )
    horizon: int | None = field(
        default=None, metadata={"help": "Actions predicted at once (length of a chunk). Default: 1."}
    )
    skip_first: int = field(
        default=0,
        metadata={"help": "Steps left out at the start of every episode (bridge: 1, its first action is 0)."},
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of the episodes that is held out and evaluated on."}
    )
    augment_limits: float = field(
        default=0.0,
        metadata={
            "help": "Share of the chunks drawn whose actions are those of a robot under a random step limit, between the "
            "20th and 100th percentile of the data's moves: the same path in smaller steps. Deltas only. The pictures "
            "stay what they are, so this teaches slow actions, not what a slowed robot sees."
        },
    )
    action_names: list[str] | None = field(
        default=None, metadata={"help": "Name of each dimension. Default: those of the dataset."}
    )
    action_units: list[str] | None = field(
        default=None,
        metadata={"help": "Unit of each dimension, 'none' where there is none, such as m m m rad rad rad none."},
    )
    action_kind: str | None = field(
        default=None,
        metadata={
            "help": "'delta' if actions are changes, 'absolute' if they are targets.",
            "choices": ["delta", "absolute"],
        },
    )
    action_frame: str | None = field(
        default=None,
        metadata={"help": "Axes of the actions.", "choices": ["world", "base", "tcp", "joint"]},
    )
    gripper: str | None = field(
        default=None,
        metadata={
            "help": "Name or index of the gripper's dimension, 'none' if there is none. Default: 'gripper' if so named."
        },
    )
    gripper_open: float = field(default=1.0, metadata={"help": "Value of the open gripper."})
    gripper_closed: float = field(default=0.0, metadata={"help": "Value of the closed gripper."})
    gripper_binary: bool = field(
        default=True, metadata={"help": "Send only these two values to the robot, whichever is nearer."}
    )
    norm_mode: str = field(
        default="bounds_q99",
        metadata={
            "help": "What becomes [-1, 1]: 1st to 99th percentile, or min to max; or 'normal', mean 0 and standard "
            "deviation 1, for a continuous head.",
            "choices": ["bounds_q99", "bounds", "normal"],
        },
    )

    def __post_init__(self):
        for name in ("dataset", "unnorm_key", "transform"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and len(value) == 1:
                setattr(self, name, value[0])


@dataclass
class LoraArguments:
    """LoRA instead of full fine-tuning."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter and the rows of the action tokens."})
    lora_r: int = field(default=32, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter is alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get an adapter. Default: all linear ones."}
    )
    lora_vision: bool = field(
        default=False, metadata={"help": "Adapt the vision tower and the projector too; they are left out otherwise."}
    )
    lora_init: str | None = field(
        default=None,
        metadata={
            "help": "How the adapter starts: 'gaussian', 'orthogonal', 'olora', 'pissa' or 'pissa_niter_16'. Default: PEFT's "
            "own. It changes nothing at first."
        },
    )
    lora_action_rows: bool = field(
        default=True,
        metadata={
            "help": "Train the rows of the action tokens beside the adapter. Without it the layers that hold them must be "
            "among --lora_target_modules, or be trained already."
        },
    )
    lora_rslora: bool = field(
        default=False,
        metadata={
            "help": "Scale the adapter by alpha / sqrt(r) (rsLoRA), so that large ranks learn as fast as small."
        },
    )
    lora_dora: bool = field(
        default=False,
        metadata={"help": "Train the lengths of the weights' rows apart from their directions (DoRA). Slower."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Train the adapter on 4-bit weights (QLoRA: NF4, double quantization; needs bitsandbytes). Embeddings "
            "and the output layer keep their precision. `hf-vla merge` asks into which weights the adapter shall go."
        },
    )

    def __post_init__(self):
        start = self.lora_init
        if start is not None and start not in LORA_INITS and NITER.fullmatch(start) is None:
            raise TrainingError(
                f"--lora_init {start}: an adapter starts as one of {list(LORA_INITS)} or pissa_niter_N; leave it out for "
                "PEFT's own"
            )
        if start == "orthogonal" and self.lora_r % 2:
            raise TrainingError(f"--lora_init orthogonal takes an even --lora_r, got {self.lora_r}")
        if self.lora_r < 1:
            raise TrainingError(f"lora_r is a rank of at least 1, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise TrainingError(f"lora_dropout is a share from 0 to below 1, got {self.lora_dropout}")
        if not self.use_peft:
            wants = [name for name in ("lora_rslora", "lora_dora", "load_in_4bit") if getattr(self, name)]
            if wants:
                why = (
                    "4-bit weights cannot be trained themselves"
                    if wants == ["load_in_4bit"]
                    else "there is no adapter"
                )
                raise TrainingError(f"{', '.join('--' + name for name in wants)} without --use_peft: {why}")


@dataclass
class VLATrainingArguments(TrainingArguments):
    """Transformers' TrainingArguments with the defaults of a policy."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the policy and its checkpoints."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: 5e-4 with LoRA, 2e-5 without."}
    )
    freeze_vision: bool = field(
        default=False, metadata={"help": "In full fine-tuning, keep the vision tower and the projector as they are."}
    )
    freeze_language_model: bool = field(
        default=False,
        metadata={
            "help": "In full fine-tuning, keep the layers of the language model as they are; embeddings, output layer, "
            "vision tower and projector are trained unless frozen too."
        },
    )
    freeze_text_embeddings: bool = field(
        default=False,
        metadata={
            "help": "In full fine-tuning, keep the input and output embeddings as they are, but for the rows of the "
            "action tokens."
        },
    )
    taco_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Add this many times the expected squared violation of constraints (in real units squared, so 1e3 to "
            "1e5 for meters) to the cross entropy, so that the policy itself learns to keep them."
        },
    )
    taco_constraints: str | None = field(
        default=None,
        metadata={
            "help": "For --taco_loss_weight: constraints such as 'Range(x, -0.005, 0.005); Speed([x, y], 0.02)'. Default: "
            "the permanent limits of the policy."
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of a continuous head. Default: that of the model, but at least 1e-4."},
    )
    head_insulate: bool = field(
        default=False,
        metadata={"help": "No gradient goes from the head into the model (knowledge insulation)."},
    )
    transfusion_weight: float | None = field(
        default=None,
        metadata={
            "help": "With --head and --action_tokenizer: weight of the head's loss beside the tokens'. Default: 1."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Say what would be done, and stop before any weight is loaded: trained numbers of each part, memory, "
            "steps, tokens a sample, and what is odd about the dataset."
        },
    )
    overfit_one_batch: bool = field(
        default=False,
        metadata={
            "help": "An early check: train on one batch again and again (--max_steps, else 300), then ask the policy for it. "
            "Ends with a verdict, and with exit status 1 if it has not learned it by heart."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'true': go on from the last whole checkpoint of --output_dir as if nothing had happened, or the folder "
            "of a checkpoint. Give the options of the training again."
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Train into a folder that is not empty."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept false: pictures are columns too."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    report_to: str = field(default="none", metadata={"help": "Where to log: 'none', 'tensorboard', 'wandb', ..."})

    def __post_init__(self):
        if not self.output_dir:
            raise TrainingError("nowhere to save the policy: pass --output_dir")
        if not (math.isfinite(self.taco_loss_weight) and self.taco_loss_weight >= 0):
            raise TrainingError(f"taco_loss_weight is a number of at least 0, got {self.taco_loss_weight}")
        weight = self.transfusion_weight
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            raise TrainingError(f"transfusion_weight is a number of at least 0, got {weight}")
        rate = self.head_learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise TrainingError(f"head_learning_rate is a number above 0, got {rate}")
        if self.taco_constraints is not None and not self.taco_loss_weight:
            raise TrainingError("taco_constraints do nothing without a weight: pass --taco_loss_weight, such as 1e4")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is a whole number of at least 1, got {getattr(self, name)}")
        self.label_names = ["labels"]
        self.learning_rate_was_given = self.learning_rate is not None
        self.learning_rate = self.learning_rate if self.learning_rate_was_given else FULL_LEARNING_RATE
        super().__post_init__()

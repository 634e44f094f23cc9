"""What a training would do, found out before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from hf_vla_actions.data.sanity import SanityReport, check_numbers
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.families import OPENVLA, family_of
from hf_vla_actions.models.head_collator import HeadCollator
from hf_vla_actions.models.head_files import PREFIX
from hf_vla_actions.train.arguments import LoraArguments, VLATrainingArguments
from hf_vla_actions.train.collator import IGNORED, ActionCollator
from hf_vla_actions.train.lora import cuts_weights
from hf_vla_actions.train.memory import FORMULA, Batch, Memory, in_vision, memory_of


@dataclass(frozen=True)
class Part:
    """Numbers of one part of the policy.

    Args:
        name: which.
        trained: numbers that change.
        total: numbers there are, with the adapter's.
    """

    name: str
    trained: int
    total: int


@dataclass(frozen=True)
class Tokens:
    """Of one sample.

    Args:
        text: of the prompt.
        image: of all pictures.
        action: of the chunk and the closing token; with a continuous head its learned embeddings.
    """

    text: int
    image: int
    action: int
    what: str = "action and end"

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.image + self.action


@dataclass(frozen=True)
class Steps:
    """How long it trains.

    Args:
        samples: of one epoch.
        batch: samples of one optimizer step, over all processes.
        an_epoch: optimizer steps in an epoch.
        total: optimizer steps.
    """

    samples: int
    batch: int
    an_epoch: int
    total: int


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that `--dry_run` says.

    Args:
        how: full fine-tuning, or which adapter.
        parts: of the policy.
        memory: on one device.
        tokens: of the sample with the longest instruction.
        steps: of the training.
        datasets: what is odd about the numbers.
        held_out: chunks to evaluate on.
        shares: of the samples that each dataset of a mixture gives, by its `unnorm_key`.
    """

    how: str
    parts: tuple[Part, ...]
    memory: Memory
    tokens: Tokens
    steps: Steps
    datasets: tuple[SanityReport, ...]
    held_out: int
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Numbers that change."""
        return sum(part.trained for part in self.parts)

    @property
    def total(self) -> int:
        """Numbers there are."""
        return sum(part.total for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        lines = [report.text() for report in self.datasets]
        lines.append(f"{self.how}; what is trained:")
        whole = (*self.parts, Part("all", self.trained, self.total))
        lines += [
            f"  {p.name:<18}{p.trained:>16,} of {p.total:>16,}{p.trained / p.total:>10.3%}" for p in whole if p.total
        ]
        t, s, m = self.tokens, self.steps, self.memory
        lines.append(f"tokens a sample: {t.total} ({t.text} text, {t.image} image, {t.action} {t.what})")
        held_out = f", {self.held_out:,} held out" if self.held_out else ""
        lines.append(
            f"steps: {s.total:,} of {s.batch} samples, {s.an_epoch:,} an epoch of {s.samples:,} samples{held_out}"
        )
        if self.shares:
            lines.append("mixture: " + ", ".join(f"{share:.1%} {name}" for name, share in self.shares.items()))
        values = ", ".join(f"{name} {_size(value)}" for name, value in asdict(m).items())
        lines.append(f"memory of one device, about {_size(m.total)}: {values}")
        lines.append(f"  ({FORMULA})")
        return "\n".join(lines) + "\n"


def check_possible(dataset, horizon: int | None, skip_first: int) -> None:
    """Refuse chunks that no episode is long enough for: all of them would end in repeated actions.

    Args:
        dataset: the reader.
        horizon: actions in a chunk; None for what the policy says.
        skip_first: steps left out at the start of every episode.

    Raises:
        TrainingError: no episode has that many steps.
    """
    longest = max(len(episode) for episode in dataset.episodes) - skip_first
    if horizon is not None and horizon > longest:
        raise TrainingError(
            f"--horizon {horizon} is longer than every episode of {dataset.root}: the longest has {longest} steps, and every "
            "chunk would end in repeated actions"
        )


def make_plan(
    model,
    policy,
    unnorm_key: str,
    dataset,
    chunks,
    held_out,
    args: VLATrainingArguments,
    lora: LoraArguments,
    *,
    skip_first: int = 0,
) -> TrainingPlan:
    """Find out what a training would do.

    Args:
        model: what would be trained, after freezing or with its adapter; "meta" tensors do.
        policy: the policy in it.
        unnorm_key: of the dataset.
        dataset: the reader.
        chunks: ChunkDataset to train on.
        held_out: ChunkDataset to evaluate on, or None.
        args: of the training.
        lora: of the adapter.
        skip_first: steps of each episode of this dataset that are left out.
    """
    family = family_of(policy.config)
    tokens, batch = _tokens(policy, unnorm_key, chunks, args.train_batch_size)
    space, stats = policy.action_config.space(unnorm_key), policy.action_config.stats(unnorm_key)
    report = check_numbers(
        dataset.actions,
        dataset.episodes,
        space,
        rate_hz=dataset.fps,
        source=str(dataset.root),
        states=dataset.states,
        timestamps=dataset.timestamps,
        # Those of this very dataset; its 1st to 99th percentile is what the report takes by itself.
        stats=stats if stats.mode == "bounds" and stats.horizon is None else None,
        skip_first=skip_first,
    )
    return TrainingPlan(
        how=_how(args, lora),
        parts=count_parts(model, policy, args),
        memory=memory_of(
            model,
            batch,
            vision=family.vision_modules,
            four_bit=lora.load_in_4bit,
            optimizer=str(getattr(args.optim, "value", args.optim)),
            half=args.bf16 or args.fp16 or policy.dtype.itemsize == 2,
            checkpointing=bool(args.gradient_checkpointing),
            layers=policy.config.get_text_config().num_hidden_layers,
            parts=args.world_size if cuts_weights() else 1,
            autocast=args.bf16 or args.fp16,
            mask_bytes=4 if args.device.type == "cpu" else 1,
            copies_of_gradients=2 if args.world_size > 1 and not cuts_weights() else 1,
        ),
        tokens=tokens,
        steps=steps_of(len(chunks), args),
        datasets=(report,),
        held_out=0 if held_out is None else len(held_out),
    )


def count_parts(model: nn.Module, policy, args: VLATrainingArguments) -> tuple[Part, ...]:
    """Trained and total numbers of each part; an adapter belongs to the part it changes.

    Args:
        model: what is trained, maybe a PeftModel.
        policy: the policy in it.
        args: say whether only the action tokens' rows of the embeddings are trained.
    """
    vision = family_of(policy.config).vision_modules
    places = {"vision tower": vision[:1], "projector": vision[1:]}
    embeddings = {
        "input embeddings": _path(policy, policy.get_input_embeddings()),
        "output layer": _path(policy, policy.get_output_embeddings()),
    }
    vocabulary = policy.action_config.vocabulary
    rows = None if vocabulary is None else vocabulary.token_ids.size
    counts = {name: [0, 0] for name in ("vision tower", "projector", "language model", *embeddings, "action head")}
    for name, parameter in model.named_parameters():
        part = "action head" if PREFIX in name else None
        part = part or next((part for part, modules in places.items() if in_vision(name, modules)), None)
        part = part or next((p for p, path in embeddings.items() if f".{path}." in f".{name}"), "language model")
        trained = parameter.numel() if parameter.requires_grad else 0
        if args.freeze_text_embeddings and part in embeddings and model is policy and rows is not None:
            trained = rows * parameter[0].numel()
        counts[part][0] += trained
        counts[part][1] += parameter.numel()
    return tuple(Part(name, *count) for name, count in counts.items() if count[1])


def steps_of(samples: int, args: VLATrainingArguments) -> Steps:
    """Optimizer steps as Transformers' Trainer counts them.

    Args:
        samples: of one epoch, over all processes.
        args: batch, accumulation, processes, epochs or steps.
    """
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(whole(samples / args.train_batch_size) / args.world_size)
    an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    return Steps(samples, args.train_batch_size * args.gradient_accumulation_steps * args.world_size, an_epoch, total)


def _how(args: VLATrainingArguments, lora: LoraArguments) -> str:
    if not lora.use_peft:
        frozen = [n for n in ("vision", "language_model", "text_embeddings") if getattr(args, f"freeze_{n}")]
        return "full fine-tuning" + (f" without {', '.join(frozen).replace('_', ' ')}" if frozen else "")
    root = "sqrt(r)" if lora.lora_rslora else "r"
    scale = lora.lora_alpha / (math.sqrt(lora.lora_r) if lora.lora_rslora else lora.lora_r)
    kind = ("QLoRA (NF4)" if lora.load_in_4bit else "LoRA") + (", DoRA" if lora.lora_dora else "")
    return f"{kind} of rank {lora.lora_r}, scaled by alpha / {root} = {scale:.3g}"


def _tokens(policy, unnorm_key: str, chunks, batch_size: int) -> tuple[Tokens, Batch]:
    """Lengths of the sample whose instruction is longest, as the collator makes it."""
    texts: dict[str, int] = {}
    for i in range(0, len(chunks), max(1, len(chunks) // 16)):
        texts.setdefault(chunks[i]["instruction"], i)
    sample = chunks[texts[max(texts, key=len)]]
    if policy.action_config.head is not None:
        return _tokens_of_head(
            policy, HeadCollator(policy.prompts, unnorm_key, window=policy.action_head.window)([sample]), batch_size
        )
    made = ActionCollator(policy.prompts, unnorm_key)([sample])
    action = made["labels"].shape[1]
    family = family_of(policy.config)
    patches = _patches(policy, family.vision_modules, made)
    image_id = getattr(policy.config, "image_token_id", getattr(policy.config, "image_token_index", None))
    length = made["input_ids"].shape[1]
    # OpenVLA puts its patches between the tokens inside the model; the others have a place for each in the prompt.
    image = patches if family == OPENVLA else int((made["input_ids"] == image_id).sum()) if image_id is not None else 0
    text = length - action - (0 if family == OPENVLA else image)
    tokens = Tokens(text, image, action)
    return tokens, Batch(batch_size, tokens.total, patches, action + 1)


def _tokens_of_head(policy, made: dict[str, Any], batch_size: int) -> tuple[Tokens, Batch]:
    """The same of a batch of one sample for a continuous head; one with a window reads a prompt for each step."""
    head, looks, family = policy.action_head, len(made["input_ids"]), family_of(policy.config)
    labels = made.get("labels")
    action = head.n_slots if labels is None else int((labels != IGNORED).sum())
    image_id = getattr(policy.config, "image_token_id", getattr(policy.config, "image_token_index", None))
    ids = made["input_ids"][0]
    image = 0 if image_id is None else int((ids == image_id).sum())
    text = len(ids) - image - (0 if labels is None else action)
    what = "action and end" if labels is not None else "of the head"
    tokens = Tokens(text, image, action, what if looks == 1 else f"{what}; {looks} prompts a sample, one a step")
    logits = 0 if labels is None else len(ids)
    patches = _patches(policy, family.vision_modules, made) // looks
    return tokens, Batch(batch_size * looks, tokens.total, patches, logits, head.config.horizon)


def _patches(policy, vision: tuple[str, ...], made: dict[str, Any]) -> int:
    """Patches of the pictures of one sample: numbers of the pictures over those that the patch embeddings read."""
    pixels = made.get("pixel_values")
    if pixels is None:
        return 0
    kernels = [
        math.prod(m.kernel_size) * m.in_channels
        for name, m in policy.named_modules()
        # An adapter of the embedding is made of convolutions too, which read no further patches.
        if isinstance(m, (nn.Conv2d, nn.Conv3d)) and in_vision(name, vision) and ".lora_" not in name
    ]
    return int(pixels.numel() // sum(kernels)) if kernels else 0


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def _path(policy, layer: nn.Module | None) -> str:
    return next((name for name, module in policy.named_modules() if module is layer), "no such layer")

"""Several datasets in one training: the options of each, and the mixture of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_vla_actions.data import ChunkDataset, EpisodeReader
from hf_vla_actions.data.mixture import MixtureDataset
from hf_vla_actions.data.split import split_episodes
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.train.arguments import DataArguments, ModelArguments

DECLARED = ("action_names", "action_units", "action_kind", "action_frame", "gripper")


def parts_of(args: DataArguments, model_args: ModelArguments) -> list[DataArguments]:
    """The options of each dataset that is named.

    Args:
        args: of one dataset, or of several.
        model_args: say how actions become tokens.

    Raises:
        TrainingError: weights, names or transforms that are not as many as the datasets, or an option that is for one
            dataset only.
    """
    folders = [args.dataset] if isinstance(args.dataset, str) else list(args.dataset)
    if args.dataset_weights is not None and len(args.dataset_weights) != len(folders):
        raise TrainingError(
            f"{len(args.dataset_weights)} dataset_weights {args.dataset_weights} for {len(folders)} datasets: give each "
            "dataset one"
        )
    if len(folders) == 1:
        for name in ("unnorm_key", "transform"):
            _spread(name, getattr(args, name), 1)
        return [args]
    if args.augment_limits:
        raise TrainingError("augment_limits is for one dataset, whose moves it measures: leave it out of a mixture")
    if model_args.action_tokenizer in ("fast", "vq"):
        raise TrainingError(
            f"--action_tokenizer {model_args.action_tokenizer} would be fitted to one dataset: fit a tokenizer with `hf-vla "
            f"fit-{model_args.action_tokenizer}` and pass its folder to train on a mixture"
        )
    transforms: list[Any] = [
        None if name == "none" else name for name in _spread("transform", args.transform, len(folders))
    ]
    keys = _spread("unnorm_key", args.unnorm_key, len(folders))
    if isinstance(args.unnorm_key, str):
        raise TrainingError(f"one unnorm_key {args.unnorm_key!r} for {len(folders)} datasets: give each its own")
    # What the options declare is about the datasets whose transform does not say it.
    undeclared: dict[str, Any] = dict.fromkeys(DECLARED) if None in transforms else {}
    return [
        replace(
            args,
            dataset=folder,  # type: ignore[arg-type]
            transform=transform,
            unnorm_key=key,
            dataset_weights=None,
            **(undeclared if transform is not None else {}),
        )
        for folder, transform, key in zip(folders, transforms, keys, strict=True)
    ]


def mixture_of(
    parts: Sequence[tuple[DataArguments, EpisodeReader]],
    weights: Sequence[float] | None,
    horizon: int,
    seed: int,
    history: int = 0,
) -> tuple[MixtureDataset, dict[str, ChunkDataset] | None]:
    """The chunks of several datasets to train on, and those of held-out episodes by `unnorm_key`, or None.

    Args:
        parts: the options of each dataset, and its reader.
        weights: share of the samples that each gives; None for their sizes.
        horizon: actions in a chunk.
        seed: of the split into episodes, and of the order.
        history: steps before the current one that a sample brings along.
    """
    train, held_out = [], {}
    for args, reader in parts:
        key: Any = args.unnorm_key or reader.name
        used, left = split_episodes(reader, args.eval_fraction, seed)
        options: dict[str, Any] = {"skip_first": args.skip_first, "unnorm_key": key, "history": history}
        train.append(ChunkDataset(reader, horizon, episodes=used, **options))
        if left:
            held_out[key] = ChunkDataset(reader, horizon, episodes=left, **options)
    shares = [float(len(chunks)) for chunks in train] if weights is None else weights
    return MixtureDataset(list(zip(train, shares, strict=True)), seed=seed), held_out or None


def _spread(name: str, value: Any, n: int) -> list[Any]:
    """One value for each of n datasets, of one for all or of as many."""
    if value is None or isinstance(value, str):
        return [value] * n
    if len(value) != n:
        raise TrainingError(f"{len(value)} of {name} {list(value)} for {n} dataset(s): give each dataset one")
    return list(value)

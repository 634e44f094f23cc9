"""From the options to the parts of a training run: dataset, action config, policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from hf_vla_actions.actions import ActionSpace, ActionStats, Gripper, NormStats
from hf_vla_actions.actions.units import ANGLES, LENGTHS, is_known
from hf_vla_actions.config import DEFAULT_PROMPT, ActionConfig, ActionTokenizer, check_source
from hf_vla_actions.config import FILE_NAME as ACTION_CONFIG_FILE
from hf_vla_actions.data import ChunkDataset, EpisodeReader, TransformedDataset
from hf_vla_actions.data import open_dataset as open_path
from hf_vla_actions.data.split import split_episodes as split_episodes
from hf_vla_actions.errors import CheckpointError, TrainingError
from hf_vla_actions.models import load_model, to_vla
from hf_vla_actions.models.adapter import share_statistics
from hf_vla_actions.models.embeddings import initialize_rows
from hf_vla_actions.models.families import OPENVLA_TYPE, family_of
from hf_vla_actions.models.head_files import load_head
from hf_vla_actions.models.openvla import action_config_of
from hf_vla_actions.tokenizers import FASTActionTokenizer
from hf_vla_actions.tokenizers.fast_length import code_budget
from hf_vla_actions.tokenizers.vocabulary import numbered
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.augment import SlowedChunks
from hf_vla_actions.train.head_arguments import check_same_head, new_head
from hf_vla_actions.train.recipes import RECIPES
from hf_vla_actions.train.tokens import (
    action_tokenizer_of,
    check_bins,
    check_same_tokenizer,
    check_tokens,
    chunks_of,
    vocabulary_of,
)

logger = logging.getLogger(__name__)


def open_dataset(args: DataArguments) -> EpisodeReader:
    """Open the dataset that the options name."""
    folder: Any = args.dataset
    transform: Any = args.transform
    return open_path(folder, cameras=args.cameras, action_key=args.action_key, transform=transform)


def chunk_datasets(dataset: EpisodeReader, args: DataArguments, horizon: int, seed: int, history: int = 0):
    """The chunks to train on (some of them slowed, with `augment_limits`), and those of held-out episodes or None."""
    train, held_out = split_episodes(dataset, args.eval_fraction, seed)
    chunks: list[Any] = [
        ChunkDataset(dataset, horizon, episodes=episodes, skip_first=args.skip_first, history=history)
        if episodes
        else None
        for episodes in (train, held_out)
    ]
    if args.augment_limits:
        return SlowedChunks(chunks[0], space_of(dataset, args), args.augment_limits), chunks[1]
    return chunks[0], chunks[1]


def space_of(dataset: EpisodeReader, args: DataArguments) -> ActionSpace:
    """The action space that the dataset and the options declare; what nobody says stays unknown."""
    if isinstance(dataset, TransformedDataset):
        declared = (args.action_names, args.action_units, args.action_kind, args.action_frame, args.gripper)
        if any(declared):
            raise TrainingError(
                f"the transform {dataset.transform.name} says what the actions mean; leave out --action_names, "
                "--action_units, --action_kind, --action_frame and --gripper"
            )
        return dataset.space
    names = args.action_names or dataset.action_names
    if names is None:
        if args.action_units or args.action_kind or args.action_frame or args.gripper not in (None, "none"):
            raise TrainingError(f"the dataset does not name its {dataset.dof} dimensions; pass --action_names")
        return ActionSpace.unnamed(dataset.dof)
    if len(names) != dataset.dof:
        raise TrainingError(f"{len(names)} action_names {list(names)} for actions of {dataset.dof} dimensions")
    units = None
    if args.action_units is not None:
        units = [None if unit.lower() == "none" else unit for unit in args.action_units]
        unknown = [unit for unit in units if unit is not None and not is_known(unit)]
        if unknown:
            raise TrainingError(
                f"--action_units: nobody knows {', '.join(map(repr, unknown))}; there are {[*LENGTHS, *ANGLES]}, multiples such "
                "as '0.05 m', these in a time such as 'm/s', and 'none'"
            )
    gripper = _gripper(list(names), args)
    delta: list[bool | None] = [None if args.action_kind is None else args.action_kind == "delta"] * len(names)
    if gripper is not None and delta[0] is not None:
        delta[ActionSpace(names).index(gripper.dim)] = False
    return ActionSpace(names, units, tuple(delta), args.action_frame, gripper, dataset.fps)


def _gripper(names: list[str], args: DataArguments) -> Gripper | None:
    if args.gripper == "none" or (args.gripper is None and "gripper" not in names):
        return None
    dim = args.gripper or "gripper"
    dim = names[int(dim)] if dim.isdigit() and int(dim) < len(names) else dim
    return Gripper(dim, args.gripper_open, args.gripper_closed, args.gripper_binary)


def check_gripper(values: np.ndarray, gripper: Gripper) -> None:
    """Refuse data that contradict the declared convention of the gripper: it would never open, or never close.

    Args:
        values: (n,) the gripper's column.
        gripper: what was declared.
    """
    low, high = float(values.min()), float(values.max())
    first, last = sorted((gripper.open, gripper.closed))
    slack = 0.05 * (last - first)
    outside = low < first - slack or high > last + slack
    never_there = low != high and high - low < 0.5 * (last - first)
    if outside or never_there:
        raise TrainingError(
            f"the gripper {gripper.dim!r} holds {low:.4g}..{high:.4g}, which does not fit open={gripper.open:g} and "
            f"closed={gripper.closed:g}: pass --gripper_open and --gripper_closed as the data has them, or --gripper none"
        )


def stats_of(
    dataset: EpisodeReader, space: ActionSpace, episodes: list[int], mode: str, skip_first: int = 0
) -> dict[str, Any]:
    """An entry for NormStats from the actions and states of some episodes, without the steps that are left out of them.

    The gripper is not normalized if its two states lie within [-1, 1], where the bins are.
    """
    chosen = set(episodes)
    rows = np.concatenate([np.arange(e.start + skip_first, e.stop) for e in dataset.episodes if e.index in chosen])
    if not rows.size:
        raise TrainingError(
            f"no step is left of {len(chosen)} episodes of {dataset.root} after skip_first={skip_first}"
        )
    mask = np.ones(space.dof, dtype=bool)
    if space.gripper is not None:
        dim = space.index(space.gripper.dim)
        check_gripper(dataset.actions[:, dim], space.gripper)
        mask[dim] = max(abs(space.gripper.open), abs(space.gripper.closed)) > 1
    action = ActionStats.compute(dataset.actions[rows], mask=mask, mode=mode)
    lost = action.constant & (np.asarray(action.min) < np.asarray(action.max))
    if lost.any():
        logger.warning(
            "dimensions %s have the same 1st and 99th percentile and will be held constant; --norm_mode bounds keeps "
            "their rare values",
            [space.names[i] for i in np.flatnonzero(lost)],
        )
    proprio = None if dataset.states is None else ActionStats.compute(dataset.states[rows], mode=mode)
    return {"action": action, "proprio": proprio, "num_trajectories": len(episodes)}


def load_policy(
    model_args: ModelArguments,
    data_args: DataArguments,
    dataset: EpisodeReader,
    seed: int,
    *,
    others: Sequence[tuple[DataArguments, EpisodeReader]] = (),
    load: Callable[..., tuple[Any, Any]] = load_model,
    **load_options: Any,
) -> tuple[Any, str]:
    """Load the model and make it a policy for the dataset; return it with its `unnorm_key`.

    A checkpoint of a policy keeps its action tokens, prompt and horizon, and gains the statistics of the dataset. So
    does a checkpoint of the original OpenVLA, where all of it follows from its `config.json`.

    Args:
        model_args: what to load.
        data_args: what its numbers mean.
        dataset: the dataset.
        seed: of the split into episodes.
        others: more datasets of a mixture, whose statistics and action spaces the policy gets too.
        load: loads model and processor; `models.native.load_outline` for what needs no weights.
        load_options: for the model's `from_pretrained`, such as those of `train.lora.quantized_loading`.

    Raises:
        TrainingError: options contradict each other, the dataset or the checkpoint.
    """
    key: str = data_args.unnorm_key or dataset.name  # type: ignore[assignment]
    space = space_of(dataset, data_args)
    parts = split_episodes(dataset, data_args.eval_fraction, seed)
    entry = stats_of(dataset, space, parts[0], data_args.norm_mode, data_args.skip_first)
    old = config_of(model_args.model_name_or_path)
    action_tokenizer: ActionTokenizer | None = None
    if old is not None:
        check_same_tokenizer(model_args, old)
    elif _type_of(model_args.model_name_or_path) == OPENVLA_TYPE:
        check_bins(model_args)
        if model_args.head is not None:
            raise TrainingError("an OpenVLA model has heads of its own: leave --head out, or take another model")
    elif model_args.head is None or model_args.action_tokenizer is not None:
        check_tokens(model_args, data_args)
        action_tokenizer = action_tokenizer_of(model_args, data_args, dataset, parts, space, entry["action"], seed)
    options = {"dtype": model_args.dtype or "float32", **load_options}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    model, processor = load(model_args.model_name_or_path, **options)
    rows = model.get_input_embeddings().weight.shape[0]
    native = model.config.model_type == OPENVLA_TYPE
    _check_recipe(model_args.recipe, model.config.model_type)
    if native:
        _check_openvla(model.config.to_dict(), data_args, dataset)
        old = old or _original(model, processor, key, entry)
    if old is None:
        family = family_of(model.config)
        tokenizer = processor.tokenizer if family.takes_images else processor
        vocabulary = None
        if action_tokenizer is not None:
            vocabulary = vocabulary_of(tokenizer, model_args, action_tokenizer.n_codes, space.dof)
        meaning = (NormStats({key: entry}), {key: space})
        config = ActionConfig(
            action_tokenizer,
            vocabulary,
            *meaning,
            head=new_head(model_args, data_args, space, entry),
            horizon=1 if data_args.horizon is None else data_args.horizon,
            prompt=model_args.prompt or family.prompt or DEFAULT_PROMPT,
            cameras=dataset.cameras,
            chat=model_args.chat,
        )
    else:
        _check_unchanged(model, old, model_args, data_args, dataset)
        config = _extended(old, key, entry, space)
        if old.head is None and model_args.head is not None:
            config = replace(config, head=new_head(model_args, data_args, space, entry))
        if native:
            # Each of its datasets has a camera of its own, and only the number of pictures can be checked in use.
            config = replace(config, cameras=dataset.cameras)
    config = _with_budget(config, key, data_args, dataset, seed)
    logger.info("actions of %r: %s", key, "; ".join(space.describe(i) for i in range(space.dof)))
    for more_args, more in others:
        config = _with_dataset(config, space.dof, more_args, more, seed)
    policy = to_vla(model, processor, config)
    if native:
        share_statistics(policy)
    if old is not None and old.head is not None and policy.device.type != "meta":
        load_head(policy.action_head, model_args.model_name_or_path)
    if old is not None or config.vocabulary is None:
        return policy, key
    ids, made_by_others = config.vocabulary.token_ids, config.vocabulary.layout in ("tail", "pi0_fast", "named")
    if not made_by_others and (ids < rows).any():
        # They fall on rows that the model has but never trained: some are zero, or all the same.
        initialize_rows(policy, ids)
    return policy, key


def _with_budget(
    config: ActionConfig, key: str, args: DataArguments, dataset: EpisodeReader, seed: int
) -> ActionConfig:
    """With FAST, the config with the number of tokens that a chunk of the dataset may take."""
    if not isinstance(config.tokenizer, FASTActionTokenizer):
        return config
    episodes = split_episodes(dataset, args.eval_fraction, seed)[0]
    actions, _ = chunks_of(dataset, config.horizon, episodes, args.skip_first, seed)
    budget = code_budget(config.tokenizer, config.stats(key).normalize(actions))
    budget = max(budget, config.token_budget.get(key, 0))  # what it was trained on before, it may still say
    numbers = config.horizon * config.space(key).dof
    logger.info("a chunk of %r may take %d tokens (one for each number would be %d)", key, budget, numbers)
    return replace(config, token_budget={**config.token_budget, key: budget})


def _with_dataset(
    config: ActionConfig, dof: int, args: DataArguments, dataset: EpisodeReader, seed: int
) -> ActionConfig:
    """The config with one more dataset of a mixture."""
    key: Any = args.unnorm_key or dataset.name
    space = space_of(dataset, args)
    if space.dof != dof:
        raise TrainingError(
            f"{dataset.root} has actions of {space.dof} dimensions, the first dataset of {dof}: the datasets of a mixture "
            "must have equally many; a --transform can leave out or join some"
        )
    episodes = split_episodes(dataset, args.eval_fraction, seed)[0]
    entry = stats_of(dataset, space, episodes, args.norm_mode, args.skip_first)
    logger.info("actions of %r: %s", key, "; ".join(space.describe(i) for i in range(space.dof)))
    return _with_budget(_extended(config, key, entry, space), key, args, dataset, seed)


def _extended(old: ActionConfig, key: str, entry: dict[str, Any], space: ActionSpace) -> ActionConfig:
    """The config of a trained policy with one more dataset, or the same again."""
    if key in old.norm_stats:
        _check_same_robot(old, key, entry["action"], space)
    norm_stats = NormStats({**{k: old.norm_stats[k] for k in old.norm_stats}, key: entry})
    return replace(old, norm_stats=norm_stats, spaces={**old.spaces, key: space})


def _original(model, processor, key: str, entry: dict[str, Any]) -> ActionConfig:
    """The action config that follows from a checkpoint of the original OpenVLA; it may have no statistics yet."""
    if not model.config.norm_stats:
        model.config.norm_stats = NormStats({key: entry}).to_dict()
    return action_config_of(model.config, processor.tokenizer)


def _check_recipe(name: str | None, model_type: str) -> None:
    if name is not None and RECIPES[name].model_type not in (None, model_type):
        raise TrainingError(
            f"the recipe {name!r} is for models of type {RECIPES[name].model_type!r}, this one is a {model_type!r}: "
            "leave --recipe out"
        )


def _check_openvla(config: dict[str, Any], data_args: DataArguments, dataset: EpisodeReader) -> None:
    """Refuse what an OpenVLA checkpoint has no place for: its readers would silently take it for something else."""
    if config.get("oft"):
        raise TrainingError(
            "an OpenVLA-OFT checkpoint predicts a chunk in one pass, from heads of its own; what is trained here predicts "
            "tokens one after the other. Fine-tune the OpenVLA checkpoint that it came from"
        )
    if len(dataset.cameras) != 1:
        raise TrainingError(
            f"OpenVLA sees one picture, the dataset has the cameras {list(dataset.cameras)}: choose one with --cameras"
        )
    if data_args.norm_mode != "bounds_q99":
        raise TrainingError(
            f"OpenVLA's checkpoints turn tokens into commands with q01 and q99, whatever --norm_mode "
            f"{data_args.norm_mode} says: leave it out"
        )


def config_of(path: str) -> ActionConfig | None:
    """The action config of a policy, in a folder or on the Hub; None for a model that is no policy yet."""
    check_source(path)
    try:
        file = cached_file(
            path,
            ACTION_CONFIG_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError as error:
        raise CheckpointError(f"no model to be had from {path!r}: {str(error).splitlines()[0]}") from None
    return None if file is None else ActionConfig.from_pretrained(path)


def _type_of(path: str) -> str | None:
    """The kind of a model; None where no file says so, of which its loading will speak."""
    try:
        return PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    except OSError:
        return None


def _check_unchanged(model, old: ActionConfig, model_args: ModelArguments, data_args: DataArguments, dataset) -> None:
    """Refuse options that a trained policy cannot change: its tokens would mean something else."""
    check_same_head(model_args, old)
    tokens: dict[str, tuple[Any, Any]] = {} if old.vocabulary is None else _tokens_of(model_args, old)
    asked: dict[str, tuple[Any, Any]] = {
        **tokens,
        "--prompt": (model_args.prompt, old.prompt),
        "--horizon": (data_args.horizon, old.horizon),
        "--no_chat": (None if model_args.chat else False, old.chat),
    }
    if model.config.model_type != OPENVLA_TYPE:
        asked["--cameras"] = (tuple(dataset.cameras) if old.cameras else None, tuple(old.cameras))
    for option, (wanted, has) in asked.items():
        if wanted is not None and wanted != has:
            raise TrainingError(f"the policy was trained with {option} {has!r}, got {wanted!r}; leave the option out")


def _tokens_of(model_args: ModelArguments, old: ActionConfig) -> dict[str, tuple[Any, Any]]:
    """What is asked for about action tokens, and what a policy has."""
    named = None if model_args.named_tokens is None else numbered(model_args.named_tokens, 1)[0]
    return {
        "--n_bins": (model_args.n_bins, old.tokenizer.n_codes),
        "--action_layout": (model_args.action_layout, old.vocabulary.layout),
        "--spare_from": (model_args.spare_from, int(old.vocabulary.token_ids.min())),
        "--named_tokens": (named, old.vocabulary.tokens[0]),
    }


def _check_same_robot(old: ActionConfig, key: str, stats: ActionStats, space: ActionSpace) -> None:
    """Refuse to give the numbers of a key that the policy has another meaning."""
    nobody_said = ActionSpace.unnamed(space.dof)  # as in every checkpoint of the original OpenVLA
    for what, alike in (
        ("statistics", old.stats(key).is_close(stats)),  # earlier releases rounded sums differently
        ("action space", old.space(key) in (space, nobody_said)),
    ):
        if not alike:
            raise TrainingError(
                f"the policy has other {what} under {key!r}: name this dataset with another --unnorm_key, or describe "
                "its actions as they were"
            )

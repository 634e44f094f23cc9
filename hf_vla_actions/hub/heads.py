"""The continuous head of a checkpoint, without loading it: what it is made of, and whether its file fits."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.heads import HeadConfig
from hf_vla_actions.hub.report import Head
from hf_vla_actions.hub.source import Source
from hf_vla_actions.models.head_files import HEAD_FILE


def read_head(source: Source, config: HeadConfig, native: PreTrainedConfig | None) -> tuple[Head, list[str]]:
    """What is said about a head and its file, and what is wrong with them.

    Args:
        source: the checkpoint or adapter.
        config: of the head, from `action_config.json`.
        native: configuration of the model it belongs to; None if it cannot be seen.
    """
    values = config.to_dict()
    shown = ("kind", "horizon", "dof", "proprio_dim")  # which have a place of their own
    about = {name: value for name, value in values.items() if name not in shown and value is not None}
    head = Head(config.kind, config.dof, config.proprio_dim, about)
    if not config.beside_model:
        return head, []
    if HEAD_FILE not in source.sizes:
        return head, [f"missing head: its actions come from a {config.kind!r} head, and there is no {HEAD_FILE}"]
    try:
        found = {name: shape for name, (_, shape) in source.header(HEAD_FILE).items()}
    except CheckpointError as error:
        return head, [str(error)]
    head = Head(config.kind, config.dof, config.proprio_dim, about, sum(map(math.prod, found.values())))
    if native is None:
        return head, []
    with torch.device("meta"):
        module = config.build(native.get_text_config().hidden_size)
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    wrong = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
    if wrong:
        return head, [
            f"{HEAD_FILE} does not fit the head of its action config: {len(wrong)} tensors are missing, left over or of "
            f"another shape, such as {wrong[:2]}"
        ]
    return head, []

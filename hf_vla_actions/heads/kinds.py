"""Which heads there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_vla_actions.heads.base import HeadConfig, HeadError
from hf_vla_actions.heads.diffusion import DiffusionConfig
from hf_vla_actions.heads.flow import FlowMatchingConfig
from hf_vla_actions.heads.native import NativeFlowConfig
from hf_vla_actions.heads.parallel import ParallelConfig
from hf_vla_actions.heads.recurrent import RecurrentConfig
from hf_vla_actions.heads.regression import RegressionConfig

KINDS: dict[str, type[HeadConfig]] = {
    kind.kind: kind
    for kind in (
        DiffusionConfig,
        FlowMatchingConfig,
        NativeFlowConfig,
        ParallelConfig,
        RecurrentConfig,
        RegressionConfig,
    )
}


def head_config_from_dict(values: Mapping[str, Any]) -> HeadConfig:
    """Read what `HeadConfig.to_dict` wrote; an unknown kind raises."""
    kind = values.get("kind")
    if kind not in KINDS:
        raise HeadError(f"there is no head of kind {kind!r}; there are {sorted(KINDS)}")
    return KINDS[kind].from_dict({name: value for name, value in values.items() if name != "kind"})

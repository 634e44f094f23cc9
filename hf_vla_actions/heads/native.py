"""A head that is a part of its model already: Transformers' PI0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_vla_actions.heads.base import ActionHead, HeadConfig, HeadError, check_whole
from hf_vla_actions.heads.flow import SOLVERS
from hf_vla_actions.heads.times import FLOW_TIMES, check_beta


@dataclass(frozen=True)
class NativeFlowConfig(HeadConfig):
    """What there is to say of a flow that the model itself computes, with weights of its own.

    Nothing is built for it and nothing saved beside the model: `to_vla` takes it for models that are policies by
    themselves (Transformers' `PI0ForConditionalGeneration`), and checks that horizon, numbers and times are the
    model's.

    Args:
        horizon: actions in a chunk, 50 in pi0.
        dof: numbers in an action as the model has them, 32 in pi0; those that a robot does not have are trimmed.
        proprio_dim: numbers of the state, filled up with zeros to what the model has (32 in pi0); None: the model is always shown a state of
            zeros, for robots that do not say theirs (the published weights have never seen that).
        steps: of integration, when a call names no other number.
        solver: "euler", as the model's own `sample_actions`, or "heun" (two passes a step).
        time: "pi0" (1 is noise), see `times`.
        beta: parameters of the beta distribution of the times in training, one of them 1.
    """

    kind: ClassVar[str] = "native"
    beside_model: ClassVar[bool] = False

    steps: int = 10
    solver: str = "euler"
    time: str = "pi0"
    beta: tuple[float, float] = (1.5, 1.0)

    def __post_init__(self):
        super().__post_init__()
        check_whole("steps", self.steps)
        for name, possible in (("solver", SOLVERS), ("time", tuple(FLOW_TIMES))):
            if getattr(self, name) not in possible:
                raise HeadError(f"{name} is one of {list(possible)}, got {getattr(self, name)!r}")
        check_beta(self.beta)

    def build(self, width: int) -> ActionHead:
        """Raises: such a head cannot be built for another model."""
        raise HeadError(
            "a 'native' head is a part of its model (Transformers' PI0) and cannot be built for another one: use a "
            "FlowMatchingConfig, or the preset 'pi0'"
        )

"""LogitsProcessors that let a language model emit actions, and only such actions as satisfy the constraints."""

from hf_vla_actions.decoding.taco import TACOLogitsProcessor

__all__ = ["TACOLogitsProcessor"]

"""What constraints do to a language model that emits actions: LogitsProcessor, report on its distributions, loss."""

from hf_vla_actions.decoding.confidence import confidence
from hf_vla_actions.decoding.fast import FASTLogitsProcessor
from hf_vla_actions.decoding.loss import TACOLoss, taco_loss
from hf_vla_actions.decoding.report import ConfidenceReport, effective_sample_size
from hf_vla_actions.decoding.taco import TACOLogitsProcessor

__all__ = [
    "ConfidenceReport",
    "FASTLogitsProcessor",
    "TACOLogitsProcessor",
    "TACOLoss",
    "confidence",
    "effective_sample_size",
    "taco_loss",
]

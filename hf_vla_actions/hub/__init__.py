"""What is in a checkpoint, without loading it."""

from hf_vla_actions.hub.inspect import inspect_checkpoint
from hf_vla_actions.hub.report import Report

__all__ = ["Report", "inspect_checkpoint"]

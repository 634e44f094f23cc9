"""What is in a checkpoint, without loading it; its card; publishing it."""

from hf_vla_actions.hub.card import make_card, write_card
from hf_vla_actions.hub.inspect import inspect_checkpoint
from hf_vla_actions.hub.push import PushReport, push
from hf_vla_actions.hub.report import Report

__all__ = ["PushReport", "Report", "inspect_checkpoint", "make_card", "push", "write_card"]

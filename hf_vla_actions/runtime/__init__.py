"""Carrying out predicted chunks: each object here wraps a policy and is a policy."""

from hf_vla_actions.runtime.anchor import at_anchor
from hf_vla_actions.runtime.asynchronous import AsyncPolicy
from hf_vla_actions.runtime.chunks import RecedingHorizon, remembered
from hf_vla_actions.runtime.ensemble import TemporalEnsemble, ensemble_weights
from hf_vla_actions.runtime.overlap import Overlap, overlap_weights
from hf_vla_actions.runtime.policy import Policy
from hf_vla_actions.runtime.realtime import RealTimeChunking
from hf_vla_actions.runtime.report import AsyncReport
from hf_vla_actions.runtime.slower import Retime
from hf_vla_actions.runtime.workers import SimulatedClock, SimulatedWorker, ThreadWorker, Worker

__all__ = [
    "AsyncPolicy",
    "AsyncReport",
    "Overlap",
    "Policy",
    "RealTimeChunking",
    "RecedingHorizon",
    "Retime",
    "SimulatedClock",
    "SimulatedWorker",
    "TemporalEnsemble",
    "ThreadWorker",
    "Worker",
    "at_anchor",
    "ensemble_weights",
    "overlap_weights",
    "remembered",
]

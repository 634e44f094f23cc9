"""Carrying out predicted chunks: each object here wraps a policy and is a policy."""

from hf_vla_actions.runtime.chunks import ChunkPolicy

__all__ = ["ChunkPolicy"]

"""Carrying out predicted chunks: each object here wraps a policy and is a policy."""

from hf_vla_actions.runtime.chunks import ChunkPolicy, remembered

__all__ = ["ChunkPolicy", "remembered"]

"""`push_to_hub` of policies and adapters: hands over to the hub."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Arguments of Transformers' push_to_hub that are those of saving.
OF_SAVING = ("max_shard_size", "remote_code_shim")


def push_up(model: Any, repo_id: str, *, commit_message: str | None = None, **options: Any) -> Any:
    """Save a policy or a PEFT model around one, and publish it.

    Args:
        model: a policy, or a PEFT model that this package returned.
        repo_id: owner/name; created if it is missing.
        commit_message: first line of the commit.
        options: see `ActionPredictionMixin.push_to_hub`.
    """
    save = {name: options.pop(name) for name in OF_SAVING if name in options}
    # By its name, when it is called: what checks and publishes checkpoints stands on a floor above the models.
    push_policy = import_module("hf_vla_actions.hub.push").push_policy
    return push_policy(model, repo_id, message=commit_message, save=save, **options)

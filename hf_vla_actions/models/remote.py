"""What Transformers takes for a class from a repository whose `shim` it has loaded."""

from __future__ import annotations

from typing import Any

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.models.native import hub_arguments, load_model
from hf_vla_actions.models.wrap import to_vla


class RemotePolicy:
    """Stands for a class of the repository; its `from_pretrained` returns a policy."""

    @classmethod
    def from_pretrained(cls, path: str, *_, config=None, **kwargs: Any):
        """Load the policy in `path`; called by the Auto classes with the native `config`."""
        # What the Auto classes tell a class from a repository; the native class below is none.
        passed = {k: v for k, v in kwargs.items() if k not in ("trust_remote_code", "adapter_kwargs", "_from_auto")}
        self_test = passed.pop("self_test", True)
        model, processor = load_model(str(path), config=config, **passed)
        policy = to_vla(model, processor, ActionConfig.from_pretrained(path, **hub_arguments(passed))).eval()
        if self_test:
            policy.self_test()
        return policy

    @classmethod
    def register_for_auto_class(cls, auto_class=None) -> None:
        """Nothing: `save_pretrained` of a policy must not copy this file's folder, as it would for other classes."""

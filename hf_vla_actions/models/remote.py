"""For users of `trust_remote_code=True`: one file in the repository that hands over to this package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError

FILE_NAME = "modeling_hf_vla_actions.py"
CLASS = f"{FILE_NAME.removesuffix('.py')}.VLAPolicy"
SOURCE = '''\
"""A robot policy: AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True).predict_action(...)."""

from hf_vla_actions.models.remote import RemotePolicy


class VLAPolicy(RemotePolicy):
    """Hands over to the package hf_vla_actions: pip install hf_vla_actions."""
'''


class RemotePolicy:
    """What Transformers takes for a class from the repository; its `from_pretrained` returns a policy."""

    @classmethod
    def from_pretrained(cls, path: str, *_, config=None, **kwargs: Any):
        """Load the policy in `path`; called by the Auto classes with the native `config`."""
        from hf_vla_actions.models.auto import hub_arguments, load_model
        from hf_vla_actions.models.wrap import to_vla

        # What the Auto classes tell a class from a repository; the native class below is none.
        passed = {k: v for k, v in kwargs.items() if k not in ("trust_remote_code", "adapter_kwargs", "_from_auto")}
        model, processor = load_model(str(path), config=config, **passed)
        policy = to_vla(model, processor, ActionConfig.from_pretrained(path, **hub_arguments(passed)))
        return policy.eval().self_test()

    @classmethod
    def register_for_auto_class(cls, auto_class=None) -> None:
        """Nothing: `save_pretrained` of a policy must not copy this file's folder, as it would for other classes."""


@contextmanager
def shim_in_config(config, auto_class: str | None) -> Iterator[None]:
    """While inside, `config` names the shim for `auto_class`, or does not name it if that is None."""
    kept = {k: v for k, v in (config.__dict__.get("auto_map") or {}).items() if not str(v).endswith(CLASS)}
    wanted = kept if auto_class is None else {**kept, auto_class: CLASS}
    _set_auto_map(config, wanted)
    try:
        yield
    finally:
        _set_auto_map(config, kept)


def write_shim(folder: str | os.PathLike) -> None:
    """Write the file that `trust_remote_code=True` loads."""
    path = Path(folder) / FILE_NAME
    temporary = path.with_name(FILE_NAME + ".tmp")
    temporary.write_text(SOURCE, encoding="utf-8")
    os.replace(temporary, path)


def remove_shim(folder: str | os.PathLike) -> None:
    """Take the file away where an earlier save left it; a file of that name that is not ours raises."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return
    if path.read_text(encoding="utf-8") != SOURCE:
        raise CheckpointError(f"{path} was not written by this package: remove it, or save elsewhere")
    path.unlink()


def _set_auto_map(config, auto_map: dict[str, str]) -> None:
    if auto_map:
        config.auto_map = auto_map
    elif "auto_map" in config.__dict__:
        del config.auto_map

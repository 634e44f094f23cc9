"""The one file that makes `trust_remote_code=True` return a policy: written into a checkpoint on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_vla_actions.errors import CheckpointError

FILE_NAME = "modeling_hf_vla_actions.py"
CLASS = f"{FILE_NAME.removesuffix('.py')}.VLAPolicy"
SOURCE = '''\
"""A robot policy: AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True).predict_action(...)."""

from hf_vla_actions.models.remote import RemotePolicy


class VLAPolicy(RemotePolicy):
    """Hands over to the package hf_vla_actions: pip install hf_vla_actions."""
'''


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
    path = _own(folder)
    temporary = path.with_name(FILE_NAME + ".tmp")
    temporary.write_text(SOURCE, encoding="utf-8")
    os.replace(temporary, path)


def remove_shim(folder: str | os.PathLike) -> None:
    """Take the file away where an earlier save left it."""
    _own(folder).unlink(missing_ok=True)


def _own(folder: str | os.PathLike) -> Path:
    """Where the file is or will be; a file of that name that is not ours raises."""
    path = Path(folder) / FILE_NAME
    if path.is_file() and path.read_text(encoding="utf-8") != SOURCE:
        raise CheckpointError(f"{path} was not written by this package: remove it, or save elsewhere")
    return path


def _set_auto_map(config, auto_map: dict[str, str]) -> None:
    if auto_map:
        config.auto_map = auto_map
    elif "auto_map" in config.__dict__:
        del config.auto_map

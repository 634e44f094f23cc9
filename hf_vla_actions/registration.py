"""Tells Transformers' Auto classes about the models of this package, without loading either of them.

Transformers has no entry points: whoever wants `AutoModelForImageTextToText.from_pretrained` to know "openvla" must
import this package, before or after the Auto classes. Registration itself must cost next to nothing, and nothing of
this package may be imported while Transformers is in the middle of its own imports. So what is registered are
stand-ins, as soon as the Auto classes are there; one that is used loads `hf_vla_actions.models.openvla`, which
registers the real classes over them.

Registered classes are not Transformers' own, and those always win over an `auto_map` in a checkpoint's files, whatever
`trust_remote_code` says.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"
_HOME = "hf_vla_actions.models.openvla"


class _StandIn(type):
    """Class of classes that stand for one of the same name in `_HOME`, which is loaded when it is used."""

    def __new__(mcs, name: str) -> _StandIn:
        return super().__new__(mcs, name, (), {"__module__": _HOME, "__doc__": f"Stands for {_HOME}.{name}."})

    def __init__(cls, name: str):
        super().__init__(name, (), {})

    def __getattr__(cls, name: str) -> Any:
        return getattr(_load(cls.__name__), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _load(cls.__name__)(*args, **kwargs)


def _load(name: str) -> Any:
    return getattr(importlib.import_module(_HOME), name)


CONFIG = _StandIn("OpenVLAConfig")
PROCESSOR = _StandIn("PrismaticProcessor")
IMAGE_PROCESSOR = _StandIn("PrismaticImageProcessor")


def _register_config(auto: ModuleType) -> None:
    auto.CONFIG_MAPPING.register("openvla", CONFIG, exist_ok=True)


def _register_processor(auto: ModuleType) -> None:
    # By the names in a checkpoint's files; the configuration is not even read for them.
    auto.PROCESSOR_MAPPING.register(CONFIG, PROCESSOR, exist_ok=True)


def _register_image_processor(auto: ModuleType) -> None:
    auto.IMAGE_PROCESSOR_MAPPING.register(CONFIG, {"pil": IMAGE_PROCESSOR}, exist_ok=True)


# Models need no stand-in: they are looked up by the class of a configuration, and the first one loads the real ones.
_STEPS: dict[str, Callable[[ModuleType], None]] = {
    f"{_AUTO}.configuration_auto": _register_config,
    f"{_AUTO}.processing_auto": _register_processor,
    f"{_AUTO}.image_processing_auto": _register_image_processor,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Does a step right after a module was imported; gone when nothing is left to wait for."""

    def __init__(self, steps: dict[str, Callable[[ModuleType], None]]):
        self.steps = steps

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders have, with the step behind its loader."""
        step = self.steps.pop(fullname, None)
        if step is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if not self.steps and self in sys.meta_path:
            sys.meta_path.remove(self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_step(module: ModuleType) -> None:
                load(module)
                step(module)

            spec.loader.exec_module = load_and_step  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the classes of this package with the Auto classes, now or as soon as they are imported.

    May be called again: what is registered already stays, or is registered again.
    """
    later = {}
    for name, step in _STEPS.items():
        if name not in sys.modules:
            later[name] = step
        elif _HOME not in sys.modules:
            step(sys.modules[name])
    waiting = {name for finder in sys.meta_path if isinstance(finder, _AfterImport) for name in finder.steps}
    later = {name: step for name, step in later.items() if name not in waiting}
    if later:
        sys.meta_path.insert(0, _AfterImport(later))

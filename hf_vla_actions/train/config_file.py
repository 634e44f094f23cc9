"""Options of a training in a YAML or JSON file; what stands on the command line wins."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_vla_actions.errors import TrainingError

ENDINGS = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class ConfigFile:
    """A file of options.

    Args:
        path: as the user wrote it.
        content: option to value.
    """

    path: str
    content: dict[str, Any]

    def arguments(self) -> list[str]:
        """The same as a command line, so that one parser checks both."""
        found = []
        for name, value in self.content.items():
            if isinstance(value, list):
                found += [f"--{name}", *(_text(name, item, self.path) for item in value)]
            elif value is not None:
                found.append(f"--{name}={_text(name, value, self.path)}")
        return found


def take_config(argv: Sequence[str], known: Iterable[str]) -> tuple[list[str], ConfigFile | None]:
    """All options of a command line whose first word may be a file, those of the file first: the last one wins.

    Args:
        argv: the command line.
        known: names of all options.

    Raises:
        TrainingError: the file cannot be read, or holds an option that does not exist or stands there twice.
    """
    if not argv or argv[0].startswith("-"):
        return list(argv), None
    config = read_config(argv[0], known)
    return [*config.arguments(), *argv[1:]], config


def read_config(path: str, known: Iterable[str]) -> ConfigFile:
    """Read a file of options; see `take_config`."""
    file = Path(path)
    if file.suffix.lower() not in ENDINGS:
        raise TrainingError(
            f"the first word {path!r} is no option (--...), nor a file that ends in {', '.join(ENDINGS)}"
        )
    try:
        text = file.read_text(encoding="utf-8")
        read = json.loads(text, object_pairs_hook=_once) if file.suffix.lower() == ".json" else _yaml(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"the options in {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise TrainingError(
            f"{path} should hold options and their values, such as 'lora_r: 32', got {type(read).__name__}"
        )
    content = {name.replace("-", "_"): value for name, value in read.items()}
    names = list(known)
    for name in content:
        if name not in names:
            raise TrainingError(f"{path}: {unknown_option(name, names)}")
    return ConfigFile(path, content)


def unknown_option(name: str, known: Iterable[str]) -> str:
    """What to say about an option that does not exist, with those nearest to it."""
    near = " or ".join(map(repr, difflib.get_close_matches(name, list(known), n=3)))
    return f"there is no option {name!r}" + (f"; do you mean {near}?" if near else " (see hf-vla train --help)")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TrainingError(f"options stand twice in the file: {twice}")
    return dict(pairs)


def _yaml(text: str) -> Any:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        # PyYAML itself would keep the last of two values.
        _once([(str(key.value), None) for key, _ in root.value])
    return yaml.safe_load(text)


def _text(name: str, value: Any, path: str) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, str)):
        return str(value)
    raise TrainingError(f"{path}: {name} is a {type(value).__name__}, which no option takes; write it in quotes")

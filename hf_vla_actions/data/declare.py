"""What the numbers of a dataset are declared to mean: by the dataset, and by the options of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.data.reader import EpisodeReader
from hf_vla_actions.data.transforms_dataset import TransformedDataset
from hf_vla_actions.errors import DatasetError

KINDS = ("delta", "absolute")


def declare_space(
    dataset: EpisodeReader,
    *,
    names: Sequence[str] | None = None,
    units: Sequence[str | None] | None = None,
    kind: str | None = None,
    frame: str | None = None,
    gripper: str | None = None,
    gripper_open: float = 1.0,
    gripper_closed: float = 0.0,
    gripper_binary: bool = True,
) -> ActionSpace:
    """The action space of a dataset; what nobody says stays unknown.

    Args:
        dataset: gives names, where it has them, and the control rate; a TransformedDataset knows its space.
        names: name of each dimension, instead of the dataset's.
        units: unit of each dimension; None or "none" where there is none.
        kind: "delta" or "absolute", of all dimensions but the gripper.
        frame: axes of the actions.
        gripper: name or index of its dimension, "none" if there is none; None takes the one named "gripper".
        gripper_open: value of the open gripper.
        gripper_closed: value of the closed gripper.
        gripper_binary: whether it knows only these two.

    Raises:
        DatasetError: something is declared of dimensions that have no names, or of another number of them.
    """
    if isinstance(dataset, TransformedDataset):
        if names or units or kind or frame or gripper:
            raise DatasetError(
                f"the transform {dataset.transform.name} says what the actions mean; declare nothing else"
            )
        return dataset.space
    names = names or dataset.action_names
    if names is None:
        if units or kind or frame or gripper not in (None, "none"):
            raise DatasetError(f"the dataset does not name its {dataset.dof} dimensions; pass --action_names")
        return ActionSpace.unnamed(dataset.dof)
    if len(names) != dataset.dof:
        raise DatasetError(f"{len(names)} action_names {list(names)} for actions of {dataset.dof} dimensions")
    if kind not in (None, *KINDS):
        raise DatasetError(f"actions are of the kind {' or '.join(KINDS)}, got {kind!r}")
    if units is not None:
        units = [None if unit is None or unit.lower() == "none" else unit for unit in units]
    spec = None
    if gripper != "none" and (gripper is not None or "gripper" in names):
        dim = gripper or "gripper"
        dim = names[int(dim)] if dim.isdigit() and int(dim) < len(names) else dim
        spec = Gripper(dim, gripper_open, gripper_closed, gripper_binary)
    delta: list[bool | None] = [None if kind is None else kind == "delta"] * len(names)
    if spec is not None and kind is not None:
        delta[ActionSpace(names).index(spec.dim)] = False
    return ActionSpace(names, units, tuple(delta), frame, spec, dataset.fps)


def add_space_options(options: argparse.ArgumentParser) -> None:
    """The options that `space_from` reads."""
    add = options.add_argument
    add("--action_names", nargs="+", help="name of each dimension; default: those of the dataset")
    add("--action_units", nargs="+", help="unit of each dimension, 'none' where there is none: m m m rad rad rad none")
    add("--action_kind", choices=KINDS, help="changes of the current state, or targets")
    add("--action_frame", choices=["world", "base", "tcp", "joint"], help="axes of the actions")
    add("--gripper", help="name or index of the gripper's dimension, 'none' if there is none")
    add("--gripper_open", type=float, default=1.0, help="value of the open gripper (default: %(default)s)")
    add("--gripper_closed", type=float, default=0.0, help="value of the closed gripper (default: %(default)s)")
    add("--no_gripper_binary", action="store_true", help="the gripper takes values between open and closed")


def space_from(dataset: EpisodeReader, args: argparse.Namespace) -> ActionSpace:
    """The action space that the dataset and these options declare."""
    return declare_space(
        dataset,
        names=args.action_names,
        units=args.action_units,
        kind=args.action_kind,
        frame=args.action_frame,
        gripper=args.gripper,
        gripper_open=args.gripper_open,
        gripper_closed=args.gripper_closed,
        gripper_binary=not args.no_gripper_binary,
    )

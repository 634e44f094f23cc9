"""Numbers in, numbers out: NumPy arrays, sequences and torch tensors as float64 arrays and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from hf_vla_actions.errors import ActionSpaceError


def read_numbers(what: str, values: Any) -> np.ndarray:
    """Finite float64 numbers of an array, a tensor or nested sequences.

    Args:
        what: their name, for messages.
        values: any shape; tensors on any device, without gradient: nothing here is differentiated.

    Raises:
        ActionSpaceError: what is no number, NaN or infinite, or a tensor that requires a gradient.
    """
    torch = _torch_of(values)
    if torch is not None:
        if values.requires_grad:
            raise ActionSpaceError(f"{what} requires a gradient, which ends here: pass {what}.detach()")
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    try:
        array = np.array(values)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise ActionSpaceError(f"{what} must be numbers, got {type(values).__name__} of type {array.dtype}")
    array = array.astype(np.float64)
    bad = ~np.isfinite(array)
    if bad.any():
        raise ActionSpaceError(
            f"{what} has {int(bad.sum())} NaN or infinite numbers, the first at {np.argwhere(bad)[0].tolist()}"
        )
    return array


def like(values: Any) -> Callable[[np.ndarray], Any]:
    """What turns a float64 result into the kind of `values`: a float64 tensor on its device, or the array itself.

    Tensors and arrays get the same numbers. A device without float64 (mps) gets float32.
    """
    torch = _torch_of(values)
    if torch is None:
        return lambda array: array
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    return lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(values.device, dtype)


def _torch_of(values: Any) -> Any:
    torch = sys.modules.get("torch")  # a tensor cannot come from anywhere else
    return torch if torch is not None and isinstance(values, torch.Tensor) else None

"""The transform of FAST: chunks to whole coefficients and back."""

from __future__ import annotations

import math

import numpy as np

from hf_vla_actions.errors import ActionTokenError

MARGIN = 1.01  # dimensions that are not normalized may exceed [-1, 1] by measurement noise


def check_scale(scale) -> None:
    """Raise if a scale is no positive number."""
    number = isinstance(scale, (int, float, np.number)) and not isinstance(scale, bool)
    if not number or not (math.isfinite(scale) and scale > 0):
        raise ActionTokenError(f"scale must be a positive number, got {scale!r}")


def coefficient_limit(horizon: int, scale: float) -> int:
    """Largest absolute rounded coefficient of `horizon` values in [-1, 1] and 1 % beyond.

    The rows of an orthonormal transform have length 1, so none exceeds the length of the values, sqrt(horizon).
    """
    return math.floor(MARGIN * scale * math.sqrt(horizon) + 0.5)


def to_coefficients(normalized, scale: float) -> np.ndarray:
    """Rounded coefficients of chunks: orthonormal DCT-II along time, times `scale`.

    Args:
        normalized: (..., horizon, dof) values in [-1, 1].
        scale: steps in a coefficient of 1.

    Returns:
        (n, horizon, dof) int64: frequency, dimension; leading axes are flattened.

    Raises:
        ActionTokenError: NaN, or values that are not normalized.
    """
    from scipy.fft import dct

    x = np.asarray(normalized, dtype=np.float64)
    if x.ndim < 2 or not x.shape[-1] or not x.shape[-2]:
        raise ActionTokenError(f"a chunk has shape (..., horizon, dof), got {x.shape}")
    x = x.reshape(-1, *x.shape[-2:])
    if not np.isfinite(x).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise ActionTokenError(
            f"chunk {at[0]} has {x[at]} at step {at[1]}, dimension {at[2]}; look for missing values"
        )
    limit = coefficient_limit(x.shape[1], scale)
    # As the reference: any other order of these operations rounds ties another way.
    rounded = np.around(dct(x, axis=1, norm="ortho") * scale)
    if x.size and np.abs(rounded).max() > limit:
        at = tuple(int(i) for i in np.argwhere(np.abs(rounded) > limit)[0])
        raise ActionTokenError(
            f"chunk {at[0]} holds values up to {np.abs(x[at[0], :, at[2]]).max():.4g} in dimension {at[2]}: its "
            f"coefficient {rounded[at]:.0f} at frequency {at[1]} is beyond {-limit}..{limit}, what values in [-1, 1] "
            "can have. Normalize the actions first"
        )
    return rounded.astype(np.int64)


def from_coefficients(coefficients: np.ndarray, scale: float) -> np.ndarray:
    """Chunks (n, horizon, dof) float64 of rounded coefficients of the same shape; inverse of `to_coefficients`."""
    from scipy.fft import idct

    return idct(coefficients / scale, axis=1, norm="ortho")

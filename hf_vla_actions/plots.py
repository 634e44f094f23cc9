"""Figures: every function draws on Axes it is given, or on new ones, and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hf_vla_actions.errors import VLAActionsError


def new_figure(*args, **kwargs):
    """`matplotlib.pyplot.subplots` without a window; says what to install where matplotlib is absent."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise VLAActionsError("figures need matplotlib: pip install 'hf_vla_actions[plots]'") from None
    figsize = kwargs.pop("figsize", None)
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*args, **kwargs)


def plot_paths(paths: Sequence[np.ndarray], ax=None, *, color: str = "C0", label: str | None = None, unit: str = "m"):
    """Ways of the tool seen from above.

    Args:
        paths: each (steps + 1, 2 or more): x and y come first.
        ax: Axes to draw on.
        color: of all of them.
        label: for the legend.
        unit: of the positions.
    """
    ax = new_figure()[1] if ax is None else ax
    for i, path in enumerate(paths):
        xy = np.asarray(path)
        ax.plot(xy[:, 0], xy[:, 1], "-", color=color, alpha=0.55, lw=1.3, label=label if i == 0 else None)
        ax.plot(*xy[0, :2], ".", color="0.4", ms=3)
        ax.plot(*xy[-1, :2], "o", color=color, ms=3)
    ax.set(xlabel=f"x [{unit}]", ylabel=f"y [{unit}]", aspect="equal")
    return ax


def plot_distributions(
    values: np.ndarray,
    distributions: Mapping[str, np.ndarray],
    ax=None,
    *,
    allowed: tuple[float, float] | None = None,
    name: str = "value",
):
    """Probability of one action dimension over the real values of its bins.

    Args:
        values: (n_codes,) real value of each code.
        distributions: name to (n_codes,) probabilities.
        ax: Axes to draw on.
        allowed: range that a constraint leaves; shaded.
        name: label of the axis, with the unit.
    """
    ax = new_figure()[1] if ax is None else ax
    order = np.argsort(values, kind="stable")
    for i, (label, probabilities) in enumerate(distributions.items()):
        ax.step(values[order], np.asarray(probabilities)[order], where="mid", label=label, color=f"C{i}", lw=1.4)
    if allowed is not None:
        ax.axvspan(*allowed, color="C2", alpha=0.15, lw=0, label="allowed")
    ax.set(xlabel=name, ylabel="probability")
    ax.legend(frameon=False, fontsize=8)
    return ax

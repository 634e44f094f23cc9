"""Figures: every function draws on Axes it is given, or on new ones, and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def constraint_report(report, row: int = 0, ax=None):
    """What constraints did to one predicted chunk: a panel for each dimension, over the steps of the chunk.

    Each step shows mean and standard deviation of what the policy wanted (gray) and of what the constraints made of it
    (blue), and the value that is carried out (diamond). The redder a step, the less of the policy's probability was
    allowed; above each panel stands the constraint that removes most.

    Args:
        report: ConfidenceReport.
        row: which chunk of the report.
        ax: (dof,) Axes to draw on.

    Returns:
        (dof,) array of Axes.
    """
    rows, horizon, dof = report.value.shape
    if not -rows <= row < rows:
        raise VLAActionsError(f"the report has rows 0..{rows - 1}, got {row}")
    if ax is None:
        columns = min(dof, 2)
        lines = -(-dof // columns)
        wide = max(4.2, 1.6 + 0.45 * horizon)
        figure, axes = new_figure(lines, columns, figsize=(wide * columns, 0.6 + 1.95 * lines), squeeze=False)
        for empty in axes.ravel()[dof:]:
            empty.remove()
        ax = axes.ravel()[:dof]
        for panel in ax[:-columns]:
            panel.tick_params(labelbottom=False)
        for panel in ax[-columns:]:
            panel.set_xlabel("step")
        _report_legend(figure)
    axes = np.asarray(ax).ravel()
    if len(axes) != dof:
        raise VLAActionsError(f"the report has {dof} dimensions, got {len(axes)} Axes")
    for dim, panel in enumerate(axes):
        _report_panel(panel, report, row, dim)
    return axes


BEFORE, AFTER, CONFLICT = "0.45", "C0", "C3"


def _report_panel(ax, report, row: int, dim: int) -> None:
    steps = np.arange(report.horizon)
    unit = report.space.units[dim]
    lost = 1 - report.allowed_mass[row, :, dim]
    for step, share in zip(steps, lost, strict=True):
        if share > 0.005:
            ax.axvspan(step - 0.5, step + 0.5, color=CONFLICT, alpha=0.3 * share, lw=0, zorder=0)
    for when, color, aside in (("before", BEFORE, -0.13), ("after", AFTER, 0.13)):
        mean, std = (getattr(report, f"{name}_{when}")[row, :, dim] for name in ("mean", "std"))
        ax.errorbar(steps + aside, mean, std, fmt="o", ms=4, lw=1.4, capsize=2.5, color=color)
    ax.plot(steps, report.action[row, :, dim], "-", color="k", lw=0.6, alpha=0.4, zorder=1)
    ax.plot(steps, report.action[row, :, dim], "D", ms=4.5, mfc="w", mec="k", mew=1.1, zorder=5)
    ax.set_xlim(-0.5, report.horizon - 0.5)
    ax.set_ylabel(f"{report.space.names[dim]} [{unit}]" if unit else report.space.names[dim])
    ax.set_xticks(steps[:: -(-report.horizon // 16)])
    ax.spines[["top", "right"]].set_visible(False)
    removed = {text: share[row, :, dim] for text, share in report.blame.items() if share[row, :, dim].max() > 0.005}
    if removed:
        text = max(removed, key=lambda name: removed[name].mean())
        moved = report.moved[row, :, dim].mean()
        shift = f"{moved if moved > 1e-9 else 0:.2g}{f' {unit}' if unit else ''}"
        short = text if len(text) <= 56 else text[:55] + "\u2026"
        title = f"{short}\nremoves {removed[text].mean():.0%} of the probability; moved by {shift}"
        ax.set_title(title, fontsize=8, color=CONFLICT, loc="left")


def _report_legend(figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], marker="o", ms=4, lw=1.4, color=BEFORE, label="policy: mean ± std"),
        Line2D([], [], marker="o", ms=4, lw=1.4, color=AFTER, label="with constraints: mean ± std"),
        Line2D([], [], marker="D", ms=4.5, lw=0.6, mfc="w", mec="k", color="0.6", label="carried out"),
        Patch(color=CONFLICT, alpha=0.3, lw=0, label="nothing that the policy wanted is allowed"),
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=4 if figure.get_figwidth() > 9.5 else 2,
        frameon=False,
        fontsize=8,
    )


FAMILIES = {"uniform": ("C0", "o"), "quantile": ("C2", "s"), "FAST": ("C1", "^"), "VQ": ("C3", "D")}


def plot_token_costs(costs, ax=None, *, dims: Sequence[int] | None = None):
    """Error against length of action tokenizers: down and left is better.

    Args:
        costs: list of TokenizerCost, of one horizon.
        ax: Axes to draw on.
        dims: dimensions whose root mean square error is averaged; those of the first dimension's unit if None.
    """
    ax = new_figure()[1] if ax is None else ax
    first = costs[0]
    dims = [d for d, unit in enumerate(first.units) if unit == first.units[0]] if dims is None else list(dims)
    for family, (color, marker) in FAMILIES.items():
        some = [cost for cost in costs if cost.name.startswith(family)]
        if not some:
            continue
        error = [float(np.mean([cost.rmse[d] for d in dims])) for cost in some]
        tokens = [cost.tokens for cost in some]
        ax.plot(tokens, error, marker=marker, color=color, lw=0.8, ms=5, label=family)
        for cost, x, y in zip(some, tokens, error, strict=True):
            side = {"ha": "right", "xytext": (-6, 3)} if family == "quantile" else {"ha": "left", "xytext": (6, 3)}
            text = cost.name.split(" ", 1)[1]
            ax.annotate(text, (x, y), textcoords="offset points", fontsize=7, color=color, **side)
    names = ", ".join(first.names[d] for d in dims)
    unit = first.units[dims[0]]
    ax.set(yscale="log", xlabel=f"tokens a chunk of {first.horizon} actions")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylabel(f"root mean square error of {names}{f' [{unit}]' if unit else ''}")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    ax.margins(x=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_energy(shares: np.ndarray, names: Sequence[str], ax=None):
    """Share of the motion that the frequencies up to each one carry.

    Args:
        shares: (horizon, dof), see `energy_shares`.
        names: (dof) of the dimensions.
        ax: Axes to draw on.
    """
    ax = new_figure()[1] if ax is None else ax
    for name, column in zip(names, np.cumsum(shares, axis=0).T, strict=True):
        if column[-1] > 0:
            ax.plot(column, marker=".", lw=1.2, label=name)
    ax.set(xlabel="DCT frequency (0 = mean of the chunk)", ylabel="share of the energy up to it", ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=8, ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_action_histograms(actions: np.ndarray, dimensions, ax=None, *, n_bins: int | None = None):
    """How the values of each dimension are spread, and what normalization cuts off.

    Args:
        actions: (n, dof) real units; rows that are not finite are left out.
        dimensions: (dof) entries with `name`, `unit`, `low`, `high` (what becomes -1 and 1) and `clipped`.
        ax: (dof,) Axes to draw on.
        n_bins: also draw the edges of that many equal bins of the normalized range.

    Returns:
        (dof,) array of Axes.
    """
    rows = np.asarray(actions, dtype=np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != len(dimensions):
        raise VLAActionsError(f"actions are (n, {len(dimensions)}) with a finite row, got shape {rows.shape}")
    if ax is None:
        columns = min(4, len(dimensions))
        lines = -(-len(dimensions) // columns)
        _, axes = new_figure(lines, columns, figsize=(3.1 * columns, 2.3 * lines), squeeze=False)
        for empty in axes.ravel()[len(dimensions) :]:
            empty.remove()
        ax = axes.ravel()[: len(dimensions)]
    panels = np.asarray(ax).ravel()
    for panel, column, d in zip(panels, rows.T, dimensions, strict=True):
        panel.hist(column, bins=60, color="C0", log=True)
        panel.set_ylim(bottom=0.7)  # the smallest bars, of one row, are seen too
        left, right = min(column.min(), d.low), max(column.max(), d.high)
        if n_bins and d.high > d.low:
            edges = np.linspace(d.low, d.high, n_bins + 1)
            panel.vlines(edges, 0, 0.05, transform=panel.get_xaxis_transform(), color="0.3", lw=0.5)
        for edge, end in ((d.low, left), (d.high, right)):
            panel.axvline(edge, color="C3", lw=1, ls="--")
            panel.axvspan(*sorted((edge, end)), color="C3", alpha=0.12, lw=0)
        panel.set_xlabel(f"{d.name} [{d.unit}]" if d.unit else d.name)
        panel.set_title(f"{d.clipped:.1%} outside", fontsize=8, loc="left", color="C3" if d.clipped else "0.4")
        panel.locator_params(axis="x", nbins=4)
        panel.spines[["top", "right"]].set_visible(False)
    return panels


def plot_offline(reports: Mapping[str, Any]):
    """Predicted against demonstrated values, a panel for each dimension, and how the error goes along the chunk.

    Args:
        reports: label to OfflineReport, all of one policy; the first is drawn on top and alone along the chunk.

    Returns:
        A matplotlib Figure.
    """
    if not reports:
        raise VLAActionsError("there is no report to draw")
    first = next(iter(reports.values()))
    space = first.space
    columns = min(4, space.dof + 1)
    lines = -(-(space.dof + 1) // columns)
    figure, axes = new_figure(lines, columns, figsize=(3.3 * columns, 2.9 * lines), squeeze=False)
    panels = axes.ravel()
    for dim, panel in enumerate(panels[: space.dof]):
        for i, (label, report) in reversed(list(enumerate(reports.items()))):
            wanted, told = (values[..., dim][report.pad_mask] for values in (report.demonstrated, report.predicted))
            plot_agreement(wanted, told, panel, color=("C0", "0.6", "C1")[i % 3], label=label)
        unit = space.units[dim]
        panel.set_title(f"{space.names[dim]} [{unit}]" if unit else space.names[dim], fontsize=9, loc="left")
    panels[0].legend(frameon=False, fontsize=8)
    plot_error_by_step(
        first.error_by_step / np.where(first.width > 0, first.width, np.nan), space.names, panels[space.dof]
    )
    for empty in panels[space.dof + 1 :]:
        empty.remove()
    return figure


def plot_agreement(demonstrated: np.ndarray, predicted: np.ndarray, ax=None, *, color: str = "C0", label=None):
    """Predicted values over demonstrated ones: on the dashed line they are equal.

    Args:
        demonstrated: (n,).
        predicted: (n,).
        ax: Axes to draw on.
        color: of the dots.
        label: for a legend.
    """
    ax = new_figure()[1] if ax is None else ax
    alpha = float(np.clip(60 / max(len(predicted), 1), 0.08, 0.8))
    dots = ax.plot(demonstrated, predicted, ".", ms=4, mew=0, color=color, alpha=alpha, zorder=3)
    dots[0].set_rasterized(True)
    ax.plot([], [], "o", ms=4, color=color, label=label)
    ax.axline((0, 0), slope=1, color="0.3", lw=0.7, ls="--", zorder=1)
    box = ax.dataLim  # of everything that was drawn here
    low, high = min(box.x0, box.y0), max(box.x1, box.y1)
    room = 0.05 * (high - low) or 0.05
    low, high = low - room, high + room
    ax.set(xlabel="demonstrated", ylabel="predicted", xlim=(low, high), ylim=(low, high))  # equal is the diagonal
    ax.locator_params(nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_error_by_step(error: np.ndarray, names: Sequence[str], ax=None):
    """Mean absolute error at each step of a chunk.

    Args:
        error: (horizon, dof) as shares of each dimension's range; NaN where there is none.
        names: (dof) of the dimensions.
        ax: Axes to draw on.
    """
    ax = new_figure()[1] if ax is None else ax
    steps = np.arange(1, len(error) + 1)
    for name, column in zip(names, 100 * np.asarray(error).T, strict=True):
        if not np.isnan(column).all():
            ax.plot(steps, column, marker="o", ms=3, lw=1.2, label=name)
    ax.set(xlabel="step of the chunk", ylabel="mean error [% of range]", xlim=(0.5, len(error) + 0.5))
    top = ax.get_ylim()[1]
    ax.set_ylim(0, 1.35 * top)  # room for the legend, which must not hide a number
    # A locator asked for whole numbers still puts halves where there are few.
    ax.set_xticks(steps[:: max(1, -(-len(steps) // 8))])
    ax.legend(frameon=False, fontsize=7, ncols=3, loc="upper center")
    ax.spines[["top", "right"]].set_visible(False)
    return ax

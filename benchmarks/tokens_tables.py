"""The tables of `tokens.py` in Markdown: means over the seeds of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from constraint_modes import sign_test

Rows = Sequence[dict[str, Any]]


def pooled(rows: Rows) -> str:
    """Success of all episodes of some rows, with its standard error (of episodes, not of trainings); that of each seed."""
    n, share = sum(row["episodes"] for row in rows), float(np.mean([row["success"] for row in rows]))
    each = f" ({', '.join(format(row['success'], '.2f') for row in rows)})" if len(rows) > 1 else ""
    return f"{share:.3f} ± {(share * (1 - share) / n) ** 0.5:.3f}{each}"


def against(ours: Rows, theirs: Rows) -> str:
    """Paired sign test over the episodes of the seeds that both have: only ours, only theirs, p."""
    other = {row["seed"]: row["solved"] for row in theirs}
    both = [row for row in ours if row["seed"] in other]
    wins, losses, p = sign_test(
        [(row["seed"], e) for row in both for e in row["solved"]],  # type: ignore[misc]
        [(row["seed"], e) for row in both for e in other[row["seed"]]],  # type: ignore[misc]
    )
    return f"+{wins} −{losses}, p {p:.2g}"


def mean(rows: Rows, get: Callable[[dict[str, Any]], Any], digits: int = 3) -> str:
    """The mean of a number that every row has; "–" where one has none."""
    values = [get(row) for row in rows]
    if not values or any(value is None for value in values):
        return "–"
    spread = f" ({min(values):.{digits}f}..{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def percent(rows: Rows, how: str) -> str:
    """Share of the chunks that are none without the processor."""
    bad, n = (
        sum(values) for values in zip(*((r["free"][how]["malformed"], r["free"]["chunks"]) for r in rows), strict=True)
    )
    return f"{bad / n:.1%} ({bad} of {n})"


def _markdown(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return f"\n{title}\n\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def closed_loop(rows: dict[str, list], timing: dict[str, Any] | None) -> str:
    """Table 1."""
    head = ["policy", "success", "against 256 bins", "tokens a chunk", "ms a chunk", "representation, mm"]
    head += ["no chunk, greedy", "no chunk, sampled", "no chunk, with processor"]
    lines = []
    for name in ("256 bins", "FAST", "VQ"):
        if name not in rows:
            continue
        some = rows[name]
        ms = "–" if timing is None else f"{timing['ms'][name]:.0f} ({timing['ratio'][name]:.2f}x)"
        cells = [
            name,
            pooled(some),
            against(some, rows.get("256 bins", some)),
            mean(some, lambda r: r["tokens_per_chunk"], 1),
        ]
        cells += [ms, mean(some, lambda r: r["representation_error_mm"], 2)]
        lines.append([*cells, percent(some, "greedy"), percent(some, "sampled"), "0"])
    for what in ("repair", "zeros"):
        some = [row["unmasked"][what] | {"seed": row["seed"]} for row in rows.get("FAST", ()) if "unmasked" in row]
        if some:
            bad, n = sum(r["malformed"] for r in some), sum(r["chunks"] for r in some)
            cells = [f"FAST without processor, {what}", pooled(some), against(some, rows.get("256 bins", some))]
            lines.append([*cells, "", "", "", f"{bad / n:.1%} in the loop", "", ""])
    text = _markdown("1. Closed loop", head, lines)
    for row in rows.get("FAST", ()):
        for how in ("greedy", "sampled"):
            one = row["free"][how]
            if "repaired_mm" in one:
                text += (
                    f"seed {row['seed']}, {how}: error of the {one['malformed']} broken chunks against the data, mm: repaired "
                    f"{one['repaired_mm']:.2f} ({one['lost']} beyond repair), zeros {one['zeros_mm']:.2f}, with the "
                    f"processor {one['with_processor_mm']:.2f}\n"
                )
    return text


def bins(rows: dict[str, list]) -> str:
    """Table 2, with FAST's density beside it."""
    head = ["policy", "nats a token", "nats a moving number", "as a density in mm", "nats a chunk", "success"]
    head += ["against 256 bins", "representation, mm"]
    lines = []
    for name in ("64 bins", "128 bins", "256 bins", "512 bins", "FAST"):
        some = rows.get(name)
        if some:
            keys = ("nats_per_token", "nats_per_number", "nats_density_mm")
            cells = [
                name,
                *(mean(some, lambda r, k=k: r[k]) for k in keys),
                mean(some, lambda r: r["nats_per_chunk"], 1),
            ]
            cells += [pooled(some), against(some, rows.get("256 bins", some))]
            lines.append([*cells, mean(some, lambda r: r["representation_error_mm"], 2)])
    return _markdown("2. How many bins (held-out loss)", head, lines)


def order(rows: dict[str, list]) -> str:
    """Table 3."""
    head = ["policy", "x", "y", "z", "first step: x", "y", "z", "success", "against one after the other"]
    names = {"256 bins": "one after the other", "256 bins, parallel": "all at once"}
    lines = []
    for name, title in names.items():
        some = rows.get(name)
        if some:
            cells = [mean(some, lambda r, d=d: r["nats_per_dim"][d]) for d in "xyz"]
            cells += [mean(some, lambda r, d=d: r["nats_first_step"][d]) for d in "xyz"]
            lines.append([title, *cells, pooled(some), against(some, rows.get("256 bins", some))])
    text = _markdown("3. Order (256 bins; nats a number, held out)", head, lines)
    keys = ("forced_by_mm", "same_step_y_z_mm", "later_steps_x_mm", "later_steps_y_z_mm", "mean_size_mm")
    head = ["a wrong first number", "x of the first step, mm", "y, z of it", "x later", "y, z later", "mean size"]
    lines = []
    for name in ("256 bins", "64 bins"):
        some = [row for row in rows.get(name, ()) if "forced" in row]
        if some:
            lines.append([name, *(mean(some, lambda r, k=k: r["forced"][k], 2) for k in keys)])
    return text + _markdown("   One forced wrong first number moves the others by", head, lines)


def vocabulary(rows: dict[str, list], softmax: dict[str, Any] | None) -> str:
    """Table 4."""
    head = ["action tokens", "training loss after each sixth of the steps", "held-out loss at the end", "success"]
    head.append("against shared")
    lines = []
    for name in ("256 bins", "256 bins, per dimension"):
        some = rows.get(name)
        if some:
            points = range(len(some[0]["curve"]))
            curve = " ".join(f"{np.mean([r['curve'][i]['train'] for r in some]):.3f}" for i in points)
            cells = [str(some[0]["action_tokens"]), curve, mean(some, lambda r: r["nats_per_token"])]
            lines.append([*cells, pooled(some), against(some, rows.get("256 bins", some))])
    text = _markdown("4. Shared action tokens, or a block for each dimension", head, lines)
    if softmax is not None:
        text += (
            f"last layer and cross entropy, {softmax['words']} words and 1792 action tokens against 256: "
            f"{softmax['forward_ratio']:.3f}x forward, {softmax['training_ratio']:.3f}x with backward\n"
        )
    return text


def tables(rows: Rows) -> str:
    """All tables of the rows there are."""
    by_name: dict[str, list] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    timing, softmax = (by_name.get(name, [None])[0] for name in ("timing", "softmax"))
    return closed_loop(by_name, timing) + bins(by_name) + order(by_name) + vocabulary(by_name, softmax)

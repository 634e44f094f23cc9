"""The demo's figure and its moving picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hf_vla_actions.constraints import Range
from hf_vla_actions.decoding import TACOLogitsProcessor
from hf_vla_actions.demo.judge import Limits
from hf_vla_actions.demo.world import TABLE
from hf_vla_actions.evaluate import Rollout
from hf_vla_actions.plots import new_figure, plot_distributions, plot_paths


def first_dimension(policy, obs, constraints: Sequence[Range], mode: str | None) -> np.ndarray:
    """(n_codes,) probabilities of the first action dimension for one observation.

    Args:
        policy: made by `to_vla`.
        obs: observation.
        constraints: what holds.
        mode: "transport" or "mask"; None for the model's own distribution over action tokens.
    """
    import torch

    inputs = policy.prepare(obs["images"], obs["instruction"])
    taco = TACOLogitsProcessor(
        constraints if mode else [],
        policy.action_config,
        prompt_length=inputs["input_ids"].shape[1],
        mode=mode or "mask",
    )
    out = policy.generate(
        **inputs,
        logits_processor=[taco],
        max_new_tokens=1,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    config = policy.action_config
    ids = torch.tensor(config.vocabulary.table(config.space().dof)[0])
    return torch.softmax(out.scores[0][0].cpu()[ids].double(), dim=0).numpy()


def draw_figure(
    path: Path, policy, obs, free: Sequence[Rollout], bound: Sequence[Rollout], limits: Limits, shown: int = 12
) -> None:
    """Ways of the tool free and bound, and the distribution of x before and after the constraint."""
    figure, axes = new_figure(1, 3, figsize=(13, 4.2))
    for ax, episodes, title, color in ((axes[0], free, "free", "C0"), (axes[1], bound, "bound", "C2")):
        plot_paths([np.array(e.poses) for e in episodes[:shown]], ax, color=color)
        low, high = limits.low, limits.high
        ax.plot([low[0], high[0], high[0], low[0], low[0]], [low[1], low[1], high[1], high[1], low[1]], "k--", lw=0.8)
        breaks = sum(map(limits.violations, episodes)) / sum(len(e.actions) for e in episodes)
        ax.set(xlim=(-TABLE, TABLE), ylim=(-TABLE, TABLE), title=f"{title}: {breaks:.0%} of the steps break a limit")
    constraints = limits.constraints(obs)
    values = policy.action_config.token_values()[0]
    distributions = {
        "model": first_dimension(policy, obs, constraints, None),
        "transport": first_dimension(policy, obs, constraints, "transport"),
        "mask": first_dimension(policy, obs, constraints, "mask"),
    }
    plot_distributions(
        values * 1000,
        distributions,
        axes[2],
        allowed=tuple(np.array([constraints[0].low, constraints[0].high], dtype=float) * 1000),
        name="x of one action [mm]",
    )
    axes[2].set_title(f'"{obs["instruction"]}"')
    figure.savefig(path, dpi=110)


def draw_gif(path: Path, episodes: Sequence[Rollout], captions: Sequence[str], zoom: int = 6) -> None:
    """Episodes side by side as an animation; each needs its frames."""
    length = max(len(e.frames) for e in episodes)
    pictures = []
    for step in range(length + 4):
        tiles = [
            _tile(e.frames[min(step, len(e.frames) - 1)], c, zoom) for e, c in zip(episodes, captions, strict=True)
        ]
        width = sum(tile.width for tile in tiles)
        sheet = Image.new("RGB", (width, tiles[0].height))
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (i * tile.width, 0))
        pictures.append(sheet.quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=180, loop=0)


def _tile(frame: np.ndarray, caption: str, zoom: int) -> Image.Image:
    picture = Image.fromarray(frame)
    tile = Image.new("RGB", (picture.width * zoom + 4, picture.height * zoom + 18), (20, 20, 22))
    tile.paste(picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST), (2, 16))
    ImageDraw.Draw(tile).text((4, 2), caption, fill=(230, 230, 230))
    return tile

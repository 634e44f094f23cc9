"""Does a head hear of the picture, and of the instruction?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_vla_actions.errors import SelfTestError, VLAActionsError
from hf_vla_actions.models.checks import NOISE_FACTOR, RELATIVE_CHANGE, SIZE


def head_sees_image(policy, instruction: str) -> float:
    """The smallest change of what a head is given, between black, white and noise; raises SelfTestError if there is none.

    Args:
        policy: made by `to_vla`, with a head.
        instruction: the sentence beside the pictures.
    """
    if not policy.prompts.family.takes_images:
        raise VLAActionsError(f"a {policy.prompts.family.name} model takes no images: there is nothing to check")
    noise = _noise()
    pictures = {"black": np.zeros_like(noise), "white": np.full_like(noise, 255), "noise": noise}
    return _smallest_change(policy, list(pictures.values()), [instruction] * 3, list(pictures), "picture")


def head_reads_instruction(policy, instructions: Sequence[str]) -> float:
    """The smallest change of what a head is given, between sentences; raises SelfTestError if there is none."""
    if len(set(instructions)) < 2:
        raise VLAActionsError(f"two different instructions are needed, got {list(instructions)}")
    names = [repr(sentence) for sentence in instructions]
    return _smallest_change(policy, [_noise()] * len(names), list(instructions), names, "instruction")


@torch.no_grad()
def _smallest_change(policy, pictures: list, sentences: list[str], names: list[str], what: str) -> float:
    """The smallest change of the features between two rows; the first row is there twice, to know rounding."""
    images: Any = None
    if policy.prompts.family.takes_images:
        views = max(len(policy.action_config.cameras), 1)
        images = [[picture] * views for picture in [*pictures, pictures[0]]]
    inputs = policy.prepare_prompts(images, [*sentences, sentences[0]])
    values = policy.heard(inputs).float().cpu().numpy()
    if not np.isfinite(values).all():
        raise SelfTestError("what the head is given is not finite: weights are broken, or their dtype too narrow")
    floor = np.abs(values[-1] - values[0]).max()
    threshold = max(NOISE_FACTOR * floor, RELATIVE_CHANGE * np.abs(values).max())
    pairs = [(np.abs(values[i] - values[j]).max(), i, j) for i in range(len(names)) for j in range(i)]
    change, i, j = min(pairs)
    if not change > threshold:
        raise SelfTestError(
            f"the {what} does not change what the head of this policy is given: {names[j]} and {names[i]} look the same to it "
            f"(they differ by at most {change:.2g}, rounding explains {threshold:.2g}). Do not let it move a robot; "
            "self_test=False loads it all the same"
        )
    return float(change)


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)

"""Presets: what a published policy decided, with its source, as the start of an `ActionConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace, NormStats
from hf_vla_actions.actions.stats import MODES
from hf_vla_actions.config.action_config import ActionConfig
from hf_vla_actions.config.codes import ActionTokenizer
from hf_vla_actions.config.token_plan import TokenPlan
from hf_vla_actions.errors import StatsError, VLAActionsError
from hf_vla_actions.heads import HeadConfig
from hf_vla_actions.tokenizers import ActionVocabulary

DIRECTIONS = {"pi0": "1 is noise, 0 the finished chunk", "gr00t": "0 is noise, 1 the finished chunk"}
MODE_TEXTS = {
    "normal": "mean and standard deviation",
    "bounds": "minimum..maximum to [-1, 1]",
    "bounds_q99": "1st..99th percentile to [-1, 1]",
}


@dataclass(frozen=True)
class Preset:
    """A published policy: chunk, head or tokens, normalization, conventions.

    What is not known is None or stands in `uncertain`; what this package does otherwise stands in `differs`. Another
    choice is `dataclasses.replace(preset, ...)`, or `changed(...)` for what goes with the sizes.

    Args:
        name: as for `ActionConfig.preset`.
        title: whose policy it is.
        horizon: actions in a chunk.
        dof: numbers in an action.
        pads: shorter actions are filled up with zeros to `dof`; otherwise a robot has exactly as many.
        execute_steps: actions that the original carries out before it predicts again.
        head: continuous head, or None.
        tokens: action tokens, or None.
        norm_modes: modes of statistics that fit (`ActionStats.mode`), the original's own first.
        gripper_normalized: whether the gripper is normalized like the rest; None: nobody has said.
        gripper: its convention, in words.
        window: observations that the original sees at once.
        images: their size and number, in words.
        prompt: what the model sees, with `{instruction}`.
        chat: put the prompt into the model's chat template.
        source: repository and files.
        uncertain: what was not to be found out.
        differs: where a policy made of it is not the original.
    """

    name: str
    title: str
    horizon: int
    dof: int
    pads: bool
    execute_steps: int
    norm_modes: tuple[str, ...]
    gripper: str
    images: str
    prompt: str
    source: str
    head: HeadConfig | None = None
    tokens: TokenPlan | None = None
    gripper_normalized: bool | None = None
    window: int = 1
    chat: bool = False
    uncertain: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.head is None) == (self.tokens is None):
            raise VLAActionsError(f"the preset {self.name!r} has a head or tokens, one of them")
        if self.head is not None and (self.head.horizon, self.head.dof) != (self.horizon, self.dof):
            raise VLAActionsError(
                f"the head of {self.name!r} is for chunks of {self.head.horizon} x {self.head.dof}, the preset for "
                f"{self.horizon} x {self.dof}: change both, or use changed()"
            )
        if not 1 <= self.execute_steps <= self.horizon:
            raise VLAActionsError(f"execute_steps is 1..{self.horizon}, got {self.execute_steps!r}")
        strangers = [mode for mode in self.norm_modes if mode not in MODES]
        if strangers or not self.norm_modes:
            raise VLAActionsError(f"norm_modes are of {list(MODES)}, got {self.norm_modes}")

    @property
    def norm_mode(self) -> str:
        """The mode of the original's statistics."""
        return self.norm_modes[0]

    @property
    def proprio_dim(self) -> int | None:
        """Numbers of the robot's state that the head reads; None for none."""
        return None if self.head is None else self.head.proprio_dim

    @property
    def steps(self) -> int | None:
        """Passes of the head that make a chunk; None for tokens."""
        return None if self.head is None else int(getattr(self.head, "steps", 1))

    @property
    def direction(self) -> str | None:
        """Which way the time of a flow goes, in words; None where there is no flow."""
        return DIRECTIONS.get(getattr(self.head, "time", ""))

    def changed(self, **changes: Any) -> Preset:
        """The preset with another horizon, dof or option of its head; a longer `execute_steps` is cut to the horizon.

        Args:
            changes: `horizon`, `dof`, and any field of the head, such as `proprio_dim`, `steps` or `width`.

        Raises:
            VLAActionsError: a name that is none of these.
        """
        ours = {name: value for name, value in changes.items() if name in ("horizon", "dof")}
        known = set(ours) | (set() if self.head is None else {f.name for f in fields(self.head)})
        unknown = sorted(set(changes) - known)
        if unknown:
            raise VLAActionsError(
                f"the preset {self.name!r} has no {unknown} to change; there are {self._changeable()}, and the fields of "
                "ActionConfig"
            )
        moves_gripper = "dof" in changes and getattr(self.head, "gripper_dim", None) is not None
        if moves_gripper and "gripper_dim" not in changes:
            raise VLAActionsError(
                f"dimension {self.head.gripper_dim} of {self.name!r} is its gripper: with another dof say gripper_dim= too"  # type: ignore[union-attr]
            )
        head = None if self.head is None else replace(self.head, **changes)
        horizon = ours.get("horizon", self.horizon)
        steps = self.execute_steps if not isinstance(horizon, int) else max(1, min(self.execute_steps, horizon))
        return replace(self, head=head, execute_steps=steps, **ours)

    def _changeable(self) -> list[str]:
        return ["horizon", "dof"] if self.head is None else [f.name for f in fields(self.head)]

    def config(
        self,
        norm_stats: NormStats | Mapping[str, Any],
        spaces: Mapping[str, ActionSpace] | None = None,
        *,
        tokenizer: ActionTokenizer | None = None,
        vocabulary: ActionVocabulary | None = None,
        **changes: Any,
    ) -> ActionConfig:
        """The config of a policy as this preset has it, for one's own robot.

        Args:
            norm_stats: statistics of each dataset or robot, of the preset's mode.
            spaces: meaning of the action of each `unnorm_key`.
            tokenizer: action tokenizer, where the preset has tokens that are learned (FAST, VQ).
            vocabulary: ids of its codes, where the preset has tokens.
            changes: as for `changed` (`horizon=10`), and fields of ActionConfig (`prompt`, `limits`, `cameras`, `chat`,
                `token_budget`).

        Raises:
            StatsError: statistics of another mode, or of another number of dimensions.
            VLAActionsError: tokenizer or vocabulary are missing or others, or a change that there is not.
        """
        extra = {"prompt", "limits", "cameras", "chat", "token_budget"}
        options = {name: value for name, value in changes.items() if name in extra}
        preset = self.changed(**{name: value for name, value in changes.items() if name not in extra})
        stats = norm_stats if isinstance(norm_stats, NormStats) else NormStats(norm_stats)
        spaces = dict(spaces or {})
        for key in stats:
            preset._check_stats(stats, key, spaces.get(key))
        if preset.tokens is None:
            if tokenizer is not None or vocabulary is not None:
                raise VLAActionsError(f"the preset {self.name!r} has a {preset.head.kind!r} head and no action tokens")  # type: ignore[union-attr]
        else:
            tokenizer = preset.tokens.tokenizer(tokenizer)
            if vocabulary is None:
                made = f"ActionVocabulary.{preset.tokens.layout or 'append'}(processor.tokenizer, {tokenizer.n_codes})"
                raise VLAActionsError(f"the preset {self.name!r} has action tokens: pass vocabulary={made}")
        kept = {"prompt": preset.prompt, "chat": preset.chat, **options}
        return ActionConfig(tokenizer, vocabulary, stats, spaces, horizon=preset.horizon, head=preset.head, **kept)

    def _check_stats(self, stats: NormStats, key: str, space: ActionSpace | None) -> None:
        """Raise unless the statistics of a dataset are used as the preset uses them."""
        action, state = stats[key]["action"], stats[key]["proprio"]
        parts = {"action": action} | ({"proprio": state} if self.proprio_dim is not None and state is not None else {})
        for part, found in parts.items():
            if found.mode not in self.norm_modes:
                modes = " or ".join(f"{mode!r} ({MODE_TEXTS[mode]})" for mode in self.norm_modes)
                raise StatsError(
                    f"the preset {self.name!r} normalizes by {modes}, and the {part} statistics of {key!r} have mode "
                    f"{found.mode!r}: pass NormStats.compute(dataset, mode={self.norm_mode!r}) or NormStats.from_file(path, "
                    f"mode={self.norm_mode!r}), or say the difference with dataclasses.replace(preset, norm_modes=...)"
                )
        if action.dof > self.dof or (action.dof < self.dof and not self.pads):
            fits = f"up to {self.dof}" if self.pads else f"{self.dof}"
            raise StatsError(
                f"{key!r} has actions of {action.dof} numbers, those of the preset {self.name!r} have {fits}: pass "
                f"dof={action.dof}"
            )
        if self.proprio_dim is not None and (state is None or state.dof > self.proprio_dim):
            found_state = "has no statistics of a state" if state is None else f"has a state of {state.dof} numbers"
            instead = "proprio_dim=None for a head that reads none" if state is None else f"proprio_dim={state.dof}"
            raise StatsError(
                f"the head of the preset {self.name!r} reads a state of up to {self.proprio_dim} numbers, and {key!r} "
                f"{found_state}: give one, or pass {instead}"
            )
        if space is None or space.gripper is None or self.gripper_normalized is None:
            return
        is_normalized = bool(np.asarray(action.mask)[space.index(space.gripper.dim)])
        if is_normalized != self.gripper_normalized:
            rule, mask = (
                ("normalizes the gripper", True) if self.gripper_normalized else ("leaves the gripper as it is", False)
            )
            raise StatsError(
                f"the preset {self.name!r} {rule}, and the mask of {key!r} is {is_normalized} at "
                f"{space.describe(space.gripper.dim)}: make it {mask}, or say the difference with "
                "dataclasses.replace(preset, gripper_normalized=None)"
            )

    def text(self) -> str:
        """All of it, a line a fact."""
        filled = " (shorter ones are filled up with zeros)" if self.pads else ""
        facts = {
            "policy": self.title,
            "chunk": f"{self.horizon} actions of {self.dof} numbers{filled}, {self.execute_steps} carried out",
            "actions": self.tokens.text()
            if self.tokens is not None
            else f"{self.head.kind!r} head: {self._head_text()}",  # type: ignore[union-attr]
            "time": self.direction,
            "state": None
            if self.head is None
            else f"up to {self.proprio_dim} numbers"
            if self.proprio_dim
            else "not read",
            "normalized": " or ".join(f"{mode!r} ({MODE_TEXTS[mode]})" for mode in self.norm_modes),
            "gripper": self.gripper,
            "observations": f"{self.window} at once; {self.images}",
            "prompt": repr(self.prompt) + (" in the model's chat template" if self.chat else ""),
            "source": self.source,
        }
        lines = [f"{name:<13}{fact}" for name, fact in facts.items() if fact is not None]
        lines += [f"{'uncertain':<13}{fact}" for fact in self.uncertain] + [
            f"{'differs':<13}{fact}" for fact in self.differs
        ]
        return "\n".join([self.name, *lines])

    def _head_text(self) -> str:
        """The options of the head that are neither sizes of the chunk nor of its default."""
        shown = {f.name: getattr(self.head, f.name) for f in fields(self.head)}  # type: ignore[arg-type]
        left_out = ("horizon", "dof", "proprio_dim", "time")
        return ", ".join(
            f"{name}={value}" for name, value in shown.items() if name not in left_out and value is not None
        )


def find_preset(name: str) -> Preset:
    """A preset by its name; an unknown one raises and lists those there are."""
    from hf_vla_actions.config.preset_table import PRESETS

    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(str(name), PRESETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise VLAActionsError(f"there is no preset {name!r}; there are {list(PRESETS)}{hint}")

"""What `hf-vla inspect` found, as values, and as text for people."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Weights:
    """Weights of a checkpoint, from their headers.

    Args:
        files: their names.
        size: bytes of all tensors' files together; None if the Hub does not say.
        parameters: numbers in all tensors.
        dtypes: share of the parameters in each dtype.
    """

    files: tuple[str, ...]
    size: int | None
    parameters: int
    dtypes: dict[str, float]


@dataclass(frozen=True)
class Tokens:
    """Action tokens.

    Args:
        layout: "append", "per_dimension", "tail" or "spare".
        count: how many there are.
        first: lowest id.
        last: highest id.
        end: id that closes an action.
        bins: scheme of the bins.
    """

    layout: str
    count: int
    first: int
    last: int
    end: int
    bins: str


@dataclass(frozen=True)
class Head:
    """A continuous head.

    Args:
        kind: such as "flow".
        dof: numbers in an action of the head.
        proprio_dim: numbers of the robot's state that it reads; None if it reads none.
        options: what else it is made of.
        parameters: numbers in its file; None if that cannot be read.
    """

    kind: str
    dof: int
    proprio_dim: int | None
    options: dict[str, Any]
    parameters: int | None = None


@dataclass(frozen=True)
class Dimension:
    """One number of an action.

    Args:
        name: its name, or "dim_0", "dim_1", ...
        unit: its unit; None if it has none or nobody has said.
        low: lowest value that the statistics normalize, in that unit.
        high: highest such value.
        normalized: whether it is normalized; others pass as they are, from -1 to 1.
    """

    name: str
    unit: str | None
    low: float
    high: float
    normalized: bool


@dataclass(frozen=True)
class Dataset:
    """Statistics of one `unnorm_key`.

    Args:
        dof: numbers in its action.
        dimensions: each of them; empty if the statistics cannot be used.
        transitions: steps that they were computed from, if known.
        problem: why they cannot be used; None if they can.
    """

    dof: int | None
    dimensions: tuple[Dimension, ...]
    transitions: int | None
    problem: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter.

    Args:
        base: model that it belongs to.
        type: such as "LORA".
        rank: of its matrices.
        alpha: scale is alpha / rank.
        expected: tensors that the base and `adapter_config.json` call for; None if the base cannot be seen.
        present: how many of them are there.
    """

    base: str | None
    type: str
    rank: int | None
    alpha: float | None
    expected: int | None
    present: int


@dataclass(frozen=True)
class Report:
    """Everything about one checkpoint.

    Args:
        path: folder or repository.
        kind: "policy", "OpenVLA checkpoint", "OpenVLA-OFT checkpoint", "adapter of a policy", "adapter" or "plain model".
        model_type: of `config.json` (for an adapter, of its base).
        family: how the package treats such models; None if it cannot.
        policy: whether it says actions that can be turned into commands.
        weights: None if there are none.
        tokens: None for a plain model, and for a policy that has a continuous head alone.
        datasets: statistics by `unnorm_key`.
        horizon: actions predicted at once.
        cameras: pictures of the training, if known.
        prompt: what the model is asked.
        oft: constants of an OFT checkpoint; None for others.
        components: files of OFT heads and projectors by the part's name.
        adapter: None for whole models.
        processor: whether pictures and text can be prepared.
        problems: why it is not safe to run; empty if it is.
        notes: what else to know.
        head: continuous head; None for a policy whose actions are tokens.
    """

    path: str
    kind: str
    model_type: str | None
    family: str | None
    policy: bool
    weights: Weights | None
    tokens: Tokens | None = None
    datasets: dict[str, Dataset] = field(default_factory=dict)
    horizon: int | None = None
    cameras: tuple[str, ...] = ()
    prompt: str | None = None
    oft: dict[str, Any] | None = None
    components: dict[str, str] = field(default_factory=dict)
    adapter: Adapter | None = None
    processor: bool = False
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    head: Head | None = None

    @property
    def safe(self) -> bool:
        """Whether nothing speaks against running it."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**dataclasses.asdict(self), "safe": self.safe}

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.path}: {self.kind}"]
        add = lines.append
        add(f"  model       {self.model_type or 'unknown'}, family {self.family or 'not supported'}")
        if self.weights is not None:
            add(f"  weights     {_weights(self.weights)}")
        if self.adapter is not None:
            add(f"  adapter     {_adapter(self.adapter)}")
        add(f"  processor   {'present' if self.processor else 'MISSING'}")
        if self.tokens is not None:
            t = self.tokens
            add(f"  tokens      {t.count} {t.layout!r}, ids {t.first}..{t.last}, closed by {t.end}, bins {t.bins}")
        if self.head is not None:
            add(f"  head        {_head(self.head)}")
        if self.horizon is not None:
            add(f"  chunk       {self.horizon} action(s)")
        if self.oft is not None:
            add("  oft         " + ", ".join(f"{name}={value}" for name, value in self.oft.items()))
        if self.components:
            add("  parts       " + ", ".join(f"{part} ({file})" for part, file in self.components.items()))
        if self.cameras:
            add(f"  cameras     {', '.join(self.cameras)}")
        if self.prompt is not None:
            add(f"  prompt      {self.prompt!r}")
        for key, dataset in self.datasets.items():
            steps = "" if dataset.transitions is None else f", {dataset.transitions} steps"
            add(f"  unnorm_key  {key}: {'?' if dataset.dof is None else dataset.dof} dims{steps}")
            if dataset.problem is not None:
                add(f"                UNUSABLE: {dataset.problem}")
            for dim in dataset.dimensions:
                span = f"{dim.low:>12.6g} .. {dim.high:<12.6g}"
                how = "" if dim.normalized else "as it is"
                add(f"                {dim.name:<12}{span} {dim.unit or '-':<6}{how}".rstrip())
        lines += [f"  note        {note}" for note in self.notes]
        if self.problems:
            lines += ["NOT SAFE to run:", *(f"  - {problem}" for problem in self.problems)]
        elif self.policy:
            add("fine to run")
        else:
            add("no policy yet: fine-tune it with hf-vla train, or make an ActionConfig and call to_vla")
        return "\n".join(lines) + "\n"


def _weights(weights: Weights) -> str:
    dtypes = ", ".join(
        name if share > 0.9995 else f"{share:.1%} {name}"
        for name, share in sorted(weights.dtypes.items(), key=lambda item: -item[1])
    )
    files = weights.files[0] if len(weights.files) == 1 else f"{len(weights.files)} files"
    return f"{_short(weights.parameters)} parameters, {dtypes}, {_short(weights.size)}B in {files}"


def _head(head: Head) -> str:
    state = "" if head.proprio_dim is None else f", reads {head.proprio_dim} numbers of the robot's state"
    options = ", ".join(f"{name}={value}" for name, value in head.options.items())
    return f"{head.kind}, {_short(head.parameters)} parameters, {head.dof} numbers an action{state} ({options})"


def _adapter(adapter: Adapter) -> str:
    share = f"{adapter.present} tensors"
    if adapter.expected:
        share = f"{adapter.present} of {adapter.expected} tensors ({adapter.present / adapter.expected:.1%})"
    return f"{adapter.type} rank {adapter.rank}, alpha {adapter.alpha}, {share}, on {adapter.base}"


def _short(number: float | None) -> str:
    if number is None:
        return "? "
    for limit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {name}"
    return f"{number:.0f} "

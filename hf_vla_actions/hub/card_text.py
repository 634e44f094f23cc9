"""The sections of a model card. What is not known is said to be "not recorded"; nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.hub.card_facts import HELD_OUT, OF_TRAINING, Facts, data_text, rows
from hf_vla_actions.models.families import OPENVLA_TYPE

UNKNOWN = "not recorded"
# Of training.json, in the order of the card; what was asked for beyond it stands in its "options".
HEADLINES = (
    *("recipe", "recipe_source", "model_name_or_path", "dataset", "unnorm_key", "steps", "batch_size", "world_size"),
    *("learning_rate", "seed"),
)
SHARES = ("accuracy", "chunks", "precision", "recall", "f1", "bins", "steps")


def use(facts: Facts, repository: str, base: str | None) -> str:
    """Ten lines that load and run it, and how plain Transformers loads it."""
    report, key = facts.report, facts.keys[0]
    takes_images = report.family != "text-only"
    n_images = max(len(report.cameras), int((report.oft or {}).get("num_images") or 1))
    names = report.cameras or [f"camera_{i}" for i in range(n_images)]
    order = "in this order" if len(names) > 1 else "as in training"
    known = "" if report.cameras else "; the names of the cameras are not recorded"
    files = ", ".join(f'"{_file(name)}.png"' for name in names) + ("," if len(names) == 1 else "")
    proprio = _state_size(facts, key)
    given = ["images" if takes_images else "None", '"pick up the red block"', *(["state"] if proprio else [])]
    keys = f'unnorm_key="{key}"'
    lines = ["# pip install hf_vla_actions"]
    lines += ["import numpy as np"] if proprio else []
    lines += ["from PIL import Image"] if takes_images else []
    lines += ["", "from hf_vla_actions import AutoModelForActionPrediction", ""]
    lines += [f'vla = AutoModelForActionPrediction.from_pretrained("{repository}")']
    lines += [f"images = [Image.open(name) for name in ({files})]  # {order}{known}"] if takes_images else []
    lines += [f"state = np.zeros({proprio})  # of the robot, as in training"] if proprio else []
    lines += [f"inputs = vla.prepare({', '.join(given)})  # a sentence like those of its training"]
    observed = '"images": images, "instruction": ...' + (', "proprio": state' if proprio else "")
    others = f"; there are also {', '.join(facts.keys[1:])}" if len(facts.keys) > 1 else ""
    lines += [f"actions = vla.predict_action(**inputs, {keys})  # {_shape(facts, key)}, units below{others}"]
    lines += [f"policy = vla.policy({keys})  # policy({{{observed}}}) -> one action at a time"]
    text = "```python\n" + "\n".join(lines) + "\n```\n"
    if report.adapter is not None:
        return text + f"\nIt is an adapter: its base model, `{base or report.adapter.base}`, is loaded with it.\n"
    auto = "AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM"
    first = "after `import hf_vla_actions`, " if report.model_type == OPENVLA_TYPE else ""
    text += f'\nThe model alone, without its actions: {first}`{auto}.from_pretrained("{repository}")`.'
    if facts.shim:
        text += (
            " With `trust_remote_code=True` the same call returns the policy (it needs the package hf_vla_actions)."
        )
    return text + "\n"


def meaning(facts: Facts) -> str:
    """A table of the action space of each `unnorm_key`, and what a robot must know beside it."""
    parts = []
    for key in facts.keys:
        what, table = rows(facts, key)
        space = facts.space(key)
        frame = UNKNOWN if space is None else space.frame or UNKNOWN
        heads = ["dimension", "unit", "delta or absolute", "frame", f"{what} of the training data"]
        body = [[row.name, row.unit, row.kind, frame, row.values] for row in table]
        parts.append(f'`unnorm_key="{key}"`: {facts.dof(key)} numbers.\n\n{_table(heads, body)}\n{_convention(space)}')
    horizon = UNKNOWN if facts.report.horizon is None else f"{facts.report.horizon} action(s) at once"
    return "\n".join(parts) + f"\nHorizon: {horizon}. {_tokens(facts)}\n"


def data(facts: Facts) -> str:
    """What it was trained on."""
    lines = []
    for key, dataset in facts.report.datasets.items():
        stats = None if facts.config is None else facts.config.norm_stats[key]
        lines.append(f"- `{key}`: {data_text(dataset, None if stats is None else stats['num_trajectories'])}")
    lines.append(f"- datasets: {', '.join(facts.datasets()) or UNKNOWN}")
    lines.append(f"- cameras: {', '.join(facts.report.cameras) or UNKNOWN}")
    prompt = facts.report.prompt
    lines.append(f"- prompt: {UNKNOWN if prompt is None else f'`{prompt!r}`'}")
    return "\n".join(lines) + "\n"


def training(facts: Facts) -> str:
    """How it was trained."""
    adapter, weights = facts.report.adapter, facts.report.weights
    lines = []
    if adapter is not None:
        lines.append(
            f"- adapter: {adapter.type}, rank {adapter.rank}, alpha {adapter.alpha}, {adapter.present} tensors"
        )
    if weights is not None:
        dtypes = ", ".join(f"{share:.0%} {name}" for name, share in sorted(weights.dtypes.items()))
        lines.append(f"- weights: {weights.parameters:,} numbers ({dtypes})")
    said = {name: facts.option(name) for name in HEADLINES}
    lines += [f"- {name}: {_value(value)}" for name, value in said.items() if value is not None]
    for part in ("options", "versions"):
        values = facts.training.get(part)
        if isinstance(values, dict) and values:
            each = [f"`{name}={_value(value)}`" for name, value in values.items() if name not in HEADLINES]
            lines.append(f"- {part}: {', '.join(each)}")
    if not facts.training:
        lines.append(f"- recipe: {UNKNOWN} (there was no training.json beside the weights)")
    return "\n".join(lines) + "\n"


def evaluation(facts: Facts) -> str:
    """Every metric, on held-out episodes and on a sample of the training data."""
    held, own = (_of(facts, prefix) for prefix in (HELD_OUT, OF_TRAINING))
    if not held and not own:
        return f"Metrics: {UNKNOWN}.\n\nSuccess on a robot or in a simulator: {UNKNOWN}.\n"
    shown = {"held-out episodes": held, "sample of the training data": own}
    shown = {where: values for where, values in shown.items() if values}
    names = list(dict.fromkeys(name for values in shown.values() for name in values if "/" not in name))
    body = [[name, *(_number(v.get(name)) for v in shown.values()), unit_of(facts, name)] for name in names]
    text = _table(["metric", *shown, "unit"], body)
    if not held:
        text += "\nNo episodes were held out: these numbers say nothing about data it has not seen.\n"
    where, values = next(iter(shown.items()))
    text += _by_part(facts, where, values)
    return text + f"\nSuccess on a robot or in a simulator: {UNKNOWN}.\n"


def _by_part(facts: Facts, where: str, values: dict[str, float]) -> str:
    """Metrics of each dimension (or codebook, or step), a row each."""
    split = {name: name.partition("/") for name in values if "/" in name}
    if not split:
        return ""
    metrics = list(dict.fromkeys(metric for metric, _, _ in split.values()))
    parts = list(dict.fromkeys(part for _, _, part in split.values()))
    body = []
    for part in parts:
        units = {unit_of(facts, f"{metric}/{part}") for metric in metrics if f"{metric}/{part}" in values}
        body.append([part, ", ".join(sorted(units - {"share", "-"})) or "-"])
        body[-1] += [_number(values.get(f"{metric}/{part}")) for metric in metrics]
    return f"\nOn the {where}, by part (`l1` is in the unit of its dimension):\n\n{_table(['part', 'unit', *metrics], body)}"


def figures(facts: Facts) -> str:
    """The pictures that lie beside the weights; empty if there are none."""
    return "".join(f"![{name.rpartition('.')[0].replace('_', ' ')}]({name})\n\n" for name in facts.pictures)


def limits(facts: Facts) -> str:
    """Limits saved with the policy, and what they do not do."""
    own = [] if facts.config is None else [str(limit) for limit in facts.config.limits]
    if own:
        listed = "\n".join(f"- `{limit}`" for limit in own)
        text = f"Permanent limits, which every action of this policy keeps:\n\n{listed}\n\n"
    else:
        text = "Permanent limits: none are saved with it. "
    return (
        f"{text}Limits are on the commands, in the units above; `predict_action(..., constraints=[...])` adds more for one "
        "call. They know nothing of obstacles, people, or what the robot's controller makes of a command, and keeping them "
        "does not mean that a task succeeds.\n\n"
        "Before it moves a robot: compare the table above with what the controller expects (units, frame, delta or "
        "absolute, gripper, rate), try it slowly with the emergency stop in reach, and keep the robot's own limits on. "
        "It was trained on the data above and nothing says that it can do anything else.\n\n"
        f"Where it fails: {UNKNOWN}.\n"
    )


def unit_of(facts: Facts, name: str) -> str:
    """Unit of a metric; "mixed" for errors that average over different units."""
    metric, _, dimension = name.partition("/")
    if "l1" not in metric.split("_") or "normalized" in metric:
        return "share" if metric.endswith(SHARES) else "-"
    spaces = [space for space in map(facts.space, facts.keys) if space is not None and space.named]
    units: set[str | None] = set()
    for space in spaces:
        units |= {space.units[space.index(dimension)]} if dimension in space.names else set()
        units |= set(space.units) if not dimension else set()
    if len(units) > 1:
        return "mixed units"
    return (units.pop() or "-") if units else UNKNOWN


def _convention(space: ActionSpace | None) -> str:
    if space is None:
        return f"Gripper: {UNKNOWN}. Control rate: {UNKNOWN}.\n"
    gripper, rate = space.gripper, UNKNOWN if space.rate_hz is None else f"{space.rate_hz:g} Hz"
    said = UNKNOWN
    if gripper is not None:
        states = "nothing between them is sent" if gripper.binary else "values between them are sent too"
        states = "commands that change it, halfway keeps it" if gripper.relative else states
        name = space.names[space.index(gripper.dim)]
        said = f"`{name}`, {gripper.open:g} is open, {gripper.closed:g} is closed ({states})"
    anchor = {None: "", "step": " Deltas are relative to the state before each step.", "chunk": ""}[space.anchor]
    anchor = " Deltas are relative to the state when a chunk begins." if space.anchor == "chunk" else anchor
    return f"Gripper: {said}. Control rate: {rate}.{anchor}\n"


def _tokens(facts: Facts) -> str:
    tokens, head = facts.report.tokens, facts.report.head
    if head is not None:
        options = ", ".join(f"`{name}={_value(value)}`" for name, value in head.options.items())
        size = UNKNOWN if head.parameters is None else f"{head.parameters:,} numbers"
        text = f"Actions come from a continuous head, `{head.kind}` ({size}; {options})"
        return f"{text}, and {tokens.count} tokens of actions were learned beside it." if tokens else f"{text}."
    if tokens is None:
        return "Actions come from a continuous head."
    return f"Actions are {tokens.count} tokens (`{tokens.bins}`, layout `{tokens.layout}`)."


def _state_size(facts: Facts, key: str) -> int:
    """Numbers of the robot's state that the policy reads; 0 for none."""
    head = facts.report.head
    if head is None or head.proprio_dim is None or facts.config is None:
        return int((facts.report.oft or {}).get("proprio_dim") or 0)
    stats = facts.config.norm_stats[key]["proprio"]  # a head may read more, which are filled with zeros
    return head.proprio_dim if stats is None else int(stats.dof)


def _shape(facts: Facts, key: str) -> str:
    horizon, dof = facts.report.horizon, facts.dof(key)
    if facts.report.model_type == OPENVLA_TYPE and facts.report.oft is not None:
        return f"({horizon}, {dof})"
    if facts.report.model_type == OPENVLA_TYPE and horizon == 1:
        return f"({dof},)"
    return f"(1, {horizon}, {dof})"


def _of(facts: Facts, prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in facts.metrics.items() if name.startswith(prefix)}


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def _value(value: object) -> str:
    """A value in words; of a folder of somebody's machine only its name."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if isinstance(value, str) and Path(value).is_absolute():
        return f"{Path(value).name} (not published)"
    return str(value)


def _file(camera: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in camera)


def _table(heads: list[str], body: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

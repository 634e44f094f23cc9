"""Every family with every layout in every operation: the operations, and the table that the README shows.

Each operation takes a maker of fresh policies and raises AssertionError if the cell does not hold.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import INSTRUCTIONS, action_config, picture
from tiny_families import FAMILIES, VISION_FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompileConfig

from hf_vla_actions import AutoModelForActionPrediction, TACOLogitsProcessor, VLAActionsError, to_vla
from hf_vla_actions.constraints import Fix, Range
from hf_vla_actions.models import save_adapter
from hf_vla_actions.train.arguments import LoraArguments
from hf_vla_actions.train.collator import ActionCollator, action_loss
from hf_vla_actions.train.lora import add_lora

LAYOUTS = ("append", "tail", "per_dimension", "spare")
HORIZON, DOF, N_BINS, SPARE_ROWS = 2, 7, 64, 100
N_TOKENS = HORIZON * DOF
SENTENCES = [INSTRUCTIONS[0], "push the green block onto the plate and then move to the red block", INSTRUCTIONS[2]]
LIMITS = [Range("x", -0.01, 0.01), Range("z", -0.004, 0.02, steps=[1]), Fix("gripper", "open")]


def make(family, layout, tie=None):
    """A policy with random weights; its embeddings have rows that no token uses."""
    model, processor = FAMILIES[family](0, spare_rows=SPARE_ROWS, tie=tie)
    tokenizer = processor.tokenizer if family in VISION_FAMILIES else processor
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # so that training can be compared with use
    return to_vla(model, processor, action_config(tokenizer, horizon=HORIZON, layout=layout, n_bins=N_BINS)).eval()


@functools.lru_cache(maxsize=8)
def shared(family, layout, tie=None):
    """A policy for operations that leave it as it is, with the inputs of a batch."""
    policy = make(family, layout, tie)
    return policy, policy.prepare(pictures(policy), SENTENCES)


def pictures(policy):
    return [picture(i) for i in range(3)] if policy.prompts.family.takes_images else None


def one(policy, i=0):
    images = pictures(policy)
    return policy.prepare(None if images is None else images[i], SENTENCES[i])


def respects_limits(actions):
    assert np.abs(actions[..., 0]).max() <= 0.01
    assert actions[:, 1, 2].min() >= -0.004
    assert actions[:, 1, 2].max() <= 0.02
    assert (actions[..., 6] == 1.0).all()


def decoded(policy, sequences, length):
    """Actions of what plain generate returned: one chunk a row, the closing token, nothing else."""
    new = sequences[:, length:].numpy()
    assert new.shape[1] == N_TOKENS + 1
    assert (new[:, -1] == policy.action_config.vocabulary.end_token_id).all()
    actions = policy.action_config.decode(new[:, :-1])[1]
    respects_limits(actions)
    return actions


def generated(policy, inputs, length=None, **options):
    """`generate` with TACO alone, as a user of plain Transformers calls it; (tokens, actions)."""
    length = inputs["input_ids"].shape[1] if length is None else length
    taco = TACOLogitsProcessor(LIMITS, policy.action_config, prompt_length=length, mode="mask")
    options = {"max_new_tokens": N_TOKENS + 5, **options}
    with torch.no_grad():
        sequences = policy.generate(**inputs, logits_processor=[taco], **options)
    return sequences[:, length:], decoded(policy, sequences, length)


def predict(family, layout):
    """predict_action: a left-padded batch equals the loop, and limits hold, in the three modes."""
    policy, inputs = shared(family, layout)
    alone = [one(policy, i) for i in range(3)]
    for mode in ("project", "transport", "mask"):
        batch = policy.predict_action(**inputs, constraints=LIMITS, mode=mode)
        assert batch.shape == (3, HORIZON, DOF)
        assert batch.dtype == np.float64
        respects_limits(batch)
        loop = [policy.predict_action(**row, constraints=LIMITS, mode=mode)[0] for row in alone]
        np.testing.assert_array_equal(batch, loop)
    assert len(np.unique(batch[:, :, 1])) > 1, "rows that are all the same would prove nothing"


def self_test(family, layout):
    """It sees its picture and reads its instruction."""
    policy, _ = shared(family, layout)
    policy.self_test()


def teacher_forcing(family, layout):
    """Training sees the logits that use sees: one forward pass over the collated batch, and generate with its cache."""
    policy, inputs = shared(family, layout)
    out = policy.predict_action(**inputs, return_dict=True)
    images = pictures(policy)
    samples = [
        {
            "images": None if images is None else [images[i]],
            "instruction": SENTENCES[i],
            "actions": policy.action_config.decode(out.token_ids[i])[1],
            "action_pad_mask": np.ones(HORIZON, dtype=bool),
            "episode": 0,
            "step": i,
        }
        for i in range(3)
    ]
    batch = ActionCollator(policy.prompts)(samples)
    _ = batch.pop("labels"), batch.pop("sample_ids")
    # The gripper's tokens would come back as others of the same meaning: open and closed have half the bins each.
    tokens = torch.from_numpy(out.token_ids)
    batch["input_ids"][:, -N_TOKENS - 1 : -1] = tokens
    for mode in (policy.eval, policy.train):  # some families build other masks while training
        mode()
        with torch.no_grad():
            logits = policy(**batch).logits[:, -N_TOKENS - 2 : -2]
        log_p = torch.log_softmax(logits.double(), -1).gather(2, tokens[..., None])[..., 0].sum(1)
        np.testing.assert_allclose(log_p.numpy(), out.log_prob, atol=2e-3)
    policy.eval()


def _train(model, policy, steps=24):
    images = pictures(policy)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, N_BINS, (3, N_TOKENS))
    actions = policy.action_config.decode(policy.action_config.vocabulary.to_ids(codes))[1]
    samples = [
        {
            "images": None if images is None else [images[i]],
            "instruction": SENTENCES[i],
            "actions": actions[i],
            "action_pad_mask": np.ones(HORIZON, dtype=bool),
            "episode": 0,
            "step": i,
        }
        for i in range(3)
    ]
    batch = ActionCollator(policy.prompts)(samples)
    batch.pop("sample_ids")
    labels = batch.pop("labels")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = action_loss(model(**batch), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if losses[-1] < 0.6 * losses[0]:  # more than is asked below: the rest would only take time
                break
    model.eval()
    assert losses[-1] < 0.7 * losses[0], losses


def train_full(family, layout):
    """All weights learn."""
    policy = make(family, layout)
    _train(policy, policy)


def train_lora(family, layout, tie=None):
    """LoRA learns; old rows stay to the bit; the saved adapter on a fresh base gives the same logits."""
    policy = make(family, layout, tie)
    ids = policy.action_config.vocabulary.token_ids.reshape(-1)
    others = np.setdiff1d(np.arange(policy.get_input_embeddings().weight.shape[0]), ids)
    before = policy.get_input_embeddings().weight[others].detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        native, processor = FAMILIES[family](0, spare_rows=SPARE_ROWS, tie=tie)
        native.save_pretrained(base)
        processor.save_pretrained(base)
        policy.config._name_or_path = policy.name_or_path = str(base)
        adapted = add_lora(policy, LoraArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0))
        names = [name for name, p in adapted.named_parameters() if p.requires_grad]
        vision = policy.prompts.family.vision_modules
        assert not [name for name in names if any(f".{module}." in name for module in vision)]
        _train(adapted, policy)
        save_adapter(adapted, Path(folder) / "adapter")
        again = AutoModelForActionPrediction.from_pretrained(Path(folder) / "adapter")
        inputs = policy.prepare(pictures(policy), SENTENCES)
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(again.predict_action(**inputs), adapted.predict_action(**inputs))
        merged = adapted.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight[others], before)


def save_load(family, layout, tie=None):
    """Saved as the native class would; plain Auto classes and ours load it, no key missing, none unexpected."""
    policy, inputs = shared(family, layout, tie)
    native = type(policy).__mro__[2]
    auto = AutoModelForImageTextToText if policy.prompts.family.takes_images else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        for name, saved in (("policy", policy), ("native", native(policy.config))):
            saved.save_pretrained(Path(folder) / name)
        keys = []
        for name in ("policy", "native"):
            with safe_open(Path(folder) / name / "model.safetensors", "pt") as file:
                keys.append({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
        assert keys[0] == keys[1]
        plain, info = auto.from_pretrained(Path(folder) / "policy", output_loading_info=True)
        assert type(plain) is native
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        again = AutoModelForActionPrediction.from_pretrained(Path(folder) / "policy")
        assert again.action_config == policy.action_config
    for name, value in policy.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    images = pictures(policy)
    inputs_again = again.prepare(images, SENTENCES)
    assert torch.equal(inputs_again["input_ids"], inputs["input_ids"])
    np.testing.assert_array_equal(again.predict_action(**inputs_again), policy.predict_action(**inputs))


def greedy(family, layout):
    """Plain generate with TACO equals predict_action in the same mode, and ends by itself."""
    policy, inputs = shared(family, layout)
    _, actions = generated(policy, inputs)
    np.testing.assert_array_equal(actions, policy.predict_action(**inputs, constraints=LIMITS, mode="mask"))


def sampling(family, layout):
    """Temperature, top-k, top-p, several samples a row."""
    policy, inputs = shared(family, layout)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.95, "num_return_sequences": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens, _ = generated(policy, inputs, **options)
    assert tokens.shape[0] == 6
    assert len(torch.unique(tokens, dim=0)) > 3


def beams(family, layout):
    """Beam search, alone and with sampling, several sequences a row."""
    policy, inputs = shared(family, layout)
    assert generated(policy, inputs, num_beams=3, num_return_sequences=2)[0].shape[0] == 6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generated(policy, inputs, num_beams=2, do_sample=True)


def assisted(family, layout):
    """Speculative decoding with a smaller model gives the greedy tokens."""
    policy, _ = shared(family, layout)
    inputs = one(policy)
    draft = type(policy).__mro__[2](policy.config).eval()
    expected, _ = generated(policy, inputs)
    tokens, _ = generated(policy, inputs, assistant_model=draft)
    assert torch.equal(tokens, expected)


def prompt_lookup(family, layout):
    """Prompt-lookup decoding gives the greedy tokens."""
    policy, _ = shared(family, layout)
    inputs = one(policy)
    assert torch.equal(generated(policy, inputs, prompt_lookup_num_tokens=2)[0], generated(policy, inputs)[0])


def static_cache(family, layout):
    """A static cache gives the greedy tokens, as no cache at all does."""
    policy, inputs = shared(family, layout)
    expected, _ = generated(policy, inputs)
    assert torch.equal(generated(policy, inputs, cache_implementation="static")[0], expected)
    assert torch.equal(generated(policy, inputs, use_cache=False)[0], expected)


@functools.lru_cache(maxsize=1)
def only_compiled(family):
    """What was compiled for one layout serves the others of its family; the next family starts anew."""
    torch.compiler.reset()


def compiled(family, layout):
    """A compiled forward pass gives the greedy tokens."""
    policy, inputs = shared(family, layout)
    expected, _ = generated(policy, inputs)
    only_compiled(family)
    options = CompileConfig(fullgraph=False, mode=None, backend="eager")
    options._compile_all_devices = True
    tokens, _ = generated(policy, inputs, cache_implementation="static", compile_config=options)
    assert torch.equal(tokens, expected)


def inputs_embeds(family, layout):
    """Embeddings instead of ids give the greedy tokens."""
    policy, inputs = shared(family, layout)
    expected, _ = generated(policy, inputs)
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = policy.get_input_embeddings()(inputs["input_ids"])
    if policy.prompts.family.own_positions:  # the places of the pictures are found in the ids
        with pytest.raises(VLAActionsError, match="input_ids as well"):
            generated(policy, embedded, length=0)
        tokens, _ = generated(policy, {**embedded, "input_ids": inputs["input_ids"]})
    else:
        tokens, _ = generated(policy, embedded, length=0)
    assert torch.equal(tokens, expected)


OPERATIONS = (
    predict,
    self_test,
    teacher_forcing,
    train_full,
    train_lora,
    save_load,
    greedy,
    sampling,
    beams,
    assisted,
    prompt_lookup,
    static_cache,
    compiled,
    inputs_embeds,
)

# What is refused: the error is what the cell asserts. Transformers' own:
REFUSED = {
    ("paligemma", "inputs_embeds"): "doesn't have its forwarding implemented",
    ("gemma3", "inputs_embeds"): "doesn't have its forwarding implemented",
    # Ours: Transformers goes on, with logits that are off by several units.
    ("paligemma", "assisted"): "reads itself in both directions",
    ("paligemma", "prompt_lookup"): "reads itself in both directions",
}


def execute(family, layout, operation):
    """Raise AssertionError unless the cell holds."""
    message = REFUSED.get((family, operation.__name__))
    if message is None:
        operation(family, layout)
        return
    with pytest.raises(ValueError, match=message):
        operation(family, layout)


def table():
    """The matrix as the README shows it; a check stands for all layouts."""
    names = [operation.__name__.replace("_", " ") for operation in OPERATIONS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for family in FAMILIES:
        cells = ["–" if (family, operation.__name__) in REFUSED else "✓" for operation in OPERATIONS]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)

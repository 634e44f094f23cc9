"""TACO in `generate`: whatever the model says, what comes out is allowed in real units."""

import logging
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from hf_vla_actions.actions import ActionSpace, ActionStats, Gripper
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.constraints import Fix, Forbid, InSet, Range, Target
from hf_vla_actions.decoding import TACOLogitsProcessor
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError
from hf_vla_actions.tokenizers import ActionVocabulary, UniformActionTokenizer

torch.set_num_threads(1)

NAMES, UNITS = ["x", "y", "yaw", "gripper"], ["m", "m", "rad", None]
LOW, HIGH = [-0.03, -0.01, -0.2, 0.0], [0.028, 0.03, 0.2, 1.0]
DOF = 4
END = 2


def make_config(n=64, horizon=2, first=40, order=1, limits=(), binary=True, scheme="uniform"):
    """`first` is the lowest action id; order -1 counts backwards as OpenVLA does."""
    space = ActionSpace(NAMES, UNITS, (True, True, True, False), gripper=Gripper("gripper", binary=binary))
    stats = ActionStats.from_ranges(LOW, HIGH, mask=[True, True, True, False])
    ids = np.arange(first, first + n)[::order]
    layout = "append" if order == 1 else "tail"
    return ActionConfig(
        tokenizer=UniformActionTokenizer(n, scheme),
        vocabulary=ActionVocabulary(ids, END, layout, tuple(f"<act_{i:03d}>" for i in range(n))),
        norm_stats={"robot": {"action": stats}},
        spaces={"robot": space},
        horizon=horizon,
        limits=limits,
    )


CONFIG = make_config()
VOCABULARY_SIZE = 40 + 64 + 8  # eight padding rows behind the last token
N = 2 * DOF


def real_values(config):
    """(dof, n) written out by hand: centers, un-normalized where masked, gripper rounded."""
    centers = config.tokenizer.grid.values
    rows = [low + (centers + 1) / 2 * (high - low) for low, high in zip(LOW, HIGH, strict=True)]
    rows[3] = np.where(centers >= 0.5, 1.0, 0.0) if config.space().gripper.binary else centers
    return np.array(rows)


def at(config, position, prompt=3, rows=1):
    """Ids of a prompt and the first `position` action tokens."""
    ids = torch.ones(rows, prompt + position, dtype=torch.long)
    ids[:, prompt:] = int(config.vocabulary.token_ids[0])
    return ids


def action_scores(config, scores):
    """Scores of the action tokens by code."""
    return scores[:, torch.tensor(config.vocabulary.token_ids.copy())]


# ---------------------------------------------------------------- against a slow oracle


def oracle(scores, values, allowed, mode, bias):
    """One row, by code, in float64 and with loops."""
    scores = [s + b for s, b in zip(scores, bias, strict=True)]
    result = [-math.inf] * len(scores)
    mass = {k: [] for k in range(len(scores)) if allowed[k]}
    for k, score in enumerate(scores):
        if allowed[k]:
            mass[k].append(score)
        elif mode == "transport":
            goal = min(mass, key=lambda j: (abs(values[j] - values[k]), values[j]))
            mass[goal].append(score)
    for k, parts in mass.items():
        top = max(parts)
        result[k] = top + math.log(sum(math.exp(p - top) for p in parts)) if len(parts) > 1 else parts[0]
    return np.array(result)


SPEC = [
    Range("x", -0.011, 0.004),
    Forbid("y", 0.0, 0.012),
    InSet("yaw", [-0.1, 0.05], tolerance=0.02),
    Fix("gripper", "open", steps=1),
    Target("x", 0.0, sigma=0.01),
]


def allowed_by_hand(values, position):
    step, dim = divmod(position, DOF)
    v = values[dim]
    if dim == 0:
        return (v >= -0.011) & (v <= 0.004)
    if dim == 1:
        return (v < 0) | (v > 0.012)
    if dim == 2:
        return (np.abs(v + 0.1) <= 0.02) | (np.abs(v - 0.05) <= 0.02)
    return v == 1.0 if step == 1 else np.full(len(v), True)


@pytest.mark.parametrize("mode", ["mask", "transport"])
@pytest.mark.parametrize("prompt_length", [3, None])
@pytest.mark.parametrize("order", [1, -1])
def test_equals_the_slow_oracle(mode, prompt_length, order):
    config = make_config(order=order)
    values = real_values(config)
    processor = TACOLogitsProcessor(SPEC, config, prompt_length=prompt_length, mode=mode)
    generator = torch.Generator().manual_seed(0)
    for position in range(N):
        scores = torch.randn(5, VOCABULARY_SIZE, generator=generator, dtype=torch.float64) * 4
        result = processor(at(config, position, rows=5), scores)
        allowed = allowed_by_hand(values, position)
        bias = -((values[0] / 0.01) ** 2) / 2 if position % DOF == 0 else np.zeros(64)
        # A constant that is the same for all tokens does not count: the pull is shifted to at most 0.
        bias = bias - (bias[allowed].max() if mode == "mask" else bias.max())
        for row in range(5):
            expected = oracle(action_scores(config, scores)[row].tolist(), values[position % DOF], allowed, mode, bias)
            np.testing.assert_allclose(action_scores(config, result)[row].numpy(), expected, rtol=1e-6, atol=1e-6)
        text = torch.ones(VOCABULARY_SIZE, dtype=torch.bool)
        text[config.vocabulary.token_ids.copy()] = False
        assert (result[:, text] == -torch.inf).all()


def test_transport_conserves_the_probability_of_action_tokens():
    scores = torch.randn(7, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(1)) * 5
    for position in range(N):
        result = TACOLogitsProcessor(SPEC[:-1], CONFIG)(at(CONFIG, position, rows=7), scores)
        torch.testing.assert_close(
            action_scores(CONFIG, scores).logsumexp(1), result.logsumexp(1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("mode", ["mask", "transport", "project"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_vacuous_spec_leaves_action_logits_bit_identical(mode, dtype):
    scores = (torch.randn(4, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(2)) * 9).to(dtype)
    for spec in (None, [], [Range("x", -1, 1), Forbid("y", 3, 4), Range("gripper", 0, 1)]):
        for prompt_length in (3, None):
            processor = TACOLogitsProcessor(spec, CONFIG, prompt_length=prompt_length, mode=mode)
            for position in range(N):
                result = processor(at(CONFIG, position, rows=4), scores)
                assert result.dtype == dtype
                assert torch.equal(action_scores(CONFIG, result), action_scores(CONFIG, scores))


@pytest.mark.parametrize("mode", ["mask", "transport"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_receives_nothing_keeps_its_score_bit_by_bit(mode, dtype):
    scores = (torch.randn(4, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(3)) * 9).to(dtype)
    before = scores.clone()
    processor = TACOLogitsProcessor([Range("x", -0.011, 0.004)], CONFIG, prompt_length=3, mode=mode)
    result = action_scores(CONFIG, processor(at(CONFIG, 0, rows=4), scores))
    inside = np.flatnonzero(allowed_by_hand(real_values(CONFIG), 0))
    kept = inside if mode == "mask" else inside[1:-1]
    assert torch.equal(result[:, kept], action_scores(CONFIG, scores)[:, kept])
    assert torch.equal(scores, before)
    if mode == "transport":
        edge = action_scores(CONFIG, scores)[:, : inside[0] + 1].float().logsumexp(1)
        torch.testing.assert_close(
            result[:, inside[0]].float(), edge, rtol=2e-2 if dtype != torch.float32 else 1e-6, atol=0
        )


def test_moved_mass_does_not_underflow():
    scores = torch.zeros(1, VOCABULARY_SIZE)
    scores[0, config_ids(CONFIG)[0]] = 500.0  # forbidden; everything else lies e^-500 below
    processor = TACOLogitsProcessor([Forbid("x", -1.0, 0.0)], CONFIG, mode="transport")
    result = action_scores(CONFIG, processor(at(CONFIG, 0), scores))
    values = real_values(CONFIG)[0]
    first = np.flatnonzero(values > 0)[0]
    assert result[0, first] == 500.0
    assert (result[0, first + 1 :] == 0).all()


def config_ids(config):
    return torch.tensor(config.vocabulary.token_ids.copy())


# ---------------------------------------------------------------- 10,000 random logit vectors


def random_spec(rng):
    """A random feasible-or-not spec and its raw inequality per dimension, kept apart from the package's sets."""
    spec, checks = [], []
    for dim in range(DOF):
        low, high = (LOW[dim], HIGH[dim])
        span = high - low
        kind = rng.integers(0, 5)
        if dim == 3:
            if kind < 2:
                word = ["open", "closed"][kind]
                spec.append(Fix("gripper", word))
                checks.append((dim, lambda v, w=1.0 - kind: v == w))
            continue
        a, b = np.sort(rng.uniform(low - 0.2 * span, high + 0.2 * span, 2)).tolist()
        if kind == 0:
            spec.append(Range(NAMES[dim], a, b))
            checks.append((dim, lambda v, a=a, b=b: (v >= a) & (v <= b)))
        elif kind == 1:
            spec.append(Forbid(dim, a, b))
            checks.append((dim, lambda v, a=a, b=b: (v < a) | (v > b)))
        elif kind == 2:
            spec.append(InSet(dim, [a, b], tolerance=span / 100))
            near = span / 100 * (1 + 1e-12)
            checks.append((dim, lambda v, a=a, b=b, t=near: (np.abs(v - a) <= t) | (np.abs(v - b) <= t)))
        elif kind == 3:
            c = rng.uniform(low, high)
            spec += [Range(dim, a, None), Forbid(dim, c, c + span / 10), Target(dim, b, sigma=span / 50)]
            checks.append((dim, lambda v, a=a, c=c, s=span: (v >= a) & ((v < c) | (v > c + s / 10))))
    return spec, checks


@pytest.fixture(scope="module")
def specs():
    """Random specs with their raw inequalities, and which modes can express them."""
    rng = np.random.default_rng(7)
    return [random_spec(rng) for _ in range(400)]


@pytest.mark.parametrize("mode", ["mask", "transport", "project"])
def test_ten_thousand_random_logit_vectors_no_violation_no_dead_end(specs, mode):
    config = make_config(n=256, horizon=1, first=8)
    feasible = []
    for spec, checks in specs:
        try:
            TACOLogitsProcessor(spec, config, mode=mode)
            feasible.append((spec, checks))
        except InfeasibleConstraintError:
            values = real_values(config)
            # Refused only if some dimension has no value at all (project: none between the tokens either).
            assert any(not check(probe(values[dim], mode)).any() for dim, check in checks)
    assert len(feasible) > 150
    each = -(-10_000 // len(feasible))
    processor = TACOLogitsProcessor([spec for spec, _ in feasible], config, prompt_length=1, mode=mode)
    rows = each * len(feasible)
    generator = torch.Generator().manual_seed(11)
    sharpness = torch.tensor([0.1, 3.0, 30.0, 300.0]).repeat(rows)[:rows, None]
    ids = torch.ones(rows, 1, dtype=torch.long)
    codes = []
    for _position in range(DOF):
        scores = torch.randn(rows, 8 + 256, generator=generator) * sharpness
        result = processor(ids, scores)
        probabilities = torch.softmax(result, dim=1)
        assert torch.isfinite(probabilities).all()
        greedy = torch.rand(rows, generator=generator) < 0.5
        token = torch.where(greedy, result.argmax(1), torch.multinomial(probabilities, 1, generator=generator)[:, 0])
        codes.append(config.vocabulary.to_codes(token.numpy()))
        ids = torch.cat([ids, token[:, None]], dim=1)
    closing = processor(ids, torch.randn(rows, 8 + 256, generator=generator))
    assert (closing.argmax(1) == END).all()
    assert (torch.isfinite(closing).sum(1) == 1).all()
    actions = real_values(config)[np.arange(DOF), np.stack(codes, axis=1)][:, None]
    np.testing.assert_array_equal(actions, config.decode(ids[:, 1:].numpy())[1])
    if mode == "project":
        actions = processor.bound.project(actions)
    violations = 0
    for i, (_, checks) in enumerate(feasible):
        for dim, check in checks:
            violations += int((~check(actions[i * each : (i + 1) * each, 0, dim])).sum())
    assert violations == 0
    assert rows >= 10_000


def probe(values, mode):
    if mode != "project" or len(np.unique(values)) == 2:
        return values
    half = (values[1] - values[0]) / 2
    return np.linspace(values[0] - half, values[-1] + half, 20_001)


# ---------------------------------------------------------------- soft targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("mode", ["mask", "transport", "project"])
def test_sigma_holds_in_meters_at_every_temperature(temperature, mode):
    config = make_config(n=256, horizon=1, first=8)
    values = real_values(config)[0]
    processor = TACOLogitsProcessor([Target("x", 0.005, sigma=0.004)], config, mode=mode, temperature=temperature)
    result = action_scores(config, processor(at(config, 0), torch.zeros(1, 264)))[0].double()
    p = torch.softmax(result / temperature, dim=0).numpy()  # what generate samples from
    expected = np.exp(-(((values - 0.005) / 0.004) ** 2) / 2)
    np.testing.assert_allclose(p, expected / expected.sum(), atol=1e-6)
    mean = (p * values).sum()
    assert mean == pytest.approx(0.005, abs=1e-5)
    assert math.sqrt((p * (values - mean) ** 2).sum()) == pytest.approx(0.004, rel=0.01)


def test_a_soft_target_is_a_product_of_experts_and_can_be_capped():
    config = make_config(n=256, horizon=1, first=8)
    values = real_values(config)[0]
    policy = torch.tensor(-(((values + 0.01) / 0.003) ** 2) / 2, dtype=torch.float32)
    scores = torch.zeros(1, 264)
    scores[0, config_ids(config)] = policy
    p = torch.softmax(TACOLogitsProcessor([Target("x", 0.01, sigma=0.003)], config)(at(config, 0), scores), 1)
    assert (action_scores(config, p)[0].double().numpy() * values).sum() == pytest.approx(0.0, abs=1e-5)
    capped = TACOLogitsProcessor([Target("x", 0.01, sigma=0.0003, max_nats=2.0)], config)(at(config, 0), scores)
    assert abs(values[int(action_scores(config, capped).argmax())] + 0.01) < 0.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_pull_from_far_away_survives_half_precision(dtype, caplog):
    with caplog.at_level(logging.ERROR):
        processor = TACOLogitsProcessor([Target("x", 50.0, sigma=1e-4)], CONFIG)
    result = processor(at(CONFIG, 0), torch.randn(1, VOCABULARY_SIZE).to(dtype))
    assert int(action_scores(CONFIG, result).argmax()) == 63


# ---------------------------------------------------------------- real generation


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY_SIZE, bos_token_id=1, eos_token_id=END, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # a model with opinions
    return model


def generate(model, processor, ids, **options):
    options = {"do_sample": False, "max_new_tokens": N + 4, "pad_token_id": 0, **options}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([processor]), **options
    )


def check_sequences(new, config=CONFIG, spec_holds=True):
    """Action tokens, then the closing token; every real value allowed."""
    assert new.shape[1] == N + 1
    assert (new[:, N] == END).all()
    actions = real_values(config)[np.arange(DOF), config.vocabulary.to_codes(new[:, :N].numpy()).reshape(-1, 2, DOF)]
    for position in range(N) if spec_holds else ():
        allowed = allowed_by_hand(real_values(config), position)
        values = real_values(config)[position % DOF][allowed]
        assert np.isin(actions[:, position // DOF, position % DOF], values).all()
    return actions


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.7},
    "top-k": {"do_sample": True, "top_k": 2},
    "top-p": {"do_sample": True, "top_p": 0.3},
    "min-p": {"do_sample": True, "min_p": 0.3},
    "beams": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "three sequences": {"do_sample": True, "num_return_sequences": 3},
    "two of four beams": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "repetition penalty": {"repetition_penalty": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", ["mask", "transport"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_keeps_the_constraints(model, mode, way):
    torch.manual_seed(5)
    batch = 1 if way == "prompt lookup" else 2
    ids = torch.randint(3, 40, (batch, 6))
    for prompt_length in (6, None):
        processor = TACOLogitsProcessor(SPEC, CONFIG, prompt_length=prompt_length, mode=mode)
        check_sequences(generate(model, processor, ids, **WAYS[way])[:, 6:])


def test_without_taco_the_same_model_does_not(model):
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(5))
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=N)[:, 6:]
    assert not np.isin(new.numpy(), CONFIG.vocabulary.token_ids).all()


@pytest.mark.parametrize("mode", ["mask", "transport"])
def test_left_padding_changes_nothing(model, mode):
    ids = torch.randint(3, 40, (1, 5), generator=torch.Generator().manual_seed(6))
    long = torch.randint(3, 40, (1, 9), generator=torch.Generator().manual_seed(7))
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1), long])
    mask = (batch != 0).long()
    for known in (True, False):
        lengths = (9, 5) if known else (None, None)
        padded, alone = (TACOLogitsProcessor(SPEC, CONFIG, prompt_length=n, mode=mode) for n in lengths)
        both = generate(model, padded, batch, attention_mask=mask)[:, 9:]
        assert torch.equal(both[:1], generate(model, alone, ids)[:, 5:])
        check_sequences(both)


@pytest.mark.parametrize("mode", ["mask", "transport"])
def test_assisted_decoding_equals_greedy(model, mode):
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1})).eval()
    ids = torch.randint(3, 40, (1, 6))
    for prompt_length in (6, None):
        processor = TACOLogitsProcessor(SPEC, CONFIG, prompt_length=prompt_length, mode=mode)
        helped = generate(model, processor, ids, assistant_model=assistant)[:, 6:]
        check_sequences(helped)
        assert torch.equal(helped, generate(model, processor, ids)[:, 6:])


def test_prompts_as_embeddings(model):
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(8))
    embeddings = model.get_input_embeddings()(ids)
    wanted = generate(model, TACOLogitsProcessor(SPEC, CONFIG, prompt_length=6), ids)[:, 6:]
    for prompt_length in (0, None):
        processor = TACOLogitsProcessor(SPEC, CONFIG, prompt_length=prompt_length)
        options = {"do_sample": False, "max_new_tokens": N + 4, "pad_token_id": 0}
        new = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([processor]),
            **options,
        )
        assert torch.equal(new, wanted)


def test_a_prompt_that_ends_in_action_tokens_needs_its_length(model):
    ids = torch.tensor([[5, 6, *CONFIG.vocabulary.token_ids[:3].tolist()]])
    check_sequences(generate(model, TACOLogitsProcessor(SPEC, CONFIG, prompt_length=5), ids)[:, 5:])
    assert generate(model, TACOLogitsProcessor(SPEC, CONFIG), ids).shape[1] == 2 + N + 1


def test_action_tokens_inside_the_prompt_do_not_count():
    action = int(CONFIG.vocabulary.token_ids[5])
    ids = torch.tensor([[action, action, 7, action], [action, 7, action, 7]])
    scores = torch.randn(2, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(14))
    result = TACOLogitsProcessor(SPEC, CONFIG)(ids, scores)
    first = TACOLogitsProcessor(SPEC, CONFIG, prompt_length=4)(ids, scores)
    second = TACOLogitsProcessor(SPEC, CONFIG, prompt_length=3)(ids, scores)
    assert torch.equal(result, torch.stack([second[0], first[1]]))


def test_each_sample_has_its_own_constraints_through_beams_and_sequences(model):
    per_sample = [[Range("x", None, -0.02)], [Range("x", 0.02, None)], []]
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(9))
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}):
        for prompt_length in (6, None):
            processor = TACOLogitsProcessor(per_sample, CONFIG, prompt_length=prompt_length)
            new = generate(model, processor, ids, **options)[:, 6:]
            x = check_sequences(new, spec_holds=False)[..., 0].reshape(3, -1)
            assert (x[0] <= -0.02).all()
            assert (x[1] >= 0.02).all()
    greedy = generate(model, TACOLogitsProcessor(per_sample, CONFIG, prompt_length=6), ids)[2:]
    assert torch.equal(greedy, generate(model, TACOLogitsProcessor([], CONFIG, prompt_length=6), ids[2:]))


def test_output_logits_stay_those_of_the_model(model):
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(10))
    out = generate(
        model,
        TACOLogitsProcessor(SPEC, CONFIG),
        ids,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        expected = model(out.sequences[:, : 6 + step]).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(logits).all()
        assert (scores == -torch.inf).any()


def test_beams_find_the_most_probable_chunk_of_the_masked_model(model):
    config = make_config(n=4, horizon=1, first=40)
    spec = [Range("x", -0.02, 0.02), Forbid("yaw", 0.1, 0.2)]
    ids = torch.randint(3, 40, (1, 4), generator=torch.Generator().manual_seed(12))
    processor = TACOLogitsProcessor(spec, config, mode="mask")
    new = generate(model, processor, ids, num_beams=256, max_new_tokens=DOF, eos_token_id=None)[0, 4:]
    codes = np.stack(np.meshgrid(*[range(4)] * DOF, indexing="ij"), -1).reshape(-1, DOF)
    values = real_values(config)[np.arange(DOF), codes]
    codes = codes[(np.abs(values[:, 0]) <= 0.02) & (values[:, 2] < 0.1)]
    chunks = torch.tensor(config.vocabulary.to_ids(codes))
    logits = model(torch.cat([ids.expand(len(chunks), -1), chunks], 1)).logits[:, 3:-1].log_softmax(-1)
    best = logits.gather(2, chunks[..., None]).sum((1, 2)).argmax()
    assert torch.equal(new, chunks[best])


# ---------------------------------------------------------------- the three classic mistakes


def test_meters_are_meters_and_not_normalized_numbers():
    config = make_config(n=256, horizon=1, first=8)
    values = real_values(config)[0]
    processor = TACOLogitsProcessor([Range("x", -0.01, 0.01)], config, mode="mask")
    allowed = torch.isfinite(action_scores(config, processor(at(config, 0), torch.zeros(1, 264)))[0]).numpy()
    assert (allowed == (np.abs(values) <= 0.01)).all()
    # In normalized space +-0.01 would be these few tokens, with other real values.
    centers = config.tokenizer.grid.values
    assert allowed.sum() == 89
    assert (np.abs(centers) <= 0.01).sum() == 2
    # And a number that only makes sense in normalized space is out of reach instead of "nearly maximal".
    with pytest.raises(InfeasibleConstraintError, match=r"reachable .* m,.*unit|steps"):
        TACOLogitsProcessor([Range("x", 0.5, 1.0)], config)


@pytest.mark.parametrize("binary", [True, False])
def test_the_gripper_is_not_normalized(binary):
    config = make_config(n=256, horizon=1, first=8, binary=binary)
    centers = config.tokenizer.grid.values
    processor = TACOLogitsProcessor([Range("gripper", 0.6, 1.0)], config, mode="mask")
    allowed = torch.isfinite(action_scores(config, processor(at(config, 3), torch.zeros(1, 264)))[0]).numpy()
    # mask=False: the center itself is the value. Scaled by its statistics (0..1) the limit would be at 0.2.
    assert centers[allowed].min() == centers[centers >= (0.5 if binary else 0.6)].min()
    assert set(np.unique(config.token_values()[3][allowed])) <= ({1.0} if binary else set(centers[centers >= 0.6]))


@pytest.mark.parametrize(("first", "order"), [(8, 1), (500, 1), (500, -1), (99, -1)])
def test_action_ids_are_where_the_vocabulary_says(first, order):
    config = make_config(n=64, horizon=1, first=first, order=order)
    size = first + 64 + 3
    values = real_values(config)[0]
    for mode in ("mask", "transport"):
        result = TACOLogitsProcessor([Range("x", 0.005, 0.01)], config, mode=mode)(at(config, 0), torch.zeros(1, size))
        ids = result[0].isfinite().nonzero()[:, 0].tolist()
        codes = np.flatnonzero((values >= 0.005) & (values <= 0.01))
        assert sorted(ids) == sorted((first + codes if order == 1 else first + 63 - codes).tolist())


# ---------------------------------------------------------------- refusals


def test_ten_centimeters_in_one_step_raises_before_any_forward(model):
    with pytest.raises(InfeasibleConstraintError) as caught:
        TACOLogitsProcessor([Fix("x", 0.10)], CONFIG)
    for part in ("'x'", "wanted 0.1 m", "reachable -0.0295469..0.0275469 m", "needs at least 4 steps"):
        assert part in str(caught.value)


def test_permanent_limits_are_added_to_every_sample():
    config = make_config(limits=[Range("x", -0.01, 0.01)])
    processor = TACOLogitsProcessor([[], [Range("x", 0.0, 1.0)]], config, mode="mask")
    result = action_scores(config, processor(at(config, 0, rows=2), torch.zeros(2, VOCABULARY_SIZE)))
    values = real_values(config)[0]
    assert (result[0].isfinite().numpy() == (np.abs(values) <= 0.01)).all()
    assert (result[1].isfinite().numpy() == ((values >= 0) & (values <= 0.01))).all()
    with pytest.raises(InfeasibleConstraintError, match="cannot hold together"):
        TACOLogitsProcessor([Range("x", 0.02, None)], config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "clip"}, "mode must be one of"),
        ({"on_infeasible": "drop"}, "on_infeasible must be one of"),
        ({"context": object()}, "context"),
        ({"prompt_length": -1}, "prompt_length"),
        ({"prompt_length": 3.0}, "prompt_length"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"unnorm_key": "other"}, "not among the statistics"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TACOLogitsProcessor([], CONFIG, **options)


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("mode", ["mask", "transport"])
@pytest.mark.parametrize("position", [0, N])
@pytest.mark.parametrize("prompt_length", [3, None])
def test_a_row_without_a_token_raises_instead_of_emitting_token_zero(bad, mode, position, prompt_length):
    processor = TACOLogitsProcessor(SPEC, CONFIG, prompt_length=prompt_length, mode=mode)
    scores = torch.zeros(3, VOCABULARY_SIZE)
    scores[1] = bad
    with pytest.raises(ConstraintError, match="no action token is left in row 1"):
        processor(at(CONFIG, position, rows=3), scores)


@pytest.mark.parametrize("prompt_length", [3, None])
def test_a_closing_token_that_is_forbidden_raises(prompt_length):
    processor = TACOLogitsProcessor([], CONFIG, prompt_length=prompt_length)
    scores = torch.zeros(2, VOCABULARY_SIZE)
    scores[:, END] = -torch.inf
    with pytest.raises(ConstraintError, match="min_new_tokens"):
        processor(at(CONFIG, N, rows=2), scores)
    processor(at(CONFIG, N - 1, rows=2), scores)


def test_half_precision_scores_are_added_in_single_precision():
    processor = TACOLogitsProcessor(SPEC[:-1], CONFIG, mode="transport")
    scores = (torch.randn(200, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(15)) / 20).bfloat16()
    for position in range(N):
        ids = at(CONFIG, position, rows=200)
        assert torch.equal(processor(ids, scores), processor(ids, scores.float()).bfloat16())


def test_another_processor_may_forbid_some_tokens_but_not_all():
    processor = TACOLogitsProcessor([Range("x", 0.0, 0.01)], CONFIG, mode="transport")
    scores = torch.zeros(1, VOCABULARY_SIZE)
    codes = np.flatnonzero((real_values(CONFIG)[0] >= 0) & (real_values(CONFIG)[0] <= 0.01))
    scores[0, config_ids(CONFIG)[codes[:-1]]] = -torch.inf
    result = action_scores(CONFIG, processor(at(CONFIG, 0), scores))[0]
    assert result[codes[-1]].isfinite()
    assert (result[codes[1:-1]] == -torch.inf).all()
    assert not result.isnan().any()


def test_shapes_that_cannot_be_are_refused():
    processor = TACOLogitsProcessor([[], [Range("x", 0, 1)]], CONFIG, prompt_length=3)
    with pytest.raises(ConstraintError, match="not resized"):
        processor(at(CONFIG, 0, rows=2), torch.zeros(2, 40 + 63))
    with pytest.raises(ConstraintError, match="3 rows do not divide among 2"):
        processor(at(CONFIG, 0, rows=3), torch.zeros(3, VOCABULARY_SIZE))
    with pytest.raises(ConstraintError, match="prompt_length is 3"):
        processor(torch.ones(2, 2, dtype=torch.long), torch.zeros(2, VOCABULARY_SIZE))
    with pytest.raises(ConstraintError, match="continuous batching"):
        processor(torch.ones(2, dtype=torch.long), torch.zeros(2, VOCABULARY_SIZE))


def test_continuous_batching_is_refused_instead_of_dropping_the_constraints():
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

    assert TACOLogitsProcessor.supports_continuous_batching is False
    for drop in (True, False):
        with pytest.raises(ConstraintError, match="continuous batching"):
            ContinuousBatchingLogitsProcessorList(
                LogitsProcessorList([TACOLogitsProcessor([], CONFIG)]), drop_unsupported_processors=drop
            )


def test_it_is_a_pure_function_of_its_arguments():
    processor = TACOLogitsProcessor(SPEC, CONFIG, prompt_length=3)
    generator = torch.Generator().manual_seed(13)
    scores = torch.randn(2, VOCABULARY_SIZE, generator=generator)
    first = [processor(at(CONFIG, p, rows=2), scores) for p in range(N + 3)]
    for position in [5, 0, 9, 3, 3, 8, 1]:
        assert torch.equal(processor(at(CONFIG, position, rows=2), scores), first[position])
    unknown = TACOLogitsProcessor(SPEC, CONFIG)
    for position in range(N + 1):
        assert torch.equal(unknown(at(CONFIG, position, rows=2), scores), first[position])

"""The promise of constrained decoding, tried by an adversary: no dead end, no violation, whatever is sampled.

`benchmarks/guarantee.py` runs the same over 100,000 rows and more.
"""

import numpy as np
import pytest
import torch
from adversary import DeadEnd, drive
from oracle_constraints import Known, all_satisfied, satisfied, separated
from random_specs import FIRST, KINDS, Case, describe, make_config, random_case, to_constraint
from survey import PROMPT, Tally, attack, make, masks

from hf_vla_actions import TACOLogitsProcessor
from hf_vla_actions.errors import InfeasibleConstraintError

torch.set_num_threads(1)


# ---------------------------------------------------------------- the promise


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("only")])
def test_an_adversary_finds_no_dead_end_and_no_violation(name):
    tally = Tally()
    for seed in range(4 if name == "where" else 12):
        tally += attack(name, seed, rows=20, mode=("mask", "transport")[seed % 2], project=8)
    assert tally.bad() == 0, "\n".join(tally.failures)
    assert tally.counts["feasible"] >= 3
    assert tally.counts["projected rows"] >= 24


def test_samples_of_one_batch_keep_to_their_own_constraints_and_contexts():
    rng = np.random.default_rng(5)
    config = make_config([-0.03, -0.02, -0.04], [0.03, 0.025, 0.04], n_codes=32, horizon=4, delta=[True] * 3)
    robot, cases, processors = describe(config), [], []
    while len(cases) < 5:
        draw = random_case(rng, "rooms", n_codes=32, dof=3, horizon=4)
        case = Case(config, robot, draw.items, draw.known, "rooms")
        try:
            processors.append(make(case, prompt_length=PROMPT))
        except InfeasibleConstraintError:
            continue
        cases.append(case)
    together = TACOLogitsProcessor(
        [case.constraints() for case in cases], config, context=stacked(cases), mode="mask", prompt_length=PROMPT
    )
    codes = np.zeros((3 * len(cases), 0), dtype=np.int64)
    for _position in range(config.n_tokens()):
        alone = [masks(p, config, codes[3 * i : 3 * i + 3]) for i, p in enumerate(processors)]
        allowed = masks(together, config, codes)
        np.testing.assert_array_equal(allowed, np.concatenate(alone))
        chosen = [rng.choice(np.flatnonzero(row)) for row in allowed]
        codes = np.concatenate([codes, np.array(chosen)[:, None]], axis=1)
    chunks = config.decode(config.vocabulary.to_ids(codes))[1]
    for i, case in enumerate(cases):
        assert all_satisfied(chunks[3 * i : 3 * i + 3], case.items, robot, case.known).all()


def stacked(cases):
    """One context of a batch."""
    from hf_vla_actions.constraints import Context

    robot = cases[0].robot
    pose = {robot.names[d]: np.array([c.known.pose[d] for c in cases]) for d in cases[0].known.pose}
    return Context(pose=pose, last_action=np.array([c.known.last for c in cases]))


def test_numbers_that_differ_by_sample_equal_one_call_a_sample():
    config = make_config([-0.03, -0.02], [0.03, 0.025], n_codes=32, horizon=3, delta=[True] * 2)
    robot = describe(config)
    steps, walls, balls = [0.004, 0.01, 0.02], [0.01, 0.03, 0.05], [0.01, 0.02, 0.03]
    poses, lasts = [0.0, 0.005, -0.01], [[0.0, 0.001], [0.01, -0.01], [-0.02, 0.02]]
    items = [
        {"kind": "Rate", "dim": 0, "max_step": steps},
        {"kind": "Workspace", "dims": [1], "low": [None], "high": [[wall] for wall in walls]},
        {"kind": "Speed", "dims": [0, 1], "max": balls},
        {"kind": "Range", "dim": 0, "low": [-0.02, -0.01, -0.03], "high": 0.02},
    ]
    from hf_vla_actions.constraints import Context

    together = TACOLogitsProcessor(
        [to_constraint(item, robot) for item in items],
        config,
        context=Context(pose={"y": np.array(poses)}, last_action=np.array(lasts)),
        mode="mask",
        prompt_length=PROMPT,
    )
    rng, codes = np.random.default_rng(0), np.zeros((3, 0), dtype=np.int64)
    for _position in range(config.n_tokens()):
        alone = []
        for i in range(3):
            known = Known({1: poses[i]}, lasts[i])
            own = [
                {**items[0], "max_step": steps[i]},
                {**items[1], "high": [walls[i]]},
                {**items[2], "max": balls[i]},
                {**items[3], "low": items[3]["low"][i]},
            ]
            alone.append(
                masks(make(Case(config, robot, own, known, ""), prompt_length=PROMPT), config, codes[i : i + 1])
            )
        allowed = masks(together, config, codes)
        np.testing.assert_array_equal(allowed, np.concatenate(alone))
        codes = np.concatenate(
            [codes, np.array([rng.choice(np.flatnonzero(row)) for row in allowed])[:, None]], axis=1
        )


# ---------------------------------------------------------------- a start that nothing can save


@pytest.mark.parametrize("mode", ["mask", "transport"])
@pytest.mark.parametrize(
    "items",
    [
        [{"kind": "Rate", "dim": 0, "max_step": 0.001}],  # the last action lies outside of what a token can say
        [{"kind": "MoveBy", "dim": 0, "total": 1.0}],
        [{"kind": "Range", "dim": 0, "low": 0.02, "high": None}, {"kind": "Speed", "dims": [0, 1], "max": 0.01}],
        [{"kind": "KeepOut", "dims": [0, 1], "low": [-1.0, -1.0], "high": [1.0, 1.0]}],
        [{"kind": "Linear", "dims": [0, 1], "weights": [1.0, 1.0], "low": 1.0, "high": None}],
        [
            {"kind": "Range", "dim": 0, "low": 0.01, "high": None},
            {"kind": "Workspace", "dims": [0], "low": [None], "high": [0.02]},
        ],
        [
            {
                "kind": "Any",
                "alternatives": [
                    [{"kind": "MoveBy", "dim": 0, "total": 1.0}],
                    [{"kind": "Linear", "dims": [0, 1], "weights": [1.0, 1.0], "low": 1.0, "high": None}],
                ],
            }
        ],
    ],
)
def test_an_impossible_start_raises_before_any_forward(items, mode):
    config = make_config([-0.03, -0.02], [0.03, 0.025], n_codes=32, horizon=4, delta=[True] * 2)
    case = Case(config, describe(config), items, Known({0: 0.0, 1: 0.0}, [0.08, 0.0]), "")
    with pytest.raises(InfeasibleConstraintError):
        make(case, mode)


# ---------------------------------------------------------------- what forbids nothing changes nothing

VACUOUS = [
    {"kind": "Range", "dim": 0, "low": -1.0, "high": 1.0},
    {"kind": "Rate", "dim": 0, "max_step": 1.0},
    {"kind": "Workspace", "dims": [0, 1], "low": [-5.0, -5.0], "high": [5.0, None]},
    {"kind": "Speed", "dims": [0, 1, 2], "max": 1.0},
    {"kind": "KeepOut", "dims": [0, 1, 2], "low": [3.0, 3.0, 3.0], "high": [4.0, 4.0, 4.0]},
    {"kind": "MoveBy", "dim": 1, "total": 0.0, "tolerance": 10.0},
    {"kind": "Linear", "dims": [0, 1], "weights": [1.0, -1.0], "low": -5.0, "high": 5.0, "cumulative": True},
    {"kind": "Sticky", "dim": 3, "min_hold": 1},
    {"kind": "Any", "alternatives": [[{"kind": "Speed", "dims": [0, 1], "max": 1.0}], [{"kind": "Fix", "dim": 0, "value": 0.0}]]},
    {"kind": "Where", "fn": lambda chunks: np.full(len(chunks), True)},
]  # fmt: skip


def vacuous_config():
    low, high = [-0.03, -0.02, -0.04, 0.0], [0.03, 0.025, 0.04, 1.0]
    return make_config(low, high, n_codes=32, horizon=3, delta=[True] * 3 + [False], binary_gripper=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "items",
    [*[[item] for item in VACUOUS], VACUOUS[:7] + VACUOUS[8:], VACUOUS[:-1]],
    ids=lambda i: "+".join(x["kind"] for x in i),
)
def test_vacuous_constraints_change_no_action_logit_by_a_bit(items, dtype):
    config = vacuous_config()
    case = Case(config, describe(config), items, Known({0: 0.1, 1: 0.1, 2: 0.2}, [0.0, 0.0, 0.0, 1.0]), "")
    table = torch.tensor(config.vocabulary.token_ids.copy())
    generator = torch.Generator().manual_seed(0)
    for mode in ("mask", "transport", "project"):
        processor = make(case, mode, prompt_length=PROMPT)
        ids = torch.ones(6, PROMPT, dtype=torch.long)
        for position in range(config.n_tokens()):
            scores = (torch.randn(6, FIRST + 32, generator=generator) * 9).to(dtype)
            result = processor(ids, scores)
            assert result.dtype == dtype
            if mode == "mask":
                assert torch.equal(result[:, table], scores[:, table]), (mode, position)
            assert torch.equal(result[:, table].argmax(1), scores[:, table].argmax(1)), (mode, position)
            sampled = torch.multinomial(result.float().softmax(1), 1, generator=generator)
            ids = torch.cat([ids, sampled], dim=1)


# ---------------------------------------------------------------- the gripper asks how sure the policy is


@pytest.mark.parametrize("mode", ["mask", "transport"])
@pytest.mark.parametrize("state", [0.0, 1.0])
@pytest.mark.parametrize(("p_other", "changes"), [(0.55, False), (0.69, False), (0.71, True), (0.999, True)])
def test_hysteresis_lets_the_gripper_change_only_for_a_sure_policy(p_other, changes, state, mode):
    config = make_config([-0.03, 0.0], [0.03, 1.0], n_codes=8, horizon=2, delta=[True, False], binary_gripper=True)
    items = [{"kind": "Sticky", "dim": 1, "hysteresis": 0.7}]
    case = Case(config, describe(config), items, Known({}, [0.0, state]), "")
    processor = make(case, mode, prompt_length=PROMPT)
    gripper = torch.tensor(config.token_values()[1])
    other = gripper != state
    scores = torch.full((1, FIRST + 8), -torch.inf)
    share = torch.where(other, p_other / other.sum(), (1 - p_other) / (~other).sum())
    scores[0, FIRST:] = share.log().float()
    result = processor(torch.tensor([[1] * PROMPT + [FIRST + 3]]), scores)[0, FIRST:]
    assert torch.equal(result.isfinite(), ~other | changes)


# ---------------------------------------------------------------- nothing but the ids counts


@pytest.mark.parametrize("name", ["all", "rooms", "sticky", "moveby", "any"])
@pytest.mark.parametrize("mode", ["mask", "transport"])
def test_the_processor_is_a_pure_function_of_its_arguments(name, mode):
    seed = next(s for s in range(100) if attack(name, s, rows=1).counts["rows"])
    case = random_case(np.random.default_rng(seed), name)
    processor = make(case, mode, prompt_length=PROMPT)
    chunks = drive(processor, case, 6, np.random.default_rng(1), PROMPT)
    ids = torch.as_tensor(case.config.encode(chunks))
    prompt = torch.ones(6, PROMPT, dtype=torch.long)
    n = case.config.n_tokens()
    scores = torch.randn(n, 6, FIRST + case.config.tokenizer.n_codes, generator=torch.Generator().manual_seed(2))
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    sequence = torch.cat([prompt, ids], dim=1)
    first = [processor(sequence[:, : PROMPT + p], scores[p]) for p in range(n)]
    unknown = make(case, mode)
    for p in [*range(n - 1, -1, -max(1, n // 8)), 0, 0]:
        assert torch.equal(processor(sequence[:, : PROMPT + p], scores[p]), first[p])
        again = processor(sequence[shuffled, : PROMPT + p], scores[p][shuffled])
        torch.testing.assert_close(again, first[p][shuffled], rtol=0, atol=0)
        assert torch.equal(unknown(sequence[:, : PROMPT + p], scores[p]), first[p])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["mask", "transport"])
def test_the_promise_holds_at_every_precision(dtype, mode):
    done = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        case = random_case(rng, "all")
        try:
            processor = make(case, mode, prompt_length=PROMPT)
        except InfeasibleConstraintError:
            continue
        chunks = drive(processor, case, 20, rng, PROMPT, dtype=dtype)
        assert all_satisfied(chunks, case.items, case.robot, case.known).all()
        done += 1
        if done == 4:
            return
    pytest.fail("no feasible case in 40")


# ---------------------------------------------------------------- the oracle and the adversary themselves


def test_the_adversary_finds_the_dead_ends_of_masks_that_do_not_look_ahead():
    dead = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        config = make_config([-0.03, -0.02], [0.03, 0.02], n_codes=32, horizon=8, delta=[True, True])
        rate, wall = float(rng.uniform(0.003, 0.01)), float(rng.uniform(0.02, 0.06))
        items = [
            {"kind": "Rate", "dim": 0, "max_step": rate},
            {"kind": "Workspace", "dims": [0], "low": [-wall], "high": [wall]},
        ]
        case = Case(config, describe(config), items, Known({0: 0.0, 1: 0.0}, [0.0, 0.0]), "")
        try:
            drive(careless(config, rate, wall), case, 24, rng, PROMPT)
        except DeadEnd:
            dead += 1
        chunks = drive(make(case), case, 24, rng, PROMPT)
        assert all_satisfied(chunks, items, case.robot, case.known).all()
    assert dead > 10


def careless(config, rate, wall):
    """A processor that only asks whether the next value itself breaks the rate or the wall."""
    values = config.token_values()

    def process(ids, scores):
        result = torch.full_like(scores, -torch.inf)
        n = ids.shape[1] - PROMPT
        if n == config.n_tokens():
            result[:, config.vocabulary.end_token_id] = 0.0
            return result
        codes = ids[:, PROMPT:].numpy() - FIRST
        past = values[0][codes[:, 0 : 2 * (n // 2) : 2]]
        before = past[:, -1] if n >= 2 else np.zeros(len(ids))
        fine = np.full((len(ids), values.shape[1]), True)
        if n % 2 == 0:
            fine = np.abs(values[0] - before[:, None]) <= rate
            fine &= np.abs(values[0] + past.sum(axis=1)[:, None]) <= wall
        result[:, FIRST : FIRST + values.shape[1]] = torch.where(torch.from_numpy(fine), 0.0, -torch.inf)
        return result

    return process


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_separating_axes_agree_with_dense_points_of_the_segment(n):
    rng = np.random.default_rng(n)
    p, q = rng.uniform(-2, 2, (400, n)), rng.uniform(-2, 2, (400, n))
    low, high = [-0.7, -0.4, -0.9][:n], [0.3, 0.8, 0.5][:n]
    apart = separated(p, q, low, high)
    points = p[:, None] + np.linspace(0, 1, 4001)[:, None] * (q - p)[:, None]
    inside = ((points >= low) & (points <= high)).all(axis=2).any(axis=1)
    near = ((points >= np.array(low) - 1e-3) & (points <= np.array(high) + 1e-3)).all(axis=2).any(axis=1)
    assert not (apart & inside).any()
    assert (apart | near).all()
    assert 50 < inside.sum() < 390


def test_the_oracle_counts_holds_and_switches_by_hand():
    config = make_config([-0.03, 0.0], [0.03, 1.0], n_codes=8, horizon=6, delta=[True, False], binary_gripper=True)
    robot = describe(config)

    def fine(grips, held=None, **arguments):
        chunk = np.stack([np.zeros(6), np.array([float(g) for g in grips])], axis=1)
        known = Known({}, [0.0, 1.0], held)
        return bool(satisfied(chunk[None], {"kind": "Sticky", "dim": 1, **arguments}, robot, known)[0])

    assert fine("111000", min_hold=3)
    assert fine("000111", min_hold=3)
    assert not fine("000111", held=2, min_hold=3)
    assert fine("100011", held=2, min_hold=3)
    assert not fine("100111", held=2, min_hold=3)
    assert fine("111111", held=0, min_hold=9)
    assert fine("100111", max_switches=2)
    assert not fine("101011", max_switches=2)


def test_the_oracle_sees_a_jump_over_a_zone():
    config = make_config([-0.5, -0.5], [0.5, 0.5], n_codes=8, horizon=2, delta=[True, True])
    item = {"kind": "KeepOut", "dims": [0, 1], "low": [0.1, -0.1], "high": [0.2, 0.1]}
    chunks = np.array([[[0.4, 0.0], [0.0, 0.0]], [[0.4, 0.5], [0.0, -0.4]], [[0.05, 0.2], [0.3, 0.0]]])
    assert satisfied(chunks, item, describe(config), Known({0: 0.0, 1: 0.0})).tolist() == [False, True, True]

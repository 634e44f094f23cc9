"""One list of constraints on FAST tokens: what is kept while they are decoded, what afterwards, and that all of it holds."""

import itertools
import logging

import numpy as np
import pytest
import torch
from oracle_constraints import all_satisfied, violations
from random_specs import KINDS, random_case
from test_fast import byte_tokenizer
from test_fast_processor import foreign, generate, processor, smooth
from tiny import INSTRUCTIONS, SPACE, STATS, sharpen, tiny_llama, tiny_tokenizer

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    ActionStats,
    ActionVocabulary,
    Context,
    FASTActionTokenizer,
    Gripper,
    InfeasibleConstraintError,
    NormStats,
    UniformActionTokenizer,
    VQActionTokenizer,
    to_vla,
)
from hf_vla_actions.constraints import (
    Any,
    Fix,
    Forbid,
    KeepOut,
    Linear,
    MoveBy,
    Prefix,
    Range,
    Rate,
    Speed,
    Sticky,
    Target,
    Workspace,
    bind,
)
from hf_vla_actions.decoding.fast_constraints import fast_limits
from hf_vla_actions.errors import ConstraintError, VLAActionsError
from hf_vla_actions.models.whole_chunks import overshoot

torch.set_num_threads(1)
HORIZON, DOF = 8, SPACE.dof
ZEROS = np.zeros(DOF)


@pytest.fixture(scope="module")
def tokenizer():
    return FASTActionTokenizer.fit(smooth(300, HORIZON, DOF), vocab_size=320, scale=10)


def policy_of(action_tokenizer, horizon=HORIZON, scale=30, **options):
    """A text-only policy with random weights that have opinions."""
    from transformers import LlamaForCausalLM

    text = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama().config)
    model.resize_token_embeddings(len(text), mean_resizing=False)
    vocabulary = ActionVocabulary.append(text, action_tokenizer.n_codes)
    options = {"norm_stats": NormStats({"my_robot": {"action": STATS}}), "spaces": {"my_robot": SPACE}, **options}
    config = ActionConfig(action_tokenizer, vocabulary, horizon=horizon, **options)
    return sharpen(to_vla(model, text, config).eval(), scale)


@pytest.fixture(scope="module")
def policy(tokenizer):
    return policy_of(tokenizer)


def of_case(vla, case):
    """The policy on another robot, that of a random case."""
    config = vla.action_config
    robot = {"norm_stats": case.config.norm_stats, "spaces": case.config.spaces, "horizon": case.config.horizon}
    vla.action_config = ActionConfig(config.tokenizer, config.vocabulary, **robot)
    return vla


# ---------------------------------------------------------------- an independent oracle over random specifications


WAYS = ({}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}, {"do_sample": True, "temperature": 3.0})


def within_reach(out, tokenizer, horizon):
    return np.abs(out.normalized) <= 1.0 + overshoot(tokenizer, horizon)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("only") and name != "rooms"])
def test_chunks_keep_random_specifications(policy, name):
    home = policy.action_config
    try:
        for seed in range(20):
            case = random_case(np.random.default_rng([seed, len(name)]), name, n_codes=256)
            vla, way = of_case(policy, case), {**WAYS[seed % 4], "mode": ("mixture", "project")[seed % 4 == 3]}
            inputs = vla.prepare(None, list(INSTRUCTIONS[:2]))
            torch.manual_seed(seed)
            try:
                out = vla.predict_action(
                    **inputs, constraints=case.constraints(), context=case.context(), return_dict=True, **way
                )
            except InfeasibleConstraintError:
                continue
            broken = [violations(chunk, case.items, case.continuous(), case.known) for chunk in out.actions]
            assert not any(broken), (seed, broken)
            (kept,) = out.kept_while
            texts = {str(c) for c in case.constraints()}
            assert {*kept.decoding, *dict(kept.afterwards)} <= texts
            assert not (way["mode"] == "project" and kept.decoding)
            if not kept.afterwards:  # then projection finds nothing to do
                assert not out.moved[within_reach(out, home.tokenizer, case.config.horizon)].any()
            return
    finally:
        policy.action_config = home
    raise AssertionError("every specification was infeasible")


@pytest.mark.parametrize("seed", range(6))
def test_what_tokens_keep_needs_no_projection(policy, seed):
    """Mode "mask": what the tokens say is carried out, and keeps everything."""
    home, rng = policy.action_config, np.random.default_rng(seed)
    name = ("only box", "only rate", "only workspace", "moveby", "base", "absolute")[seed]
    done = 0
    try:
        for _ in range(30):
            case = random_case(rng, name, n_codes=256)
            for item in case.items:
                if item["kind"] == "MoveBy":
                    item["tolerance"] = 0.02
            vla = of_case(policy, case)
            inputs = vla.prepare(None, INSTRUCTIONS[0])
            ask = {"constraints": case.constraints(), "context": case.context(), "mode": "mask", "return_dict": True}
            try:
                out = vla.predict_action(**inputs, **ask, **WAYS[done % 4])
            except ConstraintError:
                continue
            assert all_satisfied(out.actions, case.items, case.continuous(), case.known).all()
            assert not out.moved.any()
            assert out.certified.all()
            assert within_reach(out, home.tokenizer, case.config.horizon).all()
            assert not out.kept_while[0].afterwards
            assert len(out.kept_while[0].decoding) == len(case.items)
            done += bool(case.items)
            if done == 1 + (seed == 4):
                return
    finally:
        policy.action_config = home
    assert done


def test_an_allowed_chunk_comes_back_as_it_was_said(policy):
    """In mode "project", though the certificate of tokens would have refused what was said on the way to it."""
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    free = policy.predict_action(**inputs, return_dict=True)
    low, high = free.actions.min(axis=(0, 1)), free.actions.max(axis=(0, 1))
    asked = [Range(d, float(low[d]), float(high[d])) for d in range(6)]
    out = policy.predict_action(**inputs, constraints=asked, return_dict=True)
    np.testing.assert_array_equal(out.token_ids, free.token_ids)
    np.testing.assert_array_equal(out.actions, free.actions)
    assert out.kept_while[0].afterwards == tuple((str(c), "mode 'project' decodes freely") for c in asked)


# ---------------------------------------------------------------- totals


def steps_of(tokenizer, dim, horizon=HORIZON):
    """Sums over a chunk that its first coefficients stand for: what 0 is, and the step."""
    middle, half = (STATS.q01[dim] + STATS.q99[dim]) / 2, (STATS.q99[dim] - STATS.q01[dim]) / 2
    return horizon * middle, half * np.sqrt(horizon) / tokenizer.scale


@pytest.mark.parametrize(("way", "k"), zip(WAYS, (-7, 0, 4, 1), strict=True), ids=str)
def test_totals_are_exact(policy, tokenizer, way, k):
    still, step = steps_of(tokenizer, 0)
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    asked = [MoveBy("x", still + k * step), MoveBy("y", 0.0, tolerance=0.02)]
    out = policy.predict_action(**inputs, constraints=asked, mode="mixture", return_dict=True, **way)
    sums = out.actions.sum(axis=1)
    np.testing.assert_allclose(sums[:, 0], still + k * step, rtol=0, atol=1e-12)
    assert (np.abs(sums[:, 1]) <= 0.02).all()
    assert out.kept_while[0].decoding == tuple(map(str, asked))
    assert not out.moved[..., :2].any()
    assert not policy.predict_action(**inputs, constraints=asked, mode="mask", return_dict=True).moved.any()


def test_a_total_between_two_steps_is_decoded_next_to_it_and_moved_the_rest(policy, tokenizer):
    still, step = steps_of(tokenizer, 0)
    asked = MoveBy("x", still + 3.3 * step)
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    out = policy.predict_action(**inputs, constraints=[asked], mode="mixture", return_dict=True)
    np.testing.assert_allclose(out.actions[..., 0].sum(axis=1), still + 3.3 * step, rtol=0, atol=1.1e-9)
    decoded = STATS.unnormalize(out.normalized)[..., 0].sum(axis=1)
    np.testing.assert_allclose(decoded, still + 3 * step, rtol=0, atol=1e-12)
    (kept,) = out.kept_while
    assert kept.decoding == ()
    assert kept.afterwards[0][0] == str(asked)
    assert "in steps of 0.00806" in kept.afterwards[0][1]
    assert np.abs(out.moved[..., 0]).max() <= 0.3 * step / HORIZON * 1.01
    with pytest.raises(ConstraintError, match=r"cannot keep MoveBy.*in steps of"):
        policy.predict_action(**inputs, constraints=[asked], mode="mask")


def test_of_two_totals_that_exclude_each_other_nothing_is_silently_lost(policy):
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    with pytest.raises(InfeasibleConstraintError):
        policy.predict_action(**inputs, constraints=[MoveBy("x", 0.05), MoveBy("x", -0.05)])
    late = [MoveBy("x", 0.0331, steps=slice(2, 8), tolerance=0.0002), Range("x", -0.02, 0.02)]
    out = policy.predict_action(**inputs, constraints=late, mode="mixture", return_dict=True)
    assert abs(out.actions[0, 2:, 0].sum() - 0.0331) <= 0.0002
    assert "no constant" in dict(out.kept_while[0].afterwards)[str(late[0])]
    assert out.kept_while[0].decoding == (str(late[1]),)


# ---------------------------------------------------------------- impossible, vacuous, soft, refused


class Forwards:
    def __init__(self, vla):
        self.count = 0
        self.handle = vla.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1


@pytest.mark.parametrize(
    "impossible",
    [
        Range("x", 0.05, 0.06),
        MoveBy("x", 1.0),
        Fix("z", -0.1),
        Workspace(["x"], -0.1, 0.1),
        [Range("x", 0.0, 0.01), Range("x", 0.011, 0.02)],
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["project", "mixture", "mask"])
def test_the_impossible_is_refused_before_the_model_runs(policy, impossible, mode):
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    forwards = Forwards(policy)
    with pytest.raises(InfeasibleConstraintError) as caught:
        policy.predict_action(
            **inputs,
            constraints=impossible if isinstance(impossible, list) else [impossible],
            context=Context(pose={"x": 0.3}),
            mode=mode,
        )
    forwards.handle.remove()
    assert forwards.count == 0
    assert caught.value.bin_width is None
    assert "bins" not in str(caught.value)


@pytest.mark.parametrize(("way", "mode"), [*((way, "mixture") for way in WAYS[:3]), ({}, "project")], ids=str)
def test_constraints_that_exclude_nothing_change_nothing(policy, way, mode):
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    vacuous = [
        Range("x", -1.0, 1.0),
        MoveBy("y", 0.0, tolerance=5.0),
        Rate("z", 2.0),
        Workspace(["x", "y"], -9.0, 9.0),
        Range("gripper", 0.0, 1.0),
        KeepOut(["x", "y"], [5.0, 5.0], [6.0, 6.0]),
        Speed(["x", "y"], 1.0, ord="inf"),
    ]
    here = Context(pose={"x": 0.0, "y": 0.0}, last_action=ZEROS)
    outs = []
    for constraints in (None, vacuous):
        torch.manual_seed(1)
        ask = {"constraints": constraints, "context": here, "mode": mode, "return_dict": True}
        outs.append(policy.predict_action(**inputs, **ask, **way))
    for name in ("token_ids", "actions", "normalized", "log_prob"):
        np.testing.assert_array_equal(getattr(outs[0], name), getattr(outs[1], name))


def test_soft_constraints_say_that_they_have_no_effect(policy, caplog):
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    asked = [Range("x", -0.01, 0.01), Range("x", low=0.0).soft(1e5), Target("y", 0.0, sigma=0.00371)]
    with caplog.at_level(logging.WARNING):
        out = policy.predict_action(**inputs, constraints=asked, mode="mixture", return_dict=True)
    assert out.kept_while[0].without_effect == tuple(map(str, asked[1:]))
    assert out.kept_while[0].decoding == (str(asked[0]),)
    assert "has no effect" in caplog.text
    assert "0.00371" in caplog.text
    with pytest.raises(ConstraintError, match="only pulls"):
        policy.predict_action(**inputs, constraints=asked, mode="mask")


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        (Speed(["x", "y"], 0.01), "more than weighted sums"),
        (Forbid("x", -0.001, 0.001), "gaps"),
        (Fix("x", 0.0123), "no constant"),
        (Sticky("gripper", min_hold=2), "more than weighted sums"),
        (KeepOut(["x"], 0.5, 0.6), "more than weighted sums"),
        (Any(Range("x", 0.0), Range("y", 0.0)), "more than weighted sums"),
        (Target("x", 0.0, hard=True), "chooses"),
        (Rate("gripper", 0.5), "settled|gets its state"),
        ([Fix("gripper", "open", steps=0), Fix("gripper", "closed", steps=7)], "no constant 'gripper'"),
    ],
    ids=str,
)
def test_mask_names_what_tokens_cannot_keep(policy, constraint, why):
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    asked = [Range("yaw", -0.1, 0.1), *(constraint if isinstance(constraint, list) else [constraint])]
    context = Context(pose={"x": 0.0}, last_action=ZEROS)
    forwards = Forwards(policy)
    with pytest.raises(ConstraintError, match=why) as caught:
        policy.predict_action(**inputs, constraints=asked, context=context, mode="mask")
    forwards.handle.remove()
    assert forwards.count == 0
    assert str(asked[-1]) in str(caught.value)
    assert "mode='project'" in str(caught.value)
    out = policy.predict_action(**inputs, constraints=asked, context=context, mode="mixture", return_dict=True)
    assert str(asked[-1]) in dict(out.kept_while[0].afterwards)
    assert str(asked[0]) in out.kept_while[0].decoding


def test_other_modes_and_candidates_are_refused(policy):
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    with pytest.raises(VLAActionsError, match="use mode='project'"):
        policy.predict_action(**inputs, mode="transport")
    with pytest.raises(VLAActionsError, match="candidates are for VQ"):
        policy.predict_action(**inputs, candidates=4)


# ---------------------------------------------------------------- samples of a batch


def test_each_sample_has_its_own_limits(policy):
    inputs = policy.prepare(None, list(INSTRUCTIONS))
    boxes = [(-0.02, -0.01), (-0.004, 0.004), (0.01, 0.02)]
    lists = [[Range("x", *box), *extra] for box, extra in zip(boxes, ([], [MoveBy("x", 0.0, 0.009)], []), strict=True)]
    poses = Context(pose={"z": [0.1, 0.2, 0.3]})
    lists = [
        [*each, Workspace(["z"], low=z - 0.02, high=z + 0.05)] for each, z in zip(lists, (0.1, 0.2, 0.3), strict=True)
    ]
    for mode, n in itertools.product(("mixture", "mask"), (1, 2)):
        out = policy.predict_action(
            **inputs,
            constraints=lists,
            context=poses,
            mode=mode,
            num_return_sequences=n,
            do_sample=n > 1,
            return_dict=True,
        )
        x = out.actions[..., 0].reshape(3, n, HORIZON)
        for sample, (low, high) in enumerate(boxes):
            assert ((x[sample] >= low) & (x[sample] <= high)).all()
        assert (np.abs(x[1].sum(axis=-1)) <= 0.009).all()
        climbed = np.cumsum(out.actions[..., 2], axis=1)
        assert ((climbed >= -0.02) & (climbed <= 0.05)).all()
        assert not out.moved[..., [0, 2]].any()
        assert [len(kept.decoding) for kept in out.kept_while] == [2, 3, 2]


def test_a_sample_that_holds_keeps_no_limits(policy):
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    lists = [[Range("x", 0.005, 0.01)], [Range("x", 0.2, 0.3)]]
    out = policy.predict_action(
        **inputs,
        constraints=lists,
        context=Context(last_action=ZEROS),
        on_infeasible="hold",
        mode="mixture",
        return_dict=True,
    )
    assert out.fallback.tolist() == [False, True]
    assert ((out.actions[0, :, 0] >= 0.005) & (out.actions[0, :, 0] <= 0.01)).all()
    np.testing.assert_array_equal(out.actions[1, :, :6], 0.0)
    assert out.kept_while[1].decoding == ()


# ---------------------------------------------------------------- the limits themselves


def limits_of(tokenizer, constraints, space=SPACE, stats=STATS, context=None, horizon=HORIZON, **options):
    bound = bind(constraints, space, None, horizon, grid=False, context=context)
    return fast_limits(bound, tokenizer, stats, context=context, **options)


@pytest.mark.parametrize(
    ("opened", "closed", "threshold"),
    [
        (1.0, 0.0, None),
        (0.0, 1.0, None),
        (1.0, -1.0, None),
        (-0.5, 0.25, None),
        (1.0, 0.0, 0.05),
        (0.0, 1.0, 0.9),
        (-1.0, 1.0, 0.5),
    ],
)
@pytest.mark.parametrize("wanted", ["open", "closed"])
def test_a_binary_gripper_is_limited_before_it_is_settled(tokenizer, opened, closed, threshold, wanted):
    gripper = Gripper("g", open=opened, closed=closed, threshold=threshold)
    space = ActionSpace(["x", "g"], delta=(True, False), gripper=gripper)
    stats = ActionStats.from_ranges([-0.02, 0.0], [0.02, 0.0], mask=[True, False])
    limits = limits_of(tokenizer, [Fix("g", wanted)], space, stats, beyond=0.1)
    values = np.linspace(-1.1, 1.1, 4401)
    settled = space.settle(np.stack([np.zeros_like(values), values], axis=1))[:, 1]
    inside = (values >= limits.lower[0, 0, 1]) & (values <= limits.upper[0, 0, 1])
    np.testing.assert_array_equal(inside, settled == space.gripper.state(wanted))
    assert limits.kept[0].decoding == (str(Fix("g", wanted)),)


@pytest.mark.parametrize("mode", ["project", "mixture", "mask"])
def test_each_step_may_have_statistics_of_its_own(tokenizer, mode):
    rng = np.random.default_rng(5)
    low, high = -rng.uniform(0.01, 0.05, (HORIZON, DOF)), rng.uniform(0.01, 0.05, (HORIZON, DOF))
    low[:, -1], high[:, -1] = 0.0, 1.0
    low[2, 1] = high[2, 1] = 0.004  # this number never moves
    stats = ActionStats(mode="bounds", min=low, max=high, mask=np.array([True] * (DOF - 1) + [False]))
    vla = policy_of(tokenizer, norm_stats=NormStats({"my_robot": {"action": stats}}))
    inputs = vla.prepare(None, INSTRUCTIONS[0])
    wanted = [Range("x", -0.02, 0.015), MoveBy("y", 0.012, tolerance=0.02), Fix("gripper", "open")]
    torch.manual_seed(1)
    options = {"do_sample": True, "num_return_sequences": 6, "mode": mode, "return_dict": True}
    out = vla.predict_action(**inputs, constraints=wanted, **options)
    x, y, gripper = out.actions[..., 0], out.actions[..., 1], out.actions[..., -1]
    assert x.min() >= -0.02
    assert x.max() <= 0.015
    assert (gripper == SPACE.gripper.open).all()
    assert (np.abs(y.sum(axis=1) - 0.012) <= 0.02 * (1 + 1e-12)).all()
    assert out.kept_while[0].decoding == (() if mode == "project" else tuple(map(str, wanted)))
    said = SPACE.settle(stats.unnormalize(out.normalized))
    np.testing.assert_array_equal(out.moved, out.actions - said)
    if mode == "mask":
        assert out.certified.all()
    reach = np.maximum(np.abs(low), np.abs(high)).max(axis=0)
    for dim, beyond in (("x", 2 * reach[0]), ("yaw", 2 * reach[5])):
        with pytest.raises(InfeasibleConstraintError):
            vla.predict_action(**inputs, constraints=[Range(dim, low=beyond)], mode=mode)


def test_limits_are_those_of_each_dimension_in_normalized_numbers(tokenizer):
    space = ActionSpace(["a", "b", "c", "d"], delta=(True, False, True, True))
    stats = ActionStats.from_ranges([-0.2, 3.0, -1.0, 0.5], [0.6, 4.0, 1.0, 0.5], mask=[True, True, False, True])
    asked = [
        Range("a", 0.0, 0.4, steps=slice(0, 3)),
        Workspace(["b"], 3.25, 3.75),  # a position: each value by itself
        Range("c", -0.3, None),
        Range("d", 0.4, 0.6),  # constant
        Rate("a", 0.1, from_last=False),
    ]
    limits = limits_of(tokenizer, asked, space, stats, context=Context(pose={"b": 3.5}))
    lower, upper = limits.lower[0], limits.upper[0]
    np.testing.assert_allclose(lower[:, 0], [-0.5] * 3 + [-1] * 5)
    np.testing.assert_allclose(upper[:, 0], [0.5] * 3 + [1] * 5)
    np.testing.assert_allclose(lower[:, 1], -0.5)
    np.testing.assert_allclose(upper[:, 1], 0.5)
    np.testing.assert_allclose(lower[:, 2], -0.3)
    np.testing.assert_allclose(upper[:, 2], 1.0)
    assert np.isneginf(lower[:, 3]).all()
    assert np.isposinf(upper[:, 3]).all()
    np.testing.assert_array_equal(limits.sums.weights, np.diff(np.eye(HORIZON), axis=0)[:, ::1] * -1)
    np.testing.assert_allclose(limits.sums.upper[0, :, 0], 0.25)  # 0.1 of a half width of 0.4
    assert np.isposinf(limits.sums.upper[0, :, 1:]).all()
    assert limits.dc_ranges is None
    assert len(limits.kept[0].decoding) == 5


def test_a_small_range_far_from_zero_keeps_its_limits_through_rounding(tokenizer):
    space = ActionSpace(["x"], delta=False)
    stats = ActionStats.from_ranges([5000.0 - 1e-5], [5000.0 + 1e-5])
    for low in 5000.0 + np.random.default_rng(3).uniform(-5e-6, 0, 50):
        limits = limits_of(tokenizer, [Range("x", low, low + 5e-6)], space, stats)
        assert limits.kept[0].decoding
        ends = stats.unnormalize(np.stack([limits.lower[0, :, 0] + 1e-9, limits.upper[0, :, 0] - 1e-9])[..., None])
        assert low <= ends[0].min()
        assert ends[1].max() <= low + 5e-6


def test_without_constraints_nothing_is_limited_and_with_them_only_what_they_speak_of(tokenizer):
    free = limits_of(tokenizer, [])
    assert (free.lower, free.upper, free.dc_ranges, free.sums) == (None,) * 4
    limits = limits_of(tokenizer, [Range("x", -0.01, 0.01)], beyond=0.1)
    assert np.isfinite(limits.lower[0, :, 0]).all()
    assert np.isneginf(limits.lower[0, :, 1:]).all()
    strict = limits_of(tokenizer, [], beyond=0.1, strict=True)
    np.testing.assert_array_equal(strict.lower, -1.1)


def test_sudden_changes_of_free_dimensions_are_never_refused(tokenizer):
    """Their first frequencies overshoot [-1, 1], what the whole chunk does not."""
    chunk = np.zeros((1, HORIZON, DOF))
    chunk[0, 4:, 6] = 1.0
    chunk[0, :, 1] = np.where(np.arange(HORIZON) < 4, -1.0, 1.0)
    codes = tokenizer.encode(chunk)[0]
    for constraints, fine in (([], True), ([Range("x", -0.01, 0.01)], True), ([Range("y", -0.04, 0.04)], False)):
        fast = processor(tokenizer, HORIZON, DOF, 0, **limits_of(tokenizer, constraints, beyond=0.13).options)
        ids = torch.tensor(codes)[None] + 40
        refused = [not fast.allowed(ids[:, :i])[0][0, codes[i]] for i in range(len(codes))]
        assert any(refused) != fine


ROBOTS = {
    "bytes": byte_tokenizer,
    "foreign": foreign,
    "fitted": lambda: FASTActionTokenizer.fit(smooth(300, 8, 7), 512),
}


@pytest.mark.parametrize("name", ROBOTS)
def test_no_row_ends_in_a_dead_end_and_every_sum_is_kept(name):
    action_tokenizer, rng = ROBOTS[name](), np.random.default_rng(3)
    for horizon in (1, 3, 8):
        half = (STATS.q99 - STATS.q01) / 2
        asked = [
            Rate("x", half[0] * 0.6, from_last=False),
            Workspace(["y", "z"], [-0.05, 0.04], [0.05, 0.3]),
            Linear(["roll"], [-2.0], low=-0.3, high=0.25, cumulative=True),
            MoveBy("yaw", 0.1, tolerance=0.2, steps=slice(0, max(1, horizon // 2))),
            Range("pitch", -0.05, float(rng.uniform(0.0, 0.05))),
            Prefix([[np.nan, 0.005, np.nan, np.nan, np.nan, np.nan, np.nan]]),
        ]
        here = Context(pose={"y": 0.0, "z": 0.1})
        limits = limits_of(action_tokenizer, asked, context=here, horizon=horizon, beyond=0.15)
        assert len(limits.kept[0].decoding) == 5
        assert len(limits.kept[0].afterwards) == 1
        fast = processor(action_tokenizer, horizon, DOF, **limits.options)
        chunks = STATS.unnormalize(action_tokenizer.decode(generate(fast, rows=12), horizon, DOF))
        assert (np.abs(np.diff(chunks[..., 0], axis=1)) <= half[0] * 0.6).all()
        moved = np.cumsum(chunks, axis=1)
        assert ((moved[..., 1] >= -0.05) & (moved[..., 1] <= 0.05)).all()
        assert ((moved[..., 2] + 0.1 >= 0.04) & (moved[..., 2] + 0.1 <= 0.3)).all()
        assert ((-2 * moved[..., 3] >= -0.3) & (-2 * moved[..., 3] <= 0.25)).all()
        assert (np.abs(chunks[:, : max(1, horizon // 2), 5].sum(axis=1) - 0.1) <= 0.2).all()
        assert len(np.unique(chunks.round(9), axis=0)) > 1


# ---------------------------------------------------------------- the same list on every kind of tokens


def test_one_list_holds_for_bins_fast_and_vq():
    chunks = np.clip(smooth(200, 4, DOF), -1, 1)
    vq = VQActionTokenizer(DOF, 4, code_dim=8, codebook_size=16, n_codebooks=3, hidden=(32,))
    vq.fit(chunks, steps=40, progress=False)
    kinds = (UniformActionTokenizer(256), FASTActionTokenizer.fit(chunks, vocab_size=192, scale=10), vq)
    asked = [
        Speed(["x", "y", "z"], 0.02),
        Rate("x", 0.006),
        Workspace(["x", "y", "z"], [-0.03, -0.03, 0.05], [0.03, 0.03, 0.15]),
        MoveBy("yaw", 0.1, tolerance=0.06),
        Fix("gripper", "closed", steps=-1),
        KeepOut(["x", "y"], [0.01, -0.01], [0.02, 0.01]),
    ]
    here = Context(pose={"x": 0.0, "y": 0.0, "z": 0.1}, last_action=ZEROS)
    for action_tokenizer in kinds:
        vla = policy_of(action_tokenizer, horizon=4)
        inputs = vla.prepare(None, list(INSTRUCTIONS[:2]))
        for way in WAYS[:2]:
            x = vla.predict_action(**inputs, constraints=asked, context=here, **way)
            p = np.cumsum(x, axis=1) + np.array([0, 0, 0.1, 0, 0, 0, 0])
            assert (np.linalg.norm(x[..., :3], axis=-1) <= 0.02 * (1 + 1e-12)).all()
            assert (np.abs(np.diff(x[..., 0], axis=1, prepend=0.0)) <= 0.006).all()
            assert (np.abs(p[..., :2]) <= 0.03 * (1 + 1e-12)).all()
            assert ((p[..., 2] >= 0.05 - 1e-12) & (p[..., 2] <= 0.15 + 1e-12)).all()
            assert (np.abs(x[..., 5].sum(axis=1) - 0.1) <= 0.06).all()
            assert (x[:, -1, 6] == 0.0).all()
            assert not ((p[..., 0] > 0.01) & (p[..., 0] < 0.02) & (np.abs(p[..., 1]) < 0.01)).any()

"""Constraints that couple steps and dimensions, through every decoder of Transformers and through predict_action."""

import copy
import json

import numpy as np
import pytest
import torch
from test_taco import CONFIG, DOF, WAYS, N, generate, model, real_values  # noqa: F401
from tiny import INSTRUCTIONS, SPACE, sharpen, tiny_llama, tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    Context,
    InfeasibleConstraintError,
    TACOLogitsProcessor,
    VLAActionsError,
)
from hf_vla_actions.constraints import (
    Any,
    Fix,
    KeepOut,
    Linear,
    MoveBy,
    Range,
    Rate,
    Speed,
    Sticky,
    Target,
    Where,
    Workspace,
    bind,
    constraint_from_dict,
    project,
    retime_within,
)
from hf_vla_actions.errors import ConstraintError

torch.set_num_threads(1)

NAMES = CONFIG.space().names
PAIR = list(NAMES[:2])
HERE = Context(pose={name: 0.0 for name in PAIR}, last_action=np.zeros(DOF))
COUPLED = [Rate(PAIR[0], 0.012), Speed(PAIR, 0.03), Workspace(PAIR[0], -0.01, 0.012)]


def check_coupled(new):
    """Whole chunks, then the closing token; written out by hand."""
    values = real_values(CONFIG)
    actions = values[np.arange(DOF), CONFIG.vocabulary.to_codes(new[:, :N].numpy()).reshape(-1, N // DOF, DOF)]
    x, y = actions[..., 0], actions[..., 1]
    assert new.shape[1] == N + 1
    assert (np.abs(np.diff(x, axis=1, prepend=0.0)) <= 0.012).all()
    assert (np.hypot(x, y) <= 0.03).all()
    reached = np.cumsum(x, axis=1)
    assert (reached >= -0.01 - 1e-12).all()
    assert (reached <= 0.012 + 1e-12).all()
    return actions


@pytest.mark.parametrize("mode", ["mask", "transport"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_keeps_coupled_constraints(model, mode, way):  # noqa: F811
    torch.manual_seed(5)
    ids = torch.randint(3, 40, (1 if way == "prompt lookup" else 2, 6))
    for prompt_length in (6, None):
        processor = TACOLogitsProcessor(
            COUPLED, CONFIG, prompt_length=prompt_length, mode=mode, context=HERE, speculative=way == "prompt lookup"
        )
        check_coupled(generate(model, processor, ids, **WAYS[way])[:, 6:])


def test_assisted_decoding_equals_greedy_under_coupled_constraints(model):  # noqa: F811
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1})).eval()
    ids = torch.randint(3, 40, (1, 6))
    processor = TACOLogitsProcessor(COUPLED, CONFIG, prompt_length=6, context=HERE)
    helped = generate(model, processor, ids, assistant_model=assistant)[:, 6:]
    check_coupled(helped)
    assert torch.equal(helped, generate(model, processor, ids)[:, 6:])


def test_compiled_forward_and_embeddings_and_padding_change_nothing(model):  # noqa: F811
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(8))
    processor = TACOLogitsProcessor(COUPLED, CONFIG, prompt_length=6, context=HERE)
    wanted = generate(model, processor, ids)[:, 6:]
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    assert torch.equal(generate(compiled, processor, ids)[:, 6:], wanted)
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=torch.ones_like(ids),
        logits_processor=LogitsProcessorList([TACOLogitsProcessor(COUPLED, CONFIG, prompt_length=0, context=HERE)]),
        **{"do_sample": False, "max_new_tokens": N + 4, "pad_token_id": 0},
    )
    assert torch.equal(embedded, wanted)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    processor = TACOLogitsProcessor(COUPLED, CONFIG, prompt_length=9, context=HERE)
    assert torch.equal(generate(model, processor, padded, attention_mask=(padded != 0).long())[:, 9:], wanted)


def test_ids_that_are_no_actions_among_the_decided_ones_raise():
    processor = TACOLogitsProcessor(COUPLED, CONFIG, prompt_length=2, context=HERE)
    with pytest.raises(ConstraintError, match="no action token"):
        processor(torch.tensor([[5, 6, 7]]), torch.zeros(1, 4096))


# ---------------------------------------------------------------- predict_action


@pytest.fixture(scope="module")
def policy():
    return sharpen(tiny_llava(horizon=4), 60)


@pytest.fixture(scope="module")
def inputs(policy):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    return policy.prepare(list(pictures), list(INSTRUCTIONS[:2]))


XYZ = ("x", "y", "z")
AT = Context(pose={"x": 0.4, "y": 0.0, "z": 0.1}, last_action=[0, 0, 0, 0, 0, 0, 1.0], held_steps=1)
LIMITS = [
    Workspace(XYZ, [0.38, -0.02, 0.09], [0.41, 0.02, 0.2]),
    Rate("x", 0.01),
    Speed(XYZ, 0.02),
    KeepOut(XYZ, [0.405, -0.01, 0.0], [0.5, 0.01, 0.2]),
    Sticky("gripper", min_hold=3),
    Range("yaw", -0.05, 0.05),
]


def check_limits(actions):
    xyz = actions[..., :3]
    start = np.array([0.4, 0.0, 0.1])
    path = np.concatenate([np.tile(start, (len(actions), 1, 1)), start + np.cumsum(xyz, axis=1)], axis=1)
    assert (path >= np.array([0.38, -0.02, 0.09]) - 1e-12).all()
    assert (path <= np.array([0.41, 0.02, 0.2]) + 1e-12).all()
    assert (np.linalg.norm(xyz, axis=-1) <= 0.02 * (1 + 1e-12)).all()
    assert (np.abs(np.diff(xyz[..., 0], axis=1, prepend=0.0)) <= 0.01).all()
    fine = path[:, :-1, None] + np.linspace(0, 1, 101)[:, None] * (path[:, 1:] - path[:, :-1])[:, :, None]
    inside = ((fine >= [0.405, -0.01, 0.0]) & (fine <= [0.5, 0.01, 0.2])).all(-1)
    assert not inside.any()
    grip = np.concatenate([np.ones((len(actions), 1)), actions[..., 6]], axis=1)
    assert (grip[:, :3] == 1).all()  # open for one step only when the chunk began: two more have to follow
    assert (np.abs(actions[..., 5]) <= 0.05).all()


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 1.5, "top_k": 5}, {"do_sample": True, "top_p": 0.4}]
)
@pytest.mark.parametrize("mode", ["project", "mixture", "transport", "mask"])
def test_predict_action_keeps_all_limits_at_once(policy, inputs, mode, sampling):
    torch.manual_seed(0)
    out = policy.predict_action(**inputs, constraints=LIMITS, context=AT, mode=mode, return_dict=True, **sampling)
    check_limits(out.actions)
    assert not out.fallback.any()
    if mode in ("mask", "transport"):
        assert not out.moved.any()
    else:
        np.testing.assert_array_equal(out.moved, out.actions - policy.action_config.decode(out.token_ids)[1])


@pytest.mark.parametrize("style", ["axis", "direction"])
def test_projection_styles(policy, inputs, style):
    limits = [Speed(XYZ, 0.004)]
    free = policy.predict_action(**inputs)
    actions = policy.predict_action(**inputs, constraints=limits, style=style)
    length = np.linalg.norm(actions[..., :3], axis=-1)
    assert (length <= 0.004 * (1 + 1e-12)).all()
    np.testing.assert_array_equal(actions[..., 3:], free[..., 3:])
    cosine = (actions[..., :3] * free[..., :3]).sum(-1) / (length * np.linalg.norm(free[..., :3], axis=-1))
    np.testing.assert_allclose(cosine, 1.0, atol=1e-6)  # the nearest point of a ball is on the ray, too
    box = [Range(dim, -0.002, 0.002) for dim in XYZ]
    bent = policy.predict_action(**inputs, constraints=box, style=style)[..., :3]
    cosine = (bent * free[..., :3]).sum(-1) / np.linalg.norm(bent, axis=-1) / np.linalg.norm(free[..., :3], axis=-1)
    assert (np.abs(bent) <= 0.002).all()
    assert (cosine > 1 - 1e-6).all() == (style == "direction")


def test_context_for_each_sample_equals_one_call_each(policy, inputs):
    poses = np.array([[0.4, 0.0, 0.1], [0.39, 0.01, 0.11]])
    last = np.array([[0, 0, 0, 0, 0, 0, 1.0], [0.004, 0, 0, 0, 0, 0, 0.0]])
    both = policy.predict_action(
        **inputs, constraints=LIMITS, context=Context(poses, last, held_steps=[1, 9]), mode="mask"
    )
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        context = Context(poses[i], last[i], held_steps=[1, 9][i])
        alone = policy.predict_action(**one, constraints=LIMITS, context=context, mode="mask")
        np.testing.assert_array_equal(both[i : i + 1], alone)


def test_numbers_for_each_sample(policy, inputs):
    actions = policy.predict_action(
        **inputs, constraints=[Speed(XYZ, torch.tensor([0.001, 0.01])), Range("yaw", [0.0, -1], 1)]
    )
    lengths = np.linalg.norm(actions[..., :3], axis=-1).max(axis=1)
    assert lengths[0] <= 0.001 * (1 + 1e-12)
    assert 0.001 < lengths[1] <= 0.01 * (1 + 1e-12)
    assert (actions[0, :, 5] >= 0).all()
    with pytest.raises(ConstraintError, match="batch of 2"):
        policy.predict_action(**inputs, constraints=[Speed(XYZ, [0.001, 0.01, 0.02])])


@pytest.mark.parametrize(
    "constraint", [Rate("x", 0.01), Workspace("x", 0, 1), KeepOut("x", 1, 2), Sticky("gripper", 2)]
)
def test_what_needs_a_context_raises_without_one(policy, inputs, constraint):
    with pytest.raises(ConstraintError, match="Context"):
        policy.predict_action(**inputs, constraints=[constraint])


IMPOSSIBLE = [Workspace("x", 0.39, 0.41), MoveBy("x", 0.08)]


@pytest.mark.parametrize("mode", ["project", "mixture", "transport", "mask"])
def test_infeasible_start_raises_before_the_model_runs_and_names_the_smallest_set(policy, inputs, mode, monkeypatch):
    monkeypatch.setattr(type(policy), "generate", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(InfeasibleConstraintError, match="cannot hold together") as caught:
        policy.predict_action(**inputs, constraints=[Speed(XYZ, 0.05), *IMPOSSIBLE], context=AT, mode=mode)
    assert set(caught.value.names) == {str(constraint) for constraint in IMPOSSIBLE}
    assert caught.value.unit == "m"


@pytest.mark.parametrize("mode", ["project", "mask"])
def test_hold_and_nearest_are_flagged_per_sample(policy, inputs, mode):
    constraints = [[Range("x", -0.01, 0.01), *IMPOSSIBLE], [Range("x", -0.01, 0.01)]]
    options = {"constraints": constraints, "context": AT, "mode": mode, "return_dict": True}
    held = policy.predict_action(**inputs, on_infeasible="hold", **options)
    assert held.fallback.tolist() == [True, False]
    np.testing.assert_array_equal(held.actions[0], np.tile([0, 0, 0, 0, 0, 0, 1.0], (4, 1)))
    assert held.fallbacks[0].kind == "hold"
    assert "cannot" in held.fallbacks[0].reason
    near = policy.predict_action(**inputs, on_infeasible="nearest", **options)
    assert near.fallback.tolist() == [True, False]
    assert near.fallbacks[0].dropped
    assert (np.abs(near.actions[..., 0]) <= 0.01).all()
    np.testing.assert_array_equal(near.actions[1], held.actions[1])


def test_permanent_limits_are_the_last_to_be_left_out(inputs):
    limits = [Workspace("x", 0.39, 0.41)]
    vla = sharpen(tiny_llava(horizon=4, limits=limits), 60)
    assert ActionConfig.from_dict(json.loads(json.dumps(vla.action_config.to_dict()))).limits == tuple(limits)
    options = {"constraints": [MoveBy("x", 0.08)], "context": AT, "on_infeasible": "nearest", "return_dict": True}
    out = vla.predict_action(**inputs, **options)
    assert out.fallbacks[0].dropped == (str(MoveBy("x", 0.08)),)
    reached = 0.4 + np.cumsum(out.actions[..., 0], axis=1)
    assert ((reached >= 0.39 - 1e-12) & (reached <= 0.41 + 1e-12)).all()
    with pytest.raises(ConstraintError, match="Context"):
        vla.predict_action(**inputs)


def test_move_by_reaches_its_total_on_and_off_the_grid(policy, inputs):
    for mode, tolerance in (("mask", 2e-4), ("project", 1e-8)):
        actions = policy.predict_action(**inputs, constraints=[MoveBy("x", 0.05), Speed(XYZ, 0.02)], mode=mode)
        np.testing.assert_allclose(actions[..., 0].sum(axis=1), 0.05, atol=tolerance)


def test_soft_constraints_pull_and_exclude_nothing(policy, inputs):
    free = policy.predict_action(**inputs)
    strong = [Speed(XYZ, 0.002).soft(1e8), Rate("yaw", 0.001).soft(1e8)]
    pulled = policy.predict_action(**inputs, constraints=strong, context=AT)
    assert np.linalg.norm(pulled[..., :3], axis=-1).max() < np.linalg.norm(free[..., :3], axis=-1).max() / 2
    weak = policy.predict_action(**inputs, constraints=[Speed(XYZ, 0.002).soft(1e-9)])
    np.testing.assert_array_equal(weak, free)
    bridge = policy.predict_action(**inputs, constraints=[MoveBy("x", 0.06, sigma=1e-3)])
    np.testing.assert_allclose(bridge[..., 0].sum(axis=1), 0.06, atol=3e-3)


def test_alternatives_and_functions(policy, inputs):
    sideways = Any(Range("x", None, 0.0), [Range("y", 0.0, None), Speed(("x", "y"), 0.01)])
    for mode in ("project", "mask"):
        actions = policy.predict_action(**inputs, constraints=[sideways], mode=mode)
        first = (actions[..., 0] <= 0).all(axis=1)
        second = ((actions[..., 1] >= 0) & (np.hypot(actions[..., 0], actions[..., 1]) <= 0.01 * (1 + 1e-12))).all(
            axis=1
        )
        assert (first | second).all()
        even = Where(lambda chunks: chunks[..., 2].sum(-1) >= 0.004, backup=[0, 0, 0.01, 0, 0, 0, 1.0], name="rises")
        assert (policy.predict_action(**inputs, constraints=[even], mode=mode)[..., 2].sum(axis=1) >= 0.004).all()


def test_hysteresis_keeps_the_gripper_unless_the_policy_is_sure(policy, inputs):
    stay = policy.predict_action(**inputs, constraints=[Sticky("gripper", hysteresis=0.9999)], context=AT)
    assert (stay[..., 6] == 1).all()
    free = policy.predict_action(**inputs)
    again = policy.predict_action(**inputs, constraints=[Sticky("gripper", hysteresis=0.0)], context=AT)
    np.testing.assert_array_equal(again, free)
    out = policy.predict_action(
        **inputs, constraints=[Sticky("gripper", hysteresis=0.9999)], context=AT, mode="mask", return_dict=True
    )
    assert (out.actions[..., 6] == 1).all()
    assert (out.confidence.log_q[..., 6] <= 1e-12).all()
    assert np.isfinite(out.confidence.log_q).all()


def test_a_forced_token_that_breaks_the_constraints_is_not_returned(policy, inputs, monkeypatch):
    taco_call = TACOLogitsProcessor.__call__

    def forcing(self, input_ids, scores):
        result = taco_call(self, input_ids, scores)
        forced = torch.full_like(result, -torch.inf)
        forced[:, int(self.vocabulary.token_ids[-1])] = 0.0
        return forced

    monkeypatch.setattr(TACOLogitsProcessor, "__call__", forcing)
    with pytest.raises(VLAActionsError, match="exceeds its constraints"):
        policy.predict_action(**inputs, constraints=[Range("x", -0.01, 0.01)], mode="mask")


def test_vacuous_constraints_leave_every_logit_as_it_is(policy):
    config = policy.action_config
    wide = [Range("x", -9, 9), Rate("x", 9.0), Workspace(XYZ, -9, 9), Speed(XYZ, 9.0), KeepOut(XYZ, 5, 6), Forbid9()]
    ids = torch.randint(3, 30, (2, 5))
    plain, bound = (TACOLogitsProcessor(c, config, prompt_length=5, mode="mask", context=AT) for c in ([], wide))
    for _position in range(config.n_tokens()):
        scores = torch.randn(2, policy.config.text_config.vocab_size)
        assert torch.equal(plain(ids, scores), bound(ids, scores))
        best = bound(ids, scores).argmax(dim=1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)


def Forbid9():
    return constraint_from_dict({"type": "Forbid", "dim": "y", "low": 8.0, "high": 9.0})


# ---------------------------------------------------------------- policies


def observation(seed):
    picture = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return {"images": picture, "instruction": INSTRUCTIONS[0]}


def test_a_policy_knows_its_last_action(policy):
    start = Context(last_action=[0, 0, 0, 0, 0, 0, 1.0])
    runner = policy.policy(
        constraints=[Rate("x", 0.004)], context=lambda obs: start if obs["first"] else None, execute_steps=2
    )
    done = [runner({**observation(i), "first": i == 0}) for i in range(8)]
    assert (np.abs(np.diff([0.0, *[action[0] for action in done]])) <= 0.004).all()
    runner.reset()
    with pytest.raises(ConstraintError, match="Context"):
        runner({**observation(0), "first": False})


def test_a_retiming_policy_takes_more_steps_on_the_same_path(policy):
    free = np.array([policy.policy()(observation(0))])
    runner = policy.policy(constraints=[Speed(XYZ, 0.003)], style="retime", execute_steps=1)
    steps, looked = [], []
    original = runner.predict_chunk
    runner.predict_chunk = lambda obs: looked.append(1) or original(obs)
    while len(looked) < 2:
        steps.append(runner(observation(0)))
    split = np.array(steps[:-1])
    assert (np.linalg.norm(split[:, :3], axis=1) <= 0.003 * (1 + 1e-12)).all()
    np.testing.assert_allclose(split[:, :6].sum(axis=0), free[0, :6], atol=1e-12)
    with pytest.raises(VLAActionsError, match="retime"):
        policy.predict_action(**policy.prepare(observation(0)["images"], INSTRUCTIONS[0]), style="retime")
    with pytest.raises(ConstraintError, match="steps"):
        policy.policy(constraints=[Range("x", -0.01, 0.01, steps=0)], style="retime")(observation(0))


def test_projection_of_chunks_of_any_head():
    chunks = np.random.default_rng(0).normal(0, 0.03, (3, 6, 7))
    actions = project(chunks, LIMITS, SPACE, context=AT)
    check_limits(actions)
    within = project(actions, LIMITS, SPACE, context=AT)
    np.testing.assert_array_equal(within, actions)


def test_a_soft_target_and_coupled_limits_together(policy, inputs):
    constraints = [Target("x", 0.004, sigma=1e-4), Speed(XYZ, 0.005), Fix("gripper", "open")]
    for mode in ("mask", "transport"):
        actions = policy.predict_action(**inputs, constraints=constraints, mode=mode)
        np.testing.assert_allclose(actions[..., 0], 0.004, atol=5e-4)
        assert (np.linalg.norm(actions[..., :3], axis=-1) <= 0.005 * (1 + 1e-12)).all()


def test_a_text_only_policy_and_prompt_lookup():
    vla = sharpen(tiny_llama(horizon=3), 60)
    inputs = vla.prepare(None, [INSTRUCTIONS[0]])
    greedy = vla.predict_action(**inputs, constraints=LIMITS, context=AT, mode="mask")
    check_limits(greedy)
    looked = vla.predict_action(**inputs, constraints=LIMITS, context=AT, mode="mask", prompt_lookup_num_tokens=3)
    np.testing.assert_array_equal(looked, greedy)


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ([Rate("x", 0.002), Workspace("x", -1, 0.41)], "reachable 0.418"),  # the first step is 18 mm at least
        ([Where(lambda chunks: chunks[..., 0].sum(-1) > 9, name="far")], "a chunk that far allows"),
        ([KeepOut(XYZ, [0.39, -0.1, 0.0], [0.42, 0.1, 0.2])], "starts inside"),
        ([Speed(XYZ, 0.001), MoveBy("x", 0.05)], "cannot hold together"),
        ([Sticky("gripper", min_hold=3), Fix("gripper", "closed", steps=0)], "neither too early"),
    ],
)
def test_refusals_say_what_could_be_reached(policy, inputs, constraints, words):
    context = Context(pose={"x": 0.4, "y": 0.0, "z": 0.1}, last_action=[0.02, 0, 0, 0, 0, 0, 1.0], held_steps=1)
    with pytest.raises(InfeasibleConstraintError, match=words) as caught:
        policy.predict_action(**inputs, constraints=constraints, context=context, mode="mask")
    assert "inf" not in str(caught.value)


def test_a_policy_counts_for_how_long_its_gripper_has_kept_still(policy):
    limits = [
        Sticky("gripper", min_hold=3),
        Fix("gripper", "open", steps=[0, 1, 2]),
        Fix("gripper", "closed", steps=3),
    ]
    told = Context(last_action=[0, 0, 0, 0, 0, 0, 1.0])

    def context(obs):
        return Context(last_action=runner.executed[-1]) if runner.executed else told

    runner = policy.policy(constraints=limits, context=context, execute_steps=4)
    assert [runner(observation(0))[6] for _ in range(4)] == [1, 1, 1, 0]
    with pytest.raises(InfeasibleConstraintError, match="Sticky"):  # closed for one step only: may not open again
        runner(observation(1))


@pytest.mark.parametrize("mode", ["mixture", "mask", "transport", "project"])
def test_hysteresis_acts_in_every_mode(mode):
    config = tiny_llama(horizon=2).action_config
    sticky = [Sticky("gripper", hysteresis=0.9)]
    taco = TACOLogitsProcessor(
        sticky, config, prompt_length=0, context=Context(last_action=[0] * 6 + [1.0]), mode=mode
    )
    ids = torch.tensor([config.vocabulary.token_ids[[128] * 6]])
    scores = torch.full((1, config.vocabulary.token_ids.max() + 1), -20.0)
    values = config.token_values()[6]
    closed, opened = config.vocabulary.token_ids[values == 0][0], config.vocabulary.token_ids[values == 1][0]
    scores[0, closed], scores[0, opened] = np.log(0.7), np.log(0.3)
    assert taco(ids, scores).argmax() == opened  # 0.7 is not sure enough to close
    scores[0, closed], scores[0, opened] = np.log(0.95), np.log(0.05)
    assert taco(ids, scores).argmax() == closed


def test_what_a_policy_returns_may_be_changed_by_the_caller(policy):
    runner = policy.policy(
        constraints=[Rate("x", 0.001)],
        context=lambda obs: Context(last_action=[0.0] * 6 + [1]) if not runner.executed else None,
        execute_steps=1,
    )
    done = []
    for i in range(3):
        action = runner(observation(i))
        done.append(float(action[0]))
        action *= 100  # to the units of some simulator
    assert (np.abs(np.diff([0.0, *done])) <= 0.001).all()


def test_the_first_action_of_an_episode_may_have_changed_the_gripper(policy):
    told = Context(last_action=[0, 0, 0, 0, 0, 0, 1.0])
    looks = []

    def limits(obs):
        looks.append(1)
        return [Sticky("gripper", min_hold=6), Target("gripper", 0.0 if len(looks) == 1 else 1.0, sigma=1e-3)]

    runner = policy.policy(constraints=limits, context=lambda obs: None if runner.executed else told, mode="mask")
    grips = [runner(observation(0))[6] for _ in range(8)]
    assert grips == [0, 0, 0, 0, 0, 0, 1, 1]  # closed at the first step, and for six


def test_retiming_keeps_soft_constraints_and_refuses_other_modes(policy):
    runner = policy.policy(
        constraints=[Target("x", 0.02, sigma=1e-4), Speed(XYZ, 0.005)], style="retime", execute_steps=1
    )
    part = runner(observation(0))
    n = 1 + len(runner._pending)
    assert part[0] * n == pytest.approx(0.02, abs=5e-4)
    for options in ({"mode": "mask"}, {"mode": "clip"}, {"style": "slow"}, {"on_infeasible": "hodl"}):
        with pytest.raises(VLAActionsError, match=r"mode|style|on_infeasible"):
            policy.policy(**{"style": "retime", **options})
    with pytest.raises(VLAActionsError, match="whole number"):
        policy.policy(execute_steps=1.5)


def test_retiming_looks_into_constraints_made_of_others():
    chunk = np.full((4, 7), 0.02)
    together = retime_within(chunk, [Speed(XYZ, 0.01) & Range("yaw", -1, 1)], SPACE)
    apart = retime_within(chunk, [Speed(XYZ, 0.01), Range("yaw", -1, 1)], SPACE)
    np.testing.assert_array_equal(together.actions, apart.actions)
    for constraint in (
        Range("x", high=0, steps=0) & Speed(XYZ, 1.0),
        Any(Range("x", high=0, steps=0), Speed(XYZ, 1.0)),
    ):
        with pytest.raises(ConstraintError, match="steps"):
            retime_within(chunk, [constraint], SPACE)


@pytest.mark.parametrize("soft", [Where(lambda chunks: chunks[:, 0, 0] > 0), Sticky("gripper", hysteresis=0.5)])
def test_what_has_no_excess_has_no_price(soft):
    with pytest.raises(ConstraintError, match="no excess"):
        soft.soft(1.0)


def test_holding_needs_to_know_what_the_numbers_are():
    space = ActionSpace.unnamed(2)
    values = np.tile(np.linspace(-1, 1, 16), (2, 1))
    with pytest.raises(ConstraintError, match="change or a target"):
        bind([Range(0, 5, 6)], space, values, 2, on_infeasible="hold", context=Context(last_action=[0.7, 0.7]))


@pytest.mark.parametrize("on_infeasible", ["hold", "nearest"])
@pytest.mark.parametrize("mode", ["mask", "project"])
def test_the_report_after_a_fallback_is_of_what_acted(inputs, on_infeasible, mode):
    vla = sharpen(tiny_llava(horizon=4, limits=[Range("x", -0.03, 0.0)]), 60)
    wanted = [Range("x", low=0.01), Range("x", low=0.012)]
    options = {"constraints": wanted, "context": AT, "on_infeasible": on_infeasible, "mode": mode, "return_dict": True}
    report = vla.predict_action(**inputs, **options).confidence
    assert np.isfinite(report.log_q).all()
    if mode == "mask":
        assert np.isfinite(report.log_weight).all()


def test_a_far_robot_costs_its_neighbor_nothing(policy):
    config = policy.action_config
    zone = [KeepOut("x", 0.405, 0.5)]
    near = TACOLogitsProcessor(zone, config, prompt_length=0, context=Context(pose={"x": 0.4}), mode="mask")
    both = TACOLogitsProcessor(zone, config, prompt_length=0, context=Context(pose={"x": [0.4, 2e6]}), mode="mask")
    scores = torch.zeros(2, int(config.vocabulary.token_ids.max()) + 1)
    ids = torch.zeros((2, 0), dtype=torch.long)
    assert torch.equal(near(ids[:1], scores[:1])[0], both(ids, scores)[0])


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_numbers_whose_squares_are_lost_are_refused(scale):
    space = ActionSpace(["x", "y"], ["m", "m"], True)
    values = np.tile(np.linspace(-1, 1, 16), (2, 1)) * scale
    with pytest.raises(ConstraintError, match="another unit"):
        bind([Speed(["x", "y"], scale)], space, values, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: bind([], SPACE, v, 0), "horizon"),
        (lambda v: bind([], SPACE, v, 2, limits=Range("x", 0, 1)), "limits are a list"),
        (lambda v: project([["a"] * 7], [], SPACE), "numbers"),
        (lambda v: bind("Range(x, 0, 1)", SPACE, v, 2), "parse_constraints"),
    ],
)
def test_bad_input_of_binding_is_named(call, message):
    with pytest.raises(ConstraintError, match=message):
        call(np.tile(np.linspace(-1, 1, 16), (7, 1)))


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize(
    "constraint",
    [
        Linear(["x", "y"], [1.0, 1.0], low=0.0),
        Linear(["x", "y"], [1.0, -1.0], high=0.0),
        Linear("x", [2.0], low=0.0),
        Workspace("x", -0.1, 0.1, on_outside="return"),
        Workspace("x", 0.09, 0.1, steps=[2, 3], on_outside="return"),
    ],
)
def test_what_touches_standing_still_can_start(constraint, grid):
    values = np.tile(np.linspace(-0.03, 0.03, 64), (7, 1))
    values[6] = np.repeat([0.0, 1.0], 32)
    context = Context(pose={"x": 0.105})
    bound = bind([constraint], SPACE, values, 4, context=context, grid=grid)
    if not grid:
        chunks = np.random.default_rng(0).normal(0, 0.02, (30, 4, 7))
        assert bound.excess(bound.project(chunks)).max() == 0


def test_reports_on_numbers_for_each_sample(policy, inputs):
    out = policy.predict_action(**inputs, constraints=[Speed(XYZ, [0.005, 0.02])], return_dict=True, mode="mask")
    assert np.isfinite(out.confidence.log_weight).all()
    batch = Context(pose=[[0.4, 0.0, 0.1], [0.39, 0.0, 0.1]], last_action=np.tile([0.0] * 6 + [1], (2, 1)))
    out = policy.predict_action(**inputs, constraints=LIMITS, context=batch, return_dict=True)
    assert len(out.confidence.blame) == len(LIMITS)


def test_two_holds_of_one_gripper_are_the_stricter_of_both():
    values = np.tile(np.linspace(-0.03, 0.03, 64), (7, 1))
    values[6] = np.repeat([0.0, 1.0], 32)
    holds = [Sticky("gripper", min_hold=3), Sticky("gripper", max_switches=1)]
    bound = bind(holds, SPACE, values, 6, context=Context(last_action=[0.0] * 6 + [1.0]))
    (hold,) = bound.branches[0][0].terms
    assert (hold.min_hold, hold.max_switches) == (3, 1)
    with pytest.raises(ConstraintError, match="a rate limit"):
        bind([*holds, Rate("gripper", 0.5)], SPACE, values, 6, context=Context(last_action=[0.0] * 6 + [1.0]))


def test_beam_sampling_with_hardly_anything_allowed(policy, inputs):
    constraints = [Fix("x", 0.0), Speed(["y", "z"], 0.002), Fix("gripper", "open")]
    for seed in range(3):
        torch.manual_seed(seed)
        actions = policy.predict_action(**inputs, constraints=constraints, mode="mask", num_beams=2, do_sample=True)
        assert (np.hypot(actions[..., 1], actions[..., 2]) <= 0.002).all()


def test_binding_remembers_little_however_often_numbers_change():
    from hf_vla_actions.constraints.binder import RECENT_MOVES, binder_of

    values = np.tile(np.linspace(-0.03, 0.03, 16), (7, 1))
    for k in range(3 * RECENT_MOVES):
        bind([Speed(XYZ, 0.02), Range("x", -0.02 + k * 1e-6, 0.02)], SPACE, values, 4)
    binder = binder_of(SPACE, values, 4, True)
    assert len(binder.recent) == RECENT_MOVES

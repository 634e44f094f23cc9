"""Constraints on VQ tokens: the most probable allowed chunk, found among candidates, or a projected one that says so."""

import itertools

import numpy as np
import pytest
import torch
from oracle_constraints import violations
from random_specs import random_case
from test_fast_constraints import ZEROS, Forwards, of_case, policy_of
from test_fast_processor import smooth
from tiny import INSTRUCTIONS, SPACE

from hf_vla_actions import ActionSpace, Context, InfeasibleConstraintError, VQActionTokenizer
from hf_vla_actions.constraints import Fix, Range, Rate, bind
from hf_vla_actions.decoding.ranges import RangesLogitsProcessor
from hf_vla_actions.errors import ConstraintError, VLAActionsError
from hf_vla_actions.models.candidates import Chunks, certified

torch.set_num_threads(1)
DOF, HORIZON, SIZE, LEVELS = SPACE.dof, 3, 4, 3


@pytest.fixture(scope="module")
def policy():
    chunks = np.clip(smooth(300, HORIZON, DOF), -1, 1)
    vq = VQActionTokenizer(DOF, HORIZON, code_dim=8, codebook_size=SIZE, n_codebooks=LEVELS, hidden=(32,))
    vq.fit(chunks, steps=60, progress=False)
    return policy_of(vq, horizon=HORIZON, scale=12)


@pytest.fixture(scope="module")
def every_chunk(policy):
    """All chunks there are, (64, horizon, dof), and their log-probability after one prompt, by a forward of each."""
    config, inputs = policy.action_config, policy.prepare(None, INSTRUCTIONS[0])
    entries = np.array(list(itertools.product(range(SIZE), repeat=LEVELS)))
    ids = config.vocabulary.to_ids(entries + np.arange(LEVELS) * SIZE)
    whole = np.concatenate([ids, np.full((len(ids), 1), config.vocabulary.end_token_id)], axis=1)
    prompt = inputs["input_ids"].repeat(len(whole), 1)
    with torch.no_grad():
        logits = policy(input_ids=torch.cat([prompt, torch.tensor(whole)], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
    log_p = torch.log_softmax(logits.float(), -1).gather(2, torch.tensor(whole)[..., None])[..., 0].double().sum(1)
    return config.decode(ids)[1], log_p.numpy(), whole


@pytest.mark.parametrize("wanted", range(0, 60, 11))
def test_the_most_probable_allowed_chunk_is_taken(policy, every_chunk, wanted):
    chunks, log_p, whole = every_chunk
    # A box that holds the chunk of some rank, and whatever else happens to be inside.
    center = chunks[np.argsort(-log_p)[wanted], :, :3]
    asked = [
        Range(d, float(center[t, d] - 0.004), float(center[t, d] + 0.004), steps=t)
        for t in range(HORIZON)
        for d in range(3)
    ]
    inside = (np.abs(chunks[..., :3] - center) <= 0.004).all(axis=(1, 2))
    best = np.flatnonzero(inside)[log_p[inside].argmax()]
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    out = policy.predict_action(**inputs, constraints=asked, candidates=64, return_dict=True)
    np.testing.assert_array_equal(out.token_ids[0], whole[best])
    np.testing.assert_allclose(out.actions[0], chunks[best], atol=1e-12)
    assert out.log_prob[0] == pytest.approx(log_p[best], abs=1e-3)
    assert out.certified.all()
    assert not out.moved.any()
    assert out.candidate[0] <= wanted + 1


def test_where_no_candidate_is_allowed_the_first_is_projected_and_flagged(policy):
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    asked = [Fix("x", 0.01234)]
    free = policy.predict_action(**inputs, return_dict=True)
    out = policy.predict_action(**inputs, constraints=asked, return_dict=True)
    assert (out.actions[..., 0] == 0.01234).all()
    assert out.candidate.tolist() == [-1, -1]
    assert not out.certified.any()
    np.testing.assert_array_equal(out.token_ids, free.token_ids)
    np.testing.assert_allclose(out.moved, out.actions - free.actions, atol=1e-15)
    (kept,) = out.kept_while
    assert dict(kept.afterwards) == {str(asked[0]): "VQ tokens are judged when the chunk is whole"}


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_constraints_that_exclude_nothing_change_nothing_and_cost_nothing(policy, options):
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    outs, counts = [], []
    for constraints in (None, [Range("x", -1.0, 1.0), Rate("y", 3.0)]):
        torch.manual_seed(0)
        forwards = Forwards(policy)
        outs.append(
            policy.predict_action(
                **inputs, constraints=constraints, context=Context(last_action=ZEROS), return_dict=True, **options
            )
        )
        forwards.handle.remove()
        counts.append(forwards.count)
    np.testing.assert_array_equal(outs[0].token_ids, outs[1].token_ids)
    np.testing.assert_array_equal(outs[0].actions, outs[1].actions)
    assert counts[0] == counts[1]
    assert (outs[1].candidate == 0).all()


def test_draws_are_those_of_the_policy_given_the_constraints(policy, every_chunk):
    chunks, log_p, _ = every_chunk
    cut = float(np.median(chunks[:, 0, 0]))
    inside = chunks[:, 0, 0] >= cut
    p = np.exp(log_p - log_p.max()) * inside
    p /= p.sum()
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    torch.manual_seed(0)
    out = policy.predict_action(
        **inputs,
        constraints=[Range("x", low=cut, steps=0)],
        do_sample=True,
        num_return_sequences=600,
        candidates=2000,
        return_dict=True,
    )
    assert (out.candidate >= 0).all()
    assert (out.candidate > 0).any()
    drawn = np.abs(out.actions[:, None] - chunks).max(axis=(2, 3)).argmin(axis=1)
    shares = np.bincount(drawn, minlength=len(p)) / len(drawn)
    assert not shares[~inside].any()
    assert np.abs(shares - p).sum() / 2 < 0.12  # total variation; 600 draws of 32 chunks


def test_each_row_gets_a_candidate_of_its_own(policy):
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    asked = [Range("x", high=0.0, steps=0)]
    out = policy.predict_action(
        **inputs, constraints=asked, num_beams=6, num_return_sequences=6, candidates=64, return_dict=True
    )
    assert (out.actions[:, 0, 0] <= 0).all()
    assert (out.candidate > 0).any()
    for sample in (out.token_ids[:6], out.token_ids[6:]):
        assert len(np.unique(sample, axis=0)) == 6


def test_one_candidate_is_no_search(policy):
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    forwards = Forwards(policy)
    out = policy.predict_action(**inputs, constraints=[Fix("x", 0.01234)], candidates=1, return_dict=True)
    forwards.handle.remove()
    assert forwards.count == LEVELS + 1
    assert out.candidate.tolist() == [-1]
    for wrong in (0, -1, 2.0, True, "4"):
        with pytest.raises(VLAActionsError, match="candidates is a whole number"):
            policy.predict_action(**inputs, candidates=wrong)
    for mode in ("mask", "transport", "mixture"):
        with pytest.raises(VLAActionsError, match="use mode='project'"):
            policy.predict_action(**inputs, mode=mode)


def test_more_candidates_than_chunks_there_are(policy):
    inputs = policy.prepare(None, INSTRUCTIONS[0])
    out = policy.predict_action(**inputs, constraints=[Fix("x", 0.01234)], candidates=100, return_dict=True)
    assert out.candidate.tolist() == [-1]
    assert (out.actions[..., 0] == 0.01234).all()


@pytest.mark.parametrize("name", ["base", "keepout", "moveby", "any", "all"])
def test_chunks_keep_random_specifications(policy, name):
    home = policy.action_config
    try:
        for seed in range(30):
            case = random_case(np.random.default_rng([seed, len(name)]), name, n_codes=256, dof=DOF, horizon=HORIZON)
            vla = of_case(policy, case)
            inputs = vla.prepare(None, list(INSTRUCTIONS[:2]))
            ask = {"constraints": case.constraints(), "context": case.context(), "return_dict": True}
            try:
                out = vla.predict_action(**inputs, **ask, do_sample=bool(seed % 2))
            except InfeasibleConstraintError:
                continue
            assert not any(violations(chunk, case.items, case.continuous(), case.known) for chunk in out.actions)
            np.testing.assert_array_equal(out.certified, out.candidate >= 0)
            return
    finally:
        policy.action_config = home
    raise AssertionError("every specification was infeasible")


def test_candidates_go_to_the_rows_that_need_them():
    bound = bind([Range(0, low=0.0)], ActionSpace.unnamed(1), None, 1, grid=False)

    def chunks_of(values):
        x = np.array(values, dtype=float)[:, None, None]
        return Chunks(np.array(values)[:, None], x, x, np.zeros(len(x)))

    first = chunks_of([5, -1, -2, -3, 7, -4])  # two samples of three rows
    asked = []

    def more(options):
        asked.append(options)
        return chunks_of([-9, 11, -8, 12, -1, -1, 7, 21])

    out, candidate = certified(bound, first, more, 4, sampled=False)
    assert out.tokens[:, 0].tolist() == [5, 11, 12, 21, 7, -4]  # 7 is there already
    assert candidate.tolist() == [0, 2, 4, 4, 0, -1]
    assert first.tokens[:, 0].tolist() == [5, -1, -2, -3, 7, -4]
    assert asked == [{"num_return_sequences": 4, "num_beams": 4, "do_sample": False}]
    out, candidate = certified(bound, first, more, 4, sampled=True)
    assert out.tokens[:, 0].tolist() == [5, 11, 12, 7, 7, 21]  # draws may repeat
    assert candidate.tolist() == [0, 2, 4, 3, 0, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_leave_no_choice_raise(policy, value):
    config = policy.action_config
    processor = RangesLogitsProcessor(config.tokenizer.code_ranges, config.vocabulary, prompt_length=2)
    end, n_ids = config.vocabulary.end_token_id, len(policy.processor)
    for place, codes in enumerate([*config.tokenizer.code_ranges.tolist(), None]):
        allowed = [end] if codes is None else config.vocabulary.token_ids[slice(*codes)].tolist()
        scores, ids = torch.randn(2, n_ids), torch.zeros(2, 2 + place, dtype=torch.long)
        kept = processor(ids, scores)
        assert np.flatnonzero((kept[1] > -torch.inf).numpy()).tolist() == sorted(allowed)
        np.testing.assert_array_equal(kept[:, allowed], scores[:, allowed])
        bad = scores.clone()
        bad[1, allowed if value == -float("inf") else allowed[:1]] = value
        with pytest.raises(ConstraintError, match="no action token is left"):
            processor(ids, bad)
    with pytest.raises(ConstraintError, match="embeddings were not resized"):
        processor(ids, torch.zeros(2, int(config.vocabulary.token_ids.max())))
    with pytest.raises(ConstraintError, match="there are 1 ids"):
        processor(ids[:, :1], scores)

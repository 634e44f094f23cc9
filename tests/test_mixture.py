"""Mixtures: exact shares, every item once a pass, one order whatever the ranks and workers, and going on where one stood."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.data import (
    ChunkDataset,
    LeRobotDataset,
    LeRobotWriter,
    MixtureDataset,
    MixtureSampler,
    Transform,
    TransformedDataset,
)
from hf_vla_actions.errors import DatasetError

LENGTHS = {"small": 5, "large": 23, "other": 9}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    made = {}
    for name, length in LENGTHS.items():
        path = tmp_path_factory.mktemp("mixture") / name
        with LeRobotWriter(path, fps=10, robot_type="arm", action_names=["x"]) as writer:
            writer.add_episode(name, np.arange(length)[:, None])
        made[name] = ChunkDataset(LeRobotDataset(path), 2)
    return made


def mixture_of(chunks, weights=(1.0, 2.0, 3.0), **options):
    return MixtureDataset(list(zip(chunks.values(), weights, strict=True)), **options)


weights = st.tuples(*[st.floats(0.2, 5)] * 3)


@settings(deadline=None, max_examples=40)
@given(weights=weights, samples=st.integers(60, 90), seed=st.integers(0, 5))
def test_blocks_hold_the_shares_and_every_item_once_a_pass(chunks, weights, samples, seed):
    mixture = mixture_of(chunks, weights, seed=seed, samples=samples)
    draws = mixture.draw(np.arange(4 * samples))
    places = [mixture.locate(item) for item in draws.tolist()]
    for block in range(4):
        counts = Counter(part for part, _ in places[block * samples : (block + 1) * samples])
        for part, weight in enumerate(weights):
            assert abs(counts[part] - samples * weight / sum(weights)) < 1
            assert counts[part] == round(mixture.shares[part] * samples)
    for part, length in enumerate(LENGTHS.values()):
        walk = [place for p, place in places if p == part]
        for start in range(0, len(walk), length):
            one_pass = walk[start : start + length]
            assert len(set(one_pass)) == len(one_pass)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 3), positions=st.lists(st.integers(0, 400), min_size=1, max_size=30))
def test_a_draw_depends_on_seed_and_position_alone(chunks, seed, positions):
    in_order = mixture_of(chunks, seed=seed, samples=41).draw(np.arange(401))
    fresh = mixture_of(chunks, seed=seed, samples=41)
    assert fresh.draw(np.array(positions)).tolist() == in_order[positions].tolist()
    assert [int(fresh.draw(np.array([p]))[0]) for p in positions] == in_order[positions].tolist()


def test_every_pass_is_shuffled_anew(chunks):
    mixture = MixtureDataset([(chunks["large"], 1)])
    passes = [mixture.draw(np.arange(start, start + 23)).tolist() for start in (0, 23, 46)]
    assert all(sorted(one) == list(range(23)) for one in passes)
    assert len({tuple(one) for one in [*passes, range(23)]}) == 4
    # In a mixture, blocks are shuffled too: there the order of one part alone tells.
    draws = mixture_of(chunks, samples=69).draw(np.arange(69 * 4)).tolist()
    walk = [place for part, place in map(mixture_of(chunks).locate, draws) if part == 1]
    assert walk[:23] != walk[23:46]


def test_seeds_and_blocks_differ(chunks):
    mixture = mixture_of(chunks, samples=60)
    first, second = mixture.draw(np.arange(60)), mixture.draw(np.arange(60, 120))
    assert first.tolist() != second.tolist()
    assert first.tolist() != mixture_of(chunks, samples=60, seed=1).draw(np.arange(60)).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [None, 40, 42])
def test_ranks_together_take_every_draw_once(chunks, world_size, samples):
    mixture = mixture_of(chunks, samples=samples)
    samplers = [MixtureSampler(mixture, rank=rank, world_size=world_size) for rank in range(world_size)]
    taken = []
    for _ in range(3):
        epoch = [list(sampler) for sampler in samplers]
        assert {len(part) for part in epoch} == {len(samplers[0])}
        taken += [item for step in zip(*epoch, strict=True) for item in step]
    assert len(taken) >= 3 * mixture.samples
    assert taken == mixture.draw(np.arange(len(taken))).tolist()


def batches(loader):
    return [[(item["unnorm_key"], int(item["actions"][0, 0])) for item in batch] for batch in loader]


def test_workers_of_a_dataloader_do_not_matter(chunks):
    mixture = mixture_of(chunks, samples=43)
    found = []
    for workers in (0, 2):
        sampler = MixtureSampler(mixture, rank=1, world_size=2)
        loader = torch.utils.data.DataLoader(
            mixture, batch_size=4, sampler=sampler, num_workers=workers, collate_fn=list
        )
        found.append(batches(loader) + batches(loader))
    assert found[0] == found[1]
    keys = list(chunks)
    expected = [mixture.locate(item) for item in mixture.draw(np.arange(1, 88, 2)).tolist()]
    assert [item for batch in found[0] for item in batch] == [(keys[part], place) for part, place in expected]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("step", [0, 8, 24, 44])
def test_a_resumed_run_goes_on_with_the_next_draw(chunks, before, after, step):
    options = {"samples": 88, "seed": 3}
    one = MixtureSampler(mixture_of(chunks, **options), rank=before - 1, world_size=before)
    list(one)
    handed = iter(one)  # the second epoch
    for _ in range(step // before):
        next(handed)
    state = json.loads(json.dumps(one.state_dict()))
    rest = []
    for rank in range(after):
        sampler = MixtureSampler(mixture_of(chunks, **options), rank=rank, world_size=after)
        sampler.load_state_dict(state)
        sampler.set_epoch(sampler.epoch)  # as a trainer does at the start of an epoch
        assert (sampler.epoch, sampler.state_dict()["position"]) == (1, 88 + step)
        rest.append(list(sampler) + list(sampler))
    expected = mixture_of(chunks, **options).draw(np.arange(88 + step, 3 * 88))
    assert [item for group in zip(*rest, strict=True) for item in group] == expected.tolist()


def test_what_a_dataloader_fetched_ahead_is_not_lost(chunks):
    mixture = mixture_of(chunks, samples=40)
    sampler = MixtureSampler(mixture)
    loader = torch.utils.data.DataLoader(mixture, batch_size=4, sampler=sampler, num_workers=2, collate_fn=list)
    whole = batches(loader)
    sampler.set_epoch(0)
    used = [batch for batch, _ in zip(iter(loader), range(3), strict=False)]
    assert sampler.state_dict()["position"] > 12
    state = sampler.state_dict(taken=4 * len(used))
    again = MixtureSampler(mixture)
    again.load_state_dict(state)
    rest = torch.utils.data.DataLoader(mixture, batch_size=4, sampler=again, collate_fn=list)
    assert batches(rest) == whole[3:]


def test_set_epoch_begins_that_epoch_anew(chunks):
    mixture = mixture_of(chunks, samples=40)
    sampler = MixtureSampler(mixture)
    sampler.set_epoch(2)
    assert list(sampler) == mixture.draw(np.arange(80, 120)).tolist()
    sampler.set_epoch(2)
    assert list(sampler) == mixture.draw(np.arange(80, 120)).tolist()
    assert list(sampler) == mixture.draw(np.arange(120, 160)).tolist()


def test_items_are_those_of_the_parts_and_name_their_statistics(chunks):
    mixture = pickle.loads(pickle.dumps(mixture_of(chunks)))
    assert len(mixture) == sum(LENGTHS.values())
    assert [mixture[item]["unnorm_key"] for item in (0, 4, 5, 27, 28, 36)] == [
        *["small"] * 2,
        *["large"] * 2,
        *["other"] * 2,
    ]
    assert mixture[6]["actions"].tolist() == [[1], [2]]
    for item in (-1, 37):
        with pytest.raises(IndexError, match="37 of the mixture"):
            mixture[item]


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ((1, 0, 1), {}, "weight of 'large' must be a positive number, got 0"),
        ((1, -1, 1), {}, "positive number, got -1"),
        ((1, 1, float("nan")), {}, "weight of 'other' must be a positive number, got nan"),
        ((1, 1, 1e-3), {}, "0.001 of 'other' gives it no draw among 37"),
        ((1, 1, 1), {"samples": 0}, "samples at least 1, got 0 and 0"),
        ((1, 1, 1), {"seed": -1}, "seed must be at least 0"),
    ],
)
def test_a_mixture_that_cannot_be_raises(chunks, weights, options, message):
    with pytest.raises(DatasetError, match=message):
        mixture_of(chunks, weights, **options)


def test_parts_that_do_not_fit_together_raise(chunks, tmp_path):
    small, large, _ = chunks.values()
    with pytest.raises(DatasetError, match="at least one"):
        MixtureDataset([])
    with pytest.raises(DatasetError, match=r"one horizon, got {'small': 2, 'large': 3}"):
        MixtureDataset([(small, 1), (ChunkDataset(large.dataset, 3), 1)])
    with pytest.raises(DatasetError, match="one history"):
        MixtureDataset([(small, 1), (ChunkDataset(large.dataset, 2, history=1), 1)])
    options = {"fps": 10, "robot_type": "arm", "action_names": ["x"], "image_shapes": {"front": (4, 4, 3)}}
    with LeRobotWriter(tmp_path / "seeing", **options) as writer:
        writer.add_episode("look", np.zeros((3, 1)), {"front": np.zeros((3, 4, 4, 3), np.uint8)})
    with pytest.raises(DatasetError, match=r"one number of cameras, got {'small': 0, 'seeing': 1}"):
        MixtureDataset([(small, 1), (ChunkDataset(LeRobotDataset(tmp_path / "seeing"), 2), 1)])
    with pytest.raises(DatasetError, match="by the unnorm_key 'small'"):
        MixtureDataset([(small, 1), (ChunkDataset(large.dataset, 2, unnorm_key="small"), 1)])
    both = MixtureDataset([(small, 1), (ChunkDataset(small.dataset, 2, skip_first=1), 1)])
    assert {item["unnorm_key"] for item in (both[i] for i in range(len(both)))} == {"small"}


def test_states_of_another_mixture_or_place_raise(chunks):
    sampler = MixtureSampler(mixture_of(chunks, samples=40))
    state = sampler.state_dict()
    for options in ({"samples": 41}, {"samples": 40, "seed": 1}, {"samples": 40, "weights": (3, 2, 1)}):
        with pytest.raises(DatasetError, match="mixture is another one"):
            MixtureSampler(mixture_of(chunks, **options)).load_state_dict(state)
    with pytest.raises(DatasetError, match="check was"):
        sampler.load_state_dict(state | {"check": 0})
    for position in (-2, 3, None, "2"):
        with pytest.raises(DatasetError, match="2 processes cannot go on"):
            MixtureSampler(sampler.mixture, world_size=2).load_state_dict(state | {"position": position})
    with pytest.raises(DatasetError, match="taken must be from 0 to the 40"):
        sampler.state_dict(taken=41)
    with pytest.raises(DatasetError, match="rank must be from 0 to 1 among 2"):
        MixtureSampler(sampler.mixture, rank=2, world_size=2)


def test_one_dataset_as_it_is_and_through_a_transform_under_one_key_raises(chunks):
    plain = chunks["small"].dataset
    space = ActionSpace(("x",))
    twice = Transform("twice", lambda actions, states: (2 * actions, states, np.arange(len(actions))), space, space)
    changed = TransformedDataset(plain, twice)
    with pytest.raises(DatasetError, match=r"small and .*small through twice go by the unnorm_key 'small'"):
        MixtureDataset([(ChunkDataset(plain, 2), 1.0), (ChunkDataset(changed, 2), 1.0)])
    MixtureDataset([(ChunkDataset(plain, 2), 1.0), (ChunkDataset(changed, 2, unnorm_key="doubled"), 1.0)])
    MixtureDataset([(ChunkDataset(changed, 2), 1.0), (ChunkDataset(TransformedDataset(plain, twice), 2), 1.0)])

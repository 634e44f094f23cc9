"""Attention over a model's cache, against a model of Transformers that attends over it itself."""

import dataclasses

import pytest
import torch
from test_heads_flow import CACHED, TINY, chunks_of, features_of, head_of
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vla_actions.heads import Features, HeadError
from hf_vla_actions.heads.cached import CacheSize, JointAttention, after_prompt, rotary

PROMPTS = torch.tensor([[5, 3, 9, 2, 7], [8, 1, 4, 6, 2]])


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def seen_by(llama, ids, mask=None):
    out = llama(ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
    cache = tuple((layer.keys, layer.values) for layer in out.past_key_values.layers)
    return Features(out.hidden_states[-1], None if mask is None else mask.bool(), cache=cache)


def padded(side, n=3):
    ids, mask = torch.zeros(2, 5 + n, dtype=torch.int64), torch.zeros(2, 5 + n, dtype=torch.int64)
    place = slice(None, 5) if side == "right" else slice(n, None)
    ids[:, place], mask[:, place] = PROMPTS, 1
    return ids, mask


@pytest.mark.parametrize("layer", [0, 2])
def test_joint_attention_is_the_models_own_for_one_more_token(llama, layer):
    """With the layer's weights, the token behind the prompt gets what the layer itself gives it."""
    own = llama.model.layers[layer].self_attn
    attention = JointAttention(24, 4, CacheSize(3, 2, 6)).double()
    with torch.no_grad():
        for part in (attention.to_query, attention.to_key_value, attention.out):
            part.bias.zero_()
        attention.to_query.weight.copy_(own.q_proj.weight)
        attention.to_key_value.weight.copy_(torch.cat([own.k_proj.weight, own.v_proj.weight]))
        attention.out.weight.copy_(own.o_proj.weight)
    caught = {}

    def catch(module, arguments, options, output):
        caught["tokens"], caught["output"] = options["hidden_states"][:, -1:], output[0][:, -1:]

    hook = own.register_forward_hook(catch, with_kwargs=True)
    seen_by(llama, torch.cat([PROMPTS, torch.tensor([[11], [12]])], dim=1))
    hook.remove()
    features = seen_by(llama, PROMPTS)
    turn = rotary(after_prompt(features)[:, None], 6, 500.0, torch.float64)
    found = attention(caught["tokens"], turn, features.cache[layer], None)
    torch.testing.assert_close(found, caught["output"], atol=1e-6, rtol=1e-6)
    wrong = rotary(after_prompt(features)[:, None] + 1, 6, 500.0, torch.float64)
    assert not torch.allclose(attention(caught["tokens"], wrong, features.cache[layer], None), found, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_real_model_on_either_side_changes_nothing(llama, side):
    config = dataclasses.replace(CACHED, rope_theta=500.0)
    head, noise = head_of(config, width=24), chunks_of(config, n=2)
    expected = head.sample(seen_by(llama, PROMPTS), noise=noise)
    found = seen_by(llama, *padded(side))
    torch.testing.assert_close(head.sample(found, noise=noise), expected, atol=1e-6, rtol=1e-6)
    assert after_prompt(found).tolist() == [8 if side == "left" else 5] * 2
    # What holds this together is where the head's own tokens stand.
    moved = dataclasses.replace(found, next_position=after_prompt(found) + 2)
    assert not torch.allclose(head.sample(moved, noise=noise), expected, atol=1e-5)


def test_positions_that_the_model_counts_otherwise_are_followed(llama):
    """Left padding, with positions that count real tokens only."""
    config = dataclasses.replace(CACHED, rope_theta=500.0)
    head, noise = head_of(config, width=24), chunks_of(config, n=2)
    ids, mask = padded("left")
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        out = llama(ids, attention_mask=mask, position_ids=positions, use_cache=True, output_hidden_states=True)
    cache = tuple((layer.keys, layer.values) for layer in out.past_key_values.layers)
    counted = Features(out.hidden_states[-1], mask.bool(), cache=cache, next_position=mask.sum(dim=1))
    expected = head.sample(seen_by(llama, PROMPTS), noise=noise)
    torch.testing.assert_close(head.sample(counted, noise=noise), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(counted.detach().next_position, counted.next_position)


@pytest.mark.parametrize(
    ("n_layers", "depth", "expected"),
    [(3, 3, [0, 1, 2]), (4, 2, [1, 3]), (6, 1, [5]), (4, 3, [1, 2, 3]), (2, 4, [0, 0, 1, 1]), (18, 18, range(18))],
)
def test_blocks_attend_to_layers_spread_evenly_and_to_the_last(n_layers, depth, expected):
    size = CacheSize(n_layers, 1, 2)
    assert [size.layer_for(block, depth) for block in range(depth)] == list(expected)


def test_only_the_layers_attended_to_matter():
    head, features, noise = head_of(CACHED), features_of(CACHED), chunks_of(CACHED)
    expected = head.sample(features, noise=noise)
    for layer, matters in ((0, False), (1, True), (2, True)):
        cache = list(features.cache)
        cache[layer] = tuple(x + 1 for x in cache[layer])
        found = head.sample(dataclasses.replace(features, cache=tuple(cache)), noise=noise)
        assert torch.allclose(found, expected) is not matters
    other = dataclasses.replace(features, hidden=features.hidden + 1)
    assert torch.equal(head.sample(other, noise=noise), expected)


@pytest.mark.parametrize("config", [TINY, CACHED], ids=["hidden", "cache"])
def test_the_place_of_a_step_in_the_chunk_matters(config):
    head, features, noise = head_of(config), features_of(config), chunks_of(config)
    turned = head.sample(features, noise=noise.flip(1)).flip(1)
    assert not torch.allclose(turned, head.sample(features, noise=noise))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: cache[:2], "the cache of 3 layers, got 2"),
        (lambda cache: tuple((k[..., :4], v[..., :4]) for k, v in cache), r"\(3, 2, 6, 6\).*layer 0"),
        (lambda cache: tuple((k[:, :1], v[:, :1]) for k, v in cache), r"\(3, 2, 6, 6\)"),
        (lambda cache: (*cache[:1], (cache[1][0][:, :, 2:], cache[1][1][:, :, 2:]), cache[2]), "layer 1.*hidden"),
        (lambda cache: None, "needs .'cache'."),
    ],
)
def test_caches_of_another_model_raise(change, message):
    features = features_of(CACHED)
    with pytest.raises(HeadError, match=message):
        head_of(CACHED).sample(dataclasses.replace(features, cache=change(features.cache)))


def test_a_position_for_each_prompt_or_none():
    features = dataclasses.replace(features_of(CACHED), next_position=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(HeadError, match="next_position has shape"):
        head_of(CACHED).sample(features)


def test_a_head_that_does_not_know_its_model_yet_raises_only_when_built():
    config = dataclasses.replace(CACHED, n_layers=None, kv_heads=None, head_dim=None)
    with pytest.raises(HeadError, match=r"dataclasses\.replace"):
        config.build(5)

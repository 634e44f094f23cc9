from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from hf_vla_actions import VLAActionsError
from hf_vla_actions.models.embeddings import INITIALIZATIONS, EmbeddingError, grow_embeddings, initialize_rows

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama(rows=500, *, tie=False, dtype=torch.float32):
    """Rows as those of a trained model: around a mean that is not 0, some directions wider than others."""
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tie, **special, **SIZES))
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(0.05 + torch.randn(layer.weight.shape) * torch.linspace(0.01, 0.1, 64))
    return model.to(dtype)


def tokens(first, n=256, blocks=None):
    ids = first + np.arange(n * (blocks or 1))
    return ids if blocks is None else ids.reshape(blocks, n)


def vocabulary(ids):
    return SimpleNamespace(token_ids=ids)


def weights(model):
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def copies(model):
    return [weight.detach().clone() for weight in weights(model)]


def cosines(rows, mean):
    return nn.functional.normalize(rows.float() - mean, dim=1) @ nn.functional.normalize(rows.float() - mean, dim=1).T


@pytest.mark.parametrize("how", INITIALIZATIONS)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_leaves_old_rows_to_the_bit_and_ties(how, tie, dtype):
    model = llama(tie=tie, dtype=dtype)
    before = copies(model)
    grow_embeddings(model, vocabulary(tokens(500)), 756, how)
    for weight, old in zip(weights(model), before, strict=True):
        assert weight.shape == (756, 64)
        assert weight.dtype == dtype
        assert torch.equal(weight[:500], old)
        assert torch.isfinite(weight).all()
        assert weight.requires_grad
    assert (weights(model)[0] is weights(model)[1]) == tie


@pytest.mark.parametrize("how", INITIALIZATIONS)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_the_model_had_unused_get_a_start_and_no_others_change(how, tie, dtype):
    model = llama(1024, tie=tie, dtype=dtype)
    before = copies(model)
    grow_embeddings(model, vocabulary(tokens(600)), 856, how)
    for weight, old in zip(weights(model), before, strict=True):
        assert torch.equal(weight, old), "growing must not give trained rows a new start"
    initialize_rows(model, tokens(600), how)
    for weight, old in zip(weights(model), before, strict=True):
        assert torch.equal(weight[:600], old[:600])
        assert torch.equal(weight[856:], old[856:])
        assert not (weight[600:856] == old[600:856]).all(dim=1).any()
        assert weight.dtype == dtype
    assert (weights(model)[0] is weights(model)[1]) == tie


@pytest.mark.parametrize("how", INITIALIZATIONS)
def test_the_same_on_every_load_whatever_the_callers_random_state(how):
    first, second = llama(), llama()
    torch.manual_seed(7)
    np.random.seed(7)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    grow_embeddings(first, vocabulary(tokens(500)), 756, how)
    initialize_rows(first, tokens(500), how)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(8)
    grow_embeddings(second, vocabulary(tokens(500)), 756, how)
    initialize_rows(second, tokens(500), how)
    for a, b in zip(weights(first), weights(second), strict=True):
        assert torch.equal(a, b)
    initialize_rows(second, tokens(500), "distance", seed=1)
    assert not torch.equal(weights(first)[0], weights(second)[0])


def test_growing_by_distance_is_initialize_rows_on_what_was_added():
    grown, given = llama(), llama()
    grow_embeddings(grown, vocabulary(tokens(500)), 756, "distance")
    grow_embeddings(given, vocabulary(tokens(500)), 756, "mean")
    initialize_rows(given, tokens(500), "distance")
    for a, b in zip(weights(grown), weights(given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grow", [True, False])
def test_mean_starts_at_the_mean(grow):
    model = llama(500 if grow else 1024)
    grow_embeddings(model, vocabulary(tokens(500)), 756, "mean")
    if not grow:
        initialize_rows(model, tokens(500), "mean")
    for weight in weights(model):
        torch.testing.assert_close(
            weight[500:756], weight[:500].mean(dim=0).expand(256, -1), atol=3e-5, rtol=0, check_dtype=False
        )
        assert len(weight[500:756].unique(dim=0)) == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_makes_near_bins_nearer_than_far_ones(dtype):
    model = llama(dtype=dtype)
    grow_embeddings(model, vocabulary(tokens(500)), 756, "distance")
    for weight in weights(model):
        mean = weight[:500].float().mean(dim=0)
        similar = cosines(weight[500:756], mean)
        by_distance = [similar.diagonal(d).mean().item() for d in (1, 8, 32, 128)]
        assert by_distance[0] > 0.9
        assert by_distance == sorted(by_distance, reverse=True)
        assert abs(by_distance[3]) < 0.25
        assert len(weight[500:756].unique(dim=0)) == 256


def test_distance_spreads_like_the_trained_rows_in_every_direction():
    model = llama()
    initialize_rows(model, tokens(200, 250), "distance", length=0.002)
    for weight in weights(model):
        trained, new = weight[:200].std(dim=0), weight[200:450].std(dim=0)
        assert (new / trained).min() > 0.7
        assert (new / trained).max() < 1.4
    wide = weights(model)[0][200:450].std()
    initialize_rows(model, tokens(200, 250), "distance", length=0.002, scale=0.5)
    assert weights(model)[0][200:450].std() < 0.6 * wide


def test_input_and_output_curves_are_different():
    model = llama()
    with torch.no_grad():
        weights(model)[1].copy_(weights(model)[0])
    initialize_rows(model, tokens(200), "distance")
    assert not torch.equal(weights(model)[0][200:456], weights(model)[1][200:456])


def test_blocks_are_independent():
    one, three = llama(400), llama(400)
    ids = tokens(200, 64, blocks=3)
    initialize_rows(three, ids, "distance")
    initialize_rows(one, ids[:1], "distance")
    for a, b in zip(weights(one), weights(three), strict=True):
        assert torch.equal(a[ids[0]], b[ids[0]]), "a curve does not depend on how many others there are"
        mean = b[:200].mean(dim=0)
        blocks = [b[block] - mean for block in ids]
        cosine = nn.functional.cosine_similarity(blocks[0], blocks[1], dim=1)
        assert cosine.abs().mean() < 0.5
        near = nn.functional.cosine_similarity(blocks[1][1:], blocks[1][:-1], dim=1)
        assert near.mean() > 0.7


def test_a_block_follows_the_order_of_codes_not_of_ids():
    """OpenVLA's layout counts backwards."""
    forward, backward = llama(1024), llama(1024)
    initialize_rows(forward, tokens(600), "distance")
    initialize_rows(backward, tokens(600)[::-1], "distance")
    for a, b in zip(weights(forward), weights(backward), strict=True):
        assert torch.equal(a[600:856], b[600:856].flip(0))


@pytest.mark.parametrize("how", INITIALIZATIONS)
def test_multiples_of_64_stay_multiples(how):
    model = llama(512)
    grow_embeddings(model, vocabulary(tokens(505)), 761, how)
    assert weights(model)[0].shape == weights(model)[1].shape == (768, 64)
    plain = llama(512)
    grow_embeddings(plain, vocabulary(tokens(505)), 761, "mean")
    for a, b in zip(weights(model), weights(plain), strict=True):
        assert torch.equal(a[761:], b[761:]), "padding is left to Transformers"


@pytest.mark.parametrize("how", INITIALIZATIONS)
def test_only_added_rows_get_a_start_when_a_block_begins_on_old_ones(how):
    model = llama(512)
    before = copies(model)
    grow_embeddings(model, vocabulary(tokens(400)), 656, how)
    for weight, old in zip(weights(model), before, strict=True):
        assert torch.equal(weight[:512], old)


def test_embeddings_never_shrink():
    model = llama(1024)
    before = copies(model)
    grow_embeddings(model, vocabulary(tokens(500)), 756, "distance")
    for weight, old in zip(weights(model), before, strict=True):
        assert torch.equal(weight, old)


def test_rows_that_were_never_trained_do_not_count():
    model, clean = llama(), llama()
    with torch.no_grad():
        for weight in weights(model):
            weight[0] = 0
            weight[150:200] = 1e-6
    for each, ids in ((model, tokens(200)), (clean, tokens(200))):
        initialize_rows(each, ids, "mean")
    for weight in weights(model):
        expected = weight[1:150].mean(dim=0)
        torch.testing.assert_close(weight[200:456], expected.expand(256, -1), atol=3e-5, rtol=0)


def test_output_bias_becomes_the_mean_of_the_trained_ones():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(vocab_size=500, bos_token_id=1, eos_token_id=2, **SIZES))
    bias = model.get_output_embeddings().bias
    with torch.no_grad():
        bias.normal_(1.0, 0.1)
    old = bias.detach().clone()
    initialize_rows(model, tokens(200), "distance")
    torch.testing.assert_close(bias[200:456], old[:200].mean().expand(256))
    assert torch.equal(bias[:200], old[:200])
    assert torch.equal(bias[456:], old[456:])
    grow_embeddings(model, vocabulary(tokens(500)), 756, "distance")
    bias = model.get_output_embeddings().bias
    torch.testing.assert_close(bias[500:], bias[:500].mean().expand(256))


@pytest.mark.parametrize(
    ("ids", "how", "message"),
    [
        (tokens(200), "nearest", r"one of \['mean', 'distance'\], got 'nearest'"),
        (tokens(400), "mean", "rows 0 to 499; call grow_embeddings"),
        (tokens(-3), "mean", "rows 0 to 499"),
        (tokens(0), "distance", "no trained row"),
        (np.array([300, 301, 300]), "mean", "different whole numbers"),
        (np.array([300.0, 301.0]), "mean", "different whole numbers"),
        (np.zeros((0,), dtype=int), "mean", "different whole numbers"),
        (np.arange(300, 308).reshape(2, 2, 2), "mean", "different whole numbers"),
    ],
)
def test_what_cannot_be_given_a_start_raises_and_changes_nothing(ids, how, message):
    model = llama()
    before = copies(model)
    with pytest.raises(EmbeddingError, match=message):
        initialize_rows(model, ids, how)
    for weight, old in zip(weights(model), before, strict=True):
        assert torch.equal(weight, old)
    assert issubclass(EmbeddingError, VLAActionsError)


def test_other_impossible_requests_raise():
    model = llama()
    with pytest.raises(EmbeddingError, match="got 'smooth'"):
        grow_embeddings(model, vocabulary(tokens(500)), 756, "smooth")
    assert weights(model)[0].shape[0] == 500
    for options in ({"scale": 0.0}, {"length": -1.0}, {"length": float("nan")}):
        with pytest.raises(EmbeddingError, match="above 0"):
            initialize_rows(model, tokens(200), "distance", **options)


def test_what_was_measured_to_learn_faster_is_the_default():
    default, chosen = llama(), llama()
    grow_embeddings(default, vocabulary(tokens(500)), 756)
    grow_embeddings(chosen, vocabulary(tokens(500)), 756, "distance")
    for a, b in zip(weights(default), weights(chosen), strict=True):
        assert torch.equal(a, b)


def test_reserved_tokens_in_front_of_the_vocabulary_start_from_the_words_behind_them():
    model = llama()
    ids = np.arange(7, 39)  # such as <unused0>..<unused31> of Gemma
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[ids] = 0.0
        weight[39:] += 1.0  # words are where the mean has to be
    before = weight.detach().clone()
    initialize_rows(model, ids)
    others = np.setdiff1d(np.arange(len(before)), ids)
    assert torch.equal(weight[others], before[others])
    assert (weight[ids].mean() - before[others].mean()).abs() < 0.1
    assert len(torch.unique(weight[ids], dim=0)) == len(ids)

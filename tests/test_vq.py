import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from vector_quantize_pytorch import ResidualVQ

from hf_vla_actions import ActionSpace, ActionStats, ActionVocabulary, Gripper, VQActionTokenizer
from hf_vla_actions.errors import ActionTokenError, CheckpointError, TrainingError, VLAActionsError
from hf_vla_actions.tokenizers.vq_codebooks import ResidualCodebooks, nearest
from hf_vla_actions.tokenizers.vq_fit import FitSettings
from hf_vla_actions.tokenizers.vq_network import VQNetwork, VQShape
from hf_vla_actions.tokenizers.vq_report import usage

HORIZON, DOF = 4, 3
SMALL = {"code_dim": 4, "codebook_size": 8, "n_codebooks": 3, "hidden": (16,)}


def structured(n, seed=0):
    """(n, HORIZON, DOF) chunks made of a few numbers each: a slope, a curve and an open or closed gripper."""
    rng = np.random.default_rng(seed)
    slope, bend = rng.uniform(-1, 1, (2, n, 1))
    t = np.linspace(0, 1, HORIZON)
    gripper = np.where(rng.random((n, 1)) < 0.5, -1.0, 1.0) * np.ones(HORIZON)
    return np.stack([0.6 * slope + 0.4 * slope * t, bend * np.sin(3 * t), gripper], axis=2)


def fitted(seed=0, **kwargs):
    tokenizer = VQActionTokenizer(DOF, HORIZON, **SMALL)
    tokenizer.fit(structured(400), steps=60, batch_size=64, seed=seed, progress=False, **kwargs)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return fitted()


def codebooks_of(values):
    books = ResidualCodebooks(*values.shape)
    books.vectors.data = torch.as_tensor(values)
    return books


# Quantization


@pytest.mark.parametrize(("n", "size", "dim"), [(1, 16, 2), (4, 32, 8), (6, 64, 16)])
def test_codes_and_vectors_equal_those_of_an_independent_residual_quantizer(n, size, dim):
    rng = np.random.default_rng(n)
    values = rng.normal(size=(n, size, dim)) * (0.5 ** np.arange(n))[:, None, None]
    z = torch.from_numpy(rng.normal(size=(2000, dim)))
    oracle = ResidualVQ(dim=dim, num_quantizers=n, codebook_size=size).double().eval()
    for layer, vectors in zip(oracle.layers, values, strict=True):
        layer._codebook.embed.data.copy_(torch.from_numpy(vectors)[None])
    wanted, entries, _ = oracle(z[None])
    found = codebooks_of(values)(z)
    assert torch.equal(found.entries, entries[0])
    torch.testing.assert_close(found.vectors, wanted[0], rtol=0, atol=2e-6)  # the oracle computes in single precision
    torch.testing.assert_close(codebooks_of(values).sum_of(found.entries), found.vectors, rtol=0, atol=0)


def test_each_codebook_takes_the_entry_nearest_to_what_the_ones_before_left():
    values = np.array([[[0.0, 0.0], [10.0, 0.0]], [[1.0, 1.0], [-1.0, 0.0]]])
    found = codebooks_of(values)(torch.tensor([[9.0, 0.2], [0.9, 0.8]], dtype=torch.float64))
    assert found.entries.tolist() == [[1, 1], [0, 0]]
    assert found.vectors.tolist() == [[9.0, 0.0], [1.0, 1.0]]
    assert found.residuals[1].tolist() == [[-1.0, pytest.approx(0.2)], [0.9, 0.8]]


def test_of_equally_near_entries_the_first_is_taken():
    assert nearest(torch.tensor([[0.0]]), torch.tensor([[1.0], [-1.0], [1.0]])).tolist() == [0]


# Training of the codebooks


def test_entries_move_to_the_running_mean_of_their_rows():
    books = codebooks_of(np.array([[[0.0], [10.0]], [[0.0], [1.0]]]))
    books.counts = torch.full((2, 2), 4.0, dtype=torch.float64)
    books.sums = books.vectors.data * 4
    z = torch.tensor([[1.0], [2.0], [12.0]], dtype=torch.float64)
    books.count(books(z), decay=0.75)
    books.follow()
    # codebook 0: entry 0 takes 1 and 2, entry 1 takes 12; codebook 1 is left 1, 2 and 2, all nearest to its entry 1
    assert books.counts.tolist() == [[0.75 * 4 + 0.25 * 2, 0.75 * 4 + 0.25], [0.75 * 4, 0.75 * 4 + 0.25 * 3]]
    first = [0.25 * (1 + 2) / 3.5, (0.75 * 40 + 0.25 * 12) / 3.25]
    second = [0.0, (0.75 * 4 + 0.25 * (1 + 2 + 2)) / 3.75]
    np.testing.assert_allclose(books.vectors.numpy()[..., 0], [first, second], rtol=1e-15)


def test_an_entry_that_no_row_takes_stays_where_it_is_for_ever():
    books = codebooks_of(np.array([[[0.0], [7.0]]], dtype=np.float32))
    books.counts, books.sums = torch.ones(1, 2), books.vectors.data.clone()
    for _ in range(1000):  # the count underflows on the way
        books.count(books(torch.zeros(3, 1)), decay=0.9)
        books.follow()
    assert books.counts[0, 1] < 1e-40
    assert books.vectors[0, 1].item() == pytest.approx(7.0, rel=1e-3)


def test_only_unused_entries_are_put_onto_residuals_and_get_time_to_find_rows():
    books = codebooks_of(np.array([[[0.0], [500.0], [5.0]], [[1.0], [2.0], [-900.0]]]))
    books.counts = torch.tensor([[3.0, 0.01, 3.0], [3.0, 3.0, 0.0]], dtype=torch.float64)
    books.sums = books.vectors.data * books.counts[..., None]
    z = torch.tensor([[0.25], [5.5], [6.0], [0.5], [0.125], [5.25]], dtype=torch.float64)
    residuals = books(z).residuals
    assert books.reset_unused(residuals, 0.1, torch.Generator().manual_seed(0)) == 2
    assert books.vectors[0, [0, 2], 0].tolist() == [0.0, 5.0]
    assert books.vectors[1, [0, 1], 0].tolist() == [1.0, 2.0]
    assert books.vectors[0, 1] in residuals[0]
    assert books.vectors[1, 2] in residuals[1]
    assert books.counts.tolist() == [[3.0, 2.0, 3.0], [3.0, 3.0, 2.0]]  # 6 rows over 3 entries
    assert books.reset_unused(residuals, 0.1, torch.Generator()) == 0
    books.count(books(z), 0.99)
    books.follow()
    assert books.vectors.abs().max() < 10


def test_resets_bring_entries_into_use_that_would_never_be_taken():
    used = {}
    for below in (0.0, 0.1):
        tokenizer = VQActionTokenizer(DOF, HORIZON, code_dim=4, codebook_size=64, n_codebooks=1, hidden=(32,))
        history = tokenizer.fit(structured(1500), steps=400, held_out=0, progress=False, reset_below=below)
        used[below] = history.best.utilization[0]
        assert (sum(point.n_reset for point in history.points) > 0) == (below > 0)
    assert used[0.1] > max(used[0.0], 0.85)


# Gradients


def problem():
    torch.manual_seed(3)
    network = VQNetwork(VQShape(DOF, HORIZON, **SMALL)).double()
    network.codebooks.vectors.data = torch.randn_like(network.codebooks.vectors) * 0.2
    network.codebooks.vectors.requires_grad_(True)
    return network, torch.from_numpy(structured(20).reshape(20, -1))


def test_gradient_of_the_encoder_is_that_of_the_frozen_quantizer():
    network, x = problem()
    losses = network.losses(x)
    (losses.reconstruction + 0.25 * losses.commitment + losses.codebook).backward()
    with torch.no_grad():
        z = network.encoder(x)
        shift = network.codebooks(z).vectors - z
        chosen = network.codebooks(z).chosen
        before = torch.cumsum(chosen, dim=0) - chosen

    def surrogate():
        """The loss with the choice of entries, and what was added for them, held as they were."""
        now = network.encoder(x)
        commitment = sum(((now - before[i]) - chosen[i]).square().mean() for i in range(len(chosen)))
        return (network.decoder(now + shift) - x).square().mean() + 0.25 * commitment

    step = 1e-6
    for layer in (network.encoder[0], network.encoder[2]):
        for index in [(0, 0), (1, 2), (3, 5)]:
            with torch.no_grad():
                kept = layer.weight[index].item()
                layer.weight[index] = kept + step
                above = surrogate()
                layer.weight[index] = kept - step
                below = surrogate()
                layer.weight[index] = kept
            assert layer.weight.grad[index].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5)


def test_each_loss_moves_its_own_part_only():
    network, x = problem()
    parts = {
        "encoder": network.encoder[0].weight,
        "books": network.codebooks.vectors,
        "decoder": network.decoder[0].weight,
    }
    moved = {}
    for name in ("reconstruction", "commitment", "codebook"):
        gradients = torch.autograd.grad(getattr(network.losses(x), name), list(parts.values()), allow_unused=True)
        moved[name] = {part for part, g in zip(parts, gradients, strict=True) if g is not None and g.abs().max() > 0}
    assert moved == {"reconstruction": {"encoder", "decoder"}, "commitment": {"encoder"}, "codebook": {"books"}}


def test_gradient_of_the_codebooks_pulls_each_entry_to_the_mean_of_its_rows():
    network, x = problem()
    losses = network.losses(x)
    losses.codebook.backward()
    level, entry = 1, losses.quantized.entries[0, 1].item()
    taken = losses.quantized.entries[:, level] == entry
    residuals, vector = losses.quantized.residuals[level].detach(), network.codebooks.vectors[level, entry].detach()
    wanted = 2 * (taken.sum() * vector - residuals[taken].sum(dim=0)) / residuals.numel()
    torch.testing.assert_close(network.codebooks.vectors.grad[level, entry], wanted)


# Fit


def test_residual_codebooks_beat_one_codebook_with_as_many_tokens():
    data, others = structured(1000), structured(300, seed=1)
    error = {}
    for n_codebooks, size in ((4, 16), (1, 64)):
        tokenizer = VQActionTokenizer(DOF, HORIZON, code_dim=8, codebook_size=size, n_codebooks=n_codebooks)
        tokenizer.fit(data, held_out=others, steps=300, batch_size=128, progress=False)
        assert tokenizer.n_codes == 64
        error[n_codebooks] = np.abs(tokenizer.decode(tokenizer.encode(others), HORIZON, DOF) - others).mean()
    assert error[4] < 0.6 * error[1]
    assert error[4] < 0.03


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_both_ways_to_move_codebooks_learn(update):
    data, others = structured(1000), structured(200, seed=1)
    tokenizer = VQActionTokenizer(DOF, HORIZON, code_dim=8, codebook_size=16, n_codebooks=3, hidden=(64,))
    history = tokenizer.fit(data, held_out=others, steps=400, update=update, progress=False)
    assert history.points[0].step == 20  # the first look comes early
    assert history.best.held_out_error < 0.6 * history.points[0].held_out_error
    assert history.best.held_out_error < 0.05
    plain = np.abs(others - data.mean(axis=0)).mean()
    assert history.best.held_out_error < 0.1 * plain


def test_kept_weights_are_those_with_the_smallest_held_out_error():
    data, others = structured(30), structured(200, seed=1)
    tokenizer = VQActionTokenizer(DOF, HORIZON, **SMALL)
    history = tokenizer.fit(data, held_out=others, steps=300, lr=0.01, progress=False)
    assert history.best.held_out_error == min(point.held_out_error for point in history.points)
    found = np.abs(tokenizer.decode(tokenizer.encode(others), HORIZON, DOF) - others).mean()
    assert found == pytest.approx(history.best.held_out_error, rel=1e-4)


def test_the_seed_decides_everything():
    torch.manual_seed(5)
    first = fitted(seed=1)
    torch.manual_seed(6)
    assert fitted(seed=1) == first
    assert fitted(seed=2) != first


def test_the_fit_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    wanted = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    fitted()
    assert (torch.rand(1), np.random.rand()) == wanted


def test_a_share_is_held_out_as_one_run_of_neighbors():
    tokenizer = VQActionTokenizer(DOF, HORIZON, **SMALL)
    history = tokenizer.fit(structured(400), held_out=0.25, steps=2, progress=False)
    assert (history.n_train, history.n_held_out) == (300, 100)
    history = tokenizer.fit(structured(400), held_out=0, steps=2, progress=False)
    assert (history.n_train, history.n_held_out, history.best.held_out_error) == (400, 0, None)
    assert history.best == history.points[-1]


def test_too_few_chunks_for_the_codebooks_are_said_and_fitted(caplog):
    tokenizer = VQActionTokenizer(DOF, HORIZON, **SMALL)
    tokenizer.fit(structured(5), held_out=0, steps=20, progress=False)
    assert "5 chunks cannot use 8 entries" in caplog.text
    assert np.isfinite(tokenizer.codebooks).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"batch_size": 2.5},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"decay": 1.0},
        {"commitment": -1.0},
        {"reset_below": 1.0},
        {"update": "adam"},
        {"seed": -1},
        {"seed": True},
    ],
)
def test_settings_that_cannot_be_raise(settings):
    with pytest.raises(TrainingError, match=next(iter(settings))):
        FitSettings(**settings)


@pytest.mark.parametrize("held_out", [1.0, -0.1, np.zeros((2, HORIZON, DOF + 1))])
def test_held_out_chunks_that_cannot_be_raise(held_out):
    with pytest.raises(ActionTokenError):
        VQActionTokenizer(DOF, HORIZON, **SMALL).fit(structured(20), held_out=held_out, steps=1, progress=False)


def test_no_chunks_and_a_loss_that_explodes_raise(tokenizer):
    with pytest.raises(ActionTokenError, match="no chunks"):
        VQActionTokenizer(DOF, HORIZON, **SMALL).fit(structured(0), held_out=0, progress=False)
    before = copy.deepcopy(tokenizer)
    with pytest.raises(TrainingError, match="lr below"):
        tokenizer.fit(structured(100), steps=50, lr=1e30, progress=False)
    assert tokenizer == before  # a fit that fails leaves what was there


# Codes


def test_positions_have_ranges_of_their_own(tokenizer):
    codes = tokenizer.encode(structured(300, seed=2))
    assert codes.shape == (300, 3)
    assert codes.dtype == np.int64
    assert tokenizer.code_ranges.tolist() == [[0, 8], [8, 16], [16, 24]]
    assert (tokenizer.n_codes, tokenizer.n_tokens) == (24, 3)
    assert ((codes >= tokenizer.code_ranges[:, 0]) & (codes < tokenizer.code_ranges[:, 1])).all()


def test_every_choice_of_valid_codes_is_a_chunk_within_bounds(tokenizer):
    entries = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    chunks = tokenizer.decode(entries + tokenizer.code_ranges[:, 0], HORIZON, DOF)
    assert chunks.shape == (512, HORIZON, DOF)
    assert chunks.dtype == np.float64
    assert np.abs(chunks).max() <= 1.0


def test_decoding_is_encoder_free_and_by_hand():
    tokenizer = fitted()
    codes = tokenizer.encode(structured(3, seed=4))
    state = tokenizer._network.state_dict()
    vector = sum(tokenizer.codebooks[p, codes[:, p] - 8 * p] for p in range(3))
    hidden = np.maximum(vector @ state["decoder.0.weight"].numpy().T + state["decoder.0.bias"].numpy(), 0)
    flat = hidden @ state["decoder.2.weight"].numpy().T + state["decoder.2.bias"].numpy()
    np.testing.assert_allclose(
        tokenizer.decode(codes, HORIZON, DOF), np.clip(flat, -1, 1).reshape(3, HORIZON, DOF), rtol=0, atol=1e-12
    )


def test_a_batch_of_any_shape_gives_what_each_chunk_gives(tokenizer, monkeypatch):
    monkeypatch.setattr("hf_vla_actions.tokenizers.vq.BLOCK", 7)
    chunks = structured(24, seed=2).reshape(2, 3, 4, HORIZON, DOF)
    codes = tokenizer.encode(chunks)
    back = tokenizer.decode(codes, HORIZON, DOF)
    assert codes.shape == (2, 3, 4, 3)
    assert back.shape == chunks.shape
    assert tokenizer.encode(chunks[1, 2, 3]).tolist() == codes[1, 2, 3].tolist()
    np.testing.assert_allclose(tokenizer.decode(codes[1, 2, 3], HORIZON, DOF), back[1, 2, 3], rtol=0, atol=1e-14)
    assert tokenizer.encode(chunks[:0]).shape == (0, 3, 4, 3)
    assert tokenizer.decode(codes[:0], HORIZON, DOF).shape == (0, 3, 4, HORIZON, DOF)


def test_values_outside_are_clipped_and_whole_numbers_taken(tokenizer):
    assert (
        tokenizer.encode(np.full((HORIZON, DOF), 7.0)).tolist() == tokenizer.encode(np.ones((HORIZON, DOF))).tolist()
    )
    whole = np.ones((HORIZON, DOF), dtype=int)
    assert tokenizer.encode(whole).tolist() == tokenizer.encode(whole * 1.0).tolist()


@pytest.mark.parametrize(
    "chunk",
    [
        np.zeros(DOF),
        np.zeros((HORIZON, DOF + 1)),
        np.zeros((HORIZON + 1, DOF)),
        np.zeros(HORIZON * DOF),
        np.full((HORIZON, DOF), "a"),
        np.zeros((HORIZON, DOF), dtype=complex),
    ],
)
def test_chunks_of_another_shape_raise(tokenizer, chunk):
    with pytest.raises(ActionTokenError, match=r"\(\.\.\., 4, 3\)"):
        tokenizer.encode(chunk)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_raise_and_say_where(tokenizer, value):
    chunks = structured(3)
    chunks[2, 1, 0] = value
    with pytest.raises(ActionTokenError, match=r"first at index \(2, 1, 0\)"):
        tokenizer.encode(chunks)
    with pytest.raises(ActionTokenError, match="NaN"):
        VQActionTokenizer(DOF, HORIZON, **SMALL).fit(chunks, held_out=0, progress=False)


@pytest.mark.parametrize("codes", [[-1, 8, 16], [0, 7, 16], [0, 8, 24], [8, 8, 16], [0, 0, 0]])
def test_codes_that_are_not_valid_where_they_stand_raise(tokenizer, codes):
    with pytest.raises(ActionTokenError, match="not valid where they stand: position"):
        tokenizer.decode([[0, 8, 16], codes], HORIZON, DOF)


@pytest.mark.parametrize("codes", [np.int64(0), [0, 8], [0, 8, 16, 16], [0.0, 8.0, 16.0], [True, True, True]])
def test_codes_that_are_no_chunk_raise(tokenizer, codes):
    with pytest.raises(ActionTokenError, match="a chunk is 3 codes"):
        tokenizer.decode(codes, HORIZON, DOF)


@pytest.mark.parametrize(("horizon", "dof"), [(HORIZON + 1, DOF), (HORIZON, DOF - 1), (DOF, HORIZON)])
def test_another_horizon_or_dof_raises(tokenizer, horizon, dof):
    with pytest.raises(ActionTokenError, match="chunks of 4 x 3"):
        tokenizer.decode([0, 8, 16], horizon, dof)


def test_a_tokenizer_that_is_not_fitted_raises(tmp_path):
    new = VQActionTokenizer(DOF, HORIZON, **SMALL)
    assert not new.fitted
    for use in (
        lambda: new.encode(structured(1)),
        lambda: new.decode([0, 8, 16], HORIZON, DOF),
        lambda: new.save_pretrained(tmp_path),
        new.to_dict,
    ):
        with pytest.raises(ActionTokenError, match="not fitted"):
            use()


@pytest.mark.parametrize(
    "sizes",
    [
        {"dof": 0},
        {"horizon": 1.5},
        {"codebook_size": 1},
        {"n_codebooks": 0},
        {"code_dim": True},
        {"hidden": (8, 0)},
        {"hidden": 8},
        {"hidden": "88"},
    ],
)
def test_sizes_that_cannot_be_raise(sizes):
    with pytest.raises(ActionTokenError, match=next(iter(sizes))):
        VQActionTokenizer(**{"dof": 3, "horizon": 4, **sizes})


def test_codes_have_a_vocabulary_of_a_language_model(tokenizer):
    ids = np.arange(100, 100 + tokenizer.n_codes)
    vocabulary = ActionVocabulary(ids, 2, "spare", ("",) * len(ids))
    codes = tokenizer.encode(structured(5))
    assert vocabulary.to_codes(vocabulary.to_ids(codes)).tolist() == codes.tolist()


# Report


def test_usage_of_entries_by_hand():
    utilization, perplexity = usage(np.array([[0, 3], [1, 3], [0, 3], [1, 3]]), 4)
    assert utilization.tolist() == [0.5, 0.25]
    np.testing.assert_allclose(perplexity, [2.0, 1.0])


def test_report_speaks_of_real_units_and_leaves_padding_out(tokenizer):
    stats = ActionStats.from_ranges([-0.02, -0.5, 0.0], [0.02, 0.5, 1.0])
    space = ActionSpace(["x", "yaw", "gripper"], ["m", "rad", None], gripper=Gripper("gripper"))
    actions = stats.unnormalize(structured(50, seed=3))
    mask = np.ones((50, HORIZON), dtype=bool)
    mask[:, 2:] = False
    report = tokenizer.report(actions, stats, space=space, pad_mask=mask)
    back = stats.unnormalize(tokenizer.decode(tokenizer.encode(stats.normalize(actions)), HORIZON, DOF))
    error = np.abs(back - actions)[:, :2].reshape(-1, DOF)
    np.testing.assert_allclose(report.mean_error[:2], error.mean(axis=0)[:2])
    np.testing.assert_allclose(report.max_error[:2], error.max(axis=0)[:2])
    np.testing.assert_allclose(report.p99_error[:2], np.quantile(error, 0.99, axis=0)[:2])
    wrong = (back[:, :2, 2] >= 0.5) != (actions[:, :2, 2] == 1.0)
    assert report.mean_error[2] == wrong.mean()  # a binary gripper is right or wrong
    assert report.clipped == (0.0, 0.0, 0.0)
    assert json.loads(json.dumps(report.to_dict()))["units"] == ["m", "rad", None]
    text = report.text()
    assert "yaw" in text
    assert f"{report.mean_error[0]:.4g}" in text


def test_report_counts_what_the_statistics_cut_off_as_error(tokenizer):
    stats = ActionStats.from_ranges([-0.02, -0.5, 0.0], [0.02, 0.5, 1.0])
    actions = stats.unnormalize(structured(50, seed=3))
    actions[:10, 0, 0] = 5.0
    report = tokenizer.report(actions, stats)
    assert report.max_error[0] == pytest.approx(4.98, abs=0.05)
    assert report.clipped == (10 / 200, 0.0, 0.0)
    assert report.names == ("dim_0", "dim_1", "dim_2")


@pytest.mark.parametrize(
    ("actions", "mask"),
    [
        (np.zeros((0, HORIZON, DOF)), None),
        (np.zeros((HORIZON, DOF)), None),
        (np.zeros((2, HORIZON, DOF)), np.zeros((2, HORIZON), dtype=bool)),
        (np.zeros((2, HORIZON, DOF)), np.ones((2, DOF), dtype=bool)),
    ],
)
def test_report_of_nothing_raises(tokenizer, actions, mask):
    with pytest.raises(ActionTokenError):
        tokenizer.report(actions, ActionStats.from_ranges([-1] * DOF, [1] * DOF), pad_mask=mask)


# Files


def test_saved_and_loaded_it_is_the_same_to_the_bit(tokenizer, tmp_path):
    assert tokenizer.save_pretrained(tmp_path / "a") == tmp_path / "a"
    loaded = VQActionTokenizer.from_pretrained(tmp_path / "a")
    assert loaded == tokenizer
    chunks = structured(100, seed=9)
    codes = tokenizer.encode(chunks)
    assert np.array_equal(loaded.encode(chunks), codes)
    assert np.array_equal(loaded.decode(codes, HORIZON, DOF), tokenizer.decode(codes, HORIZON, DOF))
    loaded.save_pretrained(tmp_path / "b")
    names = ["vq_tokenizer.json", "vq_tokenizer.safetensors"]
    for folder in ("a", "b"):
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_loaded_tokenizer_can_be_fitted_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = VQActionTokenizer.from_pretrained(tmp_path)
    loaded.fit(structured(400), steps=60, batch_size=64, seed=0, progress=False)
    assert loaded == tokenizer


def test_description_goes_into_another_file_and_finds_its_weights(tokenizer, tmp_path):
    values = json.loads(json.dumps(tokenizer.to_dict()))
    assert values["type"] == "vq"
    tokenizer.save_pretrained(tmp_path)
    assert VQActionTokenizer.from_dict(values, tmp_path) == tokenizer
    with pytest.raises(ActionTokenError, match="uniform"):
        VQActionTokenizer.from_dict({**values, "type": "uniform"}, tmp_path)
    with pytest.raises(CheckpointError, match="not the description"):
        VQActionTokenizer.from_dict({**values, "color": 3}, tmp_path)
    with pytest.raises(CheckpointError, match="not the description"):
        VQActionTokenizer.from_dict({"type": "vq", "file": values["file"]}, tmp_path)
    with pytest.raises(CheckpointError, match=r"lie in vq_tokenizer\.safetensors"):
        VQActionTokenizer.from_dict({**values, "file": "../other.safetensors"}, tmp_path)


def test_it_can_be_sent_to_another_process_and_copied(tokenizer):
    codes = tokenizer.encode(structured(5))
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other == tokenizer
        assert np.array_equal(other.encode(structured(5)), codes)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def reseal(folder, content):
    """Put other weights into a folder and let its JSON vouch for them."""
    import hashlib

    (folder / "vq_tokenizer.safetensors").write_bytes(content)
    values = json.loads((folder / "vq_tokenizer.json").read_text())
    values["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "vq_tokenizer.json").write_text(json.dumps(values))


def change(folder, **new):
    file = folder / "vq_tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **new}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "vq_tokenizer.safetensors"), "damaged or of another tokenizer"),
        (lambda f: (f / "vq_tokenizer.safetensors").write_bytes(b""), "damaged or of another tokenizer"),
        (lambda f: (f / "vq_tokenizer.safetensors").unlink(), "no vq_tokenizer.safetensors"),
        (lambda f: (f / "vq_tokenizer.json").unlink(), "no vq_tokenizer.json"),
        (lambda f: (f / "vq_tokenizer.json").write_text("{"), "damaged"),
        (lambda f: (f / "vq_tokenizer.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
        (lambda f: (f / "vq_tokenizer.json").write_text("[]"), "format_version"),
        (lambda f: change(f, format_version=9), "format_version 9"),
        (lambda f: change(f, sha256=None), "damaged or of another tokenizer"),
        (lambda f: change(f, codebook_size=16), "does not fit"),
        (lambda f: change(f, hidden=[16, 16]), "does not fit"),
        (lambda f: change(f, code_dim=10**15), "sizes that cannot be|does not fit"),
        (lambda f: change(f, dof="3"), "dof"),
        (lambda f: change(f, hidden=None), "hidden"),
        (lambda f: reseal(f, b"not tensors"), "damaged"),
        (lambda f: reseal(f, save({"weight": torch.zeros(3)})), "does not fit"),
        (lambda f: reseal(f, save(half(f))), "does not fit"),
        (lambda f: reseal(f, save(with_nan(f))), "NaN"),
    ],
)
def test_damaged_and_foreign_files_raise(tokenizer, tmp_path, damage, message):
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(VLAActionsError, match=message):
        VQActionTokenizer.from_pretrained(tmp_path)


def half(folder):
    return {name: value.half() for name, value in load_file(folder / "vq_tokenizer.safetensors").items()}


def with_nan(folder):
    tensors = load_file(folder / "vq_tokenizer.safetensors")
    tensors["codebooks.vectors"][0, 0, 0] = float("nan")
    return tensors


def test_a_folder_that_does_not_exist_raises_without_asking_the_hub():
    with pytest.raises(CheckpointError, match=r"no folder \./nowhere"):
        VQActionTokenizer.from_pretrained("./nowhere")


def test_weights_of_another_fit_beside_the_description_raise(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "a")
    fitted(seed=1).save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b/vq_tokenizer.safetensors", tmp_path / "a")
    with pytest.raises(CheckpointError, match="of another tokenizer"):
        VQActionTokenizer.from_pretrained(tmp_path / "a")


def test_an_interrupted_save_leaves_no_half_written_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("hf_vla_actions.tokenizers.vq_files.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        fitted(seed=1).save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_weights_are_kept_in_single_precision_and_nothing_else_is(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "vq_tokenizer.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert sorted(tensors) == sorted(
        ["codebooks.vectors"]
        + [f"{part}.{i}.{kind}" for part in ("encoder", "decoder") for i in (0, 2) for kind in ("weight", "bias")]
    )
    save_file(tensors, tmp_path / "copy.safetensors")  # they can be written by others

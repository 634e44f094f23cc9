import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.fft import dct, idct
from test_fast_processor import smooth
from test_train import write_dataset
from transformers import PreTrainedTokenizerFast

from hf_vla_actions import FASTActionTokenizer
from hf_vla_actions.cli import main
from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.tokenizers.fast_fit import largest_error, report, scale_for
from hf_vla_actions.train.arguments import DataArguments
from hf_vla_actions.train.setup import open_dataset, space_of, split_episodes, stats_of
from hf_vla_actions.train.tokens import check_same_space


@pytest.fixture(scope="module")
def fitted():
    return FASTActionTokenizer.fit(smooth(400, 8, 7), 400, 10)


def test_it_joins_what_repeats_and_every_code_is_whole_coefficients(fitted):
    assert fitted.n_codes == 400
    assert not fitted.byte_level
    assert not fitted.tokens.continues.any()
    lengths = fitted.tokens.begun
    limit = fitted.limit(8)
    assert (lengths[: 2 * limit + 1] == 1).all()
    assert (lengths[2 * limit + 1 :] > 1).all()
    held_out = smooth(50, 8, 7, seed=1)
    assert np.mean([len(ids) for ids in fitted.encode(held_out)]) < 0.7 * 56


@settings(deadline=None, max_examples=60)
@given(chunk=arrays(np.float64, (2, 8, 7), elements=st.floats(-1, 1)))
def test_every_chunk_can_be_spelled_whether_the_data_had_it_or_not(fitted, chunk):
    back = fitted.decode(fitted.encode(chunk), 8, 7)
    assert np.abs(dct(back - chunk, axis=1, norm="ortho")).max() <= 0.05 + 1e-9


def test_extremes_can_be_spelled(fitted):
    signs = np.sign(idct(np.eye(8), axis=1, norm="ortho") + 1e-9)
    chunks = np.concatenate([np.repeat(signs[..., None], 7, axis=2), -np.repeat(signs[..., None], 7, axis=2)])
    fitted.decode(fitted.encode(chunks), 8, 7)


def test_ten_thousand_random_chunks_come_back(fitted):
    rng = np.random.default_rng(0)
    size = rng.uniform(0, 1, (10_000, 1, 7)) ** 2
    chunks = (rng.uniform(-1, 1, (10_000, 8, 7)) * size).clip(-1, 1)
    back = fitted.decode(fitted.encode(chunks), 8, 7)
    assert np.abs(dct(back - chunks, axis=1, norm="ortho")).max() <= 0.05 + 1e-9


def test_chunks_that_the_reference_s_own_fit_loses_come_back(shared):
    file = shared / "golden/fast/fit_drop_failures.npz"
    if not file.is_file():
        pytest.skip("no golden data")
    data = np.load(file)
    lost = [name for name in data.files if name.endswith("chunks")]
    assert lost
    for name in lost:
        chunks = data[name]
        _, horizon, dof = chunks.shape
        tokenizer = FASTActionTokenizer.fit(smooth(300, horizon, dof), 512, 10)
        back = tokenizer.decode(tokenizer.encode(chunks), horizon, dof)
        assert np.abs(dct(back - chunks, axis=1, norm="ortho")).max() <= 0.05 + 1e-9


def test_a_longer_chunk_than_it_was_fitted_for_is_refused_if_it_cannot_be_spelled(fitted):
    fitted.encode(0.3 * smooth(3, 16, 7))
    with pytest.raises(ActionTokenError, match="has no characters"):
        fitted.encode(np.ones((16, 7)))


def test_chunks_of_different_horizons_can_be_fitted_together():
    tokenizer = FASTActionTokenizer.fit([*smooth(20, 4, 2), *smooth(20, 9, 2)], 200, 10)
    for horizon in (4, 9):
        tokenizer.decode(tokenizer.encode(np.ones((horizon, 2))), horizon, 2)


def test_what_the_reference_reads_is_the_same_text(fitted, tmp_path):
    """The reference: one character a coefficient, through the tokenizer as text and back."""
    fitted.export_reference(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    bpe = PreTrainedTokenizerFast.from_pretrained(tmp_path / "bpe_tokenizer")
    for chunk in smooth(5, 8, 7, seed=3):
        coefficients = np.around(dct(chunk, axis=0, norm="ortho") * config["scale"]).flatten()
        text = "".join(map(chr, np.maximum(coefficients - config["min_token"], 0).astype(int)))
        ids = bpe(text)["input_ids"]
        assert ids == fitted.encode(chunk)[0].tolist()
        back = np.array([ord(c) for c in bpe.decode(ids)]) + config["min_token"]
        values = idct(back.reshape(8, 7) / config["scale"], axis=0, norm="ortho")
        assert np.allclose(values, fitted.decode([ids], 8, 7)[0], atol=1e-12)
    assert config["vocab_size"] == 400
    assert FASTActionTokenizer.from_pretrained(tmp_path) == fitted


def test_fits_are_the_same_twice():
    assert FASTActionTokenizer.fit(smooth(50, 8, 2), 120) == FASTActionTokenizer.fit(smooth(50, 8, 2), 120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 8, 2)), 50, 10), "vocab_size must be at least 59"),
        ((np.zeros((3, 8, 2)), 59.5, 10), "vocab_size"),
        ((np.zeros((3, 8, 2)), 10**6, 10_000), "there are 20992"),
        ((np.zeros(3), 500, 10), "chunks are an array"),
        (([], 500, 10), "chunks are an array"),
        ((np.full((3, 8, 2), 2.0), 500, 10), "Normalize"),
        ((np.zeros((3, 8, 2)), 500, 0), "scale"),
    ],
)
def test_what_cannot_be_fitted_raises(arguments, message):
    with pytest.raises(ActionTokenError, match=message):
        FASTActionTokenizer.fit(*arguments)


def test_the_scale_keeps_the_wanted_error_and_is_not_wasteful():
    chunks = smooth(200, 8, 3)
    wanted = np.array([0.01, 0.002, np.inf])
    scale = scale_for(chunks, wanted)
    assert (largest_error(chunks, scale) <= wanted).all()
    assert (largest_error(chunks, 0.7 * scale) > wanted).any()
    assert scale_for(chunks, np.inf) == 1
    with pytest.raises(ActionTokenError, match="no scale"):
        scale_for(chunks, 1e-9)
    with pytest.raises(ActionTokenError, match="positive"):
        scale_for(chunks, 0.0)


def test_the_report_is_of_what_the_tokenizer_does(fitted):
    chunks = smooth(30, 8, 7, seed=5)
    half_range = np.arange(1, 8) * 0.01
    found = report(fitted, chunks, half_range)
    lengths = [len(ids) for ids in fitted.encode(chunks)]
    error = (fitted.decode(fitted.encode(chunks), 8, 7) - chunks) * half_range
    assert (found.codes_mean, found.codes_max, found.n_values) == (np.mean(lengths), max(lengths), 56)
    assert np.allclose(found.max, np.abs(error).max((0, 1)))
    assert np.allclose(found.rmse, (error**2).mean((0, 1)) ** 0.5)
    json.dumps(found.to_dict())


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("fast") / "robot", episodes=4)


UNITS = ["--action_units", "m", "m", "m", "rad", "rad", "rad", "none"]


def test_the_command_keeps_the_wanted_precision(robot, tmp_path, capsys):
    argv = ["fit-fast", "--dataset", str(robot), "--horizon", "4", "--output", str(tmp_path), *UNITS]
    assert main([*argv, "--max-error", "2mm", "0.5deg", "--export_reference"]) == 0
    tokenizer = FASTActionTokenizer.from_pretrained(tmp_path)
    told = json.loads((tmp_path / "fast_report.json").read_text())
    assert told["reports"][0]["scale"] == tokenizer.scale
    assert max(told["reports"][0]["max"][:3]) <= 0.002
    assert max(told["reports"][0]["max"][3:6]) <= np.deg2rad(0.5)
    assert max(told["reports"][1]["max"][:6]) > 0.002  # half the scale
    text = capsys.readouterr().out
    assert "<- saved" in text
    assert "mm" in text
    assert (tmp_path / "bpe_tokenizer/tokenizer.json").is_file()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-error", "2mm"], "no dimension is in units of mm"),
        (["--max-error", "2 furlongs", *UNITS], "2 furlongs"),
        (["--max-error", "0mm", *UNITS], "positive"),
        (["--max-error", "0.0001mm", *UNITS], "no scale"),
        (["--vocab_size", "10"], "--vocab_size"),
        (["--action_units", "m"], "1 entries"),
        (["--eval_fraction", "1"], "share"),
        (["--max_chunks", "0"], "at least 1"),
        (["--scale", "-1"], "scale"),
        (["--gripper", "nose"], "nose"),
        (["--horizon", "0"], "horizon"),
    ],
)
def test_the_command_ends_with_one_line_and_exit_status_2(robot, tmp_path, capsys, options, message):
    argv = ["fit-fast", "--dataset", str(robot), "--horizon", "4", "--output", str(tmp_path), *options]
    assert main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit-fast", "fit-vq", "tokens-report"])
def test_the_commands_see_a_dataset_through_a_transform_as_a_training_does(shared, tmp_path, capsys, command):
    folder = shared / "data/bridge_rlds"
    wanted = DataArguments(dataset=str(folder), transform="bridge_orig", eval_fraction=0.2, horizon=4)
    dataset = open_dataset(wanted)
    space = space_of(dataset, wanted)
    train, held_out = split_episodes(dataset, 0.2, 42)
    argv = [command, "--dataset", str(folder), "--eval_fraction", "0.2"]
    small = {
        "fit-fast": ["--horizon", "4", "--no_table", "--output", str(tmp_path / "out")],
        "fit-vq": ["--horizon", "4", "--steps", "2", "--hidden", "16", "--output", str(tmp_path / "out")],
        "tokens-report": ["--horizons", "4", "--bins", "16", "--scales", "--codebooks"],
    }[command]
    assert main([*argv, *small, "--transform", "bridge_orig"]) == 0
    out = capsys.readouterr().out
    if command == "tokens-report":
        assert f"fitted to {len(train)} episodes, measured on {len(held_out)} others" in out
        assert "x mm" in out  # the transform says units, the plain folder does not even have names
    else:
        stats = stats_of(dataset, space, train, "bounds_q99")["action"]
        assert check_same_space(tmp_path / "out", stats, space) == 0.0
    assert main([*argv, *small[:-2], "--output", str(tmp_path / "new"), "--transform", "bridge"]) == 2
    assert "bridge_orig" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

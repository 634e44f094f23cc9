"""`hf-vla fit-vq`, and VQ tokenizers on real robot data."""

import json

import numpy as np
import pytest
from test_train import NAMES, write_dataset

from hf_vla_actions import ActionStats, NormStats, VQActionTokenizer
from hf_vla_actions.cli import main
from hf_vla_actions.data import ChunkDataset, LeRobotDataset

SMALL = ["--horizon", "3", "--codebook_size", "8", "--n_codebooks", "2", "--hidden", "16", "--steps", "20"]


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return str(write_dataset(tmp_path_factory.mktemp("vq") / "robot", episodes=5))


def test_the_command_fits_saves_and_reports_in_real_units(robot, tmp_path, capsys):
    out = tmp_path / "vq"
    units = ["m", "m", "m", "rad", "rad", "rad", "none"]
    argv = ["fit-vq", "--dataset", robot, "--output", str(out), *SMALL, "--eval_fraction", "0.2", "--skip_first", "1"]
    assert main([*argv, "--action_units", *units]) == 0
    said = capsys.readouterr()
    assert "fit: 100%" in said.err
    tokenizer = VQActionTokenizer.from_pretrained(out)
    assert (tokenizer.shape.horizon, tokenizer.shape.dof, tokenizer.n_codes, tokenizer.n_tokens) == (3, 7, 16, 2)
    stats = NormStats.from_file(out)["robot"]["action"]
    assert stats.mask.tolist() == [True] * 6 + [False]

    dataset = LeRobotDataset(robot)
    from hf_vla_actions.train.setup import split_episodes

    train, held_out = split_episodes(dataset, 0.2, 42)
    assert (len(train), len(held_out)) == (4, 1)
    rows = np.concatenate([dataset.actions[e.start + 1 : e.stop] for e in dataset.episodes if e.index in train])
    assert stats.count == len(rows), "without the steps that are left out"
    np.testing.assert_allclose(stats.q99, np.quantile(rows, 0.99, axis=0))
    actions, mask = ChunkDataset(dataset, 3, episodes=held_out, skip_first=1).actions_only()
    report = tokenizer.report(actions, stats, pad_mask=mask)
    blocks = said.out.split("episodes (")
    assert [block[0] for block in blocks[1:]] == ["4", "1"]
    assert f"{len(actions)} chunks" in blocks[2]
    row = next(line for line in blocks[2].splitlines() if line.startswith(f"{NAMES[0]} ")).split()
    assert row[1] == "m"
    assert float(row[2]) == pytest.approx(report.mean_error[0], rel=1e-3)
    assert float(row[4]) == pytest.approx(report.max_error[0], rel=1e-3)


def test_the_command_replaces_a_tokenizer_only_when_told_to(robot, tmp_path, capsys):
    argv = ["fit-vq", "--dataset", robot, "--output", str(tmp_path), *SMALL, "--eval_fraction", "0"]
    assert main(argv) == 0
    assert "held-out" not in capsys.readouterr().out
    first = (tmp_path / "vq_tokenizer.json").read_bytes()
    assert main([*argv, "--seed", "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "vq_tokenizer.json").read_bytes() == first
    assert main([*argv, "--seed", "1", "--overwrite"]) == 0
    assert json.loads(first)["sha256"] != VQActionTokenizer.from_pretrained(tmp_path).to_dict()["sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "./nowhere"], "nowhere"),
        (["--horizon", "0"], "horizon"),
        (["--codebook_size", "1"], "codebook_size"),
        (["--steps", "0"], "steps"),
        (["--eval_fraction", "1"], "eval_fraction"),
        (["--skip_first", "99"], "no step is left"),
        (["--gripper", "hand"], "hand"),
        (["--action_units", "m"], "units"),
        (["--action_key", "velocity"], "velocity"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing_raises(robot, tmp_path, capsys, options, message):
    argv = ["fit-vq", "--dataset", robot, "--output", str(tmp_path / "out"), *SMALL, *options]
    assert main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_real_episodes_become_four_codes_a_chunk(shared):
    dataset = LeRobotDataset(shared / "data/bridge_sample")
    train = [episode.index for episode in dataset.episodes][:16]
    mask = np.array([True] * 6 + [False])
    rows = np.concatenate([dataset.actions[e.start + 1 : e.stop] for e in dataset.episodes if e.index in train])
    stats = ActionStats.compute(rows, mask=mask)
    chunks, pad_mask = ChunkDataset(dataset, 5, episodes=train, skip_first=1).actions_only()
    tokenizer = VQActionTokenizer(7, 5, codebook_size=32, n_codebooks=4)
    history = tokenizer.fit(stats.normalize(chunks), held_out=0, steps=300, progress=False)
    report = tokenizer.report(chunks, stats, pad_mask=pad_mask)
    assert min(report.utilization) > 0.75
    assert history.best.train_error < 0.12
    spread = np.abs(chunks - chunks.mean(axis=0))[pad_mask].mean(axis=0)
    shares = np.array(report.mean_error)[:6] / spread[:6]
    assert shares.mean() < 0.6
    assert shares.max() < 0.8
    codes = tokenizer.encode(stats.normalize(chunks))
    assert len(np.unique(codes, axis=0)) > 0.8 * len(codes)  # chunks of real data keep their differences


def test_dimensions_that_never_move_in_real_data_come_back_exactly(shared):
    parquet = pytest.importorskip("pyarrow.parquet")
    files = sorted(shared.glob("data/groot_demo_v2/demo_data/*/data/*/*.parquet"))
    actions = np.array(parquet.read_table(files[0])["action"].to_pylist(), dtype=np.float64)
    stats = ActionStats.compute(actions)
    assert (stats.constant.sum(), stats.dof) == (25, 44)
    chunks = np.lib.stride_tricks.sliding_window_view(actions, 16, axis=0).transpose(0, 2, 1)
    tokenizer = VQActionTokenizer(44, 16, codebook_size=16, n_codebooks=2)
    tokenizer.fit(stats.normalize(chunks), held_out=0, steps=40, progress=False)
    report = tokenizer.report(chunks, stats)
    still = np.ptp(actions, axis=0) == 0
    assert np.array(report.max_error)[still].max() == 0
    assert np.array(report.mean_error)[~stats.constant].min() > 0

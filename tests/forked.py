"""Processes that are ready soon: forks of one that has imported everything and never ran a model."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

TESTS = str(Path(__file__).parent)


def context():
    """A context of multiprocessing whose processes have imported `resumable`, and with it all that trains."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["resumable"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = TESTS  # many a Python does not tell the server its sys.path: nothing would be imported
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return found


def run_ranks(target, *, processes):
    """Run `-m MODULE ARGUMENTS` or `SCRIPT ARGUMENTS` in several processes, with what torchrun would tell them.

    Returns `returncode` and `stderr` of the first that failed, or of rank 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            told = {"ACCELERATE_USE_CPU": "true"}
            if processes > 1:
                told |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            said = Path(folder) / str(rank)
            started.append((context().Process(target=_rank, args=(told, [*map(str, target)], str(said))), said))
            started[-1][0].start()
        for process, _ in started:
            process.join(timeout=300)
        failed = [(process, said) for process, said in started if process.exitcode != 0]
        for process, _ in failed:
            process.kill()
        process, said = (failed or started)[0]
        return SimpleNamespace(returncode=process.exitcode, stderr=said.read_text() if said.is_file() else "")


def _rank(told, target, said):
    os.environ.update({name: str(value) for name, value in told.items()})
    sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115
    if target[0] == "-m":
        sys.argv = target[1:]
        runpy.run_module(target[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = target
        runpy.run_path(target[0], run_name="__main__")

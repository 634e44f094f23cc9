"""Pieces of Python code in new interpreters that are ready soon: forks of one that imported what others import as well.

No module of Transformers and none of this package is loaded in them: what is asked is what their imports do. Torch and
SciPy are, since importing those takes most of the time. A test in which even those may not be there calls `alone`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback

# Whatever Transformers imports from elsewhere and takes long.
FOREIGN = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.export", "scipy.optimize", "PIL.Image")
FOREIGN += ("huggingface_hub", "tokenizers", "safetensors.torch", "yaml", "psutil", "regex")


class Fresh:
    """Starts with the first question."""

    def __init__(self):
        self.server = None

    def __call__(self, code, *arguments):
        """What the code prints last, as JSON; `arguments` are its sys.argv[1:]."""
        if self.server is None:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.server = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)
        self.server.stdin.write(json.dumps([code, *map(str, arguments)]) + "\n")
        self.server.stdin.flush()
        status, out, err = json.loads(self.server.stdout.readline())
        assert status == 0, err[-2000:]
        return json.loads(out.splitlines()[-1])

    def close(self):
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait(timeout=60)
            self.server.stdout.close()


def alone(code, *arguments):
    """As `Fresh`, in an interpreter that imported nothing at all."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def answer(code, arguments):
    """(status, standard output, standard error) of the code in a fork."""
    files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, file in enumerate(files, start=1):
                os.dup2(file.fileno(), number)
            sys.stdin, sys.argv = open(os.devnull), ["-c", *arguments]  # noqa: SIM115
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files:
        with file:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return status, *texts


if __name__ == "__main__":
    import importlib

    for module in FOREIGN:
        with contextlib.suppress(ImportError):  # only slower
            importlib.import_module(module)
    assert not [name for name in sys.modules if name.partition(".")[0] in ("transformers", "hf_vla_actions")]
    for question in sys.stdin:
        source, *values = json.loads(question)
        sys.stdout.write(json.dumps(answer(source, values)) + "\n")
        sys.stdout.flush()

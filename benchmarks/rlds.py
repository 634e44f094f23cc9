"""How fast RLDS folders are opened and their pictures read: NumPy's checksum against a table loop, and the reader."""

import argparse
import io
import json
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vla_actions.data import RLDSDataset
from hf_vla_actions.data import tfrecord as framing

EXAMPLE = """\
example:
  python benchmarks/rlds.py --quick
  python benchmarks/rlds.py --dataset ./bridge_dataset/1.0.0
"""


def table_loop(data: bytes) -> int:
    """CRC32C as plain Python has it."""
    table, register = framing._byte_list(), 0xFFFFFFFF
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def seconds(function, repeats=3) -> float:
    """The shortest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a message."""
    length, size = bytearray(), len(content)
    while size >= 128:
        length.append(size % 128 + 128)
        size //= 128
    return bytes([number * 8 + 2, *length, size]) + content


def write(folder: Path, episodes: int, steps: int) -> Path:
    """Noisy 256 x 256 pictures of one camera: about 20 kB each."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).resize((256, 256))
    out = io.BytesIO()
    smooth.save(out, "JPEG", quality=95)
    features = {
        "steps/action": field(2, field(1, rng.normal(size=steps * 7).astype("<f4").tobytes())),
        "steps/observation/image": field(1, field(1, out.getvalue()) * steps),
        "steps/language_instruction": field(1, field(1, b"go") * steps),
    }
    example = field(1, b"".join(field(1, field(1, key.encode()) + field(2, value)) for key, value in features.items()))
    parts = [struct.pack("<Q", len(example)), example]
    record = b"".join(part + struct.pack("<I", framing.masked_crc32c(part)) for part in parts)
    with (folder / "big-train.tfrecord-00000-of-00001").open("wb") as file:
        for _ in range(episodes):
            file.write(record)
    info = {"name": "big", "splits": [{"name": "train", "shardLengths": [str(episodes)]}]}
    leaves = {
        "action": {"tensor": {"shape": {"dimensions": ["7"]}, "dtype": "float32"}},
        "observation": {
            "featuresDict": {"features": {"image": {"image": {"shape": {"dimensions": ["256", "256", "3"]}}}}}
        },
        "language_instruction": {"text": {}},
    }
    tree = {"featuresDict": {"features": {"steps": {"sequence": {"feature": {"featuresDict": {"features": leaves}}}}}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(tree))
    return folder


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--dataset", help="an RLDS folder; without it one is written")
    options.add_argument("--quick", action="store_true", help="a small one")
    args = options.parse_args(argv)
    lines = []
    for size in (10_000, 1_000_000, 16_000_000)[: 2 if args.quick else 3]:
        data = np.random.default_rng(0).bytes(size)
        fast, slow = (
            seconds(lambda data=data: framing.crc32c(data)),
            seconds(lambda data=data: table_loop(data[: 10**6]), 1),
        )
        slow *= max(1.0, size / 10**6)
        lines.append(
            f"checksum of {size / 1e6:g} MB: {size / fast / 1e6:.0f} MB/s, {slow / fast:.0f} times a table loop"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.dataset) if args.dataset else write(Path(temporary), 10 if args.quick else 200, 40)
        size = sum(file.stat().st_size for file in folder.glob("*tfrecord*"))
        for verify in (True, False):
            took = seconds(lambda verify=verify: RLDSDataset(folder, cameras=[], verify=verify))
            lines.append(f"opening {size / 1e6:.0f} MB, verify={verify}: {took:.3f} s, {size / took / 1e6:.0f} MB/s")
        tracemalloc.start()
        dataset = RLDSDataset(folder)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        lines.append(f"memory: {kept / 1e6:.2f} MB kept, {peak / 1e6:.2f} MB at most while opening")
        rows = np.random.default_rng(0).permutation(len(dataset))[:200].tolist()
        took = seconds(lambda: [dataset.frame(row, dataset.cameras[0]) for row in rows], 1)
        read = seconds(lambda: [dataset.encoded(row, dataset.cameras[0]) for row in rows], 1)
        lines.append(
            f"pictures in random order: {len(rows) / took:.0f} a second, reading the file is {read / took:.0%} of it"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

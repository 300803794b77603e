"""The share of checksums in the time of saving and loading a checkpoint.

python benchmarks/checkpoints/checksums.py --mebibytes 500
"""

import argparse
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from moreh.runtime.checkpoint import manifest
from moreh.runtime.checkpoint.dcp_io import read_state, save_state_async
from moreh.runtime.checkpoint.dcp_tensors import TensorChunks, chunks_of_full

_TENSORS = 50


def main() -> None:
    """Measure one save and one load, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=500, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--directory", help="where to write it; the disk decides how long it takes")
    arguments = parser.parse_args()
    elements = arguments.mebibytes * 2**20 // 4 // _TENSORS
    spent = 0.0

    def timed_crc32(data: Any, value: int = 0) -> int:
        nonlocal spent
        started = time.perf_counter()
        result = crc32(data, value)
        spent += time.perf_counter() - started
        return result

    crc32 = zlib.crc32
    setattr(zlib, "crc32", timed_crc32)  # noqa: B010
    state: dict[str, TensorChunks] = {f"{index}": chunks_of_full(torch.randn(elements)) for index in range(_TENSORS)}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as parent:
        directory = Path(parent) / "state"
        started = time.perf_counter()
        save_state_async(state, directory, None).result()
        saving, in_saving = time.perf_counter() - started, spent
        started = time.perf_counter()
        assert manifest.find_damage(directory) is None
        checking = time.perf_counter() - started
        started = time.perf_counter()
        read_state(state, directory, None, "loading")
        loading = time.perf_counter() - started
    print(f"{arguments.mebibytes} MiB: saved in {saving:.2f} s, of which checksums {in_saving:.2f} s", end=" ")
    print(f"({in_saving / saving:.1%}); checked in {checking:.2f} s and loaded in {loading:.2f} s")


if __name__ == "__main__":
    main()

"""Memory that a rank needs to load and save its shards: python benchmarks/checkpoints/memory.py [--gigabytes 1]

Makes a checkpoint of a random Llama in a temporary directory, and shards it over 4 ranks in several ways. Prints for
each rank, in MiB:
- the peak of anonymous memory (RssAnon) above what the process had before, against the bound of 1.2 x its share + the
  largest tensor;
- the peak of mapped files (RssFile), which processes share and the system takes back when it needs to.

Every saved model is compared tensor by tensor with the one that was loaded. Exits with an error if a bound is exceeded
or a tensor differs.
"""

import argparse
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.multiprocessing.spawn import start_processes

from moreh.runtime.checkpoint.hf_save import save_sharded_model
from moreh.runtime.sharding.local_weights import materialize_local_shards, patch_lazy_loading
from moreh.runtime.sharding.mesh import make_mesh
from moreh.runtime.sharding.shards import full_tensor_bytes
from moreh.runtime.sharding.spec import ParamSpec, TPSplit

RANKS = 4
LAYERS = 16
BOUND = 1.2
SAMPLE_INTERVAL_S = 0.002
# Pipeline, data-parallel (FSDP) and tensor-parallel ranks, and the dtype that from_pretrained is asked for.
CASES = [
    (1, 1, 4, torch.bfloat16),
    (4, 1, 1, torch.bfloat16),
    (1, 4, 1, torch.bfloat16),
    (2, 1, 2, torch.bfloat16),
    (1, 2, 2, torch.float32),
]


@dataclass(frozen=True)
class Peaks:
    """The bytes and seconds that a rank needed."""

    share: int
    """Bytes of its local tensors."""
    largest: int
    """Bytes of the largest full tensor."""
    loading: int
    """Peak of anonymous memory while loading, above the start."""
    saving: int
    """Peak of anonymous memory while saving, above that after loading."""
    files: int
    """Peak of mapped files while loading."""
    load_s: float
    """Seconds to load."""
    save_s: float
    """Seconds to save."""


class MemoryMonitor:
    """Samples this process's memory in a thread."""

    def __init__(self) -> None:
        self.start_bytes = self.peak_anonymous = resident_bytes("RssAnon")
        self.peak_files = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL_S):
            self.peak_anonymous = max(self.peak_anonymous, resident_bytes("RssAnon"))
            self.peak_files = max(self.peak_files, resident_bytes("RssFile"))

    def stop(self) -> int:
        """Stop sampling; returns the peak of anonymous memory above the start, in bytes."""
        self._stopped.set()
        self._thread.join()
        return max(self.peak_anonymous, resident_bytes("RssAnon")) - self.start_bytes


def main() -> None:
    """Run the cases and print the memory and time of each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint in bfloat16 (1.0)")
    gigabytes = parser.parse_args().gigabytes
    failed = False
    # New processes for each case, which need not import everything again.
    multiprocessing.set_forkserver_preload(
        ["transformers.models.llama.modeling_llama", "moreh.runtime.checkpoint.hf_save"]
    )
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, saved, results = (Path(directory) / name for name in ("checkpoint", "saved", "results"))
        make_checkpoint(checkpoint, gigabytes)
        results.mkdir()
        size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        print(
            f"checkpoint of {size / 2**20:.0f} MiB in bfloat16, {RANKS} ranks; "
            "MiB of anonymous memory, peak above start"
        )
        for index, (pipeline, data, tensor, dtype) in enumerate(CASES):
            store = str(Path(directory) / f"store{index}")
            grid = (pipeline, data, tensor)
            start_processes(
                run_rank, (grid, dtype, checkpoint, saved, store, results), RANKS, start_method="forkserver"
            )
            print(f"pipeline {pipeline} x data {data} x tensor {tensor}, {str(dtype).removeprefix('torch.')}:")
            for rank in range(RANKS):
                peaks: Peaks = torch.load(results / str(rank), weights_only=False)
                failed |= print_peaks(rank, peaks)
            different = differing_tensors(checkpoint, saved, dtype)
            failed |= bool(different)
            print(f"  saved: {f'differs in {different[:5]}' if different else 'equal tensor by tensor'}", flush=True)
    sys.exit(failed)


def print_peaks(rank: int, peaks: Peaks) -> bool:
    """Print the memory and time of a rank; returns True if they exceed the bound."""
    bound = BOUND * peaks.share + peaks.largest
    # While it saves, a rank has its share already.
    exceeded = peaks.loading > bound or peaks.share + peaks.saving > bound
    share, largest, loading, saving, files, limit = (
        round(value / 2**20)
        for value in (peaks.share, peaks.largest, peaks.loading, peaks.share + peaks.saving, peaks.files, bound)
    )
    print(
        f"  rank {rank}: share {share}, largest tensor {largest}, loading {loading}, saving {saving}, bound {limit}"
        f"{' EXCEEDED' if exceeded else ''}; mapped files {files}; {peaks.load_s:.1f} s to load, "
        f"{peaks.save_s:.1f} s to save"
    )
    return exceeded


def make_checkpoint(directory: Path, gigabytes: float) -> None:
    """Save a random Llama of about `gigabytes` in bfloat16, in files of at most a quarter of it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # 16 layers of 11 hidden^2 and twice 16 hidden of vocabulary: 208 hidden^2 elements of 2 bytes.
    hidden = round((gigabytes * 1e9 / (2 * (LAYERS * 11 + 32))) ** 0.5 / 64) * 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=16 * hidden,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size=round(gigabytes * 2.5e8))
    torch.set_default_dtype(default)


def run_rank(
    rank: int,
    grid: tuple[int, int, int],
    dtype: torch.dtype,
    checkpoint: Path,
    saved: Path,
    store: str,
    results: Path,
) -> None:
    """Load and save on one rank."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = make_mesh(*grid)
    patch_lazy_loading()
    warm_up(checkpoint.parent / "tiny")
    load_monitor, started = MemoryMonitor(), time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    specs = megatron_specs(model, *grid)
    local_tensors = materialize_local_shards(model, specs, mesh)
    load_s, loading = time.perf_counter() - started, load_monitor.stop()
    model.to_empty(device="meta")
    share = sum(local.nbytes for local in local_tensors.values())
    dist.barrier()
    save_monitor, started = MemoryMonitor(), time.perf_counter()
    save_sharded_model(model, saved, specs, local_tensors, mesh, max_shard_size="300MB")
    save_s, saving = time.perf_counter() - started, save_monitor.stop()
    largest = max(full_tensor_bytes(spec) for spec in specs.values())
    peaks = Peaks(share, largest, loading, saving, load_monitor.peak_files, load_s, save_s)
    torch.save(peaks, results / str(rank))
    dist.destroy_process_group()


def warm_up(directory: Path) -> None:
    """Load and save a tiny model, so that memory which the first call keeps is not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=16
    )
    LlamaForCausalLM(config).save_pretrained(directory)  # which rank 0 does
    dist.barrier()
    LlamaForCausalLM.from_pretrained(directory)


def megatron_specs(model: torch.nn.Module, pipeline: int, data: int, tensor: int) -> dict[str, ParamSpec]:
    """Layers in stages, matrices split as in Megatron-LM, everything sharded over data-parallel ranks."""
    specs = {}
    for name, parameter in model.named_parameters():
        dim = 1 if "o_proj" in name or "down_proj" in name else 0
        tp_split = None if "norm" in name or tensor == 1 else TPSplit(dim, (parameter.shape[dim],))
        layer = re.search(r"layers\.(\d+)\.", name)
        stage = int(layer.group(1)) * pipeline // LAYERS if layer else 0 if "embed" in name else pipeline - 1
        shape = tuple(parameter.shape)
        specs[name] = ParamSpec(name, shape, parameter.dtype, (stage,), tp_split, 0 if data > 1 else None)
    return specs


def differing_tensors(first: Path, second: Path, dtype: torch.dtype) -> list[str]:
    """Names of tensors that differ, or that only one of two directories has. Those of the first are cast to `dtype`."""
    tensors: list[dict[str, Any]] = [{}, {}]  # by name, the file that has the tensor
    for directory, file_of in zip((first, second), tensors, strict=True):
        for path in directory.glob("*.safetensors"):
            file: Any = safe_open(path, "pt")
            file_of.update(dict.fromkeys(file.keys(), file))
    expected, actual = tensors
    different = sorted(expected.keys() ^ actual.keys())
    for name in sorted(expected.keys() & actual.keys()):
        if not torch.equal(expected[name].get_tensor(name).to(dtype), actual[name].get_tensor(name)):
            different.append(name)
    return different


def resident_bytes(kind: str) -> int:
    """RssAnon or RssFile of this process, in bytes."""
    match = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match is not None
    return int(match.group(1)) * 1024


if __name__ == "__main__":
    main()

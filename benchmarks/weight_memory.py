"""What a worker needs to load and save its part of a model: python benchmarks/weight_memory.py [--gigabytes 1]

Makes a checkpoint of a random Llama in a temporary directory and divides it over 4 workers in several ways. For each rank it
prints the peak of anonymous memory (RssAnon) above what the process had before, against the bound of 1.2 x its share + the
largest tensor, and the peak of mapped files (RssFile), which workers share and the system takes back when it needs to. Every
saved model is compared tensor by tensor with the one that was loaded. Exits with an error if a bound or a tensor is missed.
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
from moreh.runtime.sharding.local_weights import materialize_local_shards, patch_lazy_loading, target_dtypes
from moreh.runtime.sharding.mesh import make_mesh
from moreh.runtime.sharding.shards import full_tensor_bytes
from moreh.runtime.sharding.spec import ParamSpec, TPSplit

WORKERS = 4
LAYERS = 16
BOUND = 1.2
SAMPLE_S = 0.002
# Pipeline, data (sharded) and tensor ranks, and the dtype that is asked for.
CASES = [
    (1, 1, 4, torch.bfloat16),
    (4, 1, 1, torch.bfloat16),
    (1, 4, 1, torch.bfloat16),
    (2, 1, 2, torch.bfloat16),
    (1, 2, 2, torch.float32),
]


@dataclass(frozen=True)
class Peaks:
    """Bytes of a rank: its share of the weights, peaks while loading and saving above the start, and seconds."""

    share: int
    largest: int
    loading: int
    saving: int
    files: int
    load_s: float
    save_s: float


class Watch:
    """The peaks of this process's memory, looked at every few milliseconds by a thread."""

    def __init__(self) -> None:
        self.start = self.anonymous = resident("RssAnon")
        self.files = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.anonymous = max(self.anonymous, resident("RssAnon"))
            self.files = max(self.files, resident("RssFile"))

    def peak(self) -> int:
        """End; the highest anonymous memory above the start, in bytes."""
        self._ended.set()
        self._thread.join()
        return max(self.anonymous, resident("RssAnon")) - self.start


def main() -> None:
    """Run the cases and print their ranks."""
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
            f"checkpoint of {size / 2**20:.0f} MiB in bfloat16, {WORKERS} workers; MiB of anonymous memory, peak above start"
        )
        for number, (pipeline, data, tensor, dtype) in enumerate(CASES):
            store = str(Path(directory) / f"store{number}")
            grid = (pipeline, data, tensor)
            start_processes(
                run_rank, (grid, dtype, checkpoint, saved, store, results), WORKERS, start_method="forkserver"
            )
            print(f"pipeline {pipeline} x data {data} x tensor {tensor}, {str(dtype).removeprefix('torch.')}:")
            for rank in range(WORKERS):
                peaks: Peaks = torch.load(results / str(rank), weights_only=False)
                failed |= report(rank, peaks)
            different = compare(checkpoint, saved, dtype)
            failed |= bool(different)
            print(f"  saved: {f'differs in {different[:5]}' if different else 'equal tensor by tensor'}", flush=True)
    sys.exit(failed)


def report(rank: int, peaks: Peaks) -> bool:
    """Print a rank's figures; whether they exceed the bound."""
    bound = BOUND * peaks.share + peaks.largest
    # While it saves, a rank has its share already.
    exceeded = peaks.loading > bound or peaks.share + peaks.saving > bound
    share, largest, loading, saving, files, limit = (
        round(value / 2**20)
        for value in (peaks.share, peaks.largest, peaks.loading, peaks.share + peaks.saving, peaks.files, bound)
    )
    print(
        f"  rank {rank}: share {share}, largest tensor {largest}, loading {loading}, saving {saving}, bound {limit}"
        f"{' EXCEEDED' if exceeded else ''}; mapped files {files}; {peaks.load_s:.1f} s to load, {peaks.save_s:.1f} s to save"
    )
    return exceeded


def make_checkpoint(directory: Path, gigabytes: float) -> None:
    """A random Llama of about a size, in files of at most a quarter of it."""
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
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    mesh = make_mesh(*grid)
    patch_lazy_loading()
    warm_up(checkpoint.parent / "tiny")
    watch, started = Watch(), time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    layouts = param_specs_of(model, *grid)
    parts = materialize_local_shards(model, layouts, mesh)
    load_s, loading = time.perf_counter() - started, watch.peak()
    model.to_empty(device="meta")
    share = sum(part.nbytes for part in parts.values())
    dist.barrier()
    saving_watch, started = Watch(), time.perf_counter()
    save_sharded_model(model, saved, layouts, parts, mesh, max_shard_size="300MB")
    save_s, saving = time.perf_counter() - started, saving_watch.peak()
    largest = max(full_tensor_bytes(layout) for layout in layouts.values())
    torch.save(Peaks(share, largest, loading, saving, watch.files, load_s, save_s), results / str(rank))
    dist.destroy_process_group()


def warm_up(directory: Path) -> None:
    """Load and save a tiny model, so that what the first time leaves in memory is not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=16
    )
    LlamaForCausalLM(config).save_pretrained(directory)  # which rank 0 does
    dist.barrier()
    LlamaForCausalLM.from_pretrained(directory)


def param_specs_of(model: torch.nn.Module, pipeline: int, data: int, tensor: int) -> dict[str, ParamSpec]:
    """Layers in stages, matrices divided as in Megatron-LM, everything sharded over data-parallel ranks."""
    dtypes = target_dtypes(model)
    layouts = {}
    for name, parameter in model.named_parameters():
        dim = 1 if "o_proj" in name or "down_proj" in name else 0
        division = None if "norm" in name or tensor == 1 else TPSplit(dim, (parameter.shape[dim],))
        layer = re.search(r"layers\.(\d+)\.", name)
        stage = int(layer.group(1)) * pipeline // LAYERS if layer else 0 if "embed" in name else pipeline - 1
        shape = tuple(parameter.shape)
        layouts[name] = ParamSpec(name, shape, dtypes[name], (stage,), division, 0 if data > 1 else None)
    return layouts


def compare(first: Path, second: Path, dtype: torch.dtype) -> list[str]:
    """The names of tensors that differ, or that only one of the directories has; the first is converted."""
    found: list[dict[str, Any]] = [{}, {}]
    for directory, files in zip((first, second), found, strict=True):
        for path in directory.glob("*.safetensors"):
            file: Any = safe_open(path, "pt")
            files.update(dict.fromkeys(file.keys(), file))
    different = sorted(found[0].keys() ^ found[1].keys())
    for name in sorted(found[0].keys() & found[1].keys()):
        if not torch.equal(found[0][name].get_tensor(name).to(dtype), found[1][name].get_tensor(name)):
            different.append(name)
    return different


def resident(kind: str) -> int:
    """RssAnon or RssFile of this process, in bytes."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()

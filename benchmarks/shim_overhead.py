"""The package's cost for scripts that use it, and for others: python benchmarks/shim_overhead.py

Each pair is run in turns, A B A B ..., and the medians and their difference or ratio are printed:
- `import torch` with this package installed and with torch's autoload switched off (bound: 50 ms).
- A training step of a tiny GPT-2 on the simulated accelerator and on the CPU. The smaller the model, the larger the
  share of the memory ledger, so this is an upper bound.
- `moreh-smi` and `moreh-switch-model` as whole processes (bound: 0.3 s).
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

IMPORT = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
STEP = """
import sys, time, statistics, torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=256))
model.loss_type = "ForCausalLM"
ids = torch.zeros(4, 32, dtype=torch.long)
if sys.argv[1] == "accelerator":
    model.cuda()
    ids = ids.cuda()
optimizer = torch.optim.AdamW(model.parameters())
seconds = []
for _ in range(60):
    start = time.perf_counter()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
print(statistics.median(seconds[10:]))
"""
RUNS = 9


def main() -> None:
    """Measure, and print a line for each."""
    with tempfile.TemporaryDirectory() as state:
        environment = {**os.environ, "MOREH_STATE_DIR": state}
        without, with_package = _medians_in_turns(
            [
                lambda: _last_number(IMPORT, {**environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
                lambda: _last_number(IMPORT, environment),
            ]
        )
        added_ms = 1000 * (with_package - without)
        print(f"import torch: {without:.3f} s without, {with_package:.3f} s with: {added_ms:+.0f} ms")
        plain, simulated = _medians_in_turns(
            [
                lambda: _last_number(STEP, environment, "cpu"),
                lambda: _last_number(STEP, environment, "accelerator"),
            ]
        )
        ratio = simulated / plain
        print(f"tiny step: {1000 * plain:.2f} ms plain, {1000 * simulated:.2f} ms simulated: ratio {ratio:.2f}")
        tools = [Path(sys.executable).parent / name for name in ("moreh-smi", "moreh-switch-model")]
        times = _medians_in_turns([partial(_process_seconds, [str(tool), "--json"], environment) for tool in tools])
        for tool, seconds in zip(tools, times, strict=True):
            print(f"{tool.name}: {seconds:.3f} s")


def _medians_in_turns(measurements: Sequence[Callable[[], float]]) -> list[float]:
    """The median of each of several measurements, taken in turns so that a drift of the machine hits all of them."""
    rounds = [[measure() for measure in measurements] for _ in range(RUNS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _last_number(source: str, environment: dict[str, str], *arguments: str) -> float:
    """The number that a Python program prints last."""
    command = [sys.executable, "-c", source, *arguments]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def _process_seconds(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""The cost of a checkpoint every 50 steps that is written in the background: runs with and without, in turns.

python benchmarks/checkpoints/async_saving.py [--config configs/gpt.yaml] [--steps 50] [--rounds 5]
MOREH_WORKERS=2 python benchmarks/checkpoints/async_saving.py

The model is that of a settings file, and the rows are random. In each round, so many steps are trained without a
checkpoint, and as many with one that begins before the first of them and has to be complete after the last. The cost is
the median over the rounds of the one time divided by the other.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moreh.runtime.engine.checkpoint_api import save_training

# Like the training scripts, this one is run from a checkout.
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from utils.config.yaml_file import load_config

WARM_UP_STEPS = 5
# Tokens of the shortest row; the longest one has the positions of the settings.
SHORTEST = 32
MIB = 2**20


def main() -> None:
    """Measure, and print a line for each round and the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/gpt.yaml", help="whose model is trained (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="between two checkpoints (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, help="default: that of the settings")
    parser.add_argument("--directory", help="where to write; the disk decides how long it takes")
    arguments = parser.parse_args()
    config = load_config(arguments.config, [])
    if config.model.architecture is None:
        parser.error(f"{arguments.config} has no model.architecture: give settings of a new model")
    option = torch.moreh.option  # type: ignore[attr-defined]
    option.enable_advanced_parallelization(**config.accelerator.options())
    torch.manual_seed(0)
    sizes = {"vocab_size": config.tokenizer.entries_to_train(), **config.model.architecture}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    model.cuda().train()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = random_batch(
        arguments.batch_size or config.train.batch_size, config.data.max_length, model.config.vocab_size
    )
    train(model, optim, batch, WARM_UP_STEPS)
    costs = []
    with tempfile.TemporaryDirectory(dir=arguments.directory, ignore_cleanup_errors=True) as parent:
        directory = Path(parent) / "step"
        save_training(model, [optim], directory, {}).result()  # the first one makes threads and a process group
        for number in range(1, arguments.rounds + 1):
            without, with_save, calling, writing = one_round(model, optim, batch, arguments.steps, directory)
            costs.append(with_save / without - 1)
            print(
                f"round {number}: {arguments.steps} steps in {without:.2f} s, with a checkpoint in {with_save:.2f} s: "
                f"{costs[-1]:+.1%}; the call took {calling:.3f} s, the writing {writing:.2f} s",
                flush=True,
            )
        size = sum(path.stat().st_size for path in directory.glob("*"))
    step_s = without / arguments.steps
    print(f"a checkpoint of {size / MIB:.0f} MiB every {arguments.steps} steps of {step_s:.2f} s: ", end="")
    print(f"{statistics.median(costs):+.1%} of the time of a step (median of {arguments.rounds} rounds)")


def one_round(
    model: Any, optim: Any, batch: dict[str, torch.Tensor], steps: int, directory: Path
) -> tuple[float, float, float, float]:
    """Seconds of the steps without and with a checkpoint, of the call that begins it, and until it was complete."""
    started = time.perf_counter()
    train(model, optim, batch, steps)
    without = time.perf_counter() - started
    complete: list[float] = []
    started = time.perf_counter()
    saving = save_training(model, [optim], directory, {})
    saving.add_done_callback(lambda saved: complete.append(time.perf_counter()))
    calling = time.perf_counter() - started
    train(model, optim, batch, steps)
    saving.result()
    return without, time.perf_counter() - started, calling, complete[0] - started


def train(model: Any, optim: Any, batch: dict[str, torch.Tensor], steps: int) -> None:
    """Make steps."""
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optim.step()
        model.zero_grad(set_to_none=True)
        loss.item()


def random_batch(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Rows of several lengths, padded to the same one."""
    lengths = torch.linspace(min(SHORTEST, length), length, rows).long()
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    input_ids = torch.randint(vocabulary, (rows, length)) * mask
    labels = torch.where(mask.bool(), input_ids, -100)
    return {"input_ids": input_ids.cuda(), "attention_mask": mask.cuda(), "labels": labels.cuda()}


if __name__ == "__main__":
    main()

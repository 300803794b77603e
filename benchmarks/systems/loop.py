"""The tutorial's loop: rows padded to the longest allowed, AdamW, nothing else; with `--line` the one line before it.

python loop.py WORKLOAD [--line] [--off OPTION]
"""

import argparse
import time

import torch
from adapters import with_adapters
from workload import Record, count_labels, held_out_loss, pad_rows, read_workload

parser = argparse.ArgumentParser()
parser.add_argument("workload")
parser.add_argument("--line", action="store_true")
parser.add_argument(
    "--off", action="append", default=[], help="an optimization of the line to switch off, or mixed_precision"
)
arguments = parser.parse_args()

if arguments.line:
    disabled = [name for name in arguments.off if name != "mixed_precision"]
    torch.moreh.option.enable_advanced_parallelization(  # type: ignore[attr-defined]
        mixed_precision="mixed_precision" not in arguments.off, disable=disabled
    )

from transformers import AutoModelForCausalLM  # noqa: E402

workload = read_workload(arguments.workload)
model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
model = with_adapters(model, workload)
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optim = torch.optim.AdamW(trained, lr=workload.lr, weight_decay=workload.weight_decay)
record = Record([], [], [])
for rows in workload.batches():
    start = time.perf_counter()
    batch = pad_rows(rows, workload.max_length, workload.pad_id)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optim.step()
    model.zero_grad(set_to_none=True)
    record.log_step(loss.item(), time.perf_counter() - start, count_labels(rows))
record.write()
record.held_out_loss = held_out_loss(model, workload)
record.write()

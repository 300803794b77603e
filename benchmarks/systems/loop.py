"""The tutorial's loop: rows padded to the limit, AdamW, nothing else; with `--line` the one line in front of it.

python loop.py WORKLOAD [--line] [--off OPTION]
"""

import argparse
import time

import torch
from workload import Record, held_out_loss, label_count, padded, read_workload

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

work = read_workload(arguments.workload)
model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
model.train()
optim = torch.optim.AdamW(model.parameters(), lr=work.lr, weight_decay=work.weight_decay)
record = Record([], [], [])
for rows in work.batches():
    start = time.perf_counter()
    batch = padded(rows, work.max_length, work.pad_id)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    model.zero_grad(set_to_none=True)
    record.log_step(loss.item(), time.perf_counter() - start, label_count(rows))
record.write()
record.held_out_loss = held_out_loss(model, work)
record.write()

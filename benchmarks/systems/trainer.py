"""transformers' Trainer: its defaults, or with `--tuned` the settings that make it fastest on a CPU.

python trainer.py WORKLOAD [--tuned] [--compile] [--group]
"""

import argparse
import tempfile
from typing import Any

import torch
from adapters import with_adapters
from trainer_steps import TUNED, common_settings, record_steps
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from workload import Record, held_out_loss, pad_rows, read_workload

parser = argparse.ArgumentParser()
parser.add_argument("workload")
parser.add_argument("--tuned", action="store_true")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--group", action="store_true", help="batch rows of similar length, which changes their order")
arguments = parser.parse_args()

workload = read_workload(arguments.workload)
record = Record([], [], [])


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest row, as DataCollatorForSeq2Seq pads it."""
    return pad_rows(
        [(row["input_ids"], row["prompt"]) for row in rows], max(len(row["input_ids"]) for row in rows), workload.pad_id
    )


with tempfile.TemporaryDirectory() as directory:
    settings = TrainingArguments(
        directory,
        per_device_train_batch_size=workload.batch_size,
        max_steps=workload.steps,
        remove_unused_columns=False,
        torch_compile=arguments.compile,
        train_sampling_strategy="group_by_length" if arguments.group else "sequential",
        **common_settings(workload),
        **(TUNED if arguments.tuned else {}),
    )
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    model = with_adapters(model, workload)
    dataset: Any = [{"input_ids": ids, "prompt": prompt} for ids, prompt in workload.rows]
    trainer = Trainer(model, settings, train_dataset=dataset, data_collator=collate)
    record_steps(trainer, record)
    trainer.train()
record.write()
record.held_out_loss = held_out_loss(model, workload)
record.write()

"""TRL's SFTTrainer with packing, in bfloat16 with the fused AdamW.

python trl_packed.py WORKLOAD     in an environment with trl

It packs all rows into rows of the limit, as many in a step as have the tokens of the workload's batches: the same rows in
another order, in about as many steps.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trainer_steps import TUNED, record_steps, settings_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from workload import Record, held_out_loss, make_labels, read_workload

parser = argparse.ArgumentParser()
parser.add_argument("workload")
arguments = parser.parse_args()

work = read_workload(arguments.workload)
record = Record([], [], [])
all_rows = [row for rows in work.batches() for row in rows]
tokens_per_step = sum(len(ids) for ids, _ in all_rows) / work.steps


# SFTTrainer wants a tokenizer; the rows are token ids already.
vocabulary = {str(number): number for number in range(max(max(ids) for ids, _ in all_rows) + 1)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="0")),
    pad_token=str(work.pad_id),
    eos_token=str(work.pad_id),
)
with tempfile.TemporaryDirectory() as directory:
    settings = SFTConfig(
        directory,
        per_device_train_batch_size=max(1, round(tokens_per_step / work.max_length)),
        num_train_epochs=1,
        packing=True,
        max_length=work.max_length,
        gradient_checkpointing=False,
        **settings_of(work),
        **TUNED,
    )
    data = Dataset.from_list([{"input_ids": row[0], "labels": make_labels(row)} for row in all_rows])
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    record_steps(trainer, record)
    trainer.train()
record.write()
record.held_out_loss = held_out_loss(model, work)
record.write()

"""TRL's SFTTrainer with packing, in bfloat16 with fused AdamW.

python trl_packed.py WORKLOAD

Needs an environment with trl. All rows are packed into rows of the longest length allowed, and a step takes as many of
them as hold the tokens of one of the workload's batches: the same rows in another order, in about as many steps.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trainer_steps import TUNED, common_settings, record_steps
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from workload import Record, held_out_loss, make_labels, read_workload

parser = argparse.ArgumentParser()
parser.add_argument("workload")
arguments = parser.parse_args()

workload = read_workload(arguments.workload)
record = Record([], [], [])
all_rows = [row for rows in workload.batches() for row in rows]
tokens_per_step = sum(len(ids) for ids, _ in all_rows) / workload.steps


# SFTTrainer needs a tokenizer, although the rows are token ids already.
vocabulary = {str(token): token for token in range(max(max(ids) for ids, _ in all_rows) + 1)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="0")),
    pad_token=str(workload.pad_id),
    eos_token=str(workload.pad_id),
)
with tempfile.TemporaryDirectory() as directory:
    settings = SFTConfig(
        directory,
        per_device_train_batch_size=max(1, round(tokens_per_step / workload.max_length)),
        num_train_epochs=1,
        packing=True,
        max_length=workload.max_length,
        gradient_checkpointing=False,
        **common_settings(workload),
        **TUNED,
    )
    data = Dataset.from_list([{"input_ids": row[0], "labels": make_labels(row)} for row in all_rows])
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    record_steps(trainer, record)
    trainer.train()
record.write()
record.held_out_loss = held_out_loss(model, workload)
record.write()

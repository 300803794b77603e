"""torchtune's full fine-tuning on one device (recipes/full_finetune_single_device.py): chunked loss, fused AdamW.

python torchtune_full.py WORKLOAD [--bfloat16] [--compile]

Needs an environment with torchtune and torchao. Llama models only. `--bfloat16` keeps the weights in bfloat16, as
torchtune's recipes do; torchtune has no mixed precision.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.training import compile_loss, compile_model
from workload import IGNORED, Record, count_labels, held_out_loss, pad_rows, read_workload

parser = argparse.ArgumentParser()
parser.add_argument("workload")
parser.add_argument("--bfloat16", action="store_true")
parser.add_argument("--compile", action="store_true")
arguments = parser.parse_args()

workload = read_workload(arguments.workload)
hf = json.loads((Path(workload.model) / "config.json").read_text())
heads = {"num_heads": hf["num_attention_heads"], "num_kv_heads": hf["num_key_value_heads"]}
torch.set_default_dtype(torch.bfloat16 if arguments.bfloat16 else torch.float32)
model = llama3_2(
    vocab_size=hf["vocab_size"],
    num_layers=hf["num_hidden_layers"],
    embed_dim=hf["hidden_size"],
    max_seq_len=workload.max_length,
    rope_base=int(hf["rope_parameters"]["rope_theta"]),
    intermediate_dim=hf["intermediate_size"],
    norm_eps=hf["rms_norm_eps"],
    scale_factor=1,  # RoPE without scaling, as in Llama 2 and SmolLM2
    tie_word_embeddings=hf["tie_word_embeddings"],
    **heads,
)
torch.set_default_dtype(torch.float32)
model.load_state_dict(hf_to_tune(load_file(Path(workload.model) / "model.safetensors"), dim=hf["hidden_size"], **heads))
loss_function = CEWithChunkedOutputLoss()
model.set_num_output_chunks(loss_function.num_output_chunks)
if arguments.compile:
    compile_model(model, verbose=False)
    loss_function = compile_loss(loss_function, verbose=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=workload.lr, weight_decay=workload.weight_decay, fused=True)


def compute_loss(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss as `_loss_step` of the recipe computes it."""
    labels = torch.hstack((labels[..., 1:], labels.new_full((len(labels), 1), IGNORED)))
    return loss_function(model(input_ids), labels)


record = Record([], [], [])
for rows in workload.batches():
    start = time.perf_counter()
    batch = pad_rows(rows, max(len(ids) for ids, _ in rows), workload.pad_id)
    loss = compute_loss(batch["input_ids"], batch["labels"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    record.log_step(loss.item(), time.perf_counter() - start, count_labels(rows))
record.write()


class WithLoss(torch.nn.Module):
    """The model, to be called like those of transformers."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> argparse.Namespace:
        """The mean loss over the labels."""
        return argparse.Namespace(loss=compute_loss(input_ids, labels))


model.eval()
record.held_out_loss = held_out_loss(WithLoss(), workload)
record.write()

"""torchtune's full fine-tuning on one device (recipes/full_finetune_single_device.py): chunked loss, fused AdamW.

python torchtune_full.py WORKLOAD [--bfloat16] [--compile]     in an environment with torchtune and torchao; Llama models only

`--bfloat16` keeps the weights in bfloat16, as torchtune's recipes do; it has no mixed precision.
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
from workload import IGNORED, Record, held_out_loss, label_count, padded, read_workload

parser = argparse.ArgumentParser()
parser.add_argument("workload")
parser.add_argument("--bfloat16", action="store_true")
parser.add_argument("--compile", action="store_true")
arguments = parser.parse_args()

work = read_workload(arguments.workload)
hf = json.loads((Path(work.model) / "config.json").read_text())
heads = {"num_heads": hf["num_attention_heads"], "num_kv_heads": hf["num_key_value_heads"]}
torch.set_default_dtype(torch.bfloat16 if arguments.bfloat16 else torch.float32)
model = llama3_2(
    vocab_size=hf["vocab_size"],
    num_layers=hf["num_hidden_layers"],
    embed_dim=hf["hidden_size"],
    max_seq_len=work.max_length,
    rope_base=int(hf["rope_parameters"]["rope_theta"]),
    intermediate_dim=hf["intermediate_size"],
    norm_eps=hf["rms_norm_eps"],
    scale_factor=1,  # the positions of Llama 2 and of SmolLM2
    tie_word_embeddings=hf["tie_word_embeddings"],
    **heads,
)
torch.set_default_dtype(torch.float32)
model.load_state_dict(hf_to_tune(load_file(Path(work.model) / "model.safetensors"), dim=hf["hidden_size"], **heads))
loss_function = CEWithChunkedOutputLoss()
model.set_num_output_chunks(loss_function.num_output_chunks)
if arguments.compile:
    compile_model(model, verbose=False)
    loss_function = compile_loss(loss_function, verbose=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=work.lr, weight_decay=work.weight_decay, fused=True)


def loss_of(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `_loss_step` of the recipe computes it."""
    labels = torch.hstack((labels[..., 1:], labels.new_full((len(labels), 1), IGNORED)))
    return loss_function(model(input_ids), labels)


record = Record([], [], [])
for rows in work.batches():
    start = time.perf_counter()
    batch = padded(rows, max(len(ids) for ids, _ in rows), work.pad_id)
    loss = loss_of(batch["input_ids"], batch["labels"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    record.log_step(loss.item(), time.perf_counter() - start, label_count(rows))
record.write()


class WithLoss(torch.nn.Module):
    """The model as those of transformers are called."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> argparse.Namespace:
        """The mean loss over the labels."""
        return argparse.Namespace(loss=loss_of(input_ids, labels))


model.eval()
record.held_out_loss = held_out_loss(WithLoss(), work)
record.write()

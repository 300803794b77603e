"""LitGPT's full fine-tuning (litgpt/finetune/full.py, `fit`): its defaults, or with `--tuned` bfloat16 and fused AdamW.

python litgpt_full.py WORKLOAD [--tuned]

Needs an environment with litgpt and requests. Llama models only.
"""

import argparse
import json
import time
from pathlib import Path

import lightning as L
import torch
from litgpt.config import Config
from litgpt.data import get_sft_collate_fn
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from workload import Record, count_labels, held_out_loss, make_labels, read_workload

parser = argparse.ArgumentParser()
parser.add_argument("workload")
parser.add_argument("--tuned", action="store_true")
arguments = parser.parse_args()

workload = read_workload(arguments.workload)
hf = json.loads((Path(workload.model) / "config.json").read_text())
config = Config(
    name="workload",
    block_size=workload.max_length,
    vocab_size=hf["vocab_size"],
    padded_vocab_size=hf["vocab_size"],
    n_layer=hf["num_hidden_layers"],
    n_head=hf["num_attention_heads"],
    n_embd=hf["hidden_size"],
    n_query_groups=hf["num_key_value_heads"],
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
    intermediate_size=hf["intermediate_size"],
    norm_eps=hf["rms_norm_eps"],
    rope_base=int(hf["rope_parameters"]["rope_theta"]),
)
weights = load_file(Path(workload.model) / "model.safetensors")
weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
state: dict[str, torch.Tensor] = {}
copy_weights_hf_llama(config, {}, state, weights, dtype=torch.float32)
fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if arguments.tuned else "32-true")
model = GPT(config)
model.load_state_dict(state)
del weights, state
model = fabric.setup(model)
optimizer = fabric.setup_optimizers(
    torch.optim.AdamW(
        model.parameters(), lr=workload.lr, weight_decay=workload.weight_decay, fused=arguments.tuned or None
    )
)
collate = get_sft_collate_fn(workload.max_length, workload.pad_id)
record = Record([], [], [])
for rows in workload.batches():
    start = time.perf_counter()
    counts = {"raw": 0, "raw_plus_prompt_template": 0}
    batch = collate(
        [
            {"input_ids": torch.tensor(row[0]), "labels": torch.tensor(make_labels(row)), "token_counts": counts}
            for row in rows
        ]
    )
    logits = model(batch["input_ids"])
    loss = chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:])
    fabric.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    record.log_step(loss.item(), time.perf_counter() - start, count_labels(rows))
record.write()


class WithLoss(torch.nn.Module):
    """The model, to be called like those of transformers."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> argparse.Namespace:
        """The mean loss over the labels."""
        return argparse.Namespace(loss=chunked_cross_entropy(model(input_ids)[..., :-1, :], labels[..., 1:]))


model.eval()
record.held_out_loss = held_out_loss(WithLoss(), workload)
record.write()

"""Two training steps on four workers, pipeline size 2 by tensor-parallel size 2, with each phase on the console.

MOREH_TRACE=1 MOREH_WORKERS=4 python examples/traced_step.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Two micro-batches of one row rule out data parallelism, so the planner uses tensor parallelism for the other factor.
torch.moreh.option.enable_advanced_parallelization(num_stages=2, num_micro_batches=2)

model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
)
model.train()
optim = torch.optim.AdamW(model.parameters())
ids = torch.arange(64).view(2, 32)
for step in range(2):
    print(f"step {step}")
    model(ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad()

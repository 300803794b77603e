"""PEFT's LoRA adapters in a plain loop: only the adapters are trained and saved. Needs the package peft.

python examples/lora.py          a tiny Llama with random weights: seconds, no network
python examples/lora.py MODEL    a model on the Hugging Face Hub, or its directory
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

torch.moreh.option.enable_advanced_parallelization()
torch.manual_seed(0)

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
else:
    tokenizer = ByT5Tokenizer()  # one token per byte
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
model.print_trainable_parameters()
model.cuda()
model.train()

texts = [f"def add_{number}(x):\n    return x + {number}\n" for number in range(16)]
batch = tokenizer(texts, padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(1, 21):
    outputs = model(
        batch["input_ids"].cuda(), attention_mask=batch["attention_mask"].cuda(), labels=labels.cuda(), use_cache=False
    )
    loss = outputs[0]
    loss.backward()
    optim.step()
    model.zero_grad(set_to_none=True)
    print(f"[Step {step}/20] | Loss: {loss.item():.4f}")

model.save_pretrained("runs/lora")

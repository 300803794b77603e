"""The training loop of the MoAI Platform's tutorials, and nothing else.

python examples/tutorial_loop.py          a tiny Llama with random weights: seconds, no network
python examples/tutorial_loop.py MODEL    a model of the Hugging Face hub, or a directory that holds one
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

torch.moreh.option.enable_advanced_parallelization()
torch.manual_seed(0)

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
else:
    tokenizer = ByT5Tokenizer()  # a token for each byte
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
model.cuda()
model.train()

texts = [f"def add_{number}(x):\n    return x + {number}\n" for number in range(64)]
encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
dataset = torch.utils.data.TensorDataset(encoded["input_ids"], encoded["attention_mask"])
loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)


def mask_pads(input_ids, attention_mask, ignore_index=-100):
    labels = copy.deepcopy(input_ids)
    labels[~attention_mask.bool()] = ignore_index
    return labels


optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(5):
    for step, (input_ids, attention_mask) in enumerate(loader, start=1):
        labels = mask_pads(input_ids, attention_mask)
        outputs = model(input_ids.cuda(), attention_mask=attention_mask.cuda(), labels=labels.cuda(), use_cache=False)
        loss = outputs[0]
        loss.backward()
        optim.step()
        model.zero_grad(set_to_none=True)
        print(f"[Epoch {epoch} Step {step}/{len(loader)}] | Loss: {loss.item():.4f}")

model.save_pretrained("runs/tutorial")
tokenizer.save_pretrained("runs/tutorial")

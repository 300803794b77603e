"""The platform's tutorial as a script, and the model in the directory "model" that it fine-tunes."""

VOCABULARY_SIZE = 5


def save_tutorial_model(model, directory):
    """Save a model with `VOCABULARY_SIZE` tokens and a tokenizer of three words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(directory)


TUTORIAL = """
import copy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.manual_seed(0)
torch.moreh.option.enable_advanced_parallelization()


def create_mask(input_ids, tokenizer):
    pad_token_ids = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return (input_ids != pad_token_ids).long()


def mask_pads(input_ids, tokenizer, ignore_index=-100):
    idx_mask = create_mask(input_ids, tokenizer)
    labels = copy.deepcopy(input_ids)
    labels[~idx_mask.bool()] = ignore_index
    return labels


model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
model.cuda()
model.train()
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
texts = ["a b c a b c", "b c a b", "c a b c a", "a b c"] * 10
dataset = tokenizer(texts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")["input_ids"]
loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)
optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
for epoch in range(5):
    for input_ids in loader:
        inputs, labels = input_ids, mask_pads(input_ids, tokenizer)
        attn_mask = create_mask(inputs, tokenizer)
        outputs = model(input_ids.cuda(), attention_mask=attn_mask.cuda(), labels=labels.cuda(), use_cache=False)
        loss = outputs[0]
        loss.backward()
        optim.step()
        model.zero_grad(set_to_none=True)
        print("Loss:", loss.item())
model.save_pretrained("finetuned")
tokenizer.save_pretrained("finetuned")
"""

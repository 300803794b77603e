"""Tokenizers made on the fly, of the kinds that read spaces and control tokens in ways of their own."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = "def f(x):\n    return x + 1\n    y two three <unknown> | /s im_end"


def sentencepiece_tokenizer(kind="metaspace", scheme="always"):
    """A tokenizer of Llama 2's kind: a space becomes ▁, one is put before a text, and `<s>` is added.

    `kind` is how its file says so: "metaspace" as Mistral's and newer ones do, "normalizer" as Llama 2's.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=220,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=[*map(chr, range(32, 127)), "\n", "\t", "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer)


def chat_tokenizer():
    """A byte-level tokenizer of ChatML's kind, which adds nothing to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=CONTROL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def save_gpt2(directory, tokenizer, **changes):
    """Save a GPT-2 with random weights for a tokenizer, and the tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    settings |= {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**settings | changes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

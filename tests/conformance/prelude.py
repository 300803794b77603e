"""Imports of the conformance scripts: tiny models and batches, and `check`, which reports a value."""

import torch
from torch import nn
from torch.nn import functional

VOCABULARY_SIZE = 60
WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "eats", "one", "two", "red", "and", "not", "here", "fast"]
_SHAPE = {"vocab_size": VOCABULARY_SIZE, "bos_token_id": 0, "eos_token_id": 1}
_WITH_GROUPED_HEADS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}

__all__ = [
    "VOCABULARY_SIZE",
    "batch",
    "batches",
    "check",
    "functional",
    "gpt2",
    "gpt_neox",
    "grads",
    "llama",
    "log_probs",
    "mistral",
    "nn",
    "opt",
    "quiet_trainer",
    "qwen2",
    "rows_of",
    "token_losses",
    "tokenizer",
    "torch",
    "weights",
    "without_labels",
]

_values = []


def check(name, value):
    """Report a value: a tensor, a number, a text, None, or lists and dictionaries of them."""
    _values.append((name, plain(value)))


def plain(value, describe=None):
    """A copy of a value that can be pickled and that later changes do not reach.

    `describe` gives what to compare of other objects, which raise a TypeError without it.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).to_dense().cpu().clone()
    if isinstance(value, dict):
        return {plain(key, describe): plain(item, describe) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, describe) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, torch.Size | torch.dtype | torch.device):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if hasattr(value, "tolist"):  # a number or an array of NumPy
        return plain(value.tolist())
    if isinstance(value, nn.Module):
        return plain(value.state_dict())
    if describe is not None:
        return describe(value)
    raise TypeError(f"check() compares tensors, numbers, texts and containers of them, not {type(value).__name__}")


def reported():
    """The names and values that the script has reported."""
    return _values


def llama(**changes):
    """A Llama of two layers, in training mode, with the same weights in each run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SHAPE | _WITH_GROUPED_HEADS | changes)).train()


def gpt2(**changes):
    """A GPT-2 of two layers, with tied embeddings and without dropout, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 1}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**_SHAPE | shape | changes)).train()
    model.loss_type = "ForCausalLM"
    return model


def mistral(**changes):
    """A Mistral of two layers, in training mode."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**_SHAPE | _WITH_GROUPED_HEADS | changes)).train()


def qwen2(**changes):
    """A Qwen2 of two layers, in training mode."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**_SHAPE | _WITH_GROUPED_HEADS | changes)).train()


def opt(**changes):
    """An OPT of two layers, with tied embeddings and without dropout, in training mode."""
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"max_position_embeddings": 64, "pad_token_id": 1, "dropout": 0.0, "init_std": 0.2}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**_SHAPE | shape | changes)).train()


def gpt_neox(**changes):
    """A GPT-NeoX of two layers, in training mode."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": 64, "pad_token_id": 1, "initializer_range": 0.2}
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE | shape | changes)).train()


def batch(step=0, rows=8, length=12):
    """Ids, mask and labels of rows of different lengths, padded on the right; the first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(2, VOCABULARY_SIZE, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "labels": labels}


def batches(count, rows=8, length=12):
    """Batches of different content."""
    return [batch(step, rows, length) for step in range(count)]


def without_labels(inputs):
    """The ids and the mask of a batch."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def rows_of(inputs):
    """The rows of a batch as a list of dictionaries, such as a data set has."""
    return [{name: value[row] for name, value in inputs.items()} for row in range(len(inputs["input_ids"]))]


def quiet_trainer(model, trainer_class=None, **arguments):
    """A Trainer of transformers on 16 rows, which evaluates on 6 others and prints nothing: its logs have times.

    `arguments` are those of TrainingArguments, and `callbacks`.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    chosen = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
    chosen |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    callbacks = arguments.pop("callbacks", None)
    trainer = (trainer_class or Trainer)(
        model,
        TrainingArguments("out", **chosen | arguments),
        train_dataset=rows_of(batch(0, rows=16)),
        eval_dataset=rows_of(batch(50, rows=6)),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def token_losses(logits, labels):
    """The cross-entropy of each next token, `[rows, length - 1]`; 0 where there is no label."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.view(len(labels), -1)


def log_probs(logits, labels):
    """The logarithm of the probability of each row's labels, `[rows]`."""
    return -token_losses(logits, labels).sum(1)


def grads(model):
    """The gradients of a model by name, None where there is none."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def weights(model):
    """The parameters of a model by name."""
    return dict(model.named_parameters())


def tokenizer():
    """A tokenizer of `WORDS`, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )

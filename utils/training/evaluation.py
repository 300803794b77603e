"""The loss on held-out rows, and a sample of what the model writes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.data.batches import Batch, make_labels
from utils.data.masks import count_labels

# A little below 1, where a small model still varies but seldom strays.
SAMPLE_TEMPERATURE = 0.6
SAMPLE_TOP_P = 0.9


def evaluate(model: Any, batches: Iterable[Batch], loss_on: str) -> float:
    """The mean loss over all label tokens of the batches, which does not depend on how the rows are batched."""
    loss_sum, label_tokens = 0.0, 0
    with _evaluating(model):
        for batch in batches:
            labels = make_labels(batch, loss_on)
            outputs = model(
                batch["input_ids"].cuda(),
                attention_mask=batch["attention_mask"].cuda(),
                labels=labels.cuda(),
                use_cache=False,
            )
            count = count_labels(labels)
            loss_sum += outputs.loss.item() * count
            label_tokens += count
    return loss_sum / label_tokens


def generate_sample(model: Any, prompt_ids: list[int], tokenizer: Any, max_new_tokens: int) -> str:
    """A continuation of a prompt, until the end of text, `max_new_tokens` or the model's last position.

    Equal weights give the same one each time.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - len(prompt_ids))
    if max_new_tokens < 1:
        return ""
    input_ids = torch.tensor([prompt_ids])
    # The random numbers of training go on afterwards as if nothing had been drawn.
    with _evaluating(model), torch.random.fork_rng():
        torch.manual_seed(0)
        generated = model.generate(
            input_ids.cuda(),
            attention_mask=torch.ones_like(input_ids).cuda(),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=SAMPLE_TEMPERATURE,
            top_p=SAMPLE_TOP_P,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(generated[0, len(prompt_ids) :], skip_special_tokens=True)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradients and no dropout; afterwards the model trains again if it did before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

"""A batch on one worker: its loss and gradients as the fast path computes them, beside a whole forward pass."""

from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.batch.loss_output import LazyOutput
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.batches import batch as ids_mask_and_labels
from tests.helpers.compare import relative_difference, worst_of_names
from tests.helpers.float64 import exact_float64

ROWS, LENGTH = 7, 12
# Tokens of a micro-batch at most.
MAX_TOKENS = 30


def batch(model, *, rows=ROWS, length=LENGTH, **changes):
    """Rows of different lengths with prompts that are not labels, one without any label."""
    vocabulary_size = model.config.get_text_config().vocab_size
    ids, mask, labels = ids_mask_and_labels(0, vocabulary_size, rows, length)
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False} | changes


def differences(model, inputs, options=DEFAULT_OPTIONS, *, scale=0.5, max_tokens=MAX_TOKENS, change_grads=None):
    """The relative differences of the loss and of the gradients between the fast path and a whole forward pass.

    `change_grads` is called with the gradients of the fast path, by parameter name.
    """
    with exact_float64():
        whole = model(**inputs).loss
        (whole * scale).backward()
        expected = gradients(model)
        model.zero_grad()
        outputs = FastPath(options).call(model, (), inputs, max_tokens)
        assert isinstance(outputs, LazyOutput)
        (outputs.loss * scale).backward()
    actual = gradients(model)
    model.zero_grad()
    if change_grads is not None:
        change_grads(actual)
    # Those of keys' biases are mathematically 0.
    floor = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    return relative_difference(outputs.loss, whole), worst_of_names(actual, expected, floor=floor)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

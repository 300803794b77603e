"""What the runtime does to compute a training's losses and gradients with less work."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from moreh.option import ParallelOptions


@dataclass(frozen=True)
class Savings:
    """`padding`: what stands behind a row's last label is not computed. `packing`: rows are computed one after the other, not
    side by side. `prefix`: what all of these begin with is computed once. `logits`: the output layer and the last MLP are
    computed only where labels are. `embedding`: the gradient of tied embeddings is added to the output layer's row by row.
    `attention`, `activation`, `norm` and `rotary`: with fewer or faster kernels. `memory`: what a step frees is kept.
    """

    padding: bool = True
    packing: bool = True
    prefix: bool = True
    logits: bool = True
    embedding: bool = True
    attention: bool = True
    activation: bool = True
    norm: bool = True
    rotary: bool = True
    memory: bool = True


ALL_SAVINGS = Savings()


def savings_of(options: ParallelOptions) -> Savings:
    """The savings that the options of the hook leave on."""
    return Savings(
        options.skip_padding,
        options.pack_rows,
        options.share_prefix,
        options.logits_at_labels,
        options.sparse_embedding,
        options.block_attention,
        options.fused_activation,
        options.fused_norm,
        options.fused_rotary,
        options.keep_freed_memory,
    )


def savings_text(options: ParallelOptions) -> str:
    """A line for the log: each of them, and whether it is on."""
    said = {
        "padding skipped": options.skip_padding,
        "rows packed": options.skip_padding and options.pack_rows,
        "common prefix once": options.skip_padding and options.pack_rows and options.share_prefix,
        "logits at labels only": options.logits_at_labels,
        "tied embeddings by rows": options.sparse_embedding,
        "attention in blocks": options.block_attention,
        "fused activation": options.fused_activation,
        "fused norm": options.fused_norm,
        "fused rotary": options.fused_rotary,
        "fused Adam and AdamW": options.fused_optimizer,
        "freed memory kept": options.keep_freed_memory,
    }
    return "Computed : " + ", ".join(f"{name} : {'on' if on else 'off'}" for name, on in said.items())


@contextmanager
def faster_kernels(savings: Savings, recomputed: bool) -> Iterator[None]:
    """Let the modules of transformers compute with the kernels that the savings name.

    `recomputed`: layers are computed again in the backward pass.
    """
    from moreh.runtime.kernels.attention import use_block_attention
    from moreh.runtime.kernels.gelu import fused_activation
    from moreh.runtime.kernels.rms_norm import fused_norm
    from moreh.runtime.kernels.rotary import fused_rotary

    with ExitStack() as stack:
        if savings.attention:
            stack.enter_context(use_block_attention())
        if savings.activation:
            stack.enter_context(fused_activation(recomputed))
        if savings.norm:
            stack.enter_context(fused_norm())
        if savings.rotary:
            stack.enter_context(fused_rotary())
        yield

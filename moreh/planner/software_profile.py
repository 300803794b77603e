"""The software that runs a plan: its kernels, memory and overlap.

A plan says how the work is split. Two programs that run the same plan still differ in the traits of a
`SoftwareProfile`:

- `MOREH` is this project on several devices, and `moreh_on_cpu` on several workers of a CPU.
- `TRANSFORMERS` and `TRANSFORMERS_AUTOCAST` are a plain loop on one worker.
- The programs of published measurements, which the planner is fitted to and tested on, are in
  benchmarks/published_programs.py, with a word on which traits are known and which were chosen.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SoftwareProfile:
    """Traits of a training program. The defaults are those of a program with fused kernels and mixed precision."""

    name: str
    guessed: bool = False
    """True if the traits are those of programs of its kind, because nothing is known of this program's own."""
    not_modeled: str = ""
    """A mechanism of the program that neither time nor memory accounts for, in words; empty for none."""

    # Precision. Sizes are bytes of one number.
    compute: str = "half"
    """Precision of arithmetic: "half" (bfloat16 or float16), "float32", or "float8" (for linear layers only)."""
    activation_bytes: int = 2
    """Size of an activation."""
    weight_bytes: int = 4
    """Size of a stored weight, the one that the optimizer updates or that has a master copy."""
    weight_copy_bytes: int = 2
    """Size of a weight in a low-precision copy for arithmetic that exists besides the stored weights; 0 for no copy."""
    gradient_bytes: int = 4
    """Size of a gradient of a weight."""
    optimizer_bytes: int = 8
    """Optimizer state of a weight: AdamW's two moments, and a master copy where weights are stored in low precision."""
    moment_bytes: int = 4
    """Size of one moment in it: other optimizers keep another number of them."""
    gather_bytes: int = 2
    """Bytes that an all-gather of sharded parameters moves for each parameter."""
    reduce_bytes: int = 4
    """Bytes that a reduction of gradients moves for each parameter."""

    # Time.
    fused_attention: bool = True
    """True if attention never writes its scores to memory (FlashAttention)."""
    elementwise_traffic: float = 1.0
    """Memory traffic of norms, activations and residuals, as a multiple of one fused kernel each."""
    fuses_dropout: bool = False
    """True if one kernel adds the residual and applies the dropout, as in Megatron."""
    layer_kernels: int = 8
    """Kernels that a layer's forward pass launches besides its matmuls and attention."""
    logit_traffic_bytes: float = 30.0
    """Memory traffic of the loss for each logit, forward and backward together."""
    adds_gradients: bool = False
    """True if kernels of their own add the gradients of a micro-batch to those of the micro-batches before, as in
    autograd, and not the matmuls that compute them."""
    overlaps_data_parallel: bool = True
    """True if gathering parameters and reducing gradients overlap with computation."""
    exchanges_each_matrix: bool = False
    """True if each matrix is gathered, and its gradient reduced, by a collective of its own, not a layer at once."""
    overlaps_tensor_parallel: bool = False
    """True if tensor-parallel collectives overlap with matmuls."""
    rings_use_all_ports: bool = True
    """True if a collective over several nodes uses the network ports of all devices of a node, as NCCL's rings do, and
    not of one only."""
    recomputed_matmuls: float = 0.0
    """The share of matmuls that selective recomputation repeats (0 to 1)."""
    reshards_in_pipeline: bool = True
    """With several stages, whether sharded parameters are gathered and gradients reduced for each micro-batch, as with
    one stage. Otherwise that happens once a step, and both are whole in between (torch's PipelineStage with
    fully_shard)."""

    uses_fully_shard: bool = False
    """True if sharding is torch's `fully_shard`. It shards stored weights even where only gradients or optimizer state
    are to be sharded, and gathers a second copy of them. Its collectives go through flat buffers. It gathers the
    embedding and the output layer together. Other programs keep stored weights whole unless parameters are sharded."""

    # Activations and logits in memory.
    norm_copies: float = 1.0
    """Tensors of the hidden size that a LayerNorm keeps besides its output, which the next matmul keeps."""
    rms_norm_copies: float = 1.0
    """The same for an RMSNorm."""
    gated_copies: float = 0.5
    """Elements that the activation of a gated feed-forward network keeps, in widths of its gate and up projections. The
    product of both alone is 0.5."""
    activation_copies: float = 1.0
    """Elements that the activation of a network without a gate keeps besides its input, in inner widths."""
    mask_bytes: int | None = 1
    """Size of an element of a dropout mask; None for the size of the numbers that are dropped."""
    fused_attention_dropout: bool = True
    """True if fused attention can apply dropout. Otherwise models with dropout use attention that is not fused."""
    score_bytes: int | None = None
    """Size of a score in attention that is not fused; None for `activation_bytes`."""
    attention_block: int = 0
    """Queries of a block of causal attention that keeps the probabilities of its blocks; 0 for attention that keeps
    none."""
    max_blocked_length: int = 0
    """Tokens of the longest sequence whose attention is computed in such blocks."""
    max_saved_score_bytes: float = math.inf
    """Bytes of the probabilities of a layer and micro-batch up to which such attention keeps them. It computes more
    of them again in the backward pass."""
    keeps_gathered_inputs: bool = False
    """True if sequence parallelism keeps the inputs of column-split matmuls as gathered, besides a rank's part, and
    selective recomputation the results of row-split matmuls before they are reduced."""
    logit_bytes: float = 10.0
    """Bytes held for each logit at the peak of the loss."""
    receives_all_parts: bool = False
    """True if a reduce-scatter receives the parts of all ranks before it adds them up, into a buffer of the size of its
    input."""
    all_reduce_bytes: float = 0.0
    """Bytes of the buffer through which gradients that are not sharded are reduced after the backward pass; 0 if they
    are reduced in place or in the backward pass."""
    min_in_flight: int = 1
    """Micro-batches that a pipeline stage works on at once even where its schedule needs fewer."""
    fragmentation: float = 0.0
    """The share of temporary memory that the allocator cannot use, added on top."""

    scratch_bytes: float = 0.0
    """Buffers that kernels use again and again."""

    # The moments of a step. All but the first count only where memory is reused.
    reuses_memory: bool = False
    """True if memory freed at one moment of a step serves the next one, so that a step needs what its highest moment
    needs. Otherwise the temporary tensors of all moments add up, as with an allocator that keeps blocks of each size.
    """
    frees_gradients: bool = False
    """True if there are no gradients between the end of a step and the first backward pass of the next one
    (`zero_grad(set_to_none=True)`)."""
    autocast: bool = False
    """True if the program uses torch.autocast. Then the residual stream has the precision of the weights, each matmul
    makes a low-precision copy of its input, and copies of weights live from their use to the backward pass."""
    forward_logit_bytes: float = 0.0
    """Bytes held for each logit at the end of the forward pass."""
    optimizer_temporaries: float = 0.0
    """Tensors of a parameter's size that the optimizer makes while it updates that parameter."""


# This project. What is not named is as in the defaults above: float32 weights with low-precision copies, fused
# attention, and data-parallel communication that overlaps with computation.
MOREH = SoftwareProfile(
    "moreh",
    # A layer is transformers' own, kernel by kernel: two norms of 8 kernels in float32, 10 kernels for rotary angles,
    # the residuals, the activation, and the casts of weights.
    layer_kernels=32,
    # Stages are torch's PipelineStage with fully_shard: parameters are gathered and gradients reduced once a step.
    reshards_in_pipeline=False,
)


def moreh_software(compute: str, *, half_weights: bool = False) -> SoftwareProfile:
    """This project, computing in "half" or "float8" with float32 weights and half-precision copies, or in "float32".

    With `half_weights`, it computes in half precision, since the weights are stored in it.
    """
    if half_weights:
        return with_half_weights(MOREH)
    if compute == "float32":
        return replace(MOREH, compute=compute, activation_bytes=4, weight_copy_bytes=0, gather_bytes=4)
    return replace(MOREH, compute=compute)


def with_half_weights(software: SoftwareProfile) -> SoftwareProfile:
    """The software with weights in half precision, and gradients and optimizer state like them.

    torch gives a gradient, and a moment of AdamW, the type of its weight. There is no copy in another precision.
    """
    return replace(
        software,
        compute="half",
        autocast=False,
        activation_bytes=2,
        weight_bytes=2,
        weight_copy_bytes=0,
        gradient_bytes=2,
        optimizer_bytes=4,
        moment_bytes=2,
        gather_bytes=2,
        reduce_bytes=2,
    )


# A plain loop over a model of transformers on CPU in float32, with `use_cache=False` and sequences without padding.
# Memory is measured in tests/planner/cost/test_planner_memory.py.
TRANSFORMERS = SoftwareProfile(
    "transformers",
    # Everything is float32, so there are no copies in another precision.
    compute="float32",
    activation_bytes=4,
    weight_copy_bytes=0,
    gather_bytes=4,
    # Memory is that of live tensors: what one moment frees, the next one can use. The loop calls zero_grad after each
    # step.
    reuses_memory=True,
    frees_gradients=True,
    # The loss holds log-probabilities, their gradient and the gradient of the logits, in float32 each.
    logit_bytes=12,
    # At the end of the forward pass there are logits and log-probabilities.
    forward_logit_bytes=8,
    # LlamaRMSNorm is eager: autograd keeps its float32 input and the normalized hidden states.
    rms_norm_copies=2.0,
    # SwiGLU is eager: autograd keeps the result of SiLU and the product that the down projection reads.
    gated_copies=1.0,
    # GPT-2's GELU is the tanh approximation with a kernel for each operation: autograd keeps half of the input, the
    # tanh, one plus the tanh, and the result.
    activation_copies=4.0,
    # On CPU, dropout keeps a mask in the precision of its input, and there is no fused attention with dropout.
    mask_bytes=None,
    fused_attention_dropout=False,
    # AdamW goes through the parameters one by one and makes the root of the second moment and the denominator.
    optimizer_temporaries=2.0,
    # On CPU, a layer of transformers has several times as many small kernels as are counted. These two were chosen to
    # match the step times of four small models on one machine.
    elementwise_traffic=8.0,
    logit_traffic_bytes=90,
)
# The same loop with the forward pass under torch.autocast in bfloat16.
TRANSFORMERS_AUTOCAST = replace(
    TRANSFORMERS,
    name="transformers with autocast",
    # Matmuls read bfloat16 copies of float32 weights and activations.
    autocast=True,
    compute="half",
    activation_bytes=2,
    weight_copy_bytes=2,
    gather_bytes=2,
    # Attention that is not fused converts its bfloat16 inputs to float32.
    score_bytes=4,
    # At the end of the forward pass there are logits in bfloat16, and the loss has them and log-probabilities in
    # float32.
    forward_logit_bytes=10,
    # Chosen in the same way as for float32.
    elementwise_traffic=14.0,
    logit_traffic_bytes=60,
)
# The same loop over a model whose weights are in bfloat16, without autocast.
TRANSFORMERS_BFLOAT16 = replace(
    with_half_weights(TRANSFORMERS_AUTOCAST),
    name="transformers in bfloat16",
    # LlamaRMSNorm computes in float32: autograd keeps its input so, and the normalized hidden states in bfloat16.
    rms_norm_copies=3.0,
)


def moreh_on_cpu(compute: str, *, half_weights: bool = False) -> SoftwareProfile:
    """This project on several workers of a CPU, computing in "half" or in "float32" with float32 weights.

    With `half_weights`, it computes in half precision, since the weights are stored in it.

    benchmarks/workers/own_accuracy.py compares its memory and time with measurements.
    """
    return replace(
        worker_software(bfloat16=compute != "float32", half_weights=half_weights),
        name="moreh on CPU",
        uses_fully_shard=True,
        reshards_in_pipeline=False,
        # The layers are those of MOREH.
        layer_kernels=MOREH.layer_kernels,
        adds_gradients=True,
        # gloo's collectives run on the cores that compute.
        overlaps_data_parallel=False,
        # Kernels of moreh/runtime/kernels: the norm keeps only its result, the activation only its input and its
        # result, the loss the logits and then their gradient, AdamW nothing.
        rms_norm_copies=0.0,
        activation_copies=1.0,
        logit_bytes=8,
        forward_logit_bytes=4,
        optimizer_temporaries=0.0,
        attention_block=128,
        max_blocked_length=1024,
        max_saved_score_bytes=2**23,
        keeps_gathered_inputs=True,
        receives_all_parts=True,
        all_reduce_bytes=64 * 2**20,
        scratch_bytes=10 * 2**20,
    )


def worker_software(*, bfloat16: bool, half_weights: bool) -> SoftwareProfile:
    """The loop on one worker of this machine, with float32 weights if they are not half-precision ones.

    `bfloat16` is whether it computes in bfloat16 under autocast.
    """
    if half_weights:
        return TRANSFORMERS_BFLOAT16
    return TRANSFORMERS_AUTOCAST if bfloat16 else TRANSFORMERS

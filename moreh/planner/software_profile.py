"""The software that runs a plan: which kernels it has, what it keeps in memory, and what it overlaps.

A plan says how work is divided; two programs that carry out the same plan still differ in these points. Ours is
`MOREH`; the others describe the programs whose published measurements the planner is fitted to and tested on
(benchmarks/planner_accuracy.py): benchmarks/published_programs.py says which traits are known and which were chosen.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SoftwareProfile:
    """Traits of a training program.

    Arithmetic is in `compute` precision. Bytes of a parameter: `weight_bytes` of the stored weights, `working_bytes` of a
    copy in low precision that exists besides them (0 for none), `gradient_bytes`, `optimizer_bytes` (AdamW's two moments,
    and a master copy where weights are stored in low precision). Parameters are gathered with `gather_bytes` and
    gradients reduced with `reduce_bytes` each.

    `fused_attention`: scores are never written to memory (FlashAttention). `elementwise` scales the memory traffic of norms,
    activations and residuals against one kernel each (1.0). `logit_passes_bytes` is the memory traffic of the loss for each
    logit, forward and backward together; `logit_bytes` what is held for each at the peak. `overlaps_data` and
    `overlaps_tensor`: collectives run beside computation. `recomputed_products` is the share of matrix products that selective
    recomputation repeats. `rings_use_all_ports`: an exchange over several nodes uses the network ports of all devices of a
    node, as NCCL's rings do, instead of one.
    `norm_copies`: tensors of the hidden size that a norm keeps besides its input. `gated_copies`: what the activation of a
    gated network keeps, in widths of its two products together (their product alone is 0.5). `fragmentation` is the share of
    temporary memory that the allocator cannot use.
    `reshards_in_pipeline`: with several stages, sharded parameters are gathered and gradients reduced for each micro-batch, as
    with one stage; otherwise once a step, and both are whole in between (PipelineStage of torch with fully_shard).
    `layer_kernels`: kernels that a layer's forward pass launches besides its matrix products and attention.
    `least_in_flight`: micro-batches that a stage of a pipeline works on at once even where its schedule allows fewer.

    What follows are details of memory; the defaults are those of fused kernels and of one precision for all activations.
    `rms_norm_copies` are the `norm_copies` of RMSNorm. `activation_copies`: what the activation of a network that is not gated
    keeps besides its input, in the network's inner widths. `mask_bytes` is the size of a number in dropout's mask, None for
    that of the numbers that are dropped. `fused_dropout`: fused attention may drop scores. `score_bytes` is the size of a
    number in attention that is not fused, None for `activation_bytes`. `autocast`: torch.autocast, where the residual stream
    has the precision of the weights, each product makes a copy of its input in low precision, and the `working_bytes` are
    copies of weights that exist from their use to the backward pass.
    `reuses_memory`: what one moment of a step frees serves for the next, so that a step needs what its highest moment needs;
    without, the temporary tensors of all moments add up, as where an allocator keeps blocks of each size. The other
    three count only with it. `gradients_freed`: gradients do not exist between the end of a step and its first backward pass
    (`zero_grad(set_to_none=True)`). `forward_logit_bytes` are the `logit_bytes` before the backward pass.
    `optimizer_temporaries`: tensors of a parameter's size that the optimizer makes for one parameter after the other.
    """

    name: str
    compute: str = "half"
    activation_bytes: int = 2
    weight_bytes: int = 4
    working_bytes: int = 2
    gradient_bytes: int = 4
    optimizer_bytes: int = 8
    gather_bytes: int = 2
    reduce_bytes: int = 4
    fused_attention: bool = True
    elementwise: float = 1.0
    logit_passes_bytes: float = 30.0
    logit_bytes: float = 10.0
    overlaps_data: bool = True
    overlaps_tensor: bool = False
    recomputed_products: float = 0.0
    rings_use_all_ports: bool = True
    norm_copies: float = 1.0
    gated_copies: float = 0.5
    fragmentation: float = 0.0
    least_in_flight: int = 1
    layer_kernels: int = 8
    reshards_in_pipeline: bool = True
    rms_norm_copies: float = 1.0
    activation_copies: float = 1.0
    mask_bytes: int | None = 1
    fused_dropout: bool = True
    score_bytes: int | None = None
    reuses_memory: bool = False
    gradients_freed: bool = False
    autocast: bool = False
    forward_logit_bytes: float = 0.0
    optimizer_temporaries: float = 0.0


# A layer of transformers: two norms of 8 kernels in float32, rotary angles 10, residuals, activation, casts of weights.
MOREH = SoftwareProfile("moreh", layer_kernels=32, reshards_in_pipeline=False)


def moreh_software(compute: str) -> SoftwareProfile:
    """Ours, computing in "half" precision with float32 weights, in "float32", or in "float8" with the rest in half."""
    if compute == "float32":
        return replace(MOREH, compute=compute, activation_bytes=4, working_bytes=0, gather_bytes=4)
    return replace(MOREH, compute=compute)


# A plain loop over a model of transformers on a processor, in float32 and with torch.autocast in bfloat16, with
# `use_cache=False` and rows without padding: measured in tests/planner/test_planner_memory.py. The activation is GPT-2's, GELU
# approximated with tanh, whose operations are a kernel each. The loss holds log-probabilities, their gradient and that of the
# logits in float32; at the end of the forward pass, logits and log-probabilities.
TRANSFORMERS = SoftwareProfile(
    "transformers",
    compute="float32",
    activation_bytes=4,
    working_bytes=0,
    gather_bytes=4,
    logit_bytes=12,
    gated_copies=1.0,
    reuses_memory=True,
    gradients_freed=True,
    rms_norm_copies=2.0,
    activation_copies=4.0,
    mask_bytes=None,
    fused_dropout=False,
    forward_logit_bytes=8,
    optimizer_temporaries=2.0,
    # Time on processors, where a layer of transformers has several times as many small kernels as are counted: chosen for
    # four small models on one machine.
    elementwise=8.0,
    logit_passes_bytes=90,
)
TRANSFORMERS_AUTOCAST = replace(
    TRANSFORMERS,
    name="transformers with autocast",
    compute="half",
    activation_bytes=2,
    working_bytes=2,
    gather_bytes=2,
    autocast=True,
    score_bytes=4,
    forward_logit_bytes=10,
    elementwise=14.0,
    logit_passes_bytes=60,
)

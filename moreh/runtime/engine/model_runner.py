"""Runs a model under its plan: a training step, an evaluation, or a forward pass for logits.

`FastPath` (one worker) and `call_sharded` (several) pass the script's calls to a `ModelRunner`. With labels and
gradients enabled, it runs the forward and backward passes of all micro-batches, and returns a loss whose backward pass
hands the gradients to the script's parameters.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from moreh.errors import OptionError
from moreh.models.compatibility import has_grad_or_node_hooks, replaced_loss, unsupported_module, unsupported_reason
from moreh.models.dropout import draws_random_numbers
from moreh.models.introspection import unwrapped
from moreh.models.losses import is_known_loss, token_loss_of
from moreh.options import ParallelOptions
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.batch_cutter import BatchCutter
from moreh.runtime.batch.input_gradients import detached_inputs, reduced_grad
from moreh.runtime.batch.micro_batches import is_causal_model, label_positions
from moreh.runtime.batch.model_inputs import ONE_WORKER, ModelInputs
from moreh.runtime.engine.calls.checks import check_labels
from moreh.runtime.engine.calls.kept_forwards import KeptForwards
from moreh.runtime.engine.calls.logits import LogitsPasses, MicroBatchSeeds, batch_logits
from moreh.runtime.engine.calls.out_of_memory import MicroBatchLimit
from moreh.runtime.engine.calls.output_layer import OutputLayer, with_gradient, without_values
from moreh.runtime.engine.gradients import collect_grads, loss_with_deferred_grads, without_earlier_grads
from moreh.runtime.engine.parallel_model import (
    ParallelModel,
    build_sharded,
    build_unsharded,
    install_compute_params,
    install_user_params,
)
from moreh.runtime.engine.schedule import run_forward, run_forward_backward
from moreh.runtime.kernels.allocator import FreedMemory
from moreh.runtime.kernels.faster_kernels import FasterKernels
from moreh.runtime.kernels.tied_embedding import TiedEmbedding
from moreh.runtime.sharding.rng import rank_local_rng
from moreh.runtime.tensor.vocab_parallel import gather_logits, vocab_parallel_cross_entropy
from moreh.trace import span


class ModelRunner:
    """Runs this rank's part of a model under a plan: one micro-batch after the other."""

    def __init__(self, root: nn.Module, plan: Plan, options: ParallelOptions) -> None:
        reason = unsupported_reason(root) or replaced_loss(root)
        if reason is not None:
            raise OptionError(f"{reason}, which is not computed on several workers: {ONE_WORKER}")
        if plan.devices > 1 and has_grad_or_node_hooks(root):
            raise OptionError(f"hooks on gradients are lost at the first step: register them after it, or {ONE_WORKER}")
        causal: Any = unwrapped(root)
        # Checked before sharding changes classes. A custom module may mix tokens or rows, so it receives whole rows.
        is_token_wise = unsupported_module(root) is None
        # True if no token sees a later one; the batches are cut for that.
        self.is_causal = is_causal_model(causal)
        skip_padding = options.uses("skip_padding") and self.is_causal and is_token_wise
        self.plan = plan
        # Maximum number of tokens per micro-batch; None: the tokens of the plan's rows.
        self.max_tokens: int | None = None
        self._limit = MicroBatchLimit()
        self._options = options
        self._micro_batches: list[ModelInputs] = []
        self._vocabulary_size = causal.get_output_embeddings().weight.shape[0]
        # For custom losses: the seeds of both passes, and in the second one the gradients of each micro-batch's logits.
        self._seeds: MicroBatchSeeds | None = None
        self._grad_logits: list[torch.Tensor] = []
        make_model = build_unsharded if plan.devices == 1 else build_sharded
        self.model: ParallelModel = make_model(
            root, plan, self._micro_batch_inputs, self._micro_batch_output, self._logit_positions
        )
        on_cpu = self.model.mesh.device.type == "cpu"
        self._freed_memory = FreedMemory(keep=options.uses("keep_freed_memory") and on_cpu)
        self._kernels = FasterKernels(root, options)
        self._tied_embedding, self._output_layer = TiedEmbedding(causal), OutputLayer(causal)
        self._cutter = BatchCutter(
            self.model.parts,
            plan,
            self.model.mesh,
            skip_padding=skip_padding,
            pack_rows=skip_padding and options.uses("pack_rows") and is_token_wise,
            share_prefix=options.uses("share_prefix"),
        )
        self._kept_forwards = KeptForwards(self.model)
        passes = self._kept_forwards, self._forward, self._second_pass, self._output_layer
        self._logits_passes = LogitsPasses(self.model, self._vocabulary_size, self._cutter.sequence_multiple, *passes)
        # An output layer inside another module, as in BERT, receives that module's output at all positions.
        head = causal.get_output_embeddings()
        self._chooses_positions = any(slot.module is head for slot in self.model.parts.post_layers)
        self._chooses_positions &= options.uses("logits_at_labels") and is_token_wise and not plan.sequence_parallel

    def loss(self, inputs: ModelInputs) -> torch.Tensor:
        """The loss of a batch with labels, a scalar; with gradients enabled, the call computes them too.

        `loss.backward()` scales the gradients and adds them to those of the parameters.

        Raises:
            IndexError: a label is not a token id, as in torch.
            OptionError: the loss function is not registered, or the plan computes no gradients of such inputs.
        """
        if not torch.is_grad_enabled():
            return self.loss_and_grads(inputs, with_grads=False)[0]
        inputs, differentiable = detached_inputs(inputs, self.plan)
        if not differentiable and not any(p.requires_grad for p in self.model.user_params.values()):
            return self.loss_and_grads(inputs, with_grads=False)[0]
        loss, grads = self.loss_and_grads(inputs, with_grads=True)
        input_grads = [(entry.tensor, reduced_grad(entry, self.model.mesh)) for entry in differentiable]
        return loss_with_deferred_grads(loss, self.model, grads, input_grads)

    def loss_and_grads(self, inputs: ModelInputs, *, with_grads: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch with labels, and this rank's gradients by parameter name; none without gradients.

        Raises:
            IndexError: a label is not a token id, as in torch.
            OptionError: the model has an unregistered loss function.
        """
        self._check_labels(inputs)
        with torch.set_grad_enabled(with_grads):
            return self._train(inputs) if with_grads else (self._evaluate(inputs), {})

    def _check_labels(self, inputs: ModelInputs) -> None:
        assert inputs.labels is not None
        labels, loss_function = inputs.labels, self.model.parts.causal.loss_function
        check_labels(labels, self._vocabulary_size)
        if not is_known_loss(loss_function):
            raise OptionError(
                f"the loss function {loss_function!r} is not known to be a sum over tokens: register its token loss "
                f"with moreh.models.losses.register_token_loss, or {ONE_WORKER}"
            )

    def _train(self, inputs: ModelInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch on every rank, and this rank's gradients by parameter name."""
        self._kept_forwards.drop()
        with self._freed_memory.of_step():
            with self._rank_local_rng():
                cut = partial(self._cut_batch, inputs, self.plan.micro_batches)
                losses, grads = self._limit.compute(cut, self._forward_backward, self.model.mesh)
            return self._sum_over_ranks(losses), grads

    def _forward_backward(
        self, hidden_shape: tuple[int, int, int]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The losses of this rank's micro-batches, which are forgotten, and its gradients by parameter name."""
        with without_earlier_grads(self.model), self._computing():
            try:
                with span("forward_backward"):
                    losses = run_forward_backward(self.model, len(self._micro_batches), hidden_shape)
            finally:
                self._micro_batches = []
            self._tied_embedding.add_gradient()
            return losses, collect_grads(self.model)

    def _evaluate(self, inputs: ModelInputs) -> torch.Tensor:
        with span("evaluate"):
            # As few micro-batches as possible, none with more rows than in training.
            hidden_shape = self._cut_batch(
                inputs, -(-inputs.batch_size // (self.plan.data * self.plan.micro_batch_size))
            )
            with self._computing(), self._evaluation_rng():
                losses = run_forward(self.model, len(self._micro_batches), hidden_shape)
            self._micro_batches = []
            return self._sum_over_ranks(losses)

    def logits(self, inputs: ModelInputs) -> torch.Tensor:
        """The logits `[batch, sequence, vocabulary]` of a batch on every rank, differentiable if gradients are enabled.

        Raises:
            OptionError: the script needs gradients of the inputs.
        """
        return batch_logits(self._logits_passes, inputs)

    def loss_and_logits(self, inputs: ModelInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch with labels and its logits, from one pass; raises the errors of `loss` and `logits`."""
        self._check_labels(inputs)
        assert inputs.labels is not None
        logits = self.logits(inputs)
        token_loss = token_loss_of(self.model.parts.causal.loss_function, vocab_parallel_cross_entropy)
        losses = token_loss(logits, inputs.labels.to(logits.device), None, self._vocabulary_size)
        return losses.sum() / inputs.loss_divisor, logits

    def _forward(self, micro_batches: list[ModelInputs], *, with_seeds: bool) -> tuple[list[torch.Tensor], int | None]:
        """The logits of whole micro-batches on the last stage, and the seed of all random numbers."""
        with self._computing(), self._rank_local_rng() if with_seeds else self._evaluation_rng():
            seed = torch.initial_seed() if with_seeds else None
            self._micro_batches, self._seeds = micro_batches, None if seed is None else MicroBatchSeeds(seed)
            try:
                return run_forward(self.model, len(micro_batches), self._hidden_shape(micro_batches[0])), seed
            finally:
                self._micro_batches, self._seeds = [], None

    def _second_pass(
        self, micro_batches: list[ModelInputs], seed: int, grad_logits: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The gradients of `sum(logits * grad_logits)`; `grad_logits` has one tensor per micro-batch."""
        device = self.model.mesh.device
        rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with rng, torch.enable_grad(), self._freed_memory.of_step():
            self._micro_batches, self._seeds, self._grad_logits = micro_batches, MicroBatchSeeds(seed), grad_logits
            try:
                return self._forward_backward(self._hidden_shape(micro_batches[0]))[1]
            finally:
                self._seeds, self._grad_logits = None, []

    def _micro_batch_inputs(self, index: int) -> dict[str, Any]:
        """The keyword arguments of the model's forward pass for a micro-batch."""
        if self._seeds is not None:
            self._seeds.start_stage(index)
        micro_batch = self._micro_batches[index]
        return {**micro_batch.others, **micro_batch.tensors, "use_cache": False}

    def _micro_batch_output(self, outputs: Any, index: int) -> torch.Tensor:
        """The contribution of a micro-batch to the loss, a scalar; without labels, its logits."""
        micro_batch = self._micro_batches[index]
        group = self.model.mesh.group("tensor") if self.plan.tensor > 1 else None
        if self._grad_logits:
            return with_gradient(outputs.logits, self._grad_logits[index])
        if micro_batch.labels is None:
            self._output_layer.compare(outputs.logits)
            logits = outputs.logits.detach()
            if torch.is_grad_enabled():  # kept for the second pass, which needs no values
                outputs.logits = without_values(outputs.logits)
            return gather_logits(logits, group, self._vocabulary_size) if group is not None else logits
        positions = self._logit_positions(index)
        labels = micro_batch.labels if positions is None else micro_batch.labels.flatten()[positions].unsqueeze(0)
        token_loss = token_loss_of(self.model.parts.causal.loss_function, vocab_parallel_cross_entropy)
        return token_loss(outputs.logits, labels, group, self._vocabulary_size).sum() / micro_batch.loss_divisor

    def _logit_positions(self, index: int) -> torch.Tensor | None:
        """The positions of a micro-batch that reach the last MLP and the output layer; None for all.

        With sequence parallelism, all positions do, because the last MLP has only a part of each row.
        """
        micro_batch = self._micro_batches[index]
        if micro_batch.labels is None or not self._chooses_positions:
            return None
        return label_positions(micro_batch)

    def _cut_batch(self, inputs: ModelInputs, num_micro_batches: int) -> tuple[int, int, int]:
        """Cut a batch into this rank's micro-batches; returns the shape of the hidden states between stages."""
        with span("cut_batch"):
            self._micro_batches = self._limit.cut(self._cutter, inputs, num_micro_batches, self.max_tokens)
        return self._hidden_shape(self._micro_batches[0])

    def _hidden_shape(self, micro_batch: ModelInputs) -> tuple[int, int, int]:
        """`[batch, sequence, hidden]` of a micro-batch's hidden states between stages."""
        hidden_size = self.model.parts.causal.config.get_text_config().hidden_size
        return micro_batch.batch_size, micro_batch.sequence_length // self._cutter.sequence_multiple, hidden_size

    def _sum_over_ranks(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The loss of the whole batch, on every rank."""
        mesh = self.model.mesh
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        if mesh.rank("tensor") == 0:
            for loss in losses:
                total += loss
        if self.plan.devices > 1:
            with span("all_reduce_loss", total.nbytes):
                mesh.all_reduce(total)
        return total.to(torch.promote_types(self.model.dtype, torch.float32))

    def _rank_local_rng(self) -> AbstractContextManager[None]:
        """On several ranks, dropout uses one generator per rank; on one worker, the script's generator."""
        if self.plan.devices == 1:
            return nullcontext()
        parts = self.model.parts
        return rank_local_rng(self.model.mesh, is_random=draws_random_numbers(parts.causal.config, parts.root))

    def _evaluation_rng(self) -> AbstractContextManager[None]:
        """Keeps the ranks' generators in step if dropout is active in an evaluation."""
        return self._rank_local_rng() if self.model.parts.root.training else nullcontext()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Install the compute parameters and the faster kernels while the stages compute."""
        install_compute_params(self.model)
        try:
            by_rows = self._options.uses("sparse_embedding") and self.plan.devices == 1
            with self._kernels.bound(), self._tied_embedding.deferred_gradient() if by_rows else nullcontext():
                yield
        finally:
            for module in self.model.fsdp_modules():
                module.reshard()
            install_user_params(self.model)

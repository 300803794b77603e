"""A divided model as a script calls it: a training step, an evaluation, or logits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from moreh.errors import OptionError
from moreh.models.compatibility import (
    has_call_hooks,
    has_gradient_hooks,
    unsupported_module,
    unsupported_reason,
    uses_fp16_loss_scaling,
)
from moreh.models.introspection import unwrapped
from moreh.options import ParallelOptions
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.loss_output import LossOutput, loss_with_computed_grads
from moreh.runtime.batch.micro_batches import (
    all_lengths,
    equal_micro_batches,
    is_causal_model,
    label_positions,
    micro_batches_by_length,
    useful_lengths,
)
from moreh.runtime.batch.model_inputs import (
    IGNORED,
    ONE_WORKER,
    ModelInputs,
    check_same_on_all_ranks,
    padded,
    read_inputs,
    slice_rows,
)
from moreh.runtime.batch.packing import can_pack, num_packed_rows, pack_micro_batches
from moreh.runtime.batch.shared_prefix import shared_prefix
from moreh.runtime.engine.gradients import collect_grads, loss_with_deferred_grads
from moreh.runtime.engine.parallel_model import (
    ParallelModel,
    build_sharded,
    build_unsharded,
    install_compute_params,
    install_user_params,
)
from moreh.runtime.engine.schedule import forward, run_forward_backward
from moreh.runtime.kernels.allocator import after_training_step, before_training_step
from moreh.runtime.kernels.faster_kernels import FasterKernels
from moreh.runtime.kernels.tied_embedding import TiedEmbedding
from moreh.runtime.sharding.placement import stage_placements
from moreh.runtime.sharding.rng import rank_local_rng
from moreh.runtime.tensor.vocab_parallel import gather_logits, vocab_parallel_cross_entropy

_KEEP = "logits_to_keep"


class ModelRunner:
    """This worker's part in computing a divided model: the model, and the micro-batches of the call that is going on."""

    def __init__(self, root: nn.Module, plan: Plan, options: ParallelOptions) -> None:
        problem = unsupported_reason(root)
        if problem is not None:
            raise OptionError(f"{problem}, which is not computed on several workers: {ONE_WORKER}")
        if plan.devices > 1 and has_gradient_hooks(root):
            raise OptionError(f"hooks on gradients would not see those of all workers: {ONE_WORKER}")
        # It may see more than one token, or more than one row.
        self._has_unknown_part = unsupported_module(root) is not None
        causal: Any = unwrapped(root)
        self.plan = plan
        # Those of a micro-batch at most; None for as many as the plan's rows have.
        self.tokens: int | None = None
        self._micro_batches: list[ModelInputs] = []
        self._vocabulary = causal.get_output_embeddings().weight.shape[0]
        self._options = options
        self._steps = 0
        self._skip_padding = options.uses("skip_padding") and is_causal_model(causal)
        make_model = build_unsharded if plan.devices == 1 else build_sharded
        self.model: ParallelModel = make_model(root, plan, self._inputs, self._finish, self._wanted)
        self._kernels = FasterKernels(root, options)
        self._tied_embedding = TiedEmbedding(causal)
        head = causal.get_output_embeddings()
        # Inside of another module, as BERT's, it gets what that one makes of all positions.
        self._chooses_positions = any(place.module is head for place in self.model.decoder.post_layers)
        self._chooses_positions &= (
            options.uses("logits_at_labels") and not self._has_unknown_part and not plan.sequence_parallel
        )

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for the whole batch, which every worker is called with; collective.

        With labels and gradients switched on, this computes the gradients too. They reach the parameters when the script calls
        `loss.backward()`, times what the script has made of the loss.

        Raises:
            OptionError: the call asks for what a divided model cannot give.
            WorkerError: the workers were called with different batches.
        """
        if has_call_hooks(self.model.decoder.root):
            raise OptionError(f"a forward hook on the whole model would see no worker's call of it: {ONE_WORKER}")
        as_tuple = kwargs.get("return_dict") is False
        inputs = read_inputs(self.model.decoder.causal, args, kwargs)
        if self.plan.devices > 1:
            check_same_on_all_ranks(inputs, self.model.mesh.device)
        if inputs.labels is None:
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.compute_params.values()):
                raise OptionError(
                    "the model was called with gradients but without labels: a model that is divided over workers computes its "
                    "gradients in the call, so pass labels; without them, call it under torch.no_grad()"
                )
            return self._logits(inputs, as_tuple=as_tuple)
        if torch.is_grad_enabled() and uses_fp16_loss_scaling(self.model.mesh.device):
            raise OptionError(
                "training in float16: gradients are computed in the call, before the script scales the loss, and most would "
                f"vanish; use bfloat16, or {ONE_WORKER}"
            )
        loss = self.loss(inputs)
        return (loss,) if as_tuple else LossOutput(loss=loss)

    def loss(self, inputs: ModelInputs) -> torch.Tensor:
        """The loss of a batch with labels, which computes the gradients as `call` does.

        Raises:
            IndexError: a label is no token, as in torch.
        """
        assert inputs.labels is not None
        wrong = (inputs.labels != IGNORED) & ((inputs.labels < 0) | (inputs.labels >= self._vocabulary))
        if bool(wrong.any()):
            raise IndexError(f"Target {int(inputs.labels[wrong][0])} is out of bounds.")
        return self._train(inputs) if torch.is_grad_enabled() else self._evaluate(inputs)

    def _train(self, inputs: ModelInputs) -> torch.Tensor:
        mesh = self.model.mesh
        keeps_memory = self._options.uses("keep_freed_memory") and mesh.device.type == "cpu"
        if keeps_memory:
            before_training_step(self._steps)
        shape = self._cut(inputs, self.plan.micro_batches)
        earlier = self._stash_grads()
        with self._computing(), self._own_draws():
            losses = run_forward_backward(self.model, len(self._micro_batches), shape)
            self._tied_embedding.add_gradient()
            gradients = collect_grads(self.model)
        self._micro_batches = []
        for parameter, gradient in earlier:
            parameter.grad = gradient
        total = self._over_ranks(losses)
        if keeps_memory:
            after_training_step(self._steps)
        self._steps += 1
        if self.plan.devices == 1:
            return loss_with_computed_grads(
                total, [(self.model.compute_params[name], one) for name, one in gradients.items()]
            )
        return loss_with_deferred_grads(total, self.model, gradients)

    def _evaluate(self, inputs: ModelInputs) -> torch.Tensor:
        shape = self._cut(inputs, self._fewest_micro_batches(inputs.rows))
        with self._computing(), self._draws_of_evaluation():
            losses = forward(self.model, len(self._micro_batches), lambda _: shape, self.model.mesh.device)
        self._micro_batches = []
        return self._over_ranks(losses)

    def _logits(self, inputs: ModelInputs, *, as_tuple: bool) -> Any:
        """Logits `[batch, sequence, vocabulary]` on every worker. Each data-parallel rank computes all rows."""
        mesh = self.model.mesh
        kept = _kept_positions(inputs)
        whole = padded(inputs, inputs.rows, self._sequence_multiple)
        if (
            self.plan.sequence_parallel
        ):  # the output layer sees a part of the positions only: they are chosen afterwards
            whole = replace(whole, others={k: v for k, v in whole.others.items() if k != _KEEP})
        self._micro_batches = [slice_rows(whole, 0, whole.rows, mesh.device)]
        shape = self._hidden_shape(whole.rows, whole.sequence_length)
        with self._computing(), self._draws_of_evaluation():
            outputs = forward(self.model, 1, lambda _: shape, mesh.device)
        self._micro_batches = []
        positions = whole.sequence_length if self.plan.sequence_parallel else len(kept)
        logits = self._from_last_stage(outputs[0] if outputs else None, (whole.rows, positions))
        if self.plan.sequence_parallel:
            logits = logits[:, kept]
        return (logits,) if as_tuple else CausalLMOutputWithPast(logits=logits)

    def _inputs(self, number: int) -> dict[str, Any]:
        """What the model is called with for a micro-batch."""
        batch = self._micro_batches[number]
        return {**batch.others, **batch.tensors, "use_cache": False}

    def _finish(self, outputs: Any, number: int) -> torch.Tensor:
        """The part of the loss that a micro-batch contributes, or its logits if it has no labels."""
        batch = self._micro_batches[number]
        mesh, vocabulary = self.model.mesh, self._vocabulary
        group = mesh.group("tensor") if self.plan.tensor > 1 else None
        if batch.labels is None:
            return gather_logits(outputs.logits, group, vocabulary) if group is not None else outputs.logits
        wanted = self._wanted(number)
        labels = batch.labels if wanted is None else batch.labels.flatten()[wanted].unsqueeze(0)
        losses = vocab_parallel_cross_entropy(outputs.logits, labels, group, vocabulary)
        return losses.sum() / batch.loss_divisor

    def _wanted(self, number: int) -> torch.Tensor | None:
        """The positions of a micro-batch that reach the output layer. Sequence-parallel ranks have a part of each row there."""
        batch = self._micro_batches[number]
        if batch.labels is None or not self._chooses_positions:
            return None
        return label_positions(batch)

    def _cut(self, inputs: ModelInputs, micro_batches: int) -> tuple[int, int, int]:
        """Cut a batch into this rank's micro-batches; the shape of hidden states between stages."""
        lengths = useful_lengths(inputs) if self._skip_padding else all_lengths(inputs)
        place = self.plan.data, self.model.mesh, self._sequence_multiple
        filled_up = inputs.sequence_length + -inputs.sequence_length % self._sequence_multiple
        tokens = self.tokens or self.plan.micro_batch_size * filled_up
        packing = self._skip_padding and self._options.uses("pack_rows") and not self._has_unknown_part
        causal = self.model.decoder.causal
        shared = 0
        if packing and self._options.uses("share_prefix"):
            shared = shared_prefix(self.model.decoder.root, causal.config.get_text_config(), inputs, lengths)
        pipelined = self.plan.pipeline > 1
        parts = (
            self.plan.data * micro_batches if pipelined else num_packed_rows(lengths, tokens, self.plan.data, shared)
        )
        if packing and can_pack(causal, inputs, lengths, parts, self.model.mesh, shared):
            self._micro_batches = pack_micro_batches(causal, inputs, lengths, parts, *place, shared)
        elif pipelined:
            self._micro_batches = equal_micro_batches(inputs, lengths, micro_batches, *place)
        else:
            self._micro_batches = micro_batches_by_length(inputs, lengths, tokens, *place)
        return self._hidden_shape(self._micro_batches[0].rows, self._micro_batches[0].sequence_length)

    @property
    def _sequence_multiple(self) -> int:
        return self.plan.tensor if self.plan.sequence_parallel else 1

    def _hidden_shape(self, rows: int, sequence_length: int) -> tuple[int, int, int]:
        hidden = self.model.decoder.causal.config.get_text_config().hidden_size
        return rows, sequence_length // self._sequence_multiple, hidden

    def _fewest_micro_batches(self, rows: int) -> int:
        """Micro-batches for an evaluation, none larger than in training."""
        return -(-rows // (self.plan.data * self.plan.micro_batch_size))

    def _over_ranks(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The loss of the whole batch on every rank."""
        mesh = self.model.mesh
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        if mesh.rank("tensor") == 0:
            for loss in losses:
                total += loss
        mesh.reduce(total)
        dtype = torch.promote_types(next(iter(self.model.compute_params.values())).dtype, torch.float32)
        return total.to(dtype)

    def _from_last_stage(self, logits: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
        if self.plan.pipeline == 1:
            assert logits is not None
            return logits
        mesh = self.model.mesh
        last = mesh.global_rank(stage_placements(self.plan)[-1].pipeline_rank, mesh.rank("data"), mesh.rank("tensor"))
        if logits is None:
            logits = torch.empty(
                *shape, self._vocabulary, dtype=next(iter(self.model.compute_params.values())).dtype, device=mesh.device
            )
        logits = logits.contiguous()
        dist.broadcast(logits, last, group=mesh.group("pipeline"))
        return logits

    def _own_draws(self) -> AbstractContextManager[None]:
        """Several workers draw for dropout from generators of their own, one from that of the script as without the hook."""
        return rank_local_rng(self.model.mesh) if self.plan.devices > 1 else nullcontext()

    def _draws_of_evaluation(self) -> AbstractContextManager[None]:
        """Dropout that a script has left on in an evaluation must not bring the workers' generators out of step."""
        return self._own_draws() if self.model.decoder.root.training else nullcontext()

    def _stash_grads(self) -> list[tuple[nn.Parameter, torch.Tensor | None]]:
        """Gradients of earlier calls, which must not mix with those that this call computes."""
        earlier: list[tuple[nn.Parameter, torch.Tensor | None]] = []
        for parameter in self.model.compute_params.values():
            if parameter.grad is not None:
                earlier.append((parameter, parameter.grad))
                parameter.grad = None
        return earlier

    @contextmanager
    def _computing(self) -> Iterator[None]:
        install_compute_params(self.model)
        try:
            by_rows = self._options.uses("sparse_embedding") and self.plan.devices == 1
            with self._kernels.bound(), self._tied_embedding.deferred_gradient() if by_rows else nullcontext():
                yield
        finally:
            for module in self.model.sharded_modules():
                module.reshard()
            install_user_params(self.model)


def _kept_positions(inputs: ModelInputs) -> torch.Tensor:
    """The positions whose logits were asked for: all, the last ones, or those that are listed."""
    kept = inputs.others.get(_KEEP, 0)
    positions = torch.arange(inputs.sequence_length)
    return positions[kept] if isinstance(kept, torch.Tensor) else positions[-kept:]

"""A sharded model as a script calls it: a training step, an evaluation, or logits.

The script's call goes here from the hook (`MultiWorkerHook`, `FastPath`). With labels and gradients it runs the
forward and the backward passes of all micro-batches, and returns a loss whose own backward pass hands the gradients
over to the script.
"""

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
from moreh.models.losses import IGNORED_LABEL, is_known_loss, token_loss_of
from moreh.options import ParallelOptions
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.batch_cutter import BatchCutter
from moreh.runtime.batch.input_gradients import InputGrad, detached_inputs, reduced_grad
from moreh.runtime.batch.loss_output import LossOutput, loss_with_computed_grads
from moreh.runtime.batch.micro_batches import is_causal_model, label_positions
from moreh.runtime.batch.model_inputs import (
    LOGITS_TO_KEEP,
    ONE_WORKER,
    ModelInputs,
    check_same_on_all_ranks,
    kept_positions,
    pad_inputs,
    read_inputs,
    slice_rows,
)
from moreh.runtime.engine.gradients import collect_grads, loss_with_deferred_grads
from moreh.runtime.engine.parallel_model import (
    ParallelModel,
    build_sharded,
    build_unsharded,
    install_compute_params,
    install_user_params,
)
from moreh.runtime.engine.schedule import run_forward, run_forward_backward
from moreh.runtime.kernels.allocator import after_training_step, before_training_step
from moreh.runtime.kernels.faster_kernels import FasterKernels
from moreh.runtime.kernels.tied_embedding import TiedEmbedding
from moreh.runtime.sharding.placement import stage_placements
from moreh.runtime.sharding.rng import rank_local_rng
from moreh.runtime.tensor.vocab_parallel import gather_logits, vocab_parallel_cross_entropy
from moreh.trace import span


class ModelRunner:
    """This rank's part in computing a model: the model, and the micro-batches of the call that is going on."""

    def __init__(self, root: nn.Module, plan: Plan, options: ParallelOptions) -> None:
        reason = unsupported_reason(root)
        if reason is not None:
            raise OptionError(f"{reason}, which is not computed on several workers: {ONE_WORKER}")
        if plan.devices > 1 and has_gradient_hooks(root):
            raise OptionError(f"hooks on gradients would not see those of all workers: {ONE_WORKER}")
        causal: Any = unwrapped(root)
        # Asked before sharding changes classes. A module of the script's own may see whole rows, so it gets them.
        is_token_wise = unsupported_module(root) is None
        skip_padding = options.uses("skip_padding") and is_causal_model(causal) and is_token_wise
        self.plan = plan
        # Tokens of a micro-batch at most; None for as many as the plan's rows have.
        self.max_tokens: int | None = None
        self._options = options
        self._micro_batches: list[ModelInputs] = []
        self._vocabulary_size = causal.get_output_embeddings().weight.shape[0]
        self._training_steps = 0
        make_model = build_unsharded if plan.devices == 1 else build_sharded
        self.model: ParallelModel = make_model(
            root, plan, self._micro_batch_inputs, self._micro_batch_output, self._logit_positions
        )
        self._kernels = FasterKernels(root, options)
        self._tied_embedding = TiedEmbedding(causal)
        self._cutter = BatchCutter(
            self.model.parts,
            plan,
            self.model.mesh,
            skip_padding=skip_padding,
            pack_rows=skip_padding and options.uses("pack_rows") and is_token_wise,
            share_prefix=options.uses("share_prefix"),
        )
        # An output layer inside of another module, as BERT's, gets what that module makes of all positions.
        head = causal.get_output_embeddings()
        self._chooses_positions = any(slot.module is head for slot in self.model.parts.post_layers)
        self._chooses_positions &= options.uses("logits_at_labels") and is_token_wise and not plan.sequence_parallel

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for the whole batch, which every rank is called with; collective.

        With labels and gradients switched on, this computes the gradients too. They reach the parameters when the
        script calls `loss.backward()`, times what the script has made of the loss.

        Raises:
            OptionError: the call asks for what a sharded model cannot give.
            WorkerError: the ranks were called with different batches.
        """
        if has_call_hooks(self.model.parts.root):
            raise OptionError(f"a forward hook on the whole model would see no worker's call of it: {ONE_WORKER}")
        as_tuple = kwargs.get("return_dict") is False
        with span("check_inputs"):
            inputs = read_inputs(self.model.parts.causal, args, kwargs)
            if self.plan.devices > 1:
                check_same_on_all_ranks(inputs, self.model.mesh.device)
        if inputs.labels is None:
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.compute_params.values()):
                raise OptionError(
                    "the model was called with gradients but without labels: a model that is sharded over workers "
                    "computes its gradients in the call, so pass labels; without them, call it under torch.no_grad()"
                )
            return self._logits(inputs, as_tuple=as_tuple)
        if torch.is_grad_enabled() and uses_fp16_loss_scaling(self.model.mesh.device):
            raise OptionError(
                "training in float16: gradients are computed in the call, before the script scales the loss, and most "
                f"would vanish; use bfloat16, or {ONE_WORKER}"
            )
        loss = self.loss(inputs)
        return (loss,) if as_tuple else LossOutput(loss=loss)

    def loss(self, inputs: ModelInputs) -> torch.Tensor:
        """The loss of a batch with labels; computes the gradients as `call` does.

        Raises:
            IndexError: a label is no token, as in torch.
            OptionError: the script has given the model a loss function that was not registered.
        """
        assert inputs.labels is not None
        labels, loss_function = inputs.labels, self.model.parts.causal.loss_function
        wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= self._vocabulary_size))
        if bool(wrong.any()):
            raise IndexError(f"Target {int(labels[wrong][0])} is out of bounds.")
        if not is_known_loss(loss_function):
            raise OptionError(
                f"the loss function {loss_function!r} is not known to be a sum over tokens: register its token loss "
                f"with moreh.models.losses.register_token_loss, or {ONE_WORKER}"
            )
        return self._train(inputs) if torch.is_grad_enabled() else self._evaluate(inputs)

    def _train(self, inputs: ModelInputs) -> torch.Tensor:
        model = self.model
        differentiable: list[InputGrad] = []
        if self.plan.devices > 1:
            inputs, differentiable = detached_inputs(inputs, self.plan)
        keeps_memory = self._options.uses("keep_freed_memory") and model.mesh.device.type == "cpu"
        if keeps_memory:
            before_training_step(self._training_steps)
        hidden_shape = self._cut_batch(inputs, self.plan.micro_batches)
        stashed_grads = self._stash_grads()
        with self._computing(), self._rank_local_rng():
            with span("forward_backward"):
                losses = run_forward_backward(model, len(self._micro_batches), hidden_shape)
            self._tied_embedding.add_gradient()
            grads = collect_grads(model)
        self._micro_batches = []
        input_grads = [(entry.tensor, reduced_grad(entry, model.mesh)) for entry in differentiable]
        for parameter, grad in stashed_grads:
            parameter.grad = grad
        loss = self._sum_over_ranks(losses)
        if keeps_memory:
            after_training_step(self._training_steps)
        self._training_steps += 1
        if self.plan.devices == 1:
            return loss_with_computed_grads(loss, [(model.compute_params[name], grad) for name, grad in grads.items()])
        return loss_with_deferred_grads(loss, model, grads, input_grads)

    def _evaluate(self, inputs: ModelInputs) -> torch.Tensor:
        with span("evaluate"):
            # As few micro-batches as there can be, none larger than in training.
            hidden_shape = self._cut_batch(
                inputs, -(-inputs.batch_size // (self.plan.data * self.plan.micro_batch_size))
            )
            with self._computing(), self._evaluation_rng():
                losses = run_forward(self.model, len(self._micro_batches), hidden_shape)
            self._micro_batches = []
            return self._sum_over_ranks(losses)

    def _logits(self, inputs: ModelInputs, *, as_tuple: bool) -> Any:
        """Logits `[batch, sequence, vocabulary]` on every rank. Each data-parallel rank computes all rows."""
        mesh = self.model.mesh
        kept = kept_positions(inputs)
        padded = pad_inputs(inputs, inputs.batch_size, self._cutter.sequence_multiple)
        if self.plan.sequence_parallel:
            # The output layer sees a part of the positions only: they are chosen afterwards.
            padded = replace(padded, others={k: v for k, v in padded.others.items() if k != LOGITS_TO_KEEP})
        self._micro_batches = [slice_rows(padded, 0, padded.batch_size, mesh.device)]
        with span("logits"), self._computing(), self._evaluation_rng():
            outputs = run_forward(self.model, 1, self._hidden_shape(padded))
        self._micro_batches = []
        num_positions = padded.sequence_length if self.plan.sequence_parallel else len(kept)
        logits = self._from_last_stage(outputs[0] if outputs else None, (padded.batch_size, num_positions))
        if self.plan.sequence_parallel:
            logits = logits[:, kept]
        return (logits,) if as_tuple else CausalLMOutputWithPast(logits=logits)

    def _micro_batch_inputs(self, index: int) -> dict[str, Any]:
        """What the model is called with for a micro-batch."""
        micro_batch = self._micro_batches[index]
        return {**micro_batch.others, **micro_batch.tensors, "use_cache": False}

    def _micro_batch_output(self, outputs: Any, index: int) -> torch.Tensor:
        """What a micro-batch contributes to the loss, a scalar; its logits if it has no labels."""
        micro_batch = self._micro_batches[index]
        group = self.model.mesh.group("tensor") if self.plan.tensor > 1 else None
        if micro_batch.labels is None:
            return gather_logits(outputs.logits, group, self._vocabulary_size) if group is not None else outputs.logits
        positions = self._logit_positions(index)
        labels = micro_batch.labels if positions is None else micro_batch.labels.flatten()[positions].unsqueeze(0)
        token_loss = token_loss_of(self.model.parts.causal.loss_function, vocab_parallel_cross_entropy)
        return token_loss(outputs.logits, labels, group, self._vocabulary_size).sum() / micro_batch.loss_divisor

    def _logit_positions(self, index: int) -> torch.Tensor | None:
        """The positions of a micro-batch that reach the output layer; None for all.

        Sequence-parallel ranks have a part of each row there, and choose none.
        """
        micro_batch = self._micro_batches[index]
        if micro_batch.labels is None or not self._chooses_positions:
            return None
        return label_positions(micro_batch)

    def _cut_batch(self, inputs: ModelInputs, num_micro_batches: int) -> tuple[int, int, int]:
        """Cut a batch into this rank's micro-batches; the shape of the hidden states between stages."""
        with span("cut_batch"):
            self._micro_batches = self._cutter.cut(inputs, num_micro_batches, self.max_tokens)
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
                mesh.reduce(total)
        return total.to(torch.promote_types(self.model.dtype, torch.float32))

    def _from_last_stage(self, logits: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
        """The logits `[*shape, vocabulary]` on every pipeline rank; the last stage's rank has them."""
        if self.plan.pipeline == 1:
            assert logits is not None
            return logits
        mesh = self.model.mesh
        last_rank = stage_placements(self.plan)[-1].pipeline_rank
        source = mesh.global_rank(last_rank, mesh.rank("data"), mesh.rank("tensor"))
        if logits is None:
            logits = torch.empty(*shape, self._vocabulary_size, dtype=self.model.dtype, device=mesh.device)
        logits = logits.contiguous()
        with span("broadcast_logits", logits.nbytes):
            dist.broadcast(logits, source, group=mesh.group("pipeline"))
        return logits

    def _rank_local_rng(self) -> AbstractContextManager[None]:
        """Ranks draw dropout from generators of their own. One worker draws from the script's, as without the hook."""
        return rank_local_rng(self.model.mesh) if self.plan.devices > 1 else nullcontext()

    def _evaluation_rng(self) -> AbstractContextManager[None]:
        """Dropout that a script has left on in an evaluation must not bring the ranks' generators out of step."""
        return self._rank_local_rng() if self.model.parts.root.training else nullcontext()

    def _stash_grads(self) -> list[tuple[nn.Parameter, torch.Tensor | None]]:
        """Take off the gradients of earlier calls, which must not mix with those that this call computes."""
        stashed: list[tuple[nn.Parameter, torch.Tensor | None]] = []
        for parameter in self.model.compute_params.values():
            if parameter.grad is not None:
                stashed.append((parameter, parameter.grad))
                parameter.grad = None
        return stashed

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """While the stages compute, the modules have the compute parameters and the faster kernels."""
        install_compute_params(self.model)
        try:
            by_rows = self._options.uses("sparse_embedding") and self.plan.devices == 1
            with self._kernels.bound(), self._tied_embedding.deferred_gradient() if by_rows else nullcontext():
                yield
        finally:
            for module in self.model.fsdp_modules():
                module.reshard()
            install_user_params(self.model)

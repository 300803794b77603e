"""Cuts a batch into this rank's micro-batches: packed rows, or rows of one shape or of similar length."""

from dataclasses import dataclass

from moreh.models.parts import ModelParts
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.micro_batches import (
    equal_micro_batches,
    full_lengths,
    micro_batches_by_length,
    useful_lengths,
)
from moreh.runtime.batch.model_inputs import ModelInputs
from moreh.runtime.batch.packing import can_pack, num_packed_rows, pack_micro_batches
from moreh.runtime.batch.shared_prefix import shared_prefix
from moreh.runtime.sharding.mesh import Mesh


@dataclass(frozen=True)
class BatchCutter:
    """Cuts the batches of one model into micro-batches."""

    parts: ModelParts
    """The model."""
    plan: Plan
    """The plan of the model."""
    mesh: Mesh
    """This rank among the ranks of the plan."""
    skip_padding: bool
    """Drop the tokens after each sequence's last label."""
    pack_rows: bool
    """Pack sequences into rows of one length if that does not change the model's results."""
    share_prefix: bool
    """Compute the tokens that all sequences begin with only once in each packed row."""

    @property
    def sequence_multiple(self) -> int:
        """Sequences are padded to a multiple of this length, so that sequence-parallel ranks have equal parts."""
        return self.plan.tensor if self.plan.sequence_parallel else 1

    def cut(self, inputs: ModelInputs, num_micro_batches: int, max_tokens: int | None) -> list[ModelInputs]:
        """This rank's micro-batches, on the device that computes them.

        A pipeline gets `num_micro_batches` of one shape. Otherwise a micro-batch has at most `max_tokens` tokens, or
        one row. If `max_tokens` is None, it is the number of tokens in a micro-batch of the plan.
        """
        seq_lens = useful_lengths(inputs) if self.skip_padding else full_lengths(inputs)
        ranks = self.plan.data, self.mesh, self.sequence_multiple
        padded_length = inputs.sequence_length + -inputs.sequence_length % self.sequence_multiple
        max_tokens = max_tokens or self.plan.micro_batch_size * padded_length
        causal = self.parts.causal
        prefix_len = 0
        # Variable-length attention on GPUs takes the keys of a sequence from one place.
        if self.pack_rows and self.share_prefix and self.mesh.device.type == "cpu":
            prefix_len = shared_prefix(self.parts.root, causal.config.get_text_config(), inputs, seq_lens)
        has_pipeline = self.plan.pipeline > 1
        num_rows = (
            self.plan.data * num_micro_batches
            if has_pipeline
            else num_packed_rows(seq_lens, max_tokens, self.plan.data, prefix_len, self.mesh.device)
        )
        if self.pack_rows and can_pack(causal, inputs, seq_lens, num_rows, self.mesh, prefix_len):
            return pack_micro_batches(causal, inputs, seq_lens, num_rows, *ranks, prefix_len)
        if has_pipeline:
            return equal_micro_batches(inputs, seq_lens, num_micro_batches, *ranks)
        return micro_batches_by_length(inputs, seq_lens, max_tokens, *ranks)

"""What a batch of a GPU passes through: decisions by the type of the device, copies, masks that are made there."""

from types import SimpleNamespace

import pytest
import torch

from moreh.runtime.batch import host_copies, packing
from moreh.runtime.batch.micro_batches import label_positions, useful_lengths
from moreh.runtime.batch.model_inputs import read_inputs, slice_rows, with_labels_on
from moreh.runtime.kernels import row_chunks
from moreh.runtime.kernels.attention import varlen
from moreh.runtime.sharding.mesh import single_rank_mesh
from tests.helpers.fast_path_cases import batch
from tests.helpers.models.families import make_model

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
META = torch.device("meta")


@pytest.fixture
def inputs():
    model = make_model("llama")
    return model, read_inputs(model, (), batch(model))


@pytest.mark.parametrize("is_usable", [True, False])
def test_rows_are_packed_where_attention_can_compute_them(inputs, is_usable, monkeypatch):
    model, read = inputs
    monkeypatch.setattr(varlen, "is_usable", lambda device, dtype: is_usable)
    seq_lens = useful_lengths(read)
    assert packing.can_pack(model, read, seq_lens, 2, single_rank_mesh(GPU)) == is_usable
    assert packing.can_pack(model, read, seq_lens, 2, single_rank_mesh(CPU))


def test_rows_of_one_length_are_not_packed_on_a_gpu(inputs, monkeypatch):
    model, read = inputs
    monkeypatch.setattr(varlen, "is_usable", lambda device, dtype: True)
    assert not packing.can_pack(model, read, torch.full((read.batch_size,), 6), 2, single_rank_mesh(GPU))


def test_rows_are_longer_on_a_gpu():
    seq_lens = torch.full((16,), 900)
    assert packing.num_packed_rows(seq_lens, 10**6, 1) == 5
    assert packing.num_packed_rows(seq_lens, 10**6, 1, device=GPU) == 4
    assert packing.num_packed_rows(seq_lens, 1800, 1, device=GPU) == 8


def test_mask_that_is_made_on_the_device_is_the_same(inputs):
    model, read = inputs
    rows = packing.pack_micro_batches(model, read, useful_lengths(read), 2, 1, single_rank_mesh(CPU), 1)
    for row in rows:
        made = packing._mask_made_on(CPU, row.others["cu_seq_lens_q"])
        assert torch.equal(made, row.tensors["attention_mask"])


def test_label_positions_are_found_in_the_cpus_memory(inputs, few_label_positions):
    _, read = inputs
    expected = label_positions(slice_rows(read, 0, 4, CPU))
    moved = slice_rows(read, 0, 4, META)
    assert moved.labels.device == META
    assert torch.equal(moved.host_labels, read.labels[:4])
    positions = label_positions(moved)
    assert positions.device == META
    assert len(positions) == len(expected)


def test_labels_that_stay_are_kept_once(inputs):
    _, read = inputs
    assert with_labels_on(CPU, read) is read


def test_whole_numbers_come_to_the_cpu_with_one_wait(monkeypatch):
    waits = []
    monkeypatch.setattr(host_copies, "_is_of_numbers_on_gpu", lambda tensor: not tensor.is_floating_point())
    monkeypatch.setattr(host_copies, "copy_to_pinned", lambda tensor: tensor + 1)
    stream = SimpleNamespace(synchronize=lambda: waits.append(None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    ids, mask, embeddings = torch.tensor([1]), torch.tensor([2]), torch.tensor([0.5])
    args, kwargs = host_copies.on_host((ids,), {"attention_mask": mask, "x": embeddings, "labels": ids, "use_cache": 0})
    assert args[0].tolist() == [2]
    assert kwargs["attention_mask"].tolist() == [3]
    assert kwargs["labels"] is args[0]
    assert kwargs["x"] is embeddings
    assert kwargs["use_cache"] == 0
    assert len(waits) == 1


def test_a_batch_in_the_cpus_memory_is_not_copied():
    ids = torch.tensor([1])
    args, kwargs = host_copies.on_host((ids,), {"labels": ids})
    assert args[0] is ids
    assert kwargs["labels"] is ids


def test_chunks_are_larger_on_gpus():
    rows = torch.empty(2**10, 2**17, device=META)
    assert row_chunks.chunk_elements("cpu") == 2**19
    assert sum(1 for _ in row_chunks.chunks(rows)) == 2
    assert row_chunks.chunk_elements("cuda") == 2**26

"""Loops over a few rows at a time, and the reusable buffers of kernels."""

import threading

import pytest
import torch

from moreh.runtime.kernels import row_chunks
from moreh.runtime.kernels.row_chunks import chunks, scratch

SHAPE = torch.Size([3, 5])


@pytest.fixture(autouse=True)
def _no_buffers(monkeypatch):
    monkeypatch.setattr(row_chunks, "_buffers", threading.local())


@pytest.mark.parametrize("chunk_elements", [1, 10, 1000])
def test_chunks_have_every_row_once_and_few_elements(monkeypatch, chunk_elements):
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", chunk_elements)
    wide, narrow = torch.arange(35).view(1, 7, 5), torch.arange(7).view(1, 7, 1)
    pairs = list(chunks(wide, narrow))
    assert max(chunk.numel() for chunk, _ in pairs) <= max(chunk_elements, 5)
    assert torch.equal(torch.cat([chunk for chunk, _ in pairs]), wide[0])
    assert torch.equal(torch.cat([chunk for _, chunk in pairs]), narrow[0])


def test_scratch_reuses_memory_for_a_slot_and_dtype_only():
    first = scratch(0, SHAPE, torch.float32)
    assert scratch(0, torch.Size([2, 2]), torch.float32).data_ptr() == first.data_ptr()
    others = [
        scratch(1, SHAPE, torch.float32),
        scratch(0, SHAPE, torch.float64),
        scratch(0, torch.Size([9, 9]), torch.float32),
    ]
    assert len({buffer.data_ptr() for buffer in (first, *others)}) == 4


def test_scratch_of_threads_is_not_shared():
    buffers = [scratch(0, SHAPE, torch.float32)]
    thread = threading.Thread(target=lambda: buffers.append(scratch(0, SHAPE, torch.float32)))
    thread.start()
    thread.join()
    assert buffers[0].data_ptr() != buffers[1].data_ptr()


def test_scratch_keeps_no_large_buffers(monkeypatch):
    monkeypatch.setattr(row_chunks, "MAX_SCRATCH_BYTES", 4 * SHAPE.numel() - 1)
    assert scratch(0, SHAPE, torch.float32).shape == SHAPE
    assert not vars(row_chunks._buffers)


def test_scratch_of_inference_mode_is_writable_afterwards():
    with torch.inference_mode():
        scratch(0, SHAPE, torch.float32)
    scratch(0, SHAPE, torch.float32).zero_()


def test_scratch_is_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        scratch(0, SHAPE, torch.float32)
    assert scratch(0, SHAPE, torch.float32).device.type == "cpu"

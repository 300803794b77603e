"""Rows a few at a time, and the memory that kernels work in."""

import threading

import pytest
import torch

from moreh.runtime.kernels import row_chunks as chunks
from moreh.runtime.kernels.row_chunks import scratch

SHAPE = torch.Size([3, 5])


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(chunks, "_kept", threading.local())


@pytest.mark.parametrize("elements", [1, 10, 1000])
def test_every_row_once(monkeypatch, elements):
    monkeypatch.setattr(chunks, "CHUNK", elements)
    wide, narrow = torch.arange(35).view(1, 7, 5), torch.arange(7).view(1, 7, 1)
    parts = list(chunks.chunks(wide, narrow))
    assert max(part.numel() for part, _ in parts) <= max(elements, 5)
    assert torch.equal(torch.cat([part for part, _ in parts]), wide[0])
    assert torch.equal(torch.cat([part for _, part in parts]), narrow[0])


def test_a_number_and_type_have_one_memory():
    first = scratch(0, SHAPE, torch.float32)
    assert scratch(0, torch.Size([2, 2]), torch.float32).data_ptr() == first.data_ptr()
    others = [
        scratch(1, SHAPE, torch.float32),
        scratch(0, SHAPE, torch.float64),
        scratch(0, torch.Size([9, 9]), torch.float32),
    ]
    assert len({one.data_ptr() for one in (first, *others)}) == 4


def test_threads_have_their_own():
    found = [scratch(0, SHAPE, torch.float32)]
    thread = threading.Thread(target=lambda: found.append(scratch(0, SHAPE, torch.float32)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != found[1].data_ptr()


def test_large_tensors_are_not_kept(monkeypatch):
    monkeypatch.setattr(chunks, "KEPT_BYTES", 4 * SHAPE.numel() - 1)
    assert scratch(0, SHAPE, torch.float32).shape == SHAPE
    assert not vars(chunks._kept)


def test_usable_after_inference():
    with torch.inference_mode():
        scratch(0, SHAPE, torch.float32)
    scratch(0, SHAPE, torch.float32).zero_()


def test_on_the_processor_whatever_the_default_is():
    with torch.device("meta"):
        scratch(0, SHAPE, torch.float32)
    assert scratch(0, SHAPE, torch.float32).device.type == "cpu"

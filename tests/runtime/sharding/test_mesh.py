"""Where messages between ranks lie; workers on one GPU send them through the CPU's memory."""

import pytest
import torch

from moreh import option
from moreh.accelerator.gpus import shares_gpus
from moreh.errors import OptionError
from moreh.runtime.sharding.mesh import outgoing, transfer_device
from tests.helpers.fake_gpus import A100, show_gpus

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("value", "device"), [("1", torch.device("cpu")), ("0", GPU), ("", GPU)])
def test_messages_of_workers_on_one_gpu_lie_in_the_cpus_memory(monkeypatch, value, device):
    monkeypatch.setenv("MOREH_SHARE_GPUS", value)
    assert transfer_device(GPU) == device


def test_a_message_is_contiguous():
    assert outgoing(torch.ones(3, 4).t()).is_contiguous()


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("MOREH_SHARE_GPUS", "yes")
    with pytest.raises(OptionError, match="MOREH_SHARE_GPUS='yes': expected 1"):
        shares_gpus()


def test_more_workers_than_gpus_only_where_they_may_share_them(monkeypatch):
    show_gpus(monkeypatch, [A100])
    monkeypatch.setenv("MOREH_WORKERS", "2")
    with pytest.raises(OptionError, match="MOREH_SHARE_GPUS=1"):
        option._workers_to_start()
    monkeypatch.setenv("MOREH_SHARE_GPUS", "1")
    assert option._workers_to_start() == 2

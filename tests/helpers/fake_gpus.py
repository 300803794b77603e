"""GPUs that torch and their driver seem to see. Nothing can be computed on them."""

from types import SimpleNamespace

import torch

A100 = "NVIDIA A100-SXM4-40GB"
A100_BYTES = 40_536 * 2**20  # 39.6 GiB


def show_gpus(monkeypatch, names, total_bytes=A100_BYTES, compute_units=108, used_bytes=2**30, **sensors):
    """Let torch.cuda tell of GPUs with these names.

    `sensors` are answers of torch.cuda.utilization, temperature and power_draw by index; those not given fail as they
    do without pynvml.
    """
    properties = [
        SimpleNamespace(name=name, total_memory=total_bytes, multi_processor_count=compute_units) for name in names
    ]

    def without_pynvml(index):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: len(names),
        "get_device_properties": lambda index: properties[index],
        "get_device_name": lambda index=0: names[index],
        "mem_get_info": lambda index=0: (total_bytes - used_bytes, total_bytes),
        "memory_reserved": lambda index=None: 0,
        "is_current_stream_capturing": lambda: False,
        **dict.fromkeys(("device_memory_used", "utilization", "temperature", "power_draw"), without_pynvml),
        **sensors,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    # A CUDA build of torch finds an accelerator then, and optimizers ask for its stream.
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: SimpleNamespace(is_capturing=lambda: False))

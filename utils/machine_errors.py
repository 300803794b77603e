"""One-line errors for lack of memory and for killed processes."""

import re

from moreh.system import available_memory_bytes

_ON_CPU = re.compile(r"DefaultCPUAllocator: (?:can't|not enough)[^:]*(?:: you tried to allocate (\d+) bytes)?")
_ON_GPU = re.compile(
    r"out of memory\. Tried to allocate ([\d.]+ \w+)\.(?:.*?of which ([\d.]+ \w+) is free)?", re.DOTALL
)
_OF_NUMPY = re.compile(r"Unable to allocate ([\d.]+ \w+)")
_LOADER = re.compile(r"DataLoader worker \(pid(?:\(s\))?:? [^)]*\)[^\n]*")
_SMALLER = "lower train.batch_size (and raise train.gradient_accumulation), data.max_length or the size of the model"


def out_of_memory_text(error: BaseException) -> str | None:
    """A message about a real lack of memory: the need, the free memory, the remedy; None for another error."""
    text = str(error)
    on_gpu = _ON_GPU.search(text)
    if on_gpu is not None:
        free = f", and {on_gpu[2]} are free" if on_gpu[2] else ""
        return f"a GPU is out of memory: {on_gpu[1]} more are needed{free}; {_SMALLER}, or use more GPUs"
    on_cpu = _ON_CPU.search(text)
    if on_cpu is None and not isinstance(error, MemoryError):
        return None
    of_numpy = _OF_NUMPY.search(text)
    needed = "more memory is"
    if on_cpu is not None and on_cpu[1]:
        needed = f"{int(on_cpu[1]) / 2**30:.2f} GiB more are"
    elif of_numpy is not None:
        needed = f"{of_numpy[1]} more are"
    free = f"{available_memory_bytes() / 2**30:.2f} GiB"
    return f"this machine is out of memory: {needed} needed, and {free} are free; {_SMALLER}, or use fewer workers"


def dead_loader_text(error: BaseException) -> str | None:
    """A message about a data-loading process that has died; None for another error."""
    said = _LOADER.search(str(error))
    if said is None:
        return None
    return (
        f"a process that prepares batches has died ({said[0].rstrip('.')}), most often because memory ran out: lower "
        "train.loader_workers or train.batch_size"
    )

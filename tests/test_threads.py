"""Several threads that call one model: each gets what it would get alone, and the model stays as it is."""

import threading

import pytest

from moreh.threads import CallThreads

THREADS = """
import sys, threading
import torch
from transformers import LlamaConfig, LlamaForCausalLM

if "line" in sys.argv:
    torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
sys.setswitchinterval(1e-5)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True)).double()

def batch(seed):
    ids = torch.randint(64, (6, 20), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(6):
        labels[row, 8 + row:] = -100
    return {"input_ids": ids, "labels": labels}

results = {}
def work(number):
    losses, waiting = [], []
    for step in range(6):
        # The first thread trains; the others evaluate the same weights, in one call or in parts.
        if number == 0:
            loss = model(**batch(step)).loss
            waiting.append(loss)
            # The gradients of a second loss that waits are computed in the backward pass.
            if step in (0, 2, 5):
                sum(waiting).backward()
                waiting.clear()
        else:
            with torch.no_grad():
                loss = model(**batch(step)).loss
                logits = model(batch(step)["input_ids"]).logits
                loss = loss + logits.sum()
        losses.append(loss.item())
    results[number] = losses

threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
if "serial" in sys.argv:
    for thread in threads:
        thread.start()
        thread.join()
else:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(sum(parameter.grad.abs().sum() for parameter in model.parameters()).item())
for number in range(3):
    print(*results[number])
names = ("forward", "warn_if_padding_and_no_attention_mask")
left = [name for module in model.modules() for name in vars(module) if name in names]
print(len(left), type(model.config).__name__, type(model.model.layers[0].self_attn.config).__name__)
"""


def numbers(output):
    lines = output.splitlines()[-5:]
    return [float(number) for line in lines[:4] for number in line.split()], lines[4]


def test_threads_get_the_numbers_of_plain_torch(run_python_forked):
    expected, left = numbers(run_python_forked(THREADS, "serial").stdout)
    assert left == "0 LlamaConfig LlamaConfig"
    for arguments in (("line",), ("line", "serial")):
        actual, left = numbers(run_python_forked(THREADS, *arguments).stdout)
        assert actual == pytest.approx(expected, rel=1e-6)
        assert left == "0 LlamaConfig LlamaConfig"


class Other:
    """Another thread, which does what it is told, step by step."""

    def __init__(self, work):
        self.go, self.arrived = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=work, args=(self,), daemon=True)
        self.thread.start()

    def wait_until_told(self):
        self.arrived.set()
        assert self.go.wait(10)

    def end(self):
        self.go.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_computation_is_alone_only_while_no_other_thread_is_in_a_call():
    threads = CallThreads()

    def work(other):
        with threads.call(with_grad=False):
            other.wait_until_told()

    with threads.call(with_grad=True), threads.alone() as alone:
        assert alone
    other = Other(work)
    assert other.arrived.wait(10)
    with threads.call(with_grad=True), threads.alone() as alone:
        assert not alone
    other.end()
    with threads.call(with_grad=True), threads.alone() as alone:
        assert alone


def test_calls_wait_for_a_computation_that_is_alone():
    threads, events = CallThreads(), []

    def work(other):
        other.arrived.set()
        with threads.call(with_grad=False):
            events.append("other")

    with threads.call(with_grad=True), threads.alone() as alone:
        assert alone
        other = Other(work)
        assert other.arrived.wait(10)
        other.thread.join(0.05)
        events.append("alone")
    other.end()
    assert events == ["alone", "other"]


def test_thread_that_computed_gradients_may_be_in_a_backward_pass():
    threads = CallThreads()

    def work(other):
        with threads.call(with_grad=True):
            pass
        other.wait_until_told()

    other = Other(work)
    assert other.arrived.wait(10)
    with threads.call(with_grad=False), threads.alone() as alone:
        assert not alone
    other.end()
    with threads.call(with_grad=False), threads.alone() as alone:
        assert alone

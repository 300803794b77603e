"""The memory ledger against sizes that are known."""

import copy
import gc

import pytest
import torch
import torch.utils.checkpoint

from moreh.accelerator.job import local_job
from moreh.accelerator.memory import saved_activations
from moreh.accelerator.memory.ledger import weight_bytes

IDS = torch.arange(32).reshape(2, 16)


@pytest.fixture(autouse=True)
def _no_garbage():
    """Frees what other tests left in reference cycles: the ledger counts it, until Python frees it at some time."""
    gc.collect()


@pytest.fixture(autouse=True)
def _all_calls_count(monkeypatch):
    """As for a script that asks for its memory, however many calls other tests have made."""
    monkeypatch.setattr(local_job().ledger.activations, "is_watched", True)


@pytest.fixture
def usage():
    """The growth of the job's memory since the test began, by kind."""
    before = local_job().ledger.usage_bytes()
    return lambda: {kind: amount - before[kind] for kind, amount in local_job().ledger.usage_bytes().items()}


def test_each_kind_over_a_step(make_gpt2, usage):
    model = make_gpt2().cuda()
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    trained = sum(p.nbytes for p in model.parameters())  # the tied embedding counts once
    assert usage() == {
        "parameters": weights,
        "gradients": 0,
        "optimizer_state": 0,
        "activations": 0,
        "other_tensors": 0,
    }
    ids = IDS.cuda()
    assert usage()["other_tensors"] == ids.nbytes

    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(ids, labels=ids, use_cache=False).loss
    after_forward = usage()
    assert after_forward["activations"] > 0
    loss.backward()
    del loss
    after_backward = usage()
    assert after_backward["activations"] == 0
    assert after_backward["gradients"] == trained
    optimizer.step()
    counters = 4 * len(list(model.parameters()))
    assert usage()["optimizer_state"] == 2 * trained + counters
    model.zero_grad(set_to_none=True)
    assert usage()["gradients"] == 0
    del model, optimizer, ids
    assert set(usage().values()) == {0}


def test_activations_are_what_autograd_keeps(usage):
    """Two layers of known sizes: autograd keeps each layer's input and the output of tanh, and no weight."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 5)).cuda()
    inputs = torch.ones(3, 10).cuda()
    output = model(inputs)
    # tanh's output is the second layer's input; the first layer's input is not an activation.
    assert usage()["activations"] == 3 * 20 * 4
    del output
    assert usage()["activations"] == 0
    with torch.no_grad():
        output = model(inputs)
    assert output.shape == (3, 5)
    assert usage()["activations"] == 0


def test_report_shows_what_the_step_needed(make_gpt2, monkeypatch):
    from moreh.accelerator.job_status import read_status

    job = local_job()
    model = make_gpt2().cuda()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    needed = job.ledger.activations.total_bytes
    loss.backward()
    del loss
    job.report_soon()
    job.report()
    assert read_status(job.job).memory_bytes["activations"] >= needed > job.ledger.activations.total_bytes


def test_short_calls_are_counted_now_and_then_until_the_script_asks_for_its_memory(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(saved_activations.time, "monotonic", lambda: now[0])
    activations = saved_activations.SavedActivations(is_counted_elsewhere=lambda address: False)
    weight = torch.ones(8, requires_grad=True)

    def counted(calls):
        found = []
        for _ in range(calls):
            with activations.counting():
                loss = weight.exp().exp().sum()
            found.append(activations.total_bytes > 0)
            del loss
            now[0] += 1e-4
        return found

    assert all(counted(4))
    # Two tensors are saved in a call, which cost 12 us: 0.5 % of 2.4 ms, or of 24 calls.
    later = counted(480)
    assert sum(later) == 20
    assert activations.take_peak_since_report() == 2 * 8 * 4
    activations.is_watched = True
    assert all(counted(50))


def test_script_that_asks_for_its_memory_is_watched(monkeypatch):
    for ask in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats):
        monkeypatch.setattr(local_job().ledger.activations, "is_watched", False)
        ask()
        assert local_job().ledger.activations.is_watched


def test_recomputation_keeps_less(make_gpt2, usage):
    activation_bytes = []
    for recompute in (False, True):
        model = make_gpt2(n_layer=4).cuda().train()
        if recompute:
            # Before transformers 5.20 it had only the older name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        loss = model(IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss
        activation_bytes.append(usage()["activations"])
        del model, loss
    assert activation_bytes[1] < activation_bytes[0] / 2


def test_counting_changes_no_gradient(make_gpt2):
    counted, plain = make_gpt2().cuda(), make_gpt2()
    for model in (counted, plain):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    for a, b in zip(counted.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_changed_activation_is_still_an_error():
    """Autograd leaves this check out while tensors are counted; without it the gradient would be wrong in silence."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sigmoid()).cuda()
    output = model(torch.ones(1, 4).cuda())
    loss = output.sum()
    with torch.no_grad():
        output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_others_stay_in_force():
    """torch uses only the innermost hooks on saved tensors; the ledger's must not disable those of a library."""
    calls = []

    class Layer(torch.nn.Linear):
        def forward(self, x):
            calls.append("forward")
            return super().forward(x)

    layer = Layer(4, 4).cuda()
    torch.utils.checkpoint.checkpoint(layer, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum().backward()
    assert calls == ["forward", "forward"]  # once in the forward pass, and recomputed in the backward pass
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layer(torch.ones(2, 4))
    assert packed
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        layer(torch.ones(2, 4))


def test_forward_without_backward_leaks_nothing(make_gpt2, usage):
    model = make_gpt2().cuda()
    for _ in range(3):
        model(IDS.cuda(), labels=IDS.cuda(), use_cache=False)
    assert usage()["activations"] == 0


def test_model_with_sparse_activations_trains():
    adjacency = torch.eye(4).to_sparse()

    class Graph(torch.nn.Linear):
        def forward(self, x):
            return torch.sparse.mm(adjacency, super().forward(x))

    layer = Graph(2, 2).cuda()
    layer(torch.ones(4, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_garbage_counts_until_python_frees_it(usage):
    """As on a real device. A reference cycle outlives the last use of its tensors."""
    model = torch.nn.Linear(2, 2).cuda()
    model.itself = [model]
    held = weight_bytes(model)
    del model
    assert usage()["parameters"] == held
    gc.collect()
    assert usage()["parameters"] == 0


def test_model_of_another_type_is_counted_once(make_gpt2, usage):
    model = make_gpt2().cuda().double()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    activations = usage()["activations"]
    assert usage()["parameters"] == weight_bytes(model)
    del loss
    fresh = make_gpt2().double().cuda()
    loss = fresh(IDS, labels=IDS, use_cache=False).loss
    assert usage()["activations"] == activations
    assert loss is not None


def test_many_small_tensors_cost_little_each():
    """Moving a tensor must not count all others: the number of full counts does not grow with the number of tensors."""
    ledger, counts = local_job().ledger, []
    count = ledger.usage_bytes
    ledger.usage_bytes = lambda: counts.append(1) or count()
    try:
        tensors = [torch.zeros(4, device="cuda") for _ in range(2000)]
    finally:
        del ledger.usage_bytes
    assert len(tensors) == 2000
    assert len(counts) < 20


def test_report_that_cannot_be_written_does_not_end_training(monkeypatch, tmp_path, make_gpt2):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MOREH_STATE_DIR", str(tmp_path / "file"))
    job = local_job()
    monkeypatch.setattr(job, "_next_report", 0.0)
    make_gpt2().cuda()(IDS)
    assert job._next_report == float("inf")


def test_copy_of_a_model_is_counted_by_itself(make_gpt2, usage):
    model = make_gpt2().cuda()
    twin = copy.deepcopy(model).cuda()
    assert usage()["parameters"] == 2 * weight_bytes(model)
    twin(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    twin.cpu()
    assert usage()["parameters"] == weight_bytes(model)

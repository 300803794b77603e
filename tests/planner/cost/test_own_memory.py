"""Memory of this project's workers on a CPU: predictions against measured peaks, and against counted allocations."""

import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from moreh.models.describe.from_source import describe_config
from moreh.planner.cost.memory.activation_memory import layer_activations
from moreh.planner.cost.memory.edge_exchange import edge_exchange
from moreh.planner.cost.memory.memory_states import deferred_layer_elements, model_states
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.plan.notation import parse_plan
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.plan.schedules import peak_deferred_weight_grads, peak_in_flight
from moreh.planner.plan.split_backward import split_backward_moments
from moreh.planner.software_profile import moreh_on_cpu
from moreh.planner.units import GIB
from moreh.runtime.kernels.attention.causal import causal_attention
from tests.helpers.source.source_tree import ROOT

SOFTWARE = moreh_on_cpu("float32")
BYTES = 4
# The shapes of benchmarks/workers/own_accuracy.py: layers, hidden size, size of the MLP's hidden layer, vocabulary.
SHAPES = {"8 layers of 512": (8, 512, 1408, 8192), "4 layers of 768": (4, 768, 2048, 16384)}


def training_of(layers, hidden, intermediate, vocabulary):
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    return Training(describe_config(config, "llama"), 8, 256)


def test_predictions_are_near_the_measured_peaks():
    """The rows of benchmarks/data/own_accuracy.md, which are measured by benchmarks/workers/own_accuracy.py."""
    text = (ROOT / "benchmarks/data/own_accuracy.md").read_text()
    rows = re.findall(r"^\| (\d layers of \d+) \| (\d) \| `(.*?)` \|.* \| (\d\.\d+) \| [^|]* \|$", text, re.MULTILINE)
    assert len(rows) >= 40
    trainings = {model: training_of(*shape) for model, shape in SHAPES.items()}
    errors = []
    for model, workers, plan, measured_gib in rows:
        table = PlanTable.from_plans([parse_plan(plan, trainings[model], int(workers))])
        predicted = peak_memory(table, trainings[model], SOFTWARE).total.max()
        errors.append(abs(predicted / (float(measured_gib) * GIB) - 1))
    assert statistics.median(errors) <= 0.02
    assert max(errors) <= 0.08


@pytest.mark.parametrize("length", [512, 1024])
def test_attention_needs_the_memory_of_its_kernel(length):
    """At 1,024 tokens, the probabilities of 8 heads are too large to be kept."""
    batch, heads, kv_heads, head_dim = 1, 8, 4, 64
    q, k, v = (torch.randn(batch, n, length, head_dim, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    grad = torch.randn(batch, length, heads, head_dim)
    causal_attention(q, k, v, 1.0).backward(grad)  # fills the caches of indices
    for tensor in (q, k, v):
        tensor.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = causal_attention(q, k, v, 1.0)
        with torch.profiler.record_function("backward"):
            out.backward(grad)
    events = profiler.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "backward")
    alive = kept = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        kept = alive if event.start_ns() < begin else kept
        peak = max(peak, alive)

    def predicted(software):
        plans = PlanTable.from_plans([Plan((8,))])
        return layer_activations(plans, replace(training_of(8, 512, 1408, 8192), sequence_length=length), software)

    # The result and the scaled queries are kept besides the probabilities.
    results = 2 * heads * length * head_dim * BYTES
    probabilities = (predicted(SOFTWARE).kept - predicted(replace(SOFTWARE, max_blocked_length=0)).kept)[0]
    assert (probabilities > 0) == (length == 512)
    assert kept == pytest.approx(probabilities + results, rel=0.02)
    # The gradients of queries, keys and values are there before the last tensors are freed.
    gradients = (heads + 2 * kv_heads) * length * head_dim * BYTES
    assert peak - kept == pytest.approx(predicted(SOFTWARE).attention_backward[0] + gradients, rel=0.02)


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks"), [(2, 1, 1), (2, 8, 1), (4, 2, 2), (4, 16, 2)])
@pytest.mark.parametrize("schedule", ["zero-bubble", "zbv"])
def test_moments_of_a_split_backward_pass_agree_with_its_peaks(schedule, ranks, micro_batches, chunks):
    chunks = 2 if schedule == "zbv" else chunks
    moments = split_backward_moments(schedule, ranks, micro_batches, chunks)
    in_flight, deferred = moments.in_flight.sum(axis=2).max(axis=1), moments.deferred.sum(axis=2).max(axis=1)
    assert (in_flight <= peak_in_flight(schedule, ranks, micro_batches, chunks)).all()
    assert (deferred <= peak_deferred_weight_grads(schedule, ranks, micro_batches, chunks)).all()
    assert deferred.max() == peak_deferred_weight_grads(schedule, ranks, micro_batches, chunks).max()
    # At the end all weights have gradients, and nothing else is left.
    ends = (moments.in_flight.sum(axis=2) == 0) & moments.has_gradients.all(axis=2)
    assert ends.any(axis=1).all()


def test_moments_of_one_micro_batch():
    """The last rank: forward, loss, backward for the input, backward for the weights."""
    moments = split_backward_moments("zero-bubble", 2, 1, 1)
    columns = (moments.in_flight, moments.deferred, moments.has_gradients, moments.waiting_logits[..., None])
    rows = np.concatenate([*columns, moments.in_loss[..., None], moments.in_input_backward[..., None]], axis=2)[1]
    assert {tuple(row) for row in rows.astype(int).tolist()} == {
        (1, 0, 0, 1, 0, 0),
        (1, 0, 0, 0, 1, 0),
        (1, 1, 0, 1, 0, 1),
        (0, 0, 1, 0, 0, 0),
    }


def test_gradients_of_row_split_results_are_whole_and_frozen_matrices_have_none():
    training = training_of(8, 512, 1408, 8192)
    plans = [Plan((8,), tensor=2, sequence_parallel=sequence_parallel) for sequence_parallel in (False, True)]
    elements = deferred_layer_elements(PlanTable.from_plans(plans), training) / 256
    # Queries, keys, values, gate and up are split by columns, output and down by rows; two norms.
    split, whole, norms = (512 + 256 + 256 + 2 * 1408) / 2, 2 * 512, 2 * 512
    assert elements == pytest.approx([split + whole + norms, split + whole + norms / 2])
    (layer,) = {layer for layer, _ in training.architecture.layer_kinds()}
    frozen = replace(layer, linears=tuple(replace(linear, frozen=True) for linear in layer.linears))
    architecture = replace(training.architecture, layers=(frozen,) * 8)
    elements = deferred_layer_elements(PlanTable.from_plans(plans), replace(training, architecture=architecture)) / 256
    assert elements == pytest.approx([norms, norms / 2])


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_reduction_of_the_embedding_and_the_output_layer(micro_batches):
    """torch's foreach_reduce: the flat gradients, the received parts, the last gradient, and the new shards."""
    training = training_of(8, 512, 1408, 8192)
    table = PlanTable.from_plans([Plan((8,), data=2, micro_batches=micro_batches, sharding="gradients")])
    matrix, norm = 8192 * 512 * BYTES, 512 * BYTES
    flat = 2 * matrix + norm

    def edges(software):
        return edge_exchange(model_states(table, training, software), table, training, software)

    gloo, nccl = edges(SOFTWARE), edges(replace(SOFTWARE, receives_all_parts=False))
    assert gloo.reduced == pytest.approx(2 * flat + matrix + norm)
    assert gloo.reduced_again == pytest.approx(2 * flat + matrix + norm + flat / 2)
    # Without such a buffer, the highest moment is that in which all gradients are beside their copy.
    assert nccl.reduced_again == pytest.approx(2 * flat, rel=1e-4)
    assert gloo.retained == pytest.approx(flat if micro_batches > 1 else 0)


def test_sequence_parallel_layers_receive_all_parts_of_a_reduction():
    """Where a layer has little else, the reduce-scatter of its network's input is its highest moment."""
    training = training_of(8, 512, 64, 8192)
    plan = PlanTable.from_plans([Plan((8,), tensor=4, sequence_parallel=True)])
    fused = replace(SOFTWARE, max_blocked_length=0)
    gloo, nccl = (
        layer_activations(plan, training, replace(fused, receives_all_parts=receives)).backward[0]
        for receives in (True, False)
    )
    assert gloo - nccl == pytest.approx(256 * 512 * BYTES)

"""The spans of a step: log lines with MOREH_TRACE=1, none without, and ranges in a profiler's trace."""

import logging
import re
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from moreh import trace
from moreh.errors import OptionError
from moreh.log import logger
from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.batches import batch as ids_mask_and_labels
from tests.helpers.fast_path_cases import MAX_TOKENS, batch
from tests.helpers.models.families import PP_TP, make_model
from tests.helpers.sharded.cases import sharded_copy
from tests.helpers.workers import run_on_workers

LINE = re.compile(r"trace rank (\d+): ( *)(\w+) (\d+\.\d{3}) ms(?:, ([\d,]+) bytes)?")
SCRIPT = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)).train()
ids = torch.arange(64).view(4, 16)
for _ in range(2):
    print("step")
    model(ids, labels=ids).loss.backward()
"""
PHASES_OF_A_STEP = [
    "check_inputs",
    "cut_batch",
    "stage_forward",
    "forward",
    "backward",
    "forward_backward",
    "collect_grads",
]
DATA_PARALLEL = {"stage_layers": (3,), "data": 2, "micro_batch_size": 4}
TENSOR_PARALLEL = {"stage_layers": (3,), "tensor": 2, "micro_batch_size": 8}
PIPELINE = {"stage_layers": (2, 1), "pipeline": 2, "micro_batches": 2, "micro_batch_size": 4}


@pytest.fixture
def run(run_forked):
    return run_forked


def lines_of(text):
    """The lines of spans in a console, as (rank, depth, name, bytes)."""
    matches = [LINE.fullmatch(line.removeprefix("[info] ")) for line in text.splitlines()]
    return [(int(m[1]), len(m[2]) // 2, m[3], m[5] and int(m[5].replace(",", ""))) for m in matches if m]


def test_one_worker_logs_a_line_for_each_phase(run_python):
    finished = run_python(SCRIPT, MOREH_TRACE="1")
    first, second = finished.stdout.split("step\n")[1:]
    assert [line[2] for line in lines_of(first)] == ["choose_plan", *PHASES_OF_A_STEP, "accumulate_grads"]
    assert [line[2] for line in lines_of(second)] == [*PHASES_OF_A_STEP, "accumulate_grads"]
    assert {line[0] for line in lines_of(second)} == {0}
    depths = {name: depth for _, depth, name, _ in lines_of(second)}
    assert depths["forward"] == depths["backward"] == depths["forward_backward"] + 1


@pytest.mark.parametrize("value", [None, "", "0"])
def test_no_lines_without_the_variable(run_python, value):
    finished = run_python(SCRIPT, **({} if value is None else {"MOREH_TRACE": value}))
    assert finished.returncode == 0, finished.stderr
    assert "trace rank" not in finished.stdout + finished.stderr


def test_other_values_of_the_variable_are_refused(monkeypatch):
    monkeypatch.setenv("MOREH_TRACE", "yes")
    with pytest.raises(OptionError, match=r"MOREH_TRACE='yes': expected 1, .* or 0"):
        torch.moreh.option.enable_advanced_parallelization()


def test_two_workers_log_on_the_console_of_the_first_and_in_a_file(run_python):
    finished = run_python(SCRIPT, MOREH_TRACE="1", MOREH_WORKERS="2")
    lines = lines_of(finished.stdout)
    names = [name for _, _, name, _ in lines]
    assert {rank for rank, *_ in lines} == {0}
    (directory,) = re.findall(r"The traces of the other workers are in (\S+)\.$", finished.stdout, re.M)
    other_lines = lines_of(Path(directory, "rank1.log").read_text())
    assert {rank for rank, *_ in other_lines} == {1}
    assert "shard_model" in [name for _, _, name, _ in other_lines]
    assert names.count("choose_plan") == names.count("shard_model") == 1
    assert names.count("check_inputs") == names.count("accumulate_grads") == 2


def step_of_rank(plan, traced):
    """On each rank: the log lines and the profiler's spans of a training step, an evaluation, and logits."""
    _, model, _ = sharded_copy("llama", plan)
    ids, mask, labels = ids_mask_and_labels(0, model.config.vocab_size)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with (
            mock.patch.object(trace, "_logs_spans", True) if traced else nullcontext(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        ):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with torch.no_grad():
                model.eval()(input_ids=ids, attention_mask=mask, labels=labels)
                model(input_ids=ids, attention_mask=mask)
    finally:
        logger.removeHandler(handler)
    return lines, set(spans_of(profiler))


def spans_of(profiler):
    """The names of the spans in a profiler's trace. Custom operators of this package have the same prefix."""
    names = [event.name.removeprefix("moreh::") for event in profiler.events() if event.name.startswith("moreh::")]
    return [name for name in names if not hasattr(torch.ops.moreh, name)]


PHASES = {"check_inputs", "cut_batch", "forward_backward", "collect_grads", "accumulate_grads", "clip_total_norm"}
PHASES |= {"evaluate", "logits", "all_reduce_loss", "all_reduce_batch_checksum", "all_reduce_grad_norm"}
COLLECTIVES = {
    "data": (DATA_PARALLEL, {"forward", "backward", "all_reduce_data_parallel_grads"}),
    "tensor": (
        TENSOR_PARALLEL,
        {"forward", "backward", "reduce_from_tp", "copy_to_tp_backward", "all_reduce_max_logit", "all_gather_logits"},
    ),
    "sequence": (
        {**TENSOR_PARALLEL, "sequence_parallel": True},
        {"gather_from_sp", "gather_from_sp_backward", "reduce_scatter_to_sp", "reduce_scatter_to_sp_backward"},
    ),
    "sharded": ({**DATA_PARALLEL, "sharding": "parameters"}, {"forward", "backward", "fsdp_reduce_scatter"}),
    "pipeline": (PIPELINE, {"forward", "broadcast_logits"}),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_spans_of_two_workers_are_in_a_profilers_trace(kind):
    plan, collectives = COLLECTIVES[kind]
    for lines, spans in run_on_workers(step_of_rank, [(plan, False)], size=2)[0]:
        assert lines == []
        assert spans >= PHASES | collectives


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_each_rank_logs_the_spans_of_its_step_with_their_bytes(kind):
    plan, collectives = COLLECTIVES[kind]
    for rank, (lines, spans) in enumerate(run_on_workers(step_of_rank, [(plan, True)], size=2)[0]):
        traced = lines_of("\n".join(lines))
        assert len(traced) == len(lines)
        assert {line[0] for line in traced} == {rank}
        assert {line[2] for line in traced} == spans >= PHASES | collectives
        moved = {name: size for _, _, name, size in traced}
        assert moved["all_reduce_loss"] == 8
        assert moved["check_inputs"] is None
        assert all(moved[name] > 0 for name in spans if re.match("all_reduce|broadcast|.*_(tp|sp)", name))


def test_gradients_of_tied_embeddings_and_of_partial_sums_are_traced():
    """A plan with both: one exchanges between stages, the other sums over tensor-parallel ranks."""
    plan = {**PP_TP, "sequence_parallel": True}
    for spans in run_on_workers(spans_of_gpt2_step, [(plan,)], size=4)[0]:
        assert spans >= {"all_reduce_partial_grads", "exchange_tied_grad"}


def spans_of_gpt2_step(plan):
    _, model, _ = sharded_copy("gpt2", plan)
    ids, mask, labels = ids_mask_and_labels(0, model.config.vocab_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    return set(spans_of(profiler))


def test_spans_of_one_worker_are_in_a_profilers_trace():
    model = make_model("llama")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS).loss.backward()
    names = spans_of(profiler)
    assert set(names) == {*PHASES_OF_A_STEP, "accumulate_grads"}
    assert names.count("forward") == names.count("backward") > 1


def test_spans_end_and_are_named_when_an_error_is_raised(caplog):
    logger.propagate, propagates = True, logger.propagate
    try:
        with (
            mock.patch.object(trace, "_logs_spans", True),
            caplog.at_level(logging.INFO, "moreh"),
            pytest.raises(KeyError),
            trace.span("outer", 1000),
            trace.span("inner"),
        ):
            raise KeyError
    finally:
        logger.propagate = propagates
    # pytest may show a record of a logger that propagates twice.
    inner, outer = (record.getMessage() for record in {id(record): record for record in caplog.records}.values())
    assert re.fullmatch(r"trace rank 0:   inner \d+\.\d{3} ms, ended by KeyError", inner)
    assert re.fullmatch(r"trace rank 0: outer \d+\.\d{3} ms, 1,000 bytes, ended by KeyError", outer)

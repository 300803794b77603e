"""Rows with other headings, cells left out, or other figures are read as those of published_runs.csv."""

import pytest

from tests.helpers.planner.published_rows import ROW, published_programs, published_runs

LLAMA = {
    "framework": "own trainer",
    "model": "Llama-3.1-8B",
    "seq_len": "8192",
    "gpu": "H100",
    "n_gpus": "8",
    "tp": "1",
    "pp": "1",
    "mbs": "1",
    "gbs": "8",
}


def run(row):
    return published_runs.published_run(row)


def test_other_headings_say_the_same():
    columns = {
        "n_gpus": "Num GPUs",
        "tp": "tensor-parallel size",
        "mbs": "micro_batch_size",
        "gbs": "Global Batch Size",
        "seq_len": "sequence_length",
        "step_time_s": "iteration_time",
    }
    other = {columns.get(column, column): text for column, text in ROW.items()}
    expected, found = run(ROW), run(other)
    assert (found.plans, found.training, found.step_time_s) == (expected.plans, expected.training, 2.0)
    milliseconds = {column: text for column, text in ROW.items() if column != "step_time_s"} | {"step_time_ms": "2000"}
    assert run(milliseconds).step_time_s == 2.0


def test_a_column_of_the_format_wins_over_another_heading():
    assert run({**ROW, "num_gpus": "32"}).cluster.devices == 16


def test_a_zero_stage_is_a_sharding():
    assert run({**ROW, "zero_stage": "1"}).plans[0].sharding == "optimizer"
    assert run({**ROW, "zero_stage": "0"}).plans[0].sharding == "none"


def test_sizes_of_a_known_model_are_filled_in():
    model = run(LLAMA).training.architecture
    assert (len(model.layers), model.hidden, model.layers[0].kv_heads, model.vocabulary) == (32, 4096, 8, 128256)
    assert model.parameters == pytest.approx(8.03e9, rel=0.001)
    cut = run({**LLAMA, "layers": "4", "hidden": "4096"}).training.architecture
    assert (len(cut.layers), cut.layers[0].kv_heads) == (4, 8)
    own = run({**LLAMA, "layers": "4", "hidden": "1024", "heads": "8"}).training.architecture
    assert own.layers[0].kv_heads == 8
    assert run({**LLAMA, "model": "GPT-2 medium"}).training.architecture.hidden == 1024
    for name in ("Nova 8B", "GPT 2.7B"):
        with pytest.raises(published_programs.Unusable, match="layers is not given"):
            run({**LLAMA, "model": name})


@pytest.mark.parametrize(("billions", "gated"), [("6.7", True), ("5.2", False), ("", False)])
def test_parameters_tell_whether_an_unknown_model_is_gated(billions, gated):
    sizes = {"layers": "32", "hidden": "4096", "heads": "32", "ffn": "11008", "vocab": "32000", "params_b": billions}
    assert run({**LLAMA, **sizes, "model": "Nova"}).training.architecture.gated is gated


def test_sizes_of_a_plan_that_can_only_be_one_are_filled_in():
    def plan(**changes):
        return run({**LLAMA, "tp": "", "pp": "", **changes}).plans[0]

    assert plan(sharding="FSDP").data == 8
    assert plan(n_gpus="1").devices == 1
    assert plan(dp="8").data == 8
    assert plan(dp="4", tp="2").tensor == 2
    for changes in ({}, {"framework": "Megatron-LM", "sharding": "ZeRO-1"}):
        with pytest.raises(published_programs.Unusable, match="the plan is not given"):
            plan(**changes)


def test_rates_of_arithmetic_give_the_step_time():
    known = run({**LLAMA, "step_time_s": "10"})
    model = known.training.architecture
    weights = model.hidden * model.vocabulary + sum(
        linear.inputs * linear.outputs for layer in model.layers for linear in layer.linears
    )
    flops = 8 * 8192 * (6 * weights + 12 * 32 * 4096 * 8192)
    tflops = {"tflops_per_gpu": str(flops / 8 / 10 / 1e12), "tflops_counts": "model FLOPs"}
    assert run({**LLAMA, **tflops}).step_time_s == pytest.approx(10)
    assert run({**LLAMA, "TFLOP/s/GPU": tflops["tflops_per_gpu"]}).step_time_s == pytest.approx(10)
    peak = known.cluster.device.bf16_flops_per_second
    for mfu in (flops / 8 / 10 / peak, 100 * flops / 8 / 10 / peak):
        assert run({**LLAMA, "MFU": str(mfu)}).step_time_s == pytest.approx(10)
    assert run({**LLAMA, **tflops, "tflops_counts": "as logged"}).step_time_s is None


@pytest.mark.parametrize(
    ("sharding", "replicas"),
    [
        ("HSDP", 4),
        ("HYBRID_SHARD", 4),
        ("HSDP dp_shard=16", 2),
        ("HSDP, replicate 8", 8),
        ("HSDP 2x16", 2),
        ("HSDP dp_shard=5", 1),
        ("FSDP", 1),
    ],
)
def test_hybrid_sharding_is_in_a_node_unless_the_row_says_otherwise(sharding, replicas):
    found = run({**LLAMA, "n_gpus": "32", "gbs": "32", "sharding": sharding})
    assert (found.plans[0].sharding, found.plans[0].replicas) == ("parameters", replicas)
    assert found.software.not_modeled == ""


@pytest.mark.parametrize(
    ("source", "overlaps"),
    [("arXiv:2104.04473", False), ("SC21 paper", False), ("arXiv:2306.10209", True), ("github:a/b@2019abc", True)],
)
def test_old_deepspeed_waits_for_its_exchange(source, overlaps):
    software = run({**ROW, "framework": "DeepSpeed", "sharding": "ZeRO-3", "source": source}).software
    assert software.exchanges_each_matrix
    assert software.overlaps_data_parallel is overlaps

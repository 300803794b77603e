"""How the planner is scored on programs that it was not fitted to."""

from dataclasses import replace

import numpy as np
import pytest

from moreh.planner.cost.prediction import predict
from moreh.planner.hardware.environment import make_environment
from tests.helpers.planner.published_rows import blind, hierarchy, make_row, planner_accuracy, published_runs, scores


def timed(factor, name="new", **changes):
    """A run that takes `factor` times as long as the planner predicts."""
    run = published_runs.published_run(make_row(**changes))
    environment = make_environment(run.cluster, run.software)
    seconds = predict(run.plans[0], run.training, environment).step_time_s
    return replace(run, step_time_s=factor * seconds, program=name)


@pytest.fixture(scope="module")
def runs():
    changes = [{"mbs": "1"}, {"mbs": "2"}, {"mbs": "4"}, {"tp": "4", "pp": "1"}, {"tp": "1", "pp": "4"}]
    return [timed(1.4, **change) for change in changes]


def test_measured_runs_of_a_program_improve_the_prediction_of_its_others(runs):
    (group,) = blind.with_shipped_constants(runs)
    assert group.name == ("new", "A100 80GB")
    assert [entry.error for entry in group.zero_shot] == pytest.approx([1 / 1.4 - 1] * 5, rel=1e-3)
    for shots in blind.SHOTS:
        assert np.isnan(group.errors[shots]).sum(axis=1).tolist() == [shots] * blind.DRAWS
        assert np.isnan(group.covered[shots]).sum(axis=1).tolist() == [shots] * blind.DRAWS
    one, three = (np.nanmean(np.abs(group.errors[shots])) for shots in (1, 3))
    assert three < one < 0.75 * (1 - 1 / 1.4)


def test_intervals_hold_what_is_as_predicted_and_not_what_is_far_off(runs):
    near, far = timed(1.02), timed(5.0)
    (group,) = blind.with_shipped_constants([near, far])
    assert [entry.covered for entry in group.zero_shot] == [True, False]
    assert 3 not in group.errors
    text = "\n".join(scores.score_lines([group]))
    assert "| new, A100 80GB | 2 | 41.0 |" in text
    assert "| 50 |" in text


def test_a_program_is_predicted_from_all_others_only(monkeypatch, runs):
    seen = []

    def fit(known, first):
        seen.append({run.program for run in known})
        assert {label.program for label in first.labels} == seen[-1]
        return hierarchy.Hierarchy(first, hierarchy.CHOICES[0])

    monkeypatch.setattr(blind, "fit_hierarchy", fit)
    three = [*runs[:2], timed(1.0, "second"), timed(1.0, "never fitted")]
    groups = blind.leaving_programs_out(three, "never fitted")
    assert seen == [{"second"}, {"new"}, {"new", "second"}]
    assert [group.name[0] for group in groups] == ["new", "second", "never fitted"]


def test_what_rows_say_of_a_device_carries_over_to_other_programs(runs):
    """Five programs that are slow say more about the devices than about each of them."""
    slow = [replace(run, program=str(number)) for number, run in enumerate(runs)]
    rows = hierarchy.prior_rows(slow)
    rows = replace(rows, seconds=np.full(5, 0.3))
    known = hierarchy.Hierarchy(rows, hierarchy.CHOICES[0])
    of_all, of_one = known.of("", "A100 80GB"), known.of("3", "A100 80GB")
    prior = hierarchy.posterior(rows.take(np.zeros(5, bool)), hierarchy.Labels("", "A100 80GB", ""), known.spreads)
    shift = rows.slopes @ (of_all.mean - prior.mean)
    assert shift == pytest.approx(0.3, rel=0.15)
    assert np.trace(of_one.covariance) < np.trace(of_all.covariance) < np.trace(prior.covariance)


def test_a_program_that_surprises_counts_less(runs):
    others = [replace(run, program=str(number)) for number, run in enumerate(runs)]
    rows = replace(hierarchy.prior_rows(others), seconds=np.array([0, 0, 0, 0, 2.0]))
    strangeness = [label.strangeness for label in hierarchy.strange_labels(rows, hierarchy.CHOICES[0]).labels]
    assert strangeness[4] > 2
    assert strangeness[0] < strangeness[4]


def test_figures_within_the_spread_of_repeats_are_tied(runs):
    assert scores.kendall_tau([1, 2, 3], [1.0, 1.02, 2.0], 0.05) == 1
    assert scores.kendall_tau([2, 1, 3], [1.0, 1.02, 2.0], 0.05) == 1
    assert scores.kendall_tau([2, 1, 3], [1.0, 1.02, 2.0]) == pytest.approx(1 / 3)
    assert scores.regret([2, 1, 3], [1.0, 1.02, 2.0], 0.05) == 0
    assert scores.regret([3, 2, 1], [1.0, 1.02, 2.0], 0.05) == pytest.approx(1)
    entries = [blind.BlindRun(replace(runs[0], step_time_s=seconds), 1.0, 0.5, 2.0) for seconds in (1.0, 1.04)]
    assert scores.spread_of_repeats(entries) == pytest.approx(0.04)
    assert scores.spread_of_repeats(entries[:1]) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": "nvfp4"}, "nvfp4 is not modeled"),
        ({"precision": "", "framework": "NeMo", "notes": "MXFP4 recipe"}, "fp4 is not modeled"),
        ({"precision": "fp32"}, "fp32 is not modeled"),
        ({"model": "Mixtral 8x7B"}, "experts"),
        ({"model": "Qwen3-30B-A3B"}, "experts"),
        ({"framework": "torchtune LoRA"}, "adapters"),
        ({"model": "T5 11B"}, "not a decoder"),
        ({"sharding": "ZeRO-3 offload"}, "host"),
        ({"model": "BART large"}, "not a decoder"),
        ({"model": "Qwen2-VL 7B"}, "of text only"),
        ({"model": "Nemotron-H 8B"}, "state-space"),
        ({"framework": "TRL DPO"}, "next tokens"),
    ],
)
def test_what_is_not_modeled_is_refused(changes, reason):
    with pytest.raises(published_runs.Unusable, match=reason):
        published_runs.published_run(make_row(**changes))


@pytest.mark.parametrize("precision", ["fp8", "MXFP8", "bf16+float8 linear", "FP8-CS e4m3"])
def test_float8_has_a_wide_interval(precision):
    run = timed(1.0, precision=precision, gpu="H100", n_gpus="16")
    assert run.software.compute == "float8"
    (group,) = blind.with_shipped_constants([run])
    (entry,) = group.zero_shot
    assert entry.high / entry.low >= 4 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sharding": "3D mesh"}, "sharding='3D mesh' is not known"),
        ({"recompute": "block, 4 layers"}, "recompute='block, 4 layers' is not known"),
        ({"flag": "paged_adamw_8bit"}, "other than AdamW"),
        ({"model": "MiMo 7B with MTP"}, "several tokens"),
        ({"model": "Mistral 7B", "seq_len": "8192"}, "sliding window"),
        ({"framework": "Megatron-LM Ulysses"}, "sequence parallelism"),
    ],
)
def test_what_only_a_rows_words_say_has_a_wide_interval(changes, reason):
    run = timed(1.0, **changes)
    assert reason in run.software.not_modeled
    ((entry,),) = [group.zero_shot for group in blind.with_shipped_constants([run])]
    assert entry.high / entry.low >= 4 * (1 - 1e-9)


def test_known_words_of_plans_are_told_apart():
    def plan(**changes):
        run = published_runs.published_run(make_row(**changes))
        assert run.software.not_modeled == ""
        return run.plans[0]

    assert plan(sharding="zero stage 3").sharding == "parameters"
    assert plan(sharding="FSDP, SHARD_GRAD_OP").sharding == "gradients"
    assert plan(sharding="distributed optimizer").sharding == "optimizer"
    assert plan(sharding="none (ZeRO-0)", precision="fp16").sharding == "none"
    assert plan(recompute="True").recomputation == "full"
    assert plan(recompute="gradient checkpointing").recomputation == "full"
    assert plan(recompute="selective+sequence parallel").recomputation == "selective"
    assert plan(recompute="").recomputation == "none"
    # Megatron Core splits the residual stream over tensor-parallel ranks, and NeMo shards the optimizer's state.
    assert not plan(framework="Megatron-LM").sequence_parallel
    newer = plan(framework="NeMo", gpu="H100")
    assert newer.sequence_parallel
    assert newer.sharding == "optimizer"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("60.68 GiB max allocated", "allocated"),
        ("82.4 GiB (max over ranks, reserved as logged)", "reserved"),
        ("6264 (MiB)", "allocated"),
        ("nvidia-smi", "driver"),
        ("mem-allocated-bytes", "states"),
        ("", "allocated"),
    ],
)
def test_memory_is_predicted_as_it_was_measured(text, kind):
    run = published_runs.published_run(make_row(mem_as_published=text))
    assert run.memory_kind == kind
    scored = planner_accuracy.score(run, frozenset())
    allocated = scored.prediction.memory_bytes / 2**30
    bounds = {"states": (0, 0.9), "allocated": (1, 1), "reserved": (1.01, 1.2), "driver": (1.02, 3)}[kind]
    assert bounds[0] * (1 - 1e-9) <= scored.memory_gib / allocated <= bounds[1] * (1 + 1e-9)


def test_program_that_is_not_known_has_a_wider_interval():
    def entry(framework):
        ((found,),) = [group.zero_shot for group in blind.with_shipped_constants([timed(1.0, framework=framework)])]
        return found

    known, guessed = entry("Megatron-LM"), entry("own trainer")
    assert guessed.run.software.guessed
    assert guessed.high / guessed.low > 1.1 * known.high / known.low


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA H200 141GB", "H200"),
        ("NVIDIA L40S 48GB", "L40S"),
        ("H20 141GB", "H20 141GB"),
        ("H20", "H20"),
        ("GB200", "GB200"),
        ("B200", "B200"),
    ],
)
def test_names_of_devices_are_told_apart(gpu, device):
    assert published_runs.published_run(make_row(gpu=gpu)).cluster.device.name == device


def test_network_that_a_row_states_for_a_node_is_shared_by_its_devices():
    def network(notes):
        run = published_runs.published_run(make_row(notes=notes))
        return run.cluster.device.network_bytes_per_second

    assert network("nodes of 8 with 400 Gbit/s a node") == pytest.approx(400e9 / 8 / 8)
    assert network("100 Gbps per GPU") == pytest.approx(100e9 / 8)
    assert network("4x200 Gb/s HDR per node") == pytest.approx(800e9 / 8 / 8)
    assert network("1.6 Tbps per node") == pytest.approx(1600e9 / 8 / 8)
    assert network("600 GB/s per GPU") == network("")
    assert network("400 Gbit/s switch") == network("")


def test_programs_have_the_kernels_of_their_time():
    def software(**changes):
        return published_runs.published_run(make_row(**changes)).software

    assert not software(framework="Megatron-LM").fused_attention
    assert software(framework="Megatron-LM", gpu="H100").fused_attention
    assert software(framework="Megatron Core 0.9").fused_attention
    assert software(framework="NVIDIA NeMo 24.09").overlaps_data_parallel
    eager, unknown = software(framework="TRL"), software(framework="Some trainer 1.0")
    assert eager.elementwise_traffic > unknown.elementwise_traffic
    assert published_runs.published_run(make_row(framework="Some trainer 1.0")).program == "Some trainer"
    assert software(framework="Megatron-LM nightly 2025").fused_attention
    assert software(framework="NeMo", gpu="H100").overlaps_tensor_parallel
    assert software(framework="PyTorch FSDP", sharding="FULL_SHARD").reduce_bytes == 2


def test_dropout_is_that_of_a_programs_time():
    def dropout(**changes):
        return published_runs.published_run(make_row(**changes)).training.architecture.dropout

    assert dropout(framework="Megatron-LM")
    assert not dropout(framework="NeMo")
    assert not dropout(framework="nanoGPT")
    assert not dropout(framework="Megatron-LM", model="Llama 7B")

"""Rows of published runs are read as what they say, or refused with the reason."""

import pytest

from tests.helpers.planner.published_rows import make_row, planner_accuracy, published_programs, published_runs

NASTY_CELLS = [
    "",
    "0",
    "0.4",
    "-8",
    "8.0",
    "3",
    "1e9",
    "1e18",
    "1e400",
    "1e-320",
    "nan",
    "many",
    "x" * 9999,
    "\xe9\ufffd",
    "\n",
    None,
]


def test_row_is_read_as_a_plan_a_training_and_a_cluster():
    run = published_runs.published_run(make_row(vpp="3", sharding="ZeRO-1"))
    plan = run.plans[0]
    assert (plan.tensor, plan.pipeline, plan.data, plan.chunks, plan.schedule) == (2, 2, 4, 3, "interleaved")
    assert (plan.micro_batch_size, plan.micro_batches, plan.recomputation, plan.sharding) == (2, 8, "full", "optimizer")
    assert run.training.tokens == 64 * 2048
    assert run.cluster.devices == 16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": ""}, "hidden is not given"),
        ({"gpu": "TPU v4"}, "no data of device 'TPU v4'"),
        ({"tp": ""}, "the plan is not given"),
        ({"tp": "3"}, "does not divide 16 devices"),
        ({"ep": "4"}, "expert parallelism is not modeled"),
        ({"dp": "2"}, r"dp=2 contradicts 16 devices / \(tp x pp x cp\) = 4"),
        ({"gpu": "MI250 (package, 2 GCD)", "dp": "5"}, r"dp=5 contradicts 32 devices / \(tp x pp x cp\) = 8"),
        ({"gbs": "63"}, "gbs 63 is not a multiple"),
        ({"layers": "many"}, "layers='many' is not a number"),
        ({"layers": "1"}, "fewer layers than stages"),
        ({"layers": "1e9"}, "layers='1e9' is not a whole number from 1 to 10,000"),
        ({"tp": "0"}, "tp='0' is not a whole number from 1"),
        ({"pp": "0.4"}, "pp='0.4' is not a whole number"),
        ({"mbs": "-2"}, "mbs='-2' is not a whole number"),
        ({"seq_len": "1e18"}, "seq_len='1e18' is not a whole number from 1 to 1,000,000,000"),
        ({"gbs": "inf"}, "gbs='inf' is not a whole number"),
        ({"n_gpus": "nan"}, "n_gpus is not given"),
        ({"hidden": "8"}, "heads of size 0: hidden=8 < heads=16"),
        ({"mbs": "1", "gbs": "1e9", "dp": "", "n_gpus": "4"}, "too many to simulate"),
        ({"seq_len": ""}, "seq_len is not given"),
        ({"mbs": "", "gbs": ""}, "neither mbs nor a gbs"),
        ({"vpp": "3", "gbs": "40"}, "cannot be divided into"),
    ],
)
def test_unusable_row_is_refused_with_the_reason(changes, reason):
    with pytest.raises(published_programs.Unusable, match=reason):
        published_runs.published_run(make_row(**changes))


def test_whole_numbers_may_be_written_as_fractions():
    assert (
        published_runs.published_run(make_row(tp="2.0", layers="24.0", mbs=" 2 ")).plans
        == published_runs.published_run(make_row()).plans
    )


def test_package_may_count_as_one_device_or_as_two():
    for data in ("4", "8", ""):
        run = published_runs.published_run(make_row(gpu="MI250 (package, 2 GCD)", dp=data))
        assert (run.units, run.cluster.devices, run.plans[0].data) == (16, 32, 8)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e400", "1e-320"])
def test_measurement_that_is_not_a_positive_number_counts_as_not_given(text):
    nothing = dict.fromkeys(("step_time_s", "tok_s_per_gpu", "tok_s_total", "samples_s_total", "tflops_per_gpu"), text)
    run = published_runs.published_run(make_row(**{**nothing, "step_time_s": "0"}, peak_mem_gib_per_gpu="-1"))
    assert (run.step_time_s, run.memory_gib) == (None, None)
    assert (
        published_runs.published_run(
            make_row(**{**nothing, "tok_s_per_gpu": "0", "tok_s_total": "65536", "step_time_s": ""})
        ).step_time_s
        == 2
    )


@pytest.mark.parametrize(
    "changes", [{}, {"framework": "torchtitan", "model": "Llama"}, {"gpu": "MI250 (package, 2 GCD)", "dp": ""}]
)
def test_no_cell_makes_a_row_raise_anything_but_unusable(changes):
    good = make_row(**changes)
    predicted = 0
    for column in good:
        cases = [{**good, column: text} for text in NASTY_CELLS]
        cases.append({name: text for name, text in good.items() if name != column})
        for case in cases:
            try:
                run = published_runs.published_run(case)
            except published_programs.Unusable:
                continue
            entry, reason = planner_accuracy.score_or_reason(run, frozenset())
            assert entry is not None, (column, case.get(column), reason)
            assert entry.time_error is None or entry.time_error >= -1
            predicted += 1
    assert predicted > 300

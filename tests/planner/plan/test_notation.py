"""The text of a plan and its way back."""

import numpy as np
import pytest

from moreh.accelerator.devices import find_device
from moreh.errors import PlanError
from moreh.models.describe.from_source import describe_config
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan, plan_text, torch_refusal
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints

# 12 layers, 8 query heads, 4 key-value heads.
MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "vocab_size": 1000,
}
MODEL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}


@pytest.fixture
def training():
    return Training(describe_config(MODEL, "small"), global_batch_size=48, sequence_length=128)


@pytest.mark.parametrize("devices", [1, 6, 16])
def test_text_of_every_kind_of_candidate_is_read_back(training, devices):
    environment = make_environment(cluster_for_devices(find_device("MI250 GCD"), devices))
    rng = np.random.default_rng(devices)
    seen, uneven = set(), 0
    for table in candidate_tables(environment.roofline, environment.cluster, training, Constraints(max_context=4)):
        for row in rng.permutation(len(table))[:40]:
            plan = table.plan(int(row))
            text = plan_text(plan)
            assert parse_plan(text, training, devices) == plan, text
            assert parse_plan(" ".join(reversed(text.upper().split())), training, devices) == plan
            seen |= {plan.schedule, plan.recomputation, plan.sharding, plan.sequence_parallel, plan.context}
            uneven += "layers:" in text
    if devices == 16:
        assert seen >= {"1f1b", "interleaved", "zero-bubble", "zbv", "none", "selective", "full", "parameters", True, 4}
        assert uneven > 10


def test_fields_that_are_left_out_are_filled_in(training):
    full = Plan((3, 3, 3, 3), pipeline=4, data=4, micro_batches=12)
    assert parse_plan("pp4", training, 16) == full
    assert parse_plan("tp1 pp4 dp4 cp1 mb1x12 1f1b recompute:none shard:none layers:3x4", training, 16) == full
    assert plan_text(full) == "tp1 pp4 dp4 mb1x12"
    assert parse_plan("pp4 mb2", training, 16).micro_batches == 6
    assert parse_plan("pp4 interleaved", training, 16).chunks == 2
    assert parse_plan("pp4 zbv", training, 16).stage_layers == (1, 1, 1, 1, 2, 2, 2, 2)


def test_layers_are_written_as_runs(training):
    plan = Plan((2, 3, 3, 4), pipeline=4, data=4, micro_batches=12)
    assert plan_text(plan).endswith(" layers:2,3x2,4")
    assert parse_plan("pp4 layers:2,3,3,4", training, 16) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the plan is empty"),
        ("tp4 pp3", "tp4 pp3 does not divide 16 devices"),
        ("tp4 pp4 dp2", "tp4 pp4 dp2 is for 32 devices, but there are 16: give dp1"),
        ("tp3 pp2 dp2", "is for 12 devices, but there are 16: give sizes with the product 16"),
        ("tp8", "tp8 does not divide the attention heads, whose common divisor is 4"),
        ("tp4 mb5", "mb5 does not divide the 12 rows"),
        ("tp4 mb2x2", "dp4 mb2x2 makes a batch of 16 rows, but it has 48: give mb2x6"),
        ("mb0", "mb0 does not divide"),
        ("tp0", "tp0 is not possible"),
        ("dp32", "is for 32 devices"),
        ("pp16", "pp and chunks make 16 stages, but the model has 12 layers"),
        ("pp4 interleaved:4", "make 16 stages"),
        ("pp4 layers:3,3,3", "gives 9 layers to 3 stages, but there are 12 layers for 4 stages"),
        ("pp4 layers:3,3,3,2", "gives 11 layers"),
        ("pp4 layers:12,0x3", "at least one each"),
        ("pp4 layers:9999999x9999999", "but there are 12 layers for 4 stages"),
        ("pp8 mb12x2", None),
        ("pp2 dp8 mb2x3 interleaved", None),
        ("pp2 tp4 dp2 mb8x3 zero-bubble", None),
        ("zbv", "zbv needs several stages"),
        ("pp4 zbv shard:optimizer", "does not go with zbv"),
        ("pp4 tp4 shard:gradients", "the plan has dp1"),
        ("sp", "the plan has tp1"),
        ("tp4 cp4 pp1 mb1x48", None),
        ("tp4 tp2", "the field tp is given twice"),
        ("xp4", "did you mean one like tp4?"),
        ("tp", "did you mean one like tp4?"),
        ("tp-1", "did you mean one like tp4?"),
        ("tp99999999999", "'tp99999999999' is not a field"),
        ("interleave:2", "did you mean one like interleaved:2?"),
        ("recompute:ful", "did you mean one like recompute:full?"),
        ("shard:param", "did you mean one like shard:parameters?"),
        ("mb1*4", "did you mean one like mb1x64?"),
        ("zero-buble", "did you mean one like zero-bubble?"),
        ("?", "there are tp4, pp4"),
    ],
)
def test_wrong_text_is_refused_in_one_line(training, text, message):
    if message is None:
        assert parse_plan(text, training, 16).devices == 16
        return
    with pytest.raises(PlanError, match=r"\A[^\n]+\Z") as caught:
        parse_plan(text, training, 16)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("tp2 sp", "sp with tp2"), ("cp2 dp1", "cp2 needs sequences of a multiple of 4")]
)
def test_sequences_that_do_not_split_are_refused(training, text, message):
    odd = Training(training.architecture, 48, 127)
    with pytest.raises(PlanError, match=message):
        parse_plan(text, odd, 2)


def test_schedules_that_torch_refuses_are_accepted_if_their_order_is_defined(training):
    """The reason of the refusal is told in fields of the text."""
    few = parse_plan("pp3 dp1 mb24x2", training, 3)
    assert torch_refusal(few) == "1f1b needs at least as many micro-batches as stages, and pp3 mb24x2 has 2 for 3"
    assert "zero-bubble with pp3 mb3x16" in torch_refusal(parse_plan("pp3 mb3x16 zero-bubble", training, 3))
    with pytest.raises(
        PlanError, match=r"^plan: interleaved with pp3 mb3x16 takes .* 16 micro-batches do not split: give mb4x12$"
    ):
        parse_plan("pp3 mb3x16 interleaved", training, 3)
    for text in ("pp3", "pp3 mb4x12 interleaved", "pp3 zbv mb24x2"):
        assert torch_refusal(parse_plan(text, training, 3)) == ""

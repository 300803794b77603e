"""Stages and micro-batches that no plan has are maxima; what a plan has is left exact."""

import pytest

from moreh.accelerator.flavors import find_flavor
from moreh.errors import PlanError
from moreh.models.describe.from_source import describe
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan import Training
from moreh.planner.search.attainable import attainable, lowered_options
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.request import Request
from moreh.planner.search.search import search

MODEL = describe("configs/models/llama3_8b.json")


def request(batch_size=32, **constraints):
    environment = make_environment(cluster_for_flavor(find_flavor("4xLarge.2048GB")))
    return Request(Training(MODEL, batch_size, 1024), environment, Constraints(**constraints))


def test_an_example_of_the_platform_is_planned_on_all_devices():
    asked = request(pipeline=2, micro_batches=32, shard_parameters=True)
    with pytest.raises(PlanError):
        search(asked.training, asked.environment, asked.constraints)
    attained = attainable(asked)
    assert attained.constraints == Constraints(pipeline=2, micro_batches=16, shard_parameters=True)
    plan = search(attained.training, attained.environment, attained.constraints).best[0].plan
    assert (plan.pipeline, plan.micro_batches, plan.devices) == (2, 16, asked.environment.cluster.devices)
    assert lowered_options(asked.constraints, attained.constraints) == [
        "num_micro_batches=32: no plan of this training has so many under the options given; it is planned with 16."
    ]


@pytest.mark.parametrize(
    "constraints", [{}, {"pipeline": 8}, {"micro_batches": 4}, {"pipeline": 2, "micro_batches": 16}]
)
def test_numbers_that_a_plan_has_stay(constraints):
    asked = request(**constraints)
    assert attainable(asked) == asked
    assert lowered_options(asked.constraints, asked.constraints) == []


def test_a_request_that_smaller_numbers_do_not_help_is_left_to_the_search():
    asked = request(batch_size=1, pipeline=3, shard_parameters=True)
    assert attainable(asked) == asked


def test_more_stages_than_devices_are_as_many_as_there_are():
    devices = request().environment.cluster.devices
    assert attainable(request(pipeline=10 * devices)).constraints.pipeline == devices

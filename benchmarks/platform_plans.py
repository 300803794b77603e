"""The plans that the platform published and the ones we choose, predicted: `python benchmarks/platform_plans.py`.

Nothing here is measured by us. The platform's tokens/s are published; everything else is predicted for the same
devices.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from moreh.accelerator.flavors import find_flavor
from moreh.models.describe.from_source import describe
from moreh.planner.cost.prediction import predict
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.efficiency import uncertainty
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.layer_balancing import even_layers
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Plan, Recomputation, Training
from moreh.planner.search.search import search

MODELS = Path(__file__).parent.parent / "configs" / "models"


@dataclass(frozen=True)
class PublishedPlan:
    """A job of the platform's tutorials, https://github.com/moreh-dev/moreh-2024docs."""

    model: str
    """Name of a file in configs/models, without its suffix."""
    flavor: str
    length: int
    """Tokens of a sequence."""
    plan: Plan
    tokens_per_second: float
    """The figures that the platform reports."""


def _sharded_plan(
    layers: int,
    pipeline: int,
    data: int,
    micro_batch_size: int,
    micro_batches: int,
    recomputation: Recomputation = "none",
) -> Plan:
    return Plan(
        even_layers(layers, pipeline),
        pipeline=pipeline,
        data=data,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        recomputation=recomputation,
        sharding="parameters",
    )


PUBLISHED = (
    PublishedPlan("cerebras_gpt_13b", "4xLarge.2048GB", 1024, _sharded_plan(40, 4, 8, 1, 2), 6800),
    PublishedPlan("cerebras_gpt_13b", "8xLarge.4096GB", 1024, _sharded_plan(40, 4, 16, 1, 2), 13000),
    PublishedPlan("llama3_70b", "8xLarge.4096GB", 1024, _sharded_plan(80, 8, 8, 1, 64, "full"), 4062),
    PublishedPlan("llama3_8b", "xLarge.512GB", 1024, _sharded_plan(32, 1, 8, 2, 1), 13000),
)


def main() -> int:
    """Print a table in Markdown."""
    print("| job | the platform's plan | published tokens/s | predicted | our plan | predicted | gain |")
    print("|---|---|---|---|---|---|---|")
    for job in PUBLISHED:
        flavor = find_flavor(job.flavor)
        environment = make_environment(cluster_for_flavor(flavor))
        training = Training(describe(MODELS / f"{job.model}.json"), job.plan.global_batch_size, job.length)
        # The platform does not say how it exchanges sharded parameters in a pipeline. Exchanges for each micro-batch
        # fit what it reports.
        platform = replace(environment, software=replace(environment.software, reshards_in_pipeline=True))
        theirs = predict(job.plan, training, platform)
        ours = search(training, environment, count=1).best[0]
        error = uncertainty(flavor.device.efficiency_class).error
        gain = ours.tokens_per_second / theirs.tokens_per_second
        # Both predictions may be off by this error, independently of each other.
        low, high = gain / (1 + error * math.sqrt(2)), gain * (1 + error * math.sqrt(2))
        print(
            f"| {job.model}, {job.flavor}, {training.global_batch_size} x {job.length} | `{plan_text(job.plan)}` | "
            f"{job.tokens_per_second:,.0f} | "
            f"{theirs.tokens_per_second:,.0f} | `{plan_text(ours.plan)}` | {ours.tokens_per_second:,.0f} | "
            f"{gain:.2f} x ({low:.2f} to {high:.2f}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

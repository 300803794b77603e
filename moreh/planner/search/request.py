"""What is to be planned: a training, where it runs, and what the user has decided already."""

from dataclasses import dataclass

from moreh.accelerator.devices import Device
from moreh.accelerator.flavors import Flavor
from moreh.planner.cost.prediction import Environment
from moreh.planner.plan.plan import SCHEDULES, Training
from moreh.planner.search.candidates import Constraints


@dataclass(frozen=True)
class Request:
    """A training that plans are searched for."""

    training: Training
    setting: Environment
    restrictions: Constraints
    flavor: Flavor | None = None
    """The accelerator of the setting; None where the devices are not those of an accelerator."""
    precision: str = "bfloat16"
    """What matmuls are computed in, such as "bfloat16"."""

    @property
    def accelerator(self) -> str:
        """Where the training is to run, for people."""
        devices = f"{self.setting.cluster.devices} x {self.device.name}"
        return devices if self.flavor is None else f"{self.flavor.name} ({devices})"

    @property
    def device(self) -> Device:
        """The kind of devices."""
        return self.setting.cluster.device

    @property
    def limit_bytes(self) -> float:
        """The bytes of each device that a plan may use."""
        return self.device.memory_bytes * self.restrictions.memory_fraction


def constraints_text(restrictions: Constraints) -> str:
    """What the user has decided, without what is so by default; may be empty."""
    texts = []
    if restrictions.pipeline is not None:
        texts.append(f"stages {restrictions.pipeline}")
    if restrictions.micro_batches is not None:
        texts.append(f"micro-batches {restrictions.micro_batches}")
    for name, choice in (
        ("recomputation", restrictions.recompute),
        ("sharded parameters", restrictions.shard_parameters),
    ):
        if choice is not None:
            texts.append(name if choice else f"no {name}")
    if restrictions.max_tensor is not None:
        texts.append(f"tensor at most {restrictions.max_tensor}")
    if set(restrictions.schedules) != set(SCHEDULES):
        texts.append(f"schedules {', '.join(restrictions.schedules)}")
    if restrictions.max_context != 1:
        texts.append(f"context at most {restrictions.max_context}")
    return ", ".join(texts)

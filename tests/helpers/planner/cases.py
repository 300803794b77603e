"""Cases of the tests of the planner: models, and random trainings on random devices."""

from dataclasses import replace

import numpy as np

from moreh.accelerator.devices import all_devices, find_device
from moreh.models.describe.from_source import describe_config
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan import Training
from moreh.planner.software_profile import moreh_software
from tests.conftest import ROOT

MODELS = ROOT / "configs" / "models"
GPT = describe_config({"model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12}, "gpt")
LLAMA = describe_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama",
)


MOE = describe_config(
    {
        "model_type": "mixtral",
        "num_hidden_layers": 8,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
    },
    "moe",
)


def environment_of(device, devices):
    """`devices` devices of a kind, by its name, with this project's software."""
    return make_environment(cluster_for_devices(find_device(device), devices))


def with_memory(environment, memory_mib):
    """The environment with other memory on each device."""
    device = replace(environment.cluster.device, memory_mib=memory_mib)
    return replace(environment, cluster=replace(environment.cluster, device=device))


def random_trainings(count):
    """Random trainings of random models, each with an environment."""
    rng = np.random.default_rng(0)
    names = list(all_devices())
    for _ in range(count):
        heads = int(2 ** rng.integers(2, 6))
        hidden = heads * int(rng.choice([64, 128]))
        config = {
            "model_type": "llama",
            "num_hidden_layers": int(rng.integers(2, 13)),
            "hidden_size": hidden,
            "intermediate_size": int(hidden * rng.choice([2, 3, 4])),
            "num_attention_heads": heads,
            "num_key_value_heads": int(2 ** rng.integers(1, np.log2(heads) + 1)),
            "vocab_size": int(rng.choice([1000, 32000, 128256])),
        }
        device = find_device(str(rng.choice(names)))
        devices = int(2 ** rng.integers(0, 5))
        training = Training(
            describe_config(config, "random"), devices * int(2 ** rng.integers(0, 4)), int(2 ** rng.integers(7, 13))
        )
        computes = ["half", "float32"] + (["float8"] if device.float8_flops_per_second else [])
        software = moreh_software(str(rng.choice(computes)))
        yield training, make_environment(cluster_for_devices(device, devices), software)

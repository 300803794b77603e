"""Tiny models of the families that tests run on several workers, and the plans that they run under."""

from tests.helpers.models.family_settings import FAMILY_SETTINGS
from tests.helpers.tensor_cases import whole_model

# One of each kind of attention, of positions, of norms, of fused matrices, of output layers.
FAMILIES = (
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "opt",
    "phi",
    "phi3",
    "falcon",
    "bloom",
    "gptj",
    "olmo2",
    "nanochat",
    "cohere",
    "starcoder2",
    "olmo",
    "mixtral",
    "gpt_oss",
    "qwen3_moe",
)
# Families without rules of tensor parallelism.
NOT_TENSOR_PARALLEL = ("gpt_bigcode",)

# Plans of four ranks for the three layers of a tiny model and eight sequences.
PP_TP = {"stage_layers": (1, 2), "pipeline": 2, "tensor": 2, "micro_batches": 2, "micro_batch_size": 4}
PLANS = {
    "pp-tp": PP_TP,
    "pp-tp-sequence": {**PP_TP, "sequence_parallel": True, "recomputation": "full"},
    "tp-sharded": {"stage_layers": (3,), "tensor": 2, "data": 2, "micro_batch_size": 4, "sharding": "parameters"},
    "pp-sharded": {
        "stage_layers": (2, 1),
        "pipeline": 2,
        "data": 2,
        "micro_batches": 2,
        "micro_batch_size": 2,
        "sharding": "parameters",
    },
}


def make_model(family, **settings):
    """A tiny model of a family in float64, the same on each rank."""
    return whole_model(family, FAMILY_SETTINGS.get(family, {}) | settings)

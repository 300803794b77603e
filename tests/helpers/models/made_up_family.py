"""A family that neither transformers nor the registry has, to show what adding one takes: Llama by another name."""

from contextlib import contextmanager
from unittest import mock

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moreh.models.families import FROM_TRANSFORMERS, Family, llama, register, registry
from tests.helpers.tensor_cases import compare_with_one_process

MODEL_TYPE = "made_up"


class MadeUpConfig(LlamaConfig):
    model_type = MODEL_TYPE


class MadeUpForCausalLM(LlamaForCausalLM):
    config_class = MadeUpConfig
    # As if it were a model of transformers: a script's own model classes run their own forward pass.
    __module__ = LlamaForCausalLM.__module__


# The whole record: with the line that registers it, all that the family takes.
MADE_UP = Family(
    MODEL_TYPE,
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=llama.FAMILY.config_keys,
    architecture=llama.FAMILY.architecture,
)


def add_to_transformers():
    """Let AutoModelForCausalLM build models of the family."""
    AutoConfig.register(MODEL_TYPE, MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)


@contextmanager
def registered(family):
    """In this context the registry has a record, in place of another one of its model type."""
    add_to_transformers()
    with mock.patch.dict(registry._families):
        registry._families.pop(family.model_type, None)
        register(family)
        yield


def compare_registered(family, changes, size, sequence_parallel):
    """`compare_with_one_process` for a record, on a rank."""
    with registered(family):
        return compare_with_one_process(family.model_type, changes, size, sequence_parallel)

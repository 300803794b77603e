"""The stand-in in outputs for the keys and values of earlier tokens, which no worker has whole."""

from typing import Any, NoReturn

from transformers.utils.generic import ModelOutput

from moreh.errors import MissingCacheError
from moreh.runtime.batch.model_inputs import CACHE_ARGUMENTS, ONE_WORKER, ModelInputs


class MissingCache:
    """A cache without content: a script may pass over it, and every use of it raises an error."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # copies, pickles and protocols look for such methods
        _refuse()

    def __getitem__(self, key: Any) -> NoReturn:
        _refuse()

    def __iter__(self) -> NoReturn:
        _refuse()

    def __len__(self) -> NoReturn:
        _refuse()

    def __bool__(self) -> bool:
        return True


def _refuse() -> NoReturn:
    raise MissingCacheError(
        "past_key_values of an output: a model on several workers keeps no cache; give the model all tokens in each "
        f"call, use model.generate, or {ONE_WORKER}"
    )


def missing_cache(causal: Any, output_class: type[ModelOutput], inputs: ModelInputs) -> dict[str, Any]:
    """The fields of a call's outputs in which the model itself would return its cache; none if it would return none."""
    uses_cache = inputs.others.get("use_cache")
    if uses_cache is None:
        uses_cache = getattr(causal.config.get_text_config(), "use_cache", False)
    if not uses_cache or (causal.training and _recomputes_activations(causal)):
        return {}
    fields = getattr(output_class, "__dataclass_fields__", {})
    return {name: MissingCache() for name in CACHE_ARGUMENTS if name in fields}


def _recomputes_activations(causal: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in causal.modules())

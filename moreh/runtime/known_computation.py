"""Whether the runtime knows what a model computes: its layers, and the mean loss over label tokens."""

from typing import Any

from moreh.planner.describe_module import unwrapped


def unknown_computation(root: Any) -> str | None:
    """What a model computes besides, which would be lost if its parts were computed one by one; None if nothing."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    causal: Any = unwrapped(root)
    name = type(causal).__name__
    if any(config.is_prompt_learning for config in getattr(root, "peft_config", {}).values()):
        return f"{name} has learned prompts of PEFT"
    if not type(causal).forward.__module__.startswith("transformers.models."):
        return (
            f"{name} has a forward pass of its own ({type(causal).forward.__module__}), which may compute another loss than "
            "those of transformers"
        )
    if getattr(causal.config.get_text_config(), "output_router_logits", False):
        return f"{name} adds a loss of its router (output_router_logits=True)"
    if causal.loss_function is not LOSS_MAPPING["ForCausalLM"]:
        return f"{name} has a loss of its own"
    return None

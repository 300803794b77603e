"""What a script has hooked or compiled inside of a model, which several workers refuse."""

from moreh.models.compatibility import compiled_module, inner_hook
from tests.helpers.models.tiny_models import build, tiny_config_of


def test_hooks_and_compilation_inside_of_a_model_are_found():
    model = build(tiny_config_of("llama", {}), device="meta")
    assert (inner_hook(model), compiled_module(model)) == (None, None)
    model.enable_input_require_grads()  # a hook of transformers
    assert inner_hook(model) is None
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *arguments: None)
    assert inner_hook(model) == "model.layers.1.mlp"
    handle.remove()
    model.model.layers[1].compile()
    assert (inner_hook(model), compiled_module(model)) == (None, "model.layers.1")

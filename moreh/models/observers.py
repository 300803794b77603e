"""Detects function modes, dispatch modes and hooks that a script has put around a call of a model."""

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_OWN = "moreh."


def observer_of_operations() -> str | None:
    """The name (for messages) of an active mode that sees, transforms or stores each operation; None without one."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._len_torch_dispatch_stack() > 0:
        return f"a dispatch mode ({type(torch._C._get_dispatch_stack_at(0)).__name__})"
    modes = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    mode = next((mode for mode in modes if not isinstance(mode, DeviceContext)), None)
    if mode is not None:
        return f"a function mode ({type(mode).__name__})"
    autograd: Any = torch._C._autograd
    hooks = autograd._top_saved_tensors_default_hooks(True) if autograd._saved_tensors_hooks_is_enabled() else None
    module = "" if hooks is None else str(getattr(hooks[0], "__module__", ""))
    # Hooks of this package count what a call keeps.
    if hooks is None or module.startswith(_OWN):
        return None
    return "torch.utils.checkpoint" if module == "torch.utils.checkpoint" else "hooks on saved tensors"

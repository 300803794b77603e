"""AdamW for bfloat16 weights, with state and arithmetic in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw


class AdamWInFloat32(torch.optim.AdamW):
    """torch's AdamW on a float32 copy of each weight, which exists while it is updated, and is then rounded.

    The moments keep what bfloat16 would round away: with beta2 = 0.999, a second moment in bfloat16 never changes by
    less than 1/256 of itself. The weights have no float32 master copy.
    """

    state_dtype = torch.float32
    """The type of the state, which the planner counts."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
                state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)
        weight = parameter.float()
        adamw(
            [weight],
            [parameter.grad.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [state["step"]],
            foreach=False,
            has_complex=False,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        parameter.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without rounding it to the type of the weights, as torch does."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step":
                    self.state[parameter][name] = value.to(parameter.device, self.state_dtype, copy=True)

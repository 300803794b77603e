"""Losses and gradients with the line, compared with those without it: cases are PRECISION/FAMILY.

In float32 (without TF32) they must agree to 1e-5. In bfloat16 both are compared with float32: the line may be 1.5 times
as far from it as autocast without the line, at most 5 %, and always 0.1 %.
"""

import importlib
from typing import Any

import torch

from gpu_check.parts.families import make_model
from gpu_check.parts.reference import loss_and_gradients, path_of
from gpu_check.settings import Result, Settings

FLOAT32_TOLERANCE = 1e-5
BFLOAT16_FACTOR, BFLOAT16_TOLERANCE = 1.5, 5e-2
# Below this share of the largest gradient's norm, a parameter's gradient is compared with that share: those of keys'
# biases are mathematically 0.
FLOOR = 1e-2


def run(case: str, settings: Settings) -> Result:
    """Compute a family with the line, and compare."""
    precision, family = case.split("/")
    enable_line(precision, settings)
    expected = torch.load(path_of(case, settings))
    loss, gradients, outputs = loss_and_gradients(make_model(family, settings), settings, autocast=False)
    figures: dict[str, Any] = {"by the line": is_fast(outputs), "loss": loss}
    if precision == "float32":
        loss_error, gradient_error = errors(loss, gradients, expected)
        figures |= {"loss error": loss_error, "gradient error": gradient_error}
        return _result(figures, (loss_error, gradient_error), (FLOAT32_TOLERANCE, FLOAT32_TOLERANCE))
    exact = torch.load(path_of(f"float32/{family}", settings))
    own, plain = errors(loss, gradients, exact), errors(expected["loss"], expected["gradients"], exact)
    figures |= {
        "loss error": own[0],
        "without the line": plain[0],
        "gradient error": own[1],
        "gradient error without the line": plain[1],
    }
    loss_limit, gradient_limit = (min(max(BFLOAT16_FACTOR * error, 1e-3), BFLOAT16_TOLERANCE) for error in plain)
    return _result(figures, own, (loss_limit, gradient_limit))


def _result(figures: dict[str, Any], own: tuple[float, float], limits: tuple[float, float]) -> Result:
    """Passed if the line has computed the loss, and both errors are within their limits; NaN is not."""
    if not figures["by the line"]:
        return Result(False, figures, "the model's own forward pass has computed it; its log says why")
    passed = own[0] <= limits[0] and own[1] <= limits[1]
    return Result(passed, figures, "" if passed else f"allowed are {limits[0]:.1e} and {limits[1]:.1e}")


def enable_line(precision: str, settings: Settings) -> None:
    """Call the line for a precision; a process can have one only."""
    import moreh  # noqa: F401  (attaches torch.moreh where the package is not installed)
    from moreh.runtime.kernels.precision import choose_as

    # What is faster is not the question here.
    choose_as({settings.device: precision == "bfloat16"})
    torch.set_float32_matmul_precision("highest")
    option = torch.moreh.option  # type: ignore[attr-defined]
    option.enable_advanced_parallelization(mixed_precision=precision == "bfloat16")
    if settings.dry:
        from moreh.runtime.engine import hook

        plan_without_measuring()
        hook.MIN_FLOPS = 0.0  # else the model's own forward pass would compute such tiny batches


def plan_without_measuring() -> None:
    """Plan for a device of the catalogue in the dry mode: measuring a CPU takes seconds."""
    from moreh.accelerator.flavors import find_flavor
    from moreh.planner.hardware.cluster import cluster_for_flavor
    from moreh.planner.hardware.environment import make_environment

    choose_plan: Any = importlib.import_module("moreh.runtime.engine.choose_plan")

    def environment(workers: int, software: Any) -> Any:
        return make_environment(cluster_for_flavor(find_flavor("xLarge.512GB")), software).with_devices(workers)

    choose_plan.measured_environment = environment


def is_fast(outputs: type[Any]) -> bool:
    """True if the runtime has computed a call, and not the model's own forward pass."""
    from moreh.runtime.batch.loss_output import LazyOutput

    return issubclass(outputs, LazyOutput)


def errors(loss: float, gradients: dict[str, torch.Tensor], expected: dict[str, Any]) -> tuple[float, float]:
    """The relative errors of a loss and of the worst gradient, each as the norm of its difference."""
    if gradients.keys() != expected["gradients"].keys():
        return float("inf"), float("inf")
    norms = {name: float(gradient.norm()) for name, gradient in expected["gradients"].items()}
    floor = FLOOR * max(norms.values())
    worst = torch.tensor(
        [
            float((gradients[name] - expected["gradients"][name]).norm()) / max(norm, floor)
            for name, norm in norms.items()
        ]
    )
    # torch's max, unlike Python's, is NaN if one of them is.
    return abs(loss - expected["loss"]) / abs(expected["loss"]), float(worst.max())

"""Our linear layer with a LoRA adapter beside PEFT's, and when a layer computes with it."""

import contextlib
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.kernels import lora
from moreh.runtime.kernels.faster_kernels import FasterKernels
from tests.helpers import compare

INPUTS, OUTPUTS, RANK = 24, 40, 4


def make_layer(*, bias=True, dtype=torch.float64, **settings):
    """A frozen layer with an adapter whose matrices are both random."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=3, **settings)
    base = torch.nn.Linear(INPUTS, OUTPUTS, bias=bias).requires_grad_(False)
    layer = Linear(base, adapter_name="default", config=config, r=RANK, lora_alpha=3)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer.to(dtype)


def make_input(dtype=torch.float64, requires_grad=True):
    """Not contiguous, as a slice of a longer sequence."""
    torch.manual_seed(1)
    return torch.randn(2, 9, INPUTS, dtype=torch.float64)[:, 1:8].to(dtype).requires_grad_(requires_grad)


def output_and_gradients(layer, x):
    """The output, and the gradients of the input and of all parameters that have one."""
    output = layer(x)
    torch.manual_seed(2)
    grad_output = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    trained = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    return [output, *torch.autograd.grad(output, trained, grad_output)]


def bound(layer, options=DEFAULT_OPTIONS):
    """Within it the layer computes with our kernel."""
    return FasterKernels(layer, options).bound()


@contextlib.contextmanager
def counted_calls():
    """The calls of our operation."""
    with mock.patch.object(lora._LoraLinear, "apply", side_effect=lora._LoraLinear.apply) as calls:
        yield calls


def worst_difference(layer, x, calls=1):
    """The largest difference between PEFT's output and gradients and ours."""
    expected = output_and_gradients(layer, x)
    with bound(layer), counted_calls() as counted:
        actual = output_and_gradients(layer, x)
    assert counted.call_count == calls
    assert [tensor.dtype for tensor in actual] == [tensor.dtype for tensor in expected]
    return compare.worst(compare.max_difference(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_equals_the_layer_of_peft(bias, requires_grad):
    assert worst_difference(make_layer(bias=bias), make_input(requires_grad=requires_grad)) < 1e-12


def test_dropout_counts_only_in_training():
    layer = make_layer(lora_dropout=0.5)
    assert worst_difference(layer.eval(), make_input()) < 1e-12
    torch.manual_seed(3)
    expected = layer.train()(make_input())
    torch.manual_seed(3)
    with bound(layer):
        assert torch.equal(layer(make_input()), expected)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_no_more_than_peft(input_dtype):
    """Both beside float64; the gradients keep the dtypes of what they are gradients of."""
    exact = output_and_gradients(make_layer(), make_input(input_dtype).detach().double().requires_grad_())
    layer, x = make_layer(dtype=torch.float32), make_input(input_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        of_peft = output_and_gradients(layer, x)
        with bound(layer), counted_calls() as counted:
            ours = output_and_gradients(layer, x)
    assert counted.call_count == 1
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in of_peft]
    for actual, reference, expected in zip(ours, of_peft, exact, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < max(1.2 * (reference.double() - expected).norm() / expected.norm(), 2**-9)


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_comparison_sees_a_wrong_scaling_and_nan(factor):
    layer = make_layer()
    found = lora._only_adapter(layer)
    with mock.patch.object(lora, "_only_adapter", return_value=(*found[:3], factor)):
        assert not worst_difference(layer, make_input()) < 1e-3


def with_hook(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


def with_replaced_forward(layer):
    layer.base_layer.forward = lambda x: torch.nn.functional.linear(x, layer.base_layer.weight)


def with_second_adapter(layer):
    layer.update_layer("second", RANK, lora_alpha=1, config=LoraConfig(r=RANK, init_lora_weights=False))
    layer.double()
    layer.set_adapter(["default", "second"])


CHANGES = {
    "hook": with_hook,
    "replaced forward": with_replaced_forward,
    "second adapter": with_second_adapter,
    "trained bias": lambda layer: layer.base_layer.bias.requires_grad_(),
    "trained weight": lambda layer: layer.base_layer.weight.requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_peft_computes_layers_with_more_than_an_adapter(change):
    layer = make_layer()
    change(layer)
    assert worst_difference(layer, make_input(), calls=0) == 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_peft_computes_other_kinds_of_adapters(settings):
    assert worst_difference(make_layer(**settings), make_input(), calls=0) == 0


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_peft_computes_layers_without_an_active_adapter(state):
    layer = make_layer()
    if state == "merged":
        layer.merge()
    else:
        layer.enable_adapters(False)
    with torch.no_grad(), bound(layer), counted_calls() as counted:
        output = layer(make_input())
    assert counted.call_count == 0
    assert torch.equal(output, layer.base_layer(make_input()))


def test_peft_computes_where_dtypes_differ():
    """Weights in bfloat16 with an adapter in float32: PEFT casts between them."""
    layer = make_layer(dtype=torch.float32)
    layer.base_layer.to(torch.bfloat16)
    assert worst_difference(layer, make_input(torch.bfloat16), calls=0) == 0


def test_option_and_end_of_the_computation_leave_the_layer_alone():
    layer = make_layer()
    with bound(layer, ParallelOptions(disable=("fused_lora",))):
        assert "forward" not in vars(layer)
    with bound(layer):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)

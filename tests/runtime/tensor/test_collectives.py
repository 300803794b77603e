"""The collectives that autograd goes through: their transposes, their order of ranks, and their spans."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moreh.runtime.tensor import collectives
from tests.helpers.workers import run_on_workers


def transposes(dtype):
    """For each collective f with backward g: the sums over ranks of f(x) * y and of x * g(y), equal for a transpose."""
    group = dist.group.WORLD
    size = group.size()
    generator = torch.Generator().manual_seed(group.rank())
    shared = torch.Generator().manual_seed(99)

    def draw(shape, source):
        # Transposed: not contiguous in memory.
        return torch.randint(-4, 5, shape[::-1], generator=source).to(dtype).movedim((0, 1, 2), (2, 1, 0))

    result = {}
    for dim in (0, 1):
        whole, part = [3, 4, 5], [3, 4, 5]
        whole[dim] = size * part[dim]
        for name, function, input_shape, output_shape, same_input, same_gradient in (
            ("copy_to_tp", lambda x: collectives.copy_to_tp(x, group), part, part, True, False),
            ("reduce_from_tp", lambda x: collectives.reduce_from_tp(x, group), part, part, False, True),
            ("gather_from_sp", lambda x, dim=dim: collectives.gather_from_sp(x, dim, group), part, whole, False, False),
            (
                "reduce_scatter_to_sp",
                lambda x, dim=dim: collectives.reduce_scatter_to_sp(x, dim, group),
                whole,
                part,
                False,
                False,
            ),
            ("scatter_to_sp", lambda x, dim=dim: collectives.scatter_to_sp(x, dim, group), whole, part, True, False),
        ):
            x = draw(input_shape, shared if same_input else generator).requires_grad_()
            before = x.detach().clone()
            output = function(x)
            grad_output = draw(output_shape, shared if same_gradient else generator)
            saved = grad_output.clone()
            output.backward(grad_output)
            products = torch.stack([(output.detach() * grad_output).double().sum(), (before * x.grad).double().sum()])
            # What all ranks hold together counts once.
            products[0] /= size if same_gradient else 1
            products[1] /= size if same_input else 1
            dist.all_reduce(products)
            unchanged = torch.equal(x.detach(), before) and torch.equal(grad_output, saved)
            result[name, dim] = (
                *products.tolist(),
                unchanged,
                list(output.shape) == output_shape,
                output.dtype == dtype,
            )
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_backward_pass_of_a_collective_is_its_transpose(dtype):
    for result in run_on_workers(transposes, [(dtype,)], size=4)[0]:
        for forward, backward, *conditions in result.values():
            # Small whole numbers: exact in every type.
            assert forward == backward != 0
            assert all(conditions)


def test_parts_are_gathered_in_the_order_of_ranks():
    assert run_on_workers(gather_ranks, [(0,), (1,)], size=2) == [
        [[[[0, 0], [0, 0], [1, 1], [1, 1]]] * 1] * 2,
        [[[[0, 0, 1, 1], [0, 0, 1, 1]]] * 1] * 2,
    ]


def gather_ranks(dim):
    part = torch.full((2, 2), float(dist.get_rank()))
    return [collectives.gather_from_sp(part, dim, dist.group.WORLD).tolist()]


def spans_of(name, *args):
    """The spans of a collective's forward and backward pass on a tensor [4, 6], with their bytes."""
    spans = []

    def record(span, bytes=None):
        spans.append((span, bytes))
        return nullcontext()

    x = torch.ones(4, 6, requires_grad=True)
    with mock.patch("moreh.trace.span", record):
        out = getattr(collectives, name)(x, *args, dist.group.WORLD)
        out.backward(torch.ones_like(out))
    return spans


# A tensor [4, 6] in float32 has 96 bytes, twice as many gathered from two ranks.
SPANS = {
    ("copy_to_tp",): [("copy_to_tp_backward", 96)],
    ("reduce_from_tp",): [("reduce_from_tp", 96)],
    ("gather_from_sp", 1): [("gather_from_sp", 192), ("gather_from_sp_backward", 192)],
    ("reduce_scatter_to_sp", 1): [("reduce_scatter_to_sp", 96), ("reduce_scatter_to_sp_backward", 96)],
    ("scatter_to_sp", 1): [("scatter_to_sp_backward", 96)],
}


def test_each_collective_is_a_span_with_its_bytes():
    for results, spans in zip(run_on_workers(spans_of, list(SPANS)), SPANS.values(), strict=True):
        assert results == [spans] * 2

"""What each rank computes in the tests of tensor parallelism: a divided model beside the whole one."""

import copy

import torch
import torch.distributed as dist
from torch.nn import functional

from moreh.models.families.config_defaults import DROPOUT_KEYS
from moreh.runtime.sharding.mesh import make_mesh
from moreh.runtime.sharding.spec import ParamSpec, shard_boxes
from moreh.runtime.tensor.apply import describe_partition, install_tensor_parallel
from moreh.runtime.tensor.collectives import gather_from_sp
from moreh.runtime.tensor.vocab_parallel import gather_logits, vocab_parallel_cross_entropy
from tests.helpers.float64 import exact_float64
from tests.helpers.tiny_models import build, tiny_config_of

BATCH, LENGTH = 3, 8


def tensor_group(size):
    """This rank's group of so many ranks."""
    return make_mesh(1, dist.get_world_size() // size, size).group("tensor")


def whole_model(family, changes):
    """A tiny model in float64 in which no parameter is 0 or 1, the same on each rank."""
    model = build(tiny_config_of(family, {**dict.fromkeys(DROPOUT_KEYS, 0.0), **changes})).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def gathered_parts(tokens):
    """Whether a tensor of parts with so many tokens is contiguous, and whose parts it has in which order."""
    group = tensor_group(2)
    whole = gather_from_sp(torch.full((BATCH, tokens, 4), float(group.rank())), 1, group)
    return whole.is_contiguous(), whole[0, :, 0].tolist()


def shard_model(model, division, group):
    """Replace each parameter by the part of this rank; tied ones stay one object."""
    parts = {}
    for name, parameter in model.named_parameters():
        layout = ParamSpec(name, tuple(parameter.shape), parameter.dtype, (0,), division.divisions.get(name))
        dim = layout.tp_split.dim if layout.tp_split else 0
        part = local_part(parameter.detach(), shard_boxes(layout, group.rank(), group.size(), 0, 1), dim)
        parts[id(parameter)] = torch.nn.Parameter(part, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = parts[id(parameter)]
    return model


def divided_copy(model, group, sequence_parallel):
    """A copy of a model that computes with this rank's parts, how it is divided, and the state of its hooks."""
    division = describe_partition(model, group.size(), sequence_parallel=sequence_parallel)
    local = shard_model(copy.deepcopy(model), division, group)
    return local, division, install_tensor_parallel(local, group, sequence_parallel=sequence_parallel)


def padded_batch(vocabulary):
    """Token ids, a mask with padding on either side, and labels that belong to the logits of the same position."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    mask[1, :2] = 0
    labels = functional.pad(ids.masked_fill(mask == 0, -100)[:, 1:], (0, 1), value=-100)
    return ids, mask, labels


def mean_loss(logits, labels, group=None, vocabulary=None):
    if group is None:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return vocab_parallel_cross_entropy(logits, labels, group, vocabulary).sum() / (labels != -100).sum()


def difference(actual, expected):
    """The largest difference, relative to the largest element."""
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-30))


def gradient_differences(local, division, whole, group):
    """By parameter, how far the gradients of a divided model are from those of the whole one."""
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    result = {}
    for name, parameter in local.named_parameters():
        gradient = parameter.grad
        if gradient is not None and name in division.partial_gradients:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=group)
        reference = expected[name]
        if reference is not None:
            layout = ParamSpec(name, tuple(reference.shape), reference.dtype, (0,), division.divisions.get(name))
            # Keys' biases have no gradient but rounding: softmax does not see them.
            scale = reference.abs().max().clamp(min=1e-6)
            reference = local_part(
                reference,
                shard_boxes(layout, group.rank(), group.size(), 0, 1),
                layout.tp_split.dim if layout.tp_split else 0,
            )
            result[name] = float(((gradient - reference).abs() / scale).amax()) if reference.numel() else 0.0
        elif gradient is not None:
            result[name] = float("inf")
    return result


def compare(family, changes, size, sequence_parallel):
    """The differences in the loss, the logits and all gradients between a divided model and the whole one."""
    group = tensor_group(size)
    whole = whole_model(family, changes)
    vocabulary = whole.get_output_embeddings().out_features
    ids, mask, labels = padded_batch(vocabulary)
    with exact_float64():
        local, division, _ = divided_copy(whole, group, sequence_parallel)
        logits = whole(input_ids=ids, attention_mask=mask).logits
        loss = mean_loss(logits, labels)
        loss.backward()
        local_logits = local(input_ids=ids, attention_mask=mask).logits
        local_loss = mean_loss(local_logits, labels, group, vocabulary)
        local_loss.backward()
    result = gradient_differences(local, division, whole, group)
    result["loss"] = difference(local_loss, loss)
    kept = mask.bool()
    result["logits"] = difference(gather_logits(local_logits, group, vocabulary)[kept], logits[kept])
    return result


def local_part(whole, held, dim):
    """A copy of the boxes of a tensor, concatenated along `dim`: what a rank holds of it."""
    if not held:
        shape = list(whole.shape)
        shape[dim] = 0
        return whole.new_empty(shape)
    parts = [whole[tuple(slice(start, stop) for start, stop in box)] for box in held]
    return parts[0].clone(memory_format=torch.contiguous_format) if len(parts) == 1 else torch.cat(parts, dim)

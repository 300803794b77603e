"""The work of each rank in the tests of tensor parallelism: a split model beside the same model on one process."""

import copy

import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import AutoConfig

from moreh.models.families.hf_config import is_dropout_key
from moreh.runtime.sharding.mesh import make_mesh
from moreh.runtime.sharding.spec import ParamSpec, shard_boxes
from moreh.runtime.tensor.apply import install_tensor_parallel
from moreh.runtime.tensor.collectives import gather_from_sp
from moreh.runtime.tensor.partition import describe_partition
from moreh.runtime.tensor.vocab_parallel import gather_logits, vocab_parallel_cross_entropy
from tests.helpers.compare import max_difference, relative_difference, worst
from tests.helpers.float64 import exact_float64
from tests.helpers.models.tiny_models import build, require_family, tiny_config_of

BATCH, LENGTH = 3, 8


def tensor_group(size):
    """This rank's group of `size` tensor-parallel ranks."""
    return make_mesh(1, dist.get_world_size() // size, size).group("tensor")


def whole_model(family, changes):
    """A tiny model in float64 on one process, the same on each rank, in which no parameter is 0 or 1."""
    require_family(family)
    keys = AutoConfig.for_model(family).get_text_config().to_dict()
    no_dropout = {key: 0.0 for key in keys if is_dropout_key(key)}
    model = build(tiny_config_of(family, {**no_dropout, **changes})).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def gathered_parts(tokens):
    """True if gathered parts of `tokens` tokens a rank are contiguous, and the rank of each token in their order."""
    group = tensor_group(2)
    gathered = gather_from_sp(torch.full((BATCH, tokens, 4), float(group.rank())), 1, group)
    return gathered.is_contiguous(), gathered[0, :, 0].tolist()


def replace_by_local_parts(model, partition, group):
    """Replace each parameter by this rank's part; tied ones stay one object."""
    parts = {}
    for name, parameter in model.named_parameters():
        part = _local_part_of(name, parameter.detach(), partition, group)
        parts[id(parameter)] = torch.nn.Parameter(part, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = parts[id(parameter)]
    return model


def tensor_parallel_copy(model, group, sequence_parallel):
    """A copy of a model that computes with this rank's parts, its partition, and the state of its hooks."""
    partition = describe_partition(model, group.size(), sequence_parallel=sequence_parallel)
    local = replace_by_local_parts(copy.deepcopy(model), partition, group)
    return local, partition, install_tensor_parallel(local, group, sequence_parallel=sequence_parallel)


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
    """The mean loss over labels, of a whole vocabulary or of this rank's part of one."""
    if group is None:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return vocab_parallel_cross_entropy(logits, labels, group, vocabulary).sum() / (labels != -100).sum()


def gradient_differences(local, partition, whole, group):
    """By parameter, how far the gradients of a tensor-parallel model are from those of the whole one."""
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    result = {}
    for name, parameter in local.named_parameters():
        gradient = parameter.grad
        if gradient is not None and name in partition.partial_gradients:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=group)
        reference = expected[name]
        if reference is not None:
            # Keys' biases have no gradient but rounding: softmax does not see them.
            scale = max(worst(reference.abs()), 1e-6)
            result[name] = max_difference(gradient, _local_part_of(name, reference, partition, group)) / scale
        elif gradient is not None:
            result[name] = float("inf")
    return result


def compare_with_one_process(family, changes, size, sequence_parallel):
    """The differences in the loss, the logits and all gradients between a tensor-parallel model and the whole one."""
    group = tensor_group(size)
    whole = whole_model(family, changes)
    vocabulary = whole.get_output_embeddings().out_features
    ids, mask, labels = padded_batch(vocabulary)
    with exact_float64():
        local, partition, _ = tensor_parallel_copy(whole, group, sequence_parallel)
        logits = whole(input_ids=ids, attention_mask=mask).logits
        loss = mean_loss(logits, labels)
        loss.backward()
        local_logits = local(input_ids=ids, attention_mask=mask).logits
        local_loss = mean_loss(local_logits, labels, group, vocabulary)
        local_loss.backward()
    differences = gradient_differences(local, partition, whole, group)
    differences["loss"] = relative_difference(local_loss, loss)
    attended = mask.bool()
    gathered = gather_logits(local_logits, group, vocabulary)
    differences["logits"] = relative_difference(gathered[attended], logits[attended])
    return differences


def _local_part_of(name, tensor, partition, group):
    """This rank's part of the parameter `name`, or of its gradient."""
    spec = ParamSpec(name, tuple(tensor.shape), tensor.dtype, (0,), partition.splits.get(name))
    dim = spec.tp_split.dim if spec.tp_split else 0
    return local_part(tensor, shard_boxes(spec, group.rank(), group.size(), 0, 1), dim)


def local_part(tensor, boxes, dim):
    """A copy of the boxes of a tensor that a rank has, concatenated along `dim`."""
    if not boxes:
        shape = list(tensor.shape)
        shape[dim] = 0
        return tensor.new_empty(shape)
    parts = [tensor[tuple(slice(start, stop) for start, stop in box)] for box in boxes]
    return parts[0].clone(memory_format=torch.contiguous_format) if len(parts) == 1 else torch.cat(parts, dim)

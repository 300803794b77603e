"""What scripts do with parameters, gradients and optimizers: each the same on a whole model and on a sharded one.

Each pattern trains a model a little and returns what a script would see: numbers and whole tensors.
"""

import copy
import io

import torch

from tests.helpers.batches import batch, label_positions_rounded_to
from tests.helpers.compare import max_difference, relative_difference, worst
from tests.helpers.float64 import exact_float64
from tests.helpers.sharded.cases import sharded_copy


def backward(model, step=0, **kwargs):
    """The loss of a batch after its backward pass."""
    ids, mask, labels = batch(step, model.config.vocab_size)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward(**kwargs)
    return loss.item()


def weights(model):
    return [parameter.detach().double().pow(2).sum().item() for parameter in model.parameters()]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def clip_by_hand(model):
    norms = []
    for step in range(2):
        backward(model, step)
        total = sum(p.grad.norm(2).item() ** 2 for p in model.parameters()) ** 0.5
        for parameter in model.parameters():
            parameter.grad.mul_(min(1.0, 0.2 / total))
        sgd(model).step()
        model.zero_grad()
        norms.append(total)
    return norms + weights(model)


def reductions(model):
    backward(model)
    seen = []
    for tensor in [t for p in model.parameters() for t in (p.detach(), p.grad)]:
        seen += [tensor.sum().item(), tensor.mean().item(), tensor.max().item(), tensor.min().item()]
        seen += [
            tensor.abs().max().item(),
            tensor.std().item(),
            tensor.norm(1).item(),
            tensor.norm(float("inf")).item(),
        ]
        seen += [float(tensor.isnan().any()), float(tensor.isfinite().all()), float((tensor > 1e-6).sum())]
        seen += [float((tensor != tensor).any()), tensor.flatten()[1].item(), tensor.flatten()[-1].item()]
        seen += [float(tensor.equal(tensor.clone())), float(torch.allclose(tensor, tensor + 1)), tensor.median().item()]
    return [*seen, *torch._foreach_norm([p.grad for p in model.parameters()])]


def not_a_number(model):
    backward(model)
    for parameter in model.parameters():
        parameter.grad.view(-1)[-1] = float("nan")
    found = [bool(p.grad.isnan().any()) for p in model.parameters()]
    found += [bool(p.grad.max().isnan()) for p in model.parameters()]
    found += [bool(p.grad.norm(float("inf")).isnan()) for p in model.parameters()]
    return [float(all(found)), float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).isnan())]


def matrices(model):
    backward(model)
    seen = []
    for parameter in (p for p in model.parameters() if p.dim() == 2):
        seen += [parameter.detach() @ parameter.detach().t(), parameter.grad.norm(dim=1), parameter.grad.t().sum(0)]
        seen += [torch.linalg.matrix_norm(parameter.detach(), 2), parameter.detach()[1:3, ::2].clone()]
    return [*seen, torch.nn.utils.parameters_to_vector(model.parameters()).detach()]


def text_of_parameters(model):
    backward(model)
    parameter = next(model.parameters())
    lists = parameter.grad.tolist()
    assert repr(parameter).startswith("Parameter containing:\ntensor([[")
    return [torch.tensor(lists), torch.from_numpy(parameter.detach().numpy().copy()), float(f"{parameter.sum():.6f}")]


def data_assigned(model):
    losses = []
    for step in range(3):
        losses.append(backward(model, step))
        for parameter in model.parameters():
            parameter.data = parameter.data - 0.5 * parameter.grad
            parameter.grad = None
    return losses + weights(model)


def data_swapped_and_restored(model):
    """As many scripts evaluate an average: the backup is no copy."""
    shadow = {name: p.data.clone() * 0.9 for name, p in model.named_parameters()}
    losses = [backward(model)]
    sgd(model).step()
    backup = {}
    for name, parameter in model.named_parameters():
        backup[name], parameter.data = parameter.data, shadow[name]
    losses.append(backward(model))
    seen = weights(model)
    for name, parameter in model.named_parameters():
        parameter.data = backup[name]
    model.zero_grad()
    losses.append(backward(model))
    sgd(model).step()
    return losses + seen + weights(model)


def vector_to_parameters(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(vector * 0.9, model.parameters())
    return [backward(model), *weights(model)]


def average_by_hand(model):
    """With copies of a whole model, made before the first step, and of a sharded one."""
    averages = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    optimizer = sgd(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        model.zero_grad()
        averages.append({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for average in averages:
                for name, parameter in model.named_parameters():
                    average[name].mul_(0.9).add_(parameter, alpha=0.1)
                    average[name].lerp_(parameter.detach(), 0.1)
    seen = [value.double().pow(2).sum().item() for average in averages for value in average.values()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(averages[0][name])
    return [*seen, backward(model), *weights(model)]


def averaged_model(model):
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = sgd(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        model.zero_grad()
        average.update_parameters(model)
    ids, mask, labels = batch(9, model.config.vocab_size)
    with torch.no_grad():
        loss = average.module(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    return [loss, *weights(average.module)]


def penalty_to_the_start(model):
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = sgd(model)
    losses = []
    for step in range(3):
        ids, mask, labels = batch(step, model.config.vocab_size)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss = loss + 0.1 * sum(((p - s) ** 2).sum() for p, s in zip(model.parameters(), start, strict=True))
        loss = loss + 1e-3 * sum(p.norm() for p in model.parameters())
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses + weights(model)


def masks_and_noise(model):
    torch.manual_seed(3)
    masks = [(torch.rand(p.shape) > 0.5) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        backward(model, step)
        torch.manual_seed(step)
        for parameter, mask in zip(model.parameters(), masks, strict=True):
            parameter.grad.mul_(mask)
            parameter.grad.add_(torch.randn_like(parameter.grad), alpha=1e-3)
            parameter.grad += 1e-3 * torch.randn(parameter.shape, dtype=parameter.dtype)
            parameter.grad[mask] = parameter.grad[mask] * 2
            parameter.grad = torch.where(mask, parameter.grad, 0.1 * parameter.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    model.get_input_embeddings().weight.data[[1, 2]] = 0.5
    with torch.no_grad():
        model.get_output_embeddings().weight[3:5].mul_(0.1)
        model.get_output_embeddings().weight[:, 1].zero_()
        next(model.parameters()).normal_()
    return [torch.rand(1).item(), *weights(model)]


def rows_masked_in_a_hook(model):
    """Hooks that are there after the first step see the whole gradient of a batch."""
    seen = []
    backward(model)
    model.zero_grad()
    embedding = model.get_input_embeddings().weight
    mask = (torch.arange(embedding.shape[0]) % 2).double()[:, None]
    handles = [embedding.register_hook(lambda grad: grad * mask)]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item())) for p in model.parameters()
    ]
    backward(model, 1)
    grads = [p.grad.norm().item() for p in model.parameters()]
    for handle in handles:
        handle.remove()
    backward(model, 2)
    return [sum(seen), len(seen), *grads, *(p.grad.norm().item() for p in model.parameters())]


def gradients_of_some_inputs(model):
    parameters = list(model.parameters())
    backward(model)
    earlier = [p.grad.norm().item() for p in parameters]
    backward(model, 1, inputs=parameters[1:3])
    ids, mask, labels = batch(2, model.config.vocab_size)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    grads = torch.autograd.grad(2 * loss, parameters)
    return [*earlier, *(p.grad.norm().item() for p in parameters), *(g.norm().item() for g in grads)]


def clip_with_others(model):
    """With a parameter of the script's own, with another model, and by value."""
    scale = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    other = torch.nn.Linear(3, 1).double()
    torch.nn.init.constant_(other.weight, 0.3)
    ids, mask, labels = batch(0, model.config.vocab_size)
    norms = []
    for norm_type in (2.0, 1.0, float("inf")):
        loss = torch.exp(-scale) * model(input_ids=ids, attention_mask=mask, labels=labels).loss + scale * 3
        (loss + other(torch.ones(2, 3, dtype=torch.float64)).sum()).backward()
        mixed = [scale, *model.parameters(), *other.parameters()]
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in mixed if p.grad is not None], norm_type))
        norms.append(torch.nn.utils.clip_grad_norm_(mixed, 0.5, norm_type=norm_type))
    torch.nn.utils.clip_grad_value_(mixed, 1e-3)
    return [*norms, scale.grad, *(p.grad.norm() for p in mixed if p.grad is not None)]


def unfrozen_later(model):
    """The first step trains the last parameters only."""
    parameters = list(model.parameters())
    for parameter in parameters[:-3]:
        parameter.requires_grad_(False)
    optimizer = sgd(model)
    backward(model)
    optimizer.step()
    seen = [float(p.grad is None) for p in parameters]
    model.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(True)
    backward(model, 1)
    optimizer.step()
    seen += [float(p.grad is None) for p in parameters]
    parameters[0].requires_grad_(False)
    model.zero_grad()
    backward(model, 2)
    optimizer.step()
    return [*seen, *weights(model)]


def saved_by_hand(model):
    """Parameters, and the state of an optimizer that is made before the first step, as torch.save writes them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    file = io.BytesIO()
    torch.save({"weights": dict(model.named_parameters()), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert all(type(p) is torch.nn.Parameter for p in saved["weights"].values())
    moments = [
        state[key].clone()
        for state in saved["optimizer"]["state"].values()
        for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    backward(model, 1)
    optimizer.step()
    optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved["weights"][name])
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    copies = [copy.deepcopy(p) for p in model.parameters()]
    optimizer.step()
    assert all(type(copied) is type(p) for copied, p in zip(copies, model.parameters(), strict=True))
    return [*saved["weights"].values(), *moments, *weights(model), *(p.sum().item() for p in copies)]


def foreach_optimizers(model):
    for kwargs in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True, **kwargs)
        for step in range(2):
            backward(model, step)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
    for kind in (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.Adamax, torch.optim.Muon):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        backward(model)
        kind(matrices, lr=1e-3).step()
        model.zero_grad()
    return weights(model)


def gradients_assigned(model):
    """Sharpness-aware steps, with gradients kept in ordinary tensors."""
    optimizer = sgd(model)
    for step in range(2):
        backward(model, step)
        kept = [p.grad.clone() for p in model.parameters()]
        norm = torch.norm(torch.stack([g.norm(p=2) for g in kept]), p=2)
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), kept, strict=True):
                parameter.add_(grad * (0.05 / norm))
        optimizer.zero_grad()
        backward(model, step)
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), kept, strict=True):
                parameter.sub_(grad * (0.05 / norm))
        for parameter in model.parameters():
            parameter.grad = torch.ones(parameter.shape, dtype=parameter.dtype) * 1e-3 + parameter.grad
        backward(model, step + 2)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


PATTERNS = {
    function.__name__: function
    for function in (
        clip_by_hand,
        reductions,
        not_a_number,
        matrices,
        text_of_parameters,
        data_assigned,
        data_swapped_and_restored,
        vector_to_parameters,
        average_by_hand,
        penalty_to_the_start,
        masks_and_noise,
        rows_masked_in_a_hook,
        gradients_of_some_inputs,
        clip_with_others,
        unfrozen_later,
        saved_by_hand,
        foreach_optimizers,
        gradients_assigned,
    )
}


def difference(family, plan, pattern, scale=1.0):
    """On each rank: the largest difference of what a pattern sees on a sharded model; `scale` falsifies it."""
    whole, sharded, _ = sharded_copy(family, plan)
    with exact_float64(), label_positions_rounded_to(4):
        expected, actual = PATTERNS[pattern](whole), PATTERNS[pattern](sharded)
    assert len(expected) == len(actual)
    return worst(_difference(a, b, scale) for a, b in zip(actual, expected, strict=True))


def _difference(actual, expected, scale):
    if isinstance(actual, torch.Tensor) and actual.dim():
        return max_difference(actual.detach() * scale, expected.detach())
    return relative_difference(float(actual) * scale, float(expected), floor=1e-3)

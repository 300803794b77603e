"""Uses of parameters and their gradients: each gives the same on a whole model and on a sharded one.

Each pattern trains a model a little and returns what a script would see: numbers and whole tensors.
"""

import torch

from tests.helpers.batches import batch


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
    """As many scripts evaluate an average: the backup is not a copy."""
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

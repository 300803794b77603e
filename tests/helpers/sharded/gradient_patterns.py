"""Uses of gradients, hooks and optimizers, as in `parameter_patterns.py`."""

import copy
import io

import torch

from tests.helpers.batches import batch
from tests.helpers.sharded.parameter_patterns import backward, sgd, weights


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
    # With AdamW's eps of 1e-8, a gradient that is rounding, as a key bias has, would move a weight by more than 1e-9.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
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


def embeddings_of_a_projector(model):
    """The loss of inputs that a module of the script's own has computed, which is trained, too."""
    torch.manual_seed(0)
    width = model.get_input_embeddings().weight.shape[1]
    projector = torch.nn.Linear(width, width).double()
    prompt = torch.nn.Parameter(torch.randn(1, 2, width, dtype=torch.float64))
    ids, mask, labels = batch(0, model.config.vocab_size)
    mask = torch.cat([torch.ones(len(ids), 2, dtype=mask.dtype), mask], 1)
    labels = torch.cat([labels.new_full((len(ids), 2), -100), labels], 1)
    embeddings = torch.nn.functional.one_hot(ids % width, width).double()
    inputs = torch.cat([prompt.expand(len(ids), -1, -1), projector(embeddings)], 1)
    loss = model(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
    (loss / 3).backward()
    norms = [0.0 if p.grad is None else p.grad.norm().item() for p in model.parameters()]
    return [loss.item(), projector.weight.grad, prompt.grad, *norms]


def attributes_from_before_the_first_step(model):
    """`difference` gives them, and a dictionary whose keys are parameters, to models that are whole."""
    backward(model)
    for parameter in model.numbers:
        parameter.later = 2 * parameter.mark
    file = io.BytesIO()
    torch.save(next(model.parameters()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    numbers = [model.numbers[p] for p in model.parameters()]
    assert all(key in set(model.parameters()) for key in model.numbers)
    later = [p.later for p in model.parameters()]
    return [*(p.mark for p in model.parameters()), *later, saved.mark, saved.later, *numbers, *weights(model)]


def gradients_from_before_the_first_labelled_call(model):
    """`difference` computes them while both models are whole."""
    backward(model)
    return [p.grad.norm().item() for p in model.parameters()]

"""Uses of the state dict of a model, as in `parameter_patterns.py`."""

import copy
import io

import torch

from tests.helpers.sharded.parameter_patterns import backward, sgd, weights


def _trained(model):
    """The state dict of a model after its first step."""
    backward(model)
    sgd(model).step()
    model.zero_grad()
    return model.state_dict()


def state_saved(model):
    """Whole tensors with torch's names in torch's order, written by torch.save and read without this package."""
    state = _trained(model)
    expected = list(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file)
    assert type(saved) is type(state)
    assert list(saved) == expected
    assert saved._metadata == state._metadata
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in saved.values())
    memories = [len({t.untyped_storage().data_ptr() for t in saved.values()}), len(set(model.parameters()))]
    prefixed = model.state_dict(prefix="a.", keep_vars=True)
    seen = [float(tensor.requires_grad) for tensor in prefixed.values()]
    part = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[1].state_dict()
    clones = [tensor.clone() for tensor in (*state.values(), *part.values())]
    names = torch.tensor(list("".join([*expected, *prefixed, *part]).encode())).double()
    return [*saved.values(), *clones, *memories, *seen, names]


def state_loaded(model):
    """A copy that is put back, whole tensors with other keys or shapes, and the steps in between."""
    state = _trained(model)
    kept = copy.deepcopy(state)
    losses = [backward(model, 1)]
    sgd(model).step()
    name = list(state)[-2]
    changed = (state[name] - kept[name]).abs().max()  # the state dict shows the step, the copy does not
    assert model.load_state_dict(kept) == ([], [])
    losses.append(backward(model, 2))
    whole = {name: tensor.clone() * 0.5 for name, tensor in kept.items()}
    whole = {name: torch.ones(tensor.shape, dtype=tensor.dtype) * tensor.mean() for name, tensor in whole.items()}
    model.load_state_dict(whole)
    losses.append(backward(model, 3))
    some = {name: tensor for name, tensor in kept.items() if ".1." in name}
    missing, unexpected = model.load_state_dict(some | {"more": torch.ones(1)}, strict=False)
    assert unexpected == ["more"]
    losses.append(backward(model, 4))
    errors = ""
    for wrong, strict in ((some | {"more": torch.ones(1)}, True), ({name: torch.ones(2)}, False)):
        try:
            model.load_state_dict(wrong, strict=strict)
        except RuntimeError as error:
            errors += str(error)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers[0].load_state_dict(layers[1].state_dict())
    losses.append(backward(model, 5))
    texts = torch.tensor(list("".join([*missing, errors]).encode())).double()
    return [changed, *losses, texts, *weights(model)]


def keep_aliases(model):
    """Give a model a state dict, its `data` and detached parameters, without copies, for the pattern below."""
    parameters = list(model.parameters())
    model.__dict__["aliases"] = model.state_dict(), [p.data for p in parameters], [p.detach() for p in parameters]
    model.__dict__["earlier"] = dict(model.named_parameters())


def aliases_from_before_the_first_step(model):
    """They show what a step makes of the weights, are saved with it, and changes of them change the weights."""
    state, data, detached = model.__dict__["aliases"]
    backward(model)
    sgd(model).step()
    model.zero_grad()
    file = io.BytesIO()
    torch.save([state, model.__dict__["earlier"]], file)
    file.seek(0)
    saved = [tensor for tensors in torch.load(file) for tensor in tensors.values()]
    saved += copy.deepcopy(list(model.__dict__["earlier"].values()))
    for number, alias in enumerate(data):
        alias.mul_(1 + 0.1 * number)
        alias[0] += 0.5
    distances = [(alias - p).norm() for alias, p in zip(detached, model.parameters(), strict=True)]
    loss = backward(model, 1)
    model.load_state_dict({name: 0.5 * tensor for name, tensor in state.items()})
    return [*saved, *distances, loss, backward(model, 2), *copy.deepcopy(detached), *weights(model)]

"""Creates the optimizer of a run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moreh.errors import MorehError, PlanError
from moreh.models.introspection import layer_list
from utils.config.optimizers import OPTIMIZERS
from utils.config.schema import TrainSection
from utils.errors import UserError
from utils.training.adamw_in_float32 import AdamWInFloat32

Groups = list[dict[str, Any]]


def make_optimizer(
    model: nn.Module, train: TrainSection, info: Callable[[str], None] = lambda line: None
) -> torch.optim.Optimizer:
    """The optimizer of a model's parameters; `info` gets a line for the log where two share them.

    Raises:
        UserError: the optimizer refuses its settings, or Muon finds no matrices.
    """
    kind = OPTIMIZERS[train.optimizer]
    settings: dict[str, Any] = {**kind.defaults, **_with_tuples(train.optimizer_settings)}
    common = {"lr": train.lr, "weight_decay": train.weight_decay}
    make = getattr(torch.optim, kind.class_name)
    try:
        if train.optimizer_state_dtype == "float32" and any(p.dtype != torch.float32 for p in model.parameters()):
            make = AdamWInFloat32  # the settings allow no other optimizer
        if train.optimizer != "muon":
            return make(_groups(list(model.named_parameters()), train), **common, **settings)
        of_adamw = {**common, **settings.pop("adamw", {})}
        matrices, others = _split_for_muon(model)
        sizes = [f"{len(each):,} ({sum(p.numel() for _, p in each):,} values)" for each in (matrices, others)]
        info(f"Muon updates {sizes[0]} matrices of the layers, AdamW the other {sizes[1]} parameters")
        muon = make([parameter for _, parameter in matrices], **common, **settings)
        return MuonWithAdamW(muon, torch.optim.AdamW(_groups(others, train), **of_adamw))
    except MorehError:  # an error of the one line is not about the optimizer's settings
        raise
    except ValueError as error:
        raise UserError(f"train.optimizer_settings: {train.optimizer}: {error}") from None


def _with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the tuples of torch in the place of YAML's lists."""
    nested = {key: _with_tuples(value) for key, value in settings.items() if isinstance(value, dict)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()} | nested


def _groups(parameters: list[tuple[str, nn.Parameter]], train: TrainSection) -> Groups:
    """One group of all parameters, or a second one of norms and biases without weight decay."""
    if train.decay_norms_and_biases:
        return [{"params": [parameter for _, parameter in parameters]}]
    decayed = [p for name, p in parameters if not is_norm_or_bias(name, p)]
    others = [p for name, p in parameters if is_norm_or_bias(name, p)]
    groups: Groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_norm_or_bias(name: str, parameter: torch.Tensor) -> bool:
    """True if a parameter is a norm's weight or a bias. Biases of stacked experts have two dimensions."""
    return parameter.dim() < 2 or name.endswith("bias")


def _split_for_muon(model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """The matrices of the layers, and all other parameters.

    Muon is made for matrices between hidden states. Rows of embeddings and of the output layer stand for one token
    each, so they get AdamW, as do norms and biases.
    """
    try:
        in_layers = {id(parameter) for parameter in layer_list(model).parameters()}
    except PlanError as error:
        raise UserError(f"train.optimizer=muon: {error}") from None
    parameters = list(model.named_parameters())
    matrices = [
        (name, p) for name, p in parameters if id(p) in in_layers and p.dim() == 2 and not is_norm_or_bias(name, p)
    ]
    chosen = {id(parameter) for _, parameter in matrices}
    return matrices, [(name, p) for name, p in parameters if id(p) not in chosen]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW, which the training loop, the scheduler and checkpoints see as one optimizer.

    Its groups and its state are those of the two: the same objects, not copies.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        muon.state = adamw.state = self.state
        self._optimizers = (muon, adamw)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each."""
        assert closure is None
        for optimizer in self._optimizers:
            optimizer.step()  # type: ignore[no-untyped-call]

"""Each optimizer of the settings on a model that is sharded over workers: it means what it means on one device."""

import json

import pytest

from tests.helpers.sharded import resume
from tests.helpers.workers import WorkerError, run_on_workers
from tests.runtime.engine.test_sharded_models import PLANS, compare
from utils.config.optimizers import OPTIMIZERS

TWO_WORKERS = {
    "tp2": {"stage_layers": (3,), "tensor": 2, "micro_batch_size": 8},
    "pp2": {"stage_layers": (2, 1), "pipeline": 2, "micro_batches": 2, "micro_batch_size": 4},
    "dp2-sharded": {"stage_layers": (3,), "data": 2, "micro_batch_size": 4, "sharding": "parameters"},
}
# eps keeps the rounding of gradients that are nearly 0 from deciding the size of an update.
SETTINGS = {
    "adamw": {"betas": [0.9, 0.95], "eps": 1e-3},
    "adam": {"amsgrad": True, "eps": 1e-3},
    "nadam": {"eps": 1e-3},
    "radam": {"eps": 1e-3},
    "adafactor": {"eps": [1e-3, 1e-3]},
    "muon": {"adamw": {"lr": 1e-3, "eps": 1e-3}},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.5, "centered": True, "eps": 1e-3},
}


def settings_of(name):
    """The section `train` of the settings, in a form that is the key of a cache."""
    section = {"optimizer": name, "optimizer_settings": SETTINGS.get(name, {}), "decay_norms_and_biases": False}
    return json.dumps({"steps": 2, "lr": 1e-2, "weight_decay": 0.1, **section})


# Adafactor is refused where a plan splits its matrices, and no plan that is chosen for it does.
CASES = [(name, plan) for name in OPTIMIZERS for plan in TWO_WORKERS if name != "adafactor" or plan == "pp2"]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_training_is_that_of_a_whole_model(name, plan):
    family = "gpt2" if plan == "tp2" else "llama"
    arguments = (family, TWO_WORKERS[plan], {"settings_of_optimizer": settings_of(name)})
    for curve, weights in run_on_workers(compare, [arguments], size=2)[0]:
        assert curve < 1e-9
        assert weights < 1e-9


@pytest.mark.parametrize("plan", ["tp2", "dp2-sharded"])
def test_adafactor_is_refused_where_matrices_are_split(plan):
    arguments = ("llama", TWO_WORKERS[plan], {"settings_of_optimizer": settings_of("adafactor")})
    with pytest.raises(WorkerError, match="OptionError: Adafactor looks at rows and columns"):
        run_on_workers(compare, [arguments], size=2)


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
def test_muon_updates_whole_matrices_where_both_dimensions_are_split(plan):
    arguments = ("gpt2", PLANS[plan], {"settings_of_optimizer": settings_of("muon"), "steps": 3})
    for curve, weights in run_on_workers(compare, [arguments], size=4)[0]:
        assert curve < 1e-9
        assert weights < 1e-9


def test_training_with_muon_goes_on_under_other_plans(tmp_path):
    arguments = (str(tmp_path / "state"), settings_of("muon"))
    run_on_workers(resume.train_and_save, [("llama", TWO_WORKERS["tp2"], *arguments)], size=2)
    cases = [("llama", TWO_WORKERS[plan], *arguments) for plan in ("dp2-sharded", "pp2")]
    for results in run_on_workers(resume.resume_and_train, cases, size=2):
        for curve, weights in results:
            assert curve < 1e-9
            assert weights < 1e-9

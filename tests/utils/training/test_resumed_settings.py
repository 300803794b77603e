"""Which settings a resumed run may change, and that it obeys the changed ones."""

import pytest

from moreh.runtime.engine.checkpoint_api import software_versions
from utils.config.schema import Config
from utils.training import optimizer as optimizer_module
from utils.training.checkpoint.resume_settings import compare

# Keys of each section that change no number of the steps, and keys that --resume-with has to name; no other may differ.
FREE = {
    "train": {"steps", "epochs", "loader_workers", "non_finite"},
    # The names of files, whose content is compared.
    "data": {"docstrings", "summaries", "files", "eval_files", "hub", "hub_configuration", "split", "sources"},
    "tokenizer": {"pretrained"},
    "model": {"pretrained"},
}
NAMED = {
    "train": {
        "lr", "schedule", "warmup_steps", "decay_steps", "decay_shape", "min_lr_ratio", "weight_decay", "max_grad_norm"
    }
}  # fmt: skip


@pytest.mark.parametrize("section", FREE)
def test_each_setting_of_a_training_is_compared(section):
    settings = Config.model_validate(
        {
            "run": {"name": "tiny"},
            "model": {"architecture": {"model_type": "gpt2", "n_head": 2}},
            "data": {"docstrings": ["stdlib"]},
            "train": {"steps": 9},
        }
    ).model_dump(mode="json")
    about = {"script": {"settings": settings, "content": {}}, "optimizers": [], "versions": software_versions()}
    kinds = {}
    for key in settings[section]:
        now = {**settings, section: {**settings[section], key: "another value"}}
        differences = compare(about, {"settings": now, "content": {}}, [])
        kinds[key] = {each.kind for each in differences if each.key.startswith(f"{section}.{key}")}
    assert {key for key, found in kinds.items() if found == {"free"}} == FREE[section]
    assert {key for key, found in kinds.items() if found == {"with"}} == NAMED.get(section, set())
    refused = {key for key, found in kinds.items() if found == {"refused"}}
    assert refused == kinds.keys() - FREE[section] - NAMED.get(section, set())


def test_weight_decay_that_is_named_is_obeyed(train, monkeypatch):
    made, original = [], optimizer_module.make_optimizer
    monkeypatch.setattr(
        optimizer_module, "make_optimizer", lambda *arguments: made.append(original(*arguments)) or made[-1]
    )
    train("train.steps=2", "checkpoint.every_steps=2", "train.weight_decay=0.1")
    train("checkpoint.resume=auto", "train.weight_decay=0.2", "checkpoint.resume_with=[train.weight_decay]")
    assert [group["weight_decay"] for optimizer in made for group in optimizer.param_groups] == [0.1, 0.2]

"""Adapters of PEFT on several workers: training, generation and saving give what one process gives without the line."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.compare import curve_difference, max_difference, worst
from tests.helpers.scripts.fork_server import run_forked, run_forked_workers
from tests.runtime.engine.test_multi_worker_runs import WITH_PLAN

SCRIPT = """
import os, torch
torch.manual_seed(0)
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60))
lora = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
model = get_peft_model(model, LoraConfig(r=4, modules_to_save=MODULES_TO_SAVE, **lora))
model.add_adapter("inactive", LoraConfig(r=2, **lora))
for name, parameter in model.named_parameters():
    if "layers.0" in name:
        parameter.requires_grad_(False)  # a part of the active adapter is frozen
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
ids = torch.arange(64).view(4, 16) % 60
for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print("Loss:", loss.item())
model.eval()
with torch.no_grad():
    inner, whole = (called(input_ids=ids).logits for called in (model.get_base_model(), model))
assert torch.equal(inner, whole)
print("Generated:", model.generate(input_ids=ids[:2, :5], max_new_tokens=6, do_sample=False).tolist())
model.save_pretrained(os.environ["SAVED"])
torch.save(get_peft_model_state_dict(model), f"{os.environ['SAVED']}-{os.getpid()}.pt")
"""


def lora_script(modules_to_save):
    return SCRIPT.replace("MODULES_TO_SAVE", repr(modules_to_save))


@pytest.mark.parametrize(
    ("workers", "plan", "modules_to_save"),
    [
        (2, "dp2 mb2x1 shard:parameters", ["lm_head"]),
        (2, "pp2 mb2x2", ["lm_head"]),
        (4, "tp2 pp2 mb2x2", None),
    ],
)
def test_active_frozen_and_inactive_adapters_are_saved_whole(environment, tmp_path, workers, plan, modules_to_save):
    plain, script = tmp_path / "plain.py", tmp_path / "script.py"
    plain.write_text(lora_script(modules_to_save))
    script.write_text(WITH_PLAN.replace("PLAN", repr(plan)) + lora_script(modules_to_save))
    variables = {**environment, "SAVED": "plain", "MOREH_ENABLE_ADVANCED_PARALLELIZATION": "0"}
    finished = [run_forked([plain], cwd=tmp_path, env=variables)]
    finished += run_forked_workers([script], workers, cwd=tmp_path, env={**environment, "SAVED": "saved"})
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    losses = [
        [float(line.split()[1]) for line in process.stdout.splitlines() if "Loss:" in line] for process in finished
    ]
    assert len(losses[0]) == 3
    assert curve_difference(losses[1], losses[0]) < 1e-5
    generated = {line for process in finished for line in process.stdout.splitlines() if "Generated:" in line}
    assert len(generated) == 1
    names = [str(path.relative_to(tmp_path / "plain")) for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert sorted(names) == ["adapter_model.safetensors", "inactive/adapter_model.safetensors"]
    for name in names:
        assert_equal(load_file(tmp_path / "saved" / name), load_file(tmp_path / "plain" / name))
    (expected,) = tmp_path.glob("plain-*.pt")
    states = list(tmp_path.glob("saved-*.pt"))
    assert len(states) == workers
    for state in states:
        assert_equal(torch.load(state), torch.load(expected))


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert worst(max_difference(tensors[name], expected[name]) for name in expected) < 1e-5

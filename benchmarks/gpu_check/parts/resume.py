"""A run that is stopped and resumed in another process ends with the same bits as one that is not stopped.

The cases run in their order, each in a process of its own: "whole", "first half", "second half".
"""

import hashlib
import os

import torch

from gpu_check.parts.correctness import enable_line
from gpu_check.parts.families import VOCABULARY, make_model
from gpu_check.rows import make_batch
from gpu_check.settings import Result, Settings

STEPS = 6
# Its random numbers come from the generator of the device, whose state a checkpoint has.
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def run(case: str, settings: Settings) -> Result:
    """Train all steps, the first half and a checkpoint, or the second half from it."""
    # torch adds some gradients with atomic operations, in an order that differs from run to run.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    enable_line("float32", settings)
    from moreh.runtime.engine.checkpoint_api import load_training, save_training
    from utils.training.checkpoint.random_states import random_states, restore_random_states

    model = make_model("gpt2", settings, **DROPOUT)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpoint = settings.scratch / "resumed-checkpoint"
    whole_file, half_file = settings.scratch / "whole.txt", settings.scratch / "first-half.txt"
    first, last = (STEPS // 2, STEPS) if case == "second half" else (0, STEPS if case == "whole" else STEPS // 2)
    if case == "second half":
        torch.manual_seed(7)
        restore_random_states(load_training(model, [optimizer], checkpoint)["random"])
    bits = []
    for step in range(first, last):
        batch = make_batch(step, VOCABULARY, settings.rows, settings.length, settings.length // 3)
        loss = model(**batch.to(settings.device), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bits.append(float(loss.detach()).hex())
    if case == "first half":
        save_training(model, [optimizer], checkpoint, {"random": random_states()}).result()
    weights = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()
    if case != "second half":
        (whole_file if case == "whole" else half_file).write_text("\n".join([*bits, weights]))
        return Result(True, {"steps": last - first})
    *expected, expected_weights = whole_file.read_text().splitlines()
    *earlier, _ = half_file.read_text().splitlines()
    same = [*earlier, *bits] == expected
    passed = same and weights == expected_weights
    figures = {"steps": last - first, "same losses": same, "same weights": weights == expected_weights}
    return Result(passed, figures, "" if passed else "the resumed run differs")

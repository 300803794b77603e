"""The systems whose speed is measured: plain loops, the line, the Trainer, Liger's kernels, TRL's packing."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from gpu_check.parts.correctness import enable_line
from gpu_check.parts.speed import Meter, predicted_beside_measured, train_loop, without_libraries_that_report
from gpu_check.parts.workloads import batch_of, make_llama, model_flops
from gpu_check.rows import IGNORED, Batch
from gpu_check.settings import Skipped

LR = 1e-4
# The Trainer and TRL read rows before they train: enough for all steps, which take them again in the same order.
BATCHES = 48


def plain(meter: Meter) -> dict[str, Any]:
    """The tutorial's loop as it is: float32, every row padded to the longest allowed, torch's default AdamW."""
    model = make_llama(meter.workload, meter.settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    train_loop(meter, model, optimizer, autocast=False, trim=False)
    return {}


def tuned(meter: Meter) -> dict[str, Any]:
    """The loop with bfloat16 autocast, fused AdamW, and rows padded to the longest of a batch."""
    model = make_llama(meter.workload, meter.settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    train_loop(meter, model, optimizer, autocast=True, trim=True)
    return {}


def line(meter: Meter) -> dict[str, Any]:
    """The tutorial's loop with the line before it."""
    enable_line("bfloat16", meter.settings)
    model = make_llama(meter.workload, meter.settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    train_loop(meter, model, optimizer, autocast=False, trim=False)
    return predicted_beside_measured(meter, model, optimizer)


def liger(meter: Meter) -> dict[str, Any]:
    """The tuned loop with Liger's kernels.

    Raises:
        Skipped: liger_kernel is not installed.
    """
    _require("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return tuned(meter)


def trainer(meter: Meter) -> dict[str, Any]:
    """transformers' Trainer in bfloat16 with fused AdamW, sdpa, and batches of rows of similar length."""
    return _trainer(meter, compile_model=False)


def trainer_compiled(meter: Meter) -> dict[str, Any]:
    """The same with torch.compile."""
    return _trainer(meter, compile_model=True)


def _trainer(meter: Meter, *, compile_model: bool) -> dict[str, Any]:
    _require("accelerate")
    from transformers import Trainer, TrainingArguments

    settings = _arguments(TrainingArguments, meter)
    names = {each.name for each in dataclasses.fields(TrainingArguments)}
    if "train_sampling_strategy" in names:
        settings["train_sampling_strategy"] = "group_by_length"
    else:
        settings["group_by_length"] = True
    if compile_model:
        settings["torch_compile"] = True
    dataset: Any = _rows(meter)
    model = make_llama(meter.workload, meter.settings)
    made = Trainer(model, TrainingArguments(**settings), train_dataset=dataset, data_collator=_collate)
    _measure(made, meter)
    made.train()
    return {}


def trl_packed(meter: Meter) -> dict[str, Any]:
    """TRL's SFTTrainer with packed rows.

    Raises:
        Skipped: trl is not installed.
    """
    _require("trl")
    _require("datasets")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows, workload = _rows(meter), meter.workload
    vocabulary = {str(token): token for token in range(workload.sizes["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="0")), pad_token="0", eos_token="2"
    )
    tokens = sum(len(row["input_ids"]) for row in rows) / BATCHES
    settings = _arguments(SFTConfig, meter) | {
        "per_device_train_batch_size": max(1, round(tokens / workload.length)),
        "packing": True,
        "max_length": workload.length,
        "gradient_checkpointing": False,
    }
    model = make_llama(workload, meter.settings)
    made = SFTTrainer(model, SFTConfig(**settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    _measure(made, meter)
    made.train()
    return {}


SYSTEMS: dict[str, Callable[[Meter], dict[str, Any]]] = {
    "line": line,
    "trainer, compiled": trainer_compiled,
    "trainer": trainer,
    "loop, bfloat16": tuned,
    "plain loop": plain,
    "liger": liger,
    "trl, packed": trl_packed,
}


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed")


def _arguments(cls: Any, meter: Meter) -> dict[str, Any]:
    """The settings that all Trainers share."""
    without_libraries_that_report()
    settings: dict[str, Any] = {
        "output_dir": str(meter.settings.scratch / "trainer"),
        "per_device_train_batch_size": meter.workload.rows,
        "max_steps": meter.settings.warm_up_steps + meter.settings.max_steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not meter.settings.dry,
        "use_cpu": meter.settings.dry,
    }
    names = {each.name for each in dataclasses.fields(cls)}
    return {name: value for name, value in settings.items() if name in names}


def _rows(meter: Meter) -> list[dict[str, list[int]]]:
    """Ids and labels of all rows, without padding."""
    rows = []
    for step in range(BATCHES if not meter.settings.dry else 4):
        batch = batch_of(meter.workload, step)
        for ids, labels, length in zip(batch.input_ids, batch.labels, batch.lengths, strict=True):
            rows.append({"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()})
    return rows


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest row, as transformers' own collators pad it."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[index, :size], labels[index, :size] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[index, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _measure(trainer: Any, meter: Meter) -> None:
    """Let a Trainer's steps be measured, from the batch on the device to the end of the optimizer's step."""
    from transformers import TrainerCallback

    seen: dict[str, Any] = {"loss": torch.zeros(()), "labels": 0, "flops": 0.0}
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen["inputs"] = {name: inputs[name].detach() for name in ("input_ids", "labels") if name in inputs}
        seen["mask"] = inputs.get("attention_mask")
        loss = original(model, inputs, *args, **kwargs)
        seen["loss"] = loss[0].detach() if isinstance(loss, tuple) else loss.detach()
        return loss

    class Steps(TrainerCallback):
        """Times each step."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            """Called by the Trainer."""
            meter.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Called by the Trainer."""
            ids, labels = seen["inputs"]["input_ids"].cpu(), seen["inputs"]["labels"].cpu()
            mask = torch.ones_like(ids) if seen["mask"] is None else seen["mask"].cpu()
            batch = Batch(ids, mask, labels)
            meter.end(float(seen["loss"]), batch.label_tokens, model_flops(meter.workload, batch))
            control.should_training_stop = meter.is_done

    trainer.compute_loss = compute_loss
    trainer.add_callback(Steps())

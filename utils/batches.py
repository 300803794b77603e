"""Batches of padded rows, and how many of them make an optimizer step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

from utils.config import Config
from utils.errors import UserError
from utils.masks import IGNORED, mask_prompts

# input_ids and attention_mask [batch, sequence] int64, prompt_lengths [batch] int64, places: the rows in the source.
Batch = dict[str, Any]


def training_loader(rows: datasets.Dataset, tokenizer: Any, config: Config) -> DataLoader[Batch]:
    """Shuffled batches of `train.batch_size` rows; what is left over at the end of an epoch is not used in it.

    Raises:
        UserError: there are fewer rows than one batch takes.
    """
    if len(rows) < config.train.batch_size:
        raise UserError(f"train.batch_size: a batch takes {config.train.batch_size} rows, but there are {len(rows)}")
    return DataLoader(
        rows,
        batch_size=config.train.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=partial(pad_rows, tokenizer=tokenizer, length=config.data.max_length),
        num_workers=config.train.loader_workers,
        generator=torch.Generator().manual_seed(config.train.seed),
        pin_memory=True,
    )


def evaluation_loader(rows: datasets.Dataset, tokenizer: Any, config: Config) -> DataLoader[Batch]:
    """All held-out rows in their order."""
    return DataLoader(
        rows,
        batch_size=config.log.eval_batch_size or config.train.batch_size,
        collate_fn=partial(pad_rows, tokenizer=tokenizer, length=config.data.max_length),
        # Every pass over a loader draws a number, which must not come from the generator that training draws from.
        generator=torch.Generator(),
        pin_memory=True,
    )


def pad_rows(rows: list[dict[str, Any]], tokenizer: Any, length: int) -> Batch:
    """A batch of rows, each padded to `length` on the right: positions then count from the first token of the text."""
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for padded, mask, row in zip(input_ids, attention_mask, rows, strict=True):
        text = torch.tensor(row["input_ids"])
        padded[: len(text)] = text
        mask[: len(text)] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "prompt_lengths": torch.tensor([row["prompt_length"] for row in rows]),
        "places": [row["place"] for row in rows],
    }


def total_steps(loader: DataLoader[Batch], config: Config) -> int:
    """The number of optimizer steps of the run.

    Raises:
        UserError: the epochs hold less than one step, or fewer than the warm-up takes.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    steps = config.train.epochs * len(loader) // config.train.gradient_accumulation
    if steps == 0:
        raise UserError(
            f"train.epochs: {config.train.epochs} epoch(s) of {len(loader)} batches are less than the "
            f"{config.train.gradient_accumulation} batches of one step (train.gradient_accumulation)"
        )
    if config.train.warmup_steps > steps:
        raise UserError(f"train.warmup_steps is {config.train.warmup_steps} but train.epochs makes only {steps} steps")
    return steps


def batches_of_steps(loader: DataLoader[Batch], batches_per_step: int, steps: int) -> Iterator[list[Batch]]:
    """For each step the batches whose gradients it sums, going through the data as often as it takes."""
    batches = iter(loader)
    for _ in range(steps):
        step: list[Batch] = []
        while len(step) < batches_per_step:
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
            else:
                step.append(batch)
        yield step


def labels_of(batch: Batch, loss_on: str) -> torch.Tensor:
    """The labels `[batch, sequence]` of a batch: its ids, without padding and, for `response`, without the prompts.

    They come from the rows' true lengths, which `mask_pads` can only tell from ids.
    """
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    if loss_on == "response":
        labels = mask_prompts(labels, batch["attention_mask"], batch["prompt_lengths"])
    return labels

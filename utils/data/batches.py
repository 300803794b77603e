"""Batches of padded rows, and how many of them make an optimizer step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Sampler

from utils.config.schema import Config
from utils.data.masks import IGNORED, mask_prompts
from utils.errors import UserError

# input_ids and attention_mask [batch, sequence] int64, prompt_lengths [batch] int64, places: the rows in the source.
Batch = dict[str, Any]


class ShuffledBatches(Sampler[list[int]]):
    """The rows of each batch, shuffled anew for each epoch in an order that only the seed and the epoch decide.

    So a training that is resumed goes on with the batch after its last one.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._epoch = self._first_batch = 0

    def start_at(self, batch: int) -> None:
        """Let the next pass begin with this batch, counted from the beginning of the training."""
        self._epoch, self._first_batch = divmod(batch, len(self))

    def __len__(self) -> int:
        return self._rows // self._batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(self._epoch + 1):
            order = torch.randperm(self._rows, generator=generator).tolist()
        first, self._first_batch = self._first_batch, 0
        self._epoch += 1
        for batch in range(first, len(self)):
            yield order[batch * self._batch_size : (batch + 1) * self._batch_size]


def training_loader(rows: datasets.Dataset, tokenizer: Any, config: Config) -> DataLoader[Batch]:
    """Shuffled batches of `train.batch_size` rows; what is left over at the end of an epoch is not used in it.

    Raises:
        UserError: there are fewer rows than one batch takes.
    """
    if len(rows) < config.train.batch_size:
        raise UserError(f"train.batch_size: a batch takes {config.train.batch_size} rows, but there are {len(rows)}")
    return DataLoader(
        rows,
        batch_sampler=ShuffledBatches(len(rows), config.train.batch_size, config.train.seed),
        collate_fn=partial(collate_padded, tokenizer=tokenizer, length=config.data.max_length),
        num_workers=config.train.loader_workers,
        generator=torch.Generator(),  # every pass over a loader draws a number, which must not come from the script's
        pin_memory=True,
    )


def evaluation_loader(rows: datasets.Dataset, tokenizer: Any, config: Config) -> DataLoader[Batch]:
    """All held-out rows in their order."""
    return DataLoader(
        rows,
        batch_size=config.log.eval_batch_size or config.train.batch_size,
        collate_fn=partial(collate_padded, tokenizer=tokenizer, length=config.data.max_length),
        # Every pass over a loader draws a number, which must not come from the generator that training draws from.
        generator=torch.Generator(),
        pin_memory=True,
    )


def collate_padded(rows: list[dict[str, Any]], tokenizer: Any, length: int) -> Batch:
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


def iter_steps(loader: DataLoader[Batch], batches_per_step: int, steps: int, done: int = 0) -> Iterator[list[Batch]]:
    """For each step after the first `done` the batches whose gradients it sums, going through the data as often as it takes."""
    assert isinstance(loader.batch_sampler, ShuffledBatches)
    loader.batch_sampler.start_at(done * batches_per_step)
    batches = iter(loader)
    for _ in range(done, steps):
        step: list[Batch] = []
        while len(step) < batches_per_step:
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
            else:
                step.append(batch)
        yield step


def make_labels(batch: Batch, loss_on: str) -> torch.Tensor:
    """The labels `[batch, sequence]` of a batch: its ids, without padding and, for `response`, without the prompts.

    They come from the rows' true lengths, which `mask_pads` can only tell from ids.
    """
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    if loss_on == "response":
        labels = mask_prompts(labels, batch["attention_mask"], batch["prompt_lengths"])
    return labels

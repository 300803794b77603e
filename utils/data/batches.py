"""Padded batches of rows, and how many of them make an optimizer step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from utils.config.schema import Config
from utils.data.dataset import RunData
from utils.data.labels import IGNORED
from utils.errors import UserError

# input_ids, attention_mask and labels: [batch, sequence] int64. locations: where each row was read.
Batch = dict[str, Any]


class ShuffledBatches(Sampler[list[int]]):
    """The rows of each batch, in an order that depends only on the seed and the epoch.

    So a resumed run continues with the batch after its last one.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self._num_rows, self._batch_size, self._seed = num_rows, batch_size, seed
        self._epoch = self._first_batch = 0

    def start_at(self, batch: int) -> None:
        """Begin the next pass with this batch, counted from the beginning of the run."""
        self._epoch, self._first_batch = divmod(batch, len(self))

    def __len__(self) -> int:
        return self._num_rows // self._batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(self._epoch + 1):
            order = torch.randperm(self._num_rows, generator=generator)
        first, self._first_batch = self._first_batch, 0
        self._epoch += 1
        for batch in range(first, len(self)):
            yield order[batch * self._batch_size : (batch + 1) * self._batch_size].tolist()


def training_loader(data: RunData, config: Config) -> DataLoader[Batch]:
    """Shuffled batches of `train.batch_size` training rows. Rows left over at the end of an epoch are skipped in it.

    Raises:
        UserError: there are fewer rows than one batch takes.
    """
    num_rows, batch_size = len(data.train), config.train.batch_size
    if num_rows < batch_size:
        raise UserError(f"train.batch_size: a batch takes {batch_size} rows, but there are {num_rows}")
    return DataLoader(
        data.train,
        batch_sampler=ShuffledBatches(num_rows, batch_size, config.train.seed),
        num_workers=config.train.loader_workers,
        **_loader_options(data, config),
    )


def evaluation_loader(data: RunData, config: Config) -> DataLoader[Batch]:
    """Batches of all held-out rows in their order."""
    batch_size = config.log.eval_batch_size or config.train.batch_size
    return DataLoader(data.evaluation, batch_size=batch_size, **_loader_options(data, config))


def _loader_options(data: RunData, config: Config) -> dict[str, Any]:
    return {
        "collate_fn": partial(collate_padded, pad_id=data.tokenizer.pad_token_id, max_length=config.data.max_length),
        # Each pass over a loader draws a number, which must not come from the generator that the training draws from.
        "generator": torch.Generator(),
        "pin_memory": True,
    }


def collate_padded(rows: list[dict[str, Any]], pad_id: int, max_length: int) -> Batch:
    """A batch of rows, each padded to `max_length` on the right, so that positions count from the first token.

    With pad token P, and -100 for tokens that are not learned:

        input_ids       a b P c P P P    attention_mask  1 1 1 1 0 0 0    labels  -100 b P c -100 -100 -100

    Masks come from the lengths of the rows. The ids do not tell padding from a pad token in the text. If the pad token
    also ends the text, a model with masks from the ids would not learn to stop.
    """
    input_ids = torch.full((len(rows), max_length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.tensor(row["input_ids"])
        attention_mask[index, :length] = 1
        labels[index, :length] = torch.tensor(row["labels"])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "locations": [row["location"] for row in rows],
    }


def total_steps(loader: DataLoader[Batch], config: Config) -> int:
    """The number of optimizer steps of the run.

    Raises:
        UserError: the epochs hold less than one step, or fewer than the warm-up and the decay take.
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
        raise UserError(
            f"train.warmup_steps is {config.train.warmup_steps}, but train.epochs makes only {steps} steps of these "
            "data: give fewer warm-up steps, or more epochs"
        )
    if config.train.warmup_steps + (config.train.decay_steps or 0) > steps:
        raise UserError(
            f"train.warmup_steps is {config.train.warmup_steps} and train.decay_steps is {config.train.decay_steps}, "
            f"but train.epochs makes only {steps} steps of these data: give fewer of the two"
        )
    return steps


def iter_steps(
    loader: DataLoader[Batch], batches_per_step: int, steps: int, start_step: int = 0
) -> Iterator[tuple[int, list[Batch]]]:
    """The number of each step after `start_step`, from 1, and the batches whose gradients it sums.

    The loader is iterated over as often as it takes.
    """
    assert isinstance(loader.batch_sampler, ShuffledBatches)
    loader.batch_sampler.start_at(start_step * batches_per_step)
    batches = iter(loader)
    for step in range(start_step + 1, steps + 1):
        batches_of_step: list[Batch] = []
        while len(batches_of_step) < batches_per_step:
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
            else:
                batches_of_step.append(batch)
        yield step, batches_of_step

"""The tokenized data of a run, cached for later runs."""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from moreh.planner.units import gib
from utils.config.data_section import CHATML_NAME
from utils.config.schema import Config, DataSection
from utils.data.cache import make_once
from utils.data.content import hash_of_tokenizer
from utils.data.encoding import encode_examples, read_rows
from utils.data.examples import decode_conversation, decode_pair, store_examples
from utils.data.records import MakePair, Record
from utils.data.rows import RowCounts
from utils.data.sources.mixing import Mix, SourceRows, require_rows, rows_of_sources
from utils.data.sources.reading import (
    ExampleReader,
    SourceCounts,
    held_out_records,
    maker_of_conversations,
    maker_of_pairs,
    source_records,
)
from utils.data.sources.states import size_of_data, state_of_data, state_of_tokenizer
from utils.data.split import split_examples
from utils.data.tokenization import END_OF_TEXT, MakeExample, train_tokenizer
from utils.errors import UserError, in_one_line
from utils.text.chat import CHATML, CHATML_TOKENS, end_of_turn
from utils.text.chat_template import drop_other_chat_template
from utils.text.tokenizers import load_tokenizer

# Part of each cache key: raise it when the same settings are to give other rows.
_FORMAT = 12
# Peak size of the cache while it is made, relative to the files of the data: it holds the texts, and for each token
# (three or four bytes of a text) eight bytes of ids and labels.
_TIMES_ITS_FILES = 3
# Bytes of examples that a tokenizer is trained on. Training keeps each distinct word in memory, with about 1 KiB: for
# 1 GB of text with many numbers, 1.8 GiB.
_TOKENIZER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RunData:
    """The tokenizer and the rows of a run. Rows have the fields of `rows.Row`."""

    tokenizer: Any
    """A tokenizer of transformers, with a pad token."""
    train: datasets.Dataset
    """The rows to train on."""
    evaluation: datasets.Dataset
    """The rows that are held out."""
    train_counts: RowCounts
    """The counts of the pairs to train on, by outcome."""
    evaluation_counts: RowCounts
    """The counts of the held-out pairs, by outcome."""
    notes: list[str]
    """Log lines about control tokens in the texts."""
    content: dict[str, str]
    """Hashes of the rows ("train", "evaluation") and of the "tokenizer": equal ones train equally."""


def prepare_data(
    config: Config, make_pair: MakePair, make_example: MakeExample, info: Callable[[str], None]
) -> RunData:
    """Read, split and tokenize the data of a run, or load the result from the cache; `info` gets lines for the log.

    `make_pair` and `make_example` define what a prompt, a response and a label are. If several processes want the same
    data, such as the workers of a run, one of them prepares it and the others wait.

    Raises:
        UserError: the data or the tokenizer cannot be read, or no rows are left.
    """
    key = _cache_key(config, make_pair, make_example)
    directory = Path(config.run.cache_directory) / f"data-{key}"
    make_once(directory, lambda target: _prepare(target, config, make_pair, make_example, info), info)
    info(f"Tokenized data: {directory}")
    try:
        data, counts = _read_entry(directory)
    except UserError:
        raise
    except Exception as error:  # the checksums fit, so another program has written the files
        reason = f"{type(error).__name__}: {in_one_line(str(error))}"
        raise UserError(f"run.cache_directory: {directory} cannot be read: {reason}; delete it") from error
    sources = [SourceRows(**source) for source in counts["sources"]]
    if config.data.sources is None:
        info(f"Rows of the data: {SourceCounts(**sources[0].read)}")
    else:
        for source in sources:
            info(source.text(len(data.train)))
    if config.data.eval_files:
        info(f"Rows of data.eval_files: {SourceCounts(**counts['eval_files'])}")
    info(f"Training rows: {data.train_counts}")
    info(f"Held-out rows: {data.evaluation_counts}")
    for note in data.notes:
        info(f"Texts: {note}")
    if left_over := len(data.train) % config.train.batch_size:
        info(f"Each epoch drops {left_over} training rows that do not fill a batch, different ones each time")
    if config.data.format == "pairs" and drop_other_chat_template(data.tokenizer, config.data.template):
        info("The tokenizer's chat template is not saved: training uses data.template, which generate.py applies")
    return data


def _read_entry(directory: Path) -> tuple[RunData, dict[str, Any]]:
    """The data in a directory of the cache, and the row counts of its sources."""
    counts = json.loads((directory / "counts.json").read_text(encoding="utf-8"))
    rows = read_rows(directory)
    data = RunData(
        tokenizer=load_tokenizer(str(directory / "tokenizer")),
        train=rows.select(np.load(directory / "train.npy")),
        evaluation=rows.select(np.load(directory / "evaluation.npy")),
        train_counts=RowCounts(**counts["train"]),
        evaluation_counts=RowCounts(**counts["evaluation"]),
        notes=counts["notes"],
        content=counts["content"],
    )
    return data, counts


def _prepare(
    target: Path, config: Config, make_pair: MakePair, make_example: MakeExample, info: Callable[[str], None]
) -> None:
    """Read, split and tokenize the data of a run into an empty directory.

    The split comes before anything is learned from the data, so that a trained tokenizer has seen no held-out row.
    """
    info("Reading and tokenizing the data (later runs use the cache).")
    data = config.data
    _warn_of_full_disk(target, data, info)
    is_chat = data.format == "chat"

    def make_reader(section: DataSection, records: Iterable[Record]) -> ExampleReader[Any]:
        make = maker_of_conversations(section, make_pair) if is_chat else maker_of_pairs(section, make_pair)
        return ExampleReader(section, records, make)

    held_out = make_reader(data, held_out_records(data))
    sources = [make_reader(section, source_records(section)) for section in data.each_source()]
    store = target / "examples.arrow"
    examples = store_examples(chain(held_out if data.eval_files else (), *sources), store)
    _require_examples("data.eval_files", [held_out] if data.eval_files else [])
    _require_examples("data", sources)
    used = [reader.counts.used for reader in (held_out, *sources)]
    mix = Mix(np.repeat(np.arange(-1, len(sources)), used), np.array(data.weights()))
    split = split_examples(
        examples.digests,
        data.eval_rows,
        config.train.seed,
        keeps_duplicates=data.duplicates == "keep",
        held_out=used[0] if data.eval_files else None,
        mix=mix,
    )
    is_training = np.zeros(len(examples.digests), bool)
    is_training[split.training] = True
    sample = _every_nth(is_training, -(-store.stat().st_size // _TOKENIZER_BYTES))
    tokenizer = _tokenizer(config, examples.texts(sample, decode_conversation if is_chat else decode_pair))
    encoded = encode_examples(examples, target, tokenizer, data, make_example)
    content = {"tokenizer": hash_of_tokenizer(tokenizer)}
    parts = {"train": split.training, "evaluation": split.held_out}
    counts: dict[str, Any] = {
        name: asdict(_counts_of_rows_left(name, encoded.counts(indices), len(indices), data.max_length))
        for name, indices in parts.items()
    }
    kept = {name: encoded.kept(indices) for name, indices in parts.items()}
    rows = {**kept, "train": mix.rows_of_epoch(kept["train"])}
    require_rows(mix, kept["train"], rows["train"])
    for name, indices in rows.items():
        np.save(target / f"{name}.npy", indices)
        content[name] = encoded.content(indices)
    tokenizer.save_pretrained(str(target / "tokenizer"))
    in_split = np.concatenate([split.training, split.held_out])
    read = [reader.counts for reader in sources]
    counts["sources"] = list(map(asdict, rows_of_sources(data, read, mix, in_split, kept, rows)))
    equal_held_out = held_out.counts.used - len(split.held_out) if data.eval_files else 0
    counts["eval_files"] = asdict(replace(held_out.counts, duplicates=equal_held_out))
    counts |= {"notes": encoded.notes, "content": content}
    (target / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
    store.unlink()


def _require_examples(key: str, readers: list[ExampleReader[Any]]) -> None:
    """Refuse a part of the data in which no row can be used.

    Raises:
        UserError: all rows were left out.
    """
    if readers and not any(reader.counts.used for reader in readers):
        raise UserError(f"{key}: no row can be used: {', and '.join(str(reader.counts) for reader in readers)}")


def _counts_of_rows_left(name: str, counts: RowCounts, examples: int, max_length: int) -> RowCounts:
    """The counts of a part of the data.

    Raises:
        UserError: no rows are left of its examples.
    """
    if not counts.kept:
        reasons = [
            (counts.dropped_too_long, f"have more than data.max_length={max_length} tokens"),
            (counts.dropped_without_label, f"have no label in their first data.max_length={max_length} tokens"),
            (counts.unusable, f"are unusable, the first: {counts.first_unusable}"),
        ]
        found = "; ".join(f"{count} {what}" for count, what in reasons if count)
        part = {"train": "training", "evaluation": "held-out"}[name]
        raise UserError(f"data: no {part} rows are left of {examples}: {found}")
    return counts


def _warn_of_full_disk(target: Path, data: DataSection, info: Callable[[str], None]) -> None:
    expected, free = _TIMES_ITS_FILES * size_of_data(data), shutil.disk_usage(target).free
    if expected > free:
        info(
            f"warning: run.cache_directory: the tokenized data takes about {gib(expected)}, and the disk of "
            f"{target.parent} has {gib(free)} free"
        )


def _every_nth(mask: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    """The first of each `n` entries that a mask names."""
    thinned = np.zeros_like(mask)
    thinned[np.flatnonzero(mask)[::n]] = True
    return thinned


def _tokenizer(config: Config, texts: Iterable[str]) -> Any:
    """The tokenizer of the settings, or one that is trained on the texts; for chats, with its template and end."""
    name, data = config.model.pretrained or config.tokenizer.pretrained, config.data
    has_chatml = data.chat_template == CHATML_NAME or (name is None and data.chat_template is None)
    if name is not None:
        tokenizer = load_tokenizer(name, data.end_token)
    else:
        control_tokens = CHATML_TOKENS if has_chatml and data.format == "chat" else ()
        entries = config.tokenizer.entries_to_train()
        tokenizer = train_tokenizer(texts, entries, data.end_token or END_OF_TEXT, control_tokens)
    if data.format == "chat":
        if has_chatml:
            tokenizer.chat_template = CHATML
        elif data.chat_template is not None:
            tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
        tokenizer.eos_token = end_of_turn(tokenizer)
    return tokenizer


def _cache_key(config: Config, make_pair: MakePair, make_example: MakeExample) -> str:
    """A hash of all that the rows depend on: settings, the script's functions, and the state of the source files."""
    tokenizer_name = config.model.pretrained or config.tokenizer.pretrained
    parts = [
        _FORMAT,
        config.data.model_dump(),
        config.tokenizer.entries_to_train() if tokenizer_name is None else state_of_tokenizer(tokenizer_name),
        config.train.seed,
        inspect.getsource(make_pair),
        inspect.getsource(make_example),
        state_of_data(config.data),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

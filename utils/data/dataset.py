"""The tokenized data of a run: prepared once, kept in the cache directory, and read from there by later runs."""

import hashlib
import inspect
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer

from utils.config.schema import Config
from utils.data.cache import make_once
from utils.data.data_sources import read_pairs
from utils.data.python_sources import source_files
from utils.data.records import MakePair, Pair
from utils.data.tokenization import MakeExample, Row, RowCounts, encode_pairs, train_tokenizer
from utils.errors import UserError, first_line

# A part of each cache key. Raise it when a change of the code gives other rows for the same settings.
_FORMAT = 2
# 32 bits for ids and labels: half the size on the disk.
_IDS = datasets.Sequence(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "prompt_length": datasets.Value("int32"),
        "location": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class RunData:
    """The tokenizer and the rows of a run. Rows have the fields of `tokenization.Row`."""

    tokenizer: Any
    """A tokenizer of transformers, with a pad token."""
    train: datasets.Dataset
    """The rows to train on."""
    evaluation: datasets.Dataset
    """The rows that are held out."""
    train_counts: RowCounts
    """What became of the pairs to train on."""
    evaluation_counts: RowCounts
    """What became of the pairs that are held out."""


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
    counts = json.loads((directory / "counts.json").read_text(encoding="utf-8"))
    data = RunData(
        tokenizer=load_tokenizer(str(directory / "tokenizer")),
        train=datasets.load_from_disk(str(directory / "train")),
        evaluation=datasets.load_from_disk(str(directory / "evaluation")),
        train_counts=RowCounts(**counts["train"]),
        evaluation_counts=RowCounts(**counts["evaluation"]),
    )
    info(f"Training rows: {data.train_counts}")
    info(f"Held-out rows: {data.evaluation_counts}")
    return data


def _prepare(
    target: Path, config: Config, make_pair: MakePair, make_example: MakeExample, info: Callable[[str], None]
) -> None:
    """Read, split and tokenize the data of a run into an empty directory.

    The split comes before anything is learned from the data, so that a trained tokenizer has seen no held-out row.
    """
    info("Reading and tokenizing the data (later runs take it from the cache).")
    held_out, training = _split(read_pairs(config.data, make_pair), config.data.eval_rows, config.train.seed)
    tokenizer_name = config.model.pretrained or config.tokenizer.pretrained
    if tokenizer_name is not None:
        tokenizer = load_tokenizer(tokenizer_name)
    else:
        texts = (pair.prompt + pair.response for pair in training)
        tokenizer = train_tokenizer(texts, config.tokenizer.vocabulary_size)
    counts = {}
    for name, pairs in (("train", training), ("evaluation", held_out)):
        rows, row_counts = encode_pairs(pairs, tokenizer, config.data, make_example)
        if not rows:
            raise UserError(
                f"no rows are left for {name}: of {len(pairs)} pairs, {row_counts.dropped_too_long} have more than "
                f"data.max_length={config.data.max_length} tokens and {row_counts.dropped_without_label} no label"
            )
        _to_dataset(rows).save_to_disk(str(target / name))
        counts[name] = asdict(row_counts)
    tokenizer.save_pretrained(str(target / "tokenizer"))
    (target / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local directory or of the hub. Without a pad token it pads with its end-of-text token.

    Raises:
        UserError: the tokenizer cannot be loaded, or has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many types for files that are missing or broken
        raise UserError(f"the tokenizer of {name!r} cannot be loaded: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no end-of-text token, without which no model learns to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _split(pairs: list[Pair], eval_rows: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs that are held out, and those to train on."""
    if eval_rows >= len(pairs):
        raise UserError(f"data.eval_rows: {eval_rows} rows are to be held out, but the data has only {len(pairs)}")
    shuffled = pairs.copy()
    random.Random(seed).shuffle(shuffled)
    return shuffled[:eval_rows], shuffled[eval_rows:]


def _to_dataset(rows: list[Row]) -> datasets.Dataset:
    columns = {name: [getattr(row, name) for row in rows] for name in _FEATURES}
    return datasets.Dataset.from_dict(columns, features=_FEATURES)


def _cache_key(config: Config, make_pair: MakePair, make_example: MakeExample) -> str:
    """A hash of everything that the rows depend on: settings, the script's functions, the state of the source files."""
    files: list[Path] = []
    if config.data.docstrings is not None:
        files = source_files(config.data.docstrings, "data.docstrings")
    elif config.data.summaries is not None:
        files = source_files(config.data.summaries, "data.summaries")
    elif config.data.files is not None:
        files = [Path(name) for name in config.data.files]
    tokenizer_name = config.model.pretrained or config.tokenizer.pretrained
    if tokenizer_name is not None and Path(tokenizer_name).is_dir():
        files += sorted(p for p in Path(tokenizer_name).iterdir() if p.suffix in {".json", ".txt", ".model", ".jinja"})
    states = [(str(path), state.st_size, state.st_mtime_ns) for path in files for state in [path.stat()]]
    parts = [
        _FORMAT,
        config.data.model_dump(),
        tokenizer_name or config.tokenizer.vocabulary_size,
        config.train.seed,
        inspect.getsource(make_pair),
        inspect.getsource(make_example),
        states,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

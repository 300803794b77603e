"""The tokenized data of a run: made once, kept in the cache directory, and read from there by later runs."""

import hashlib
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
from utils.data.data_sources import Pair, read_pairs
from utils.data.python_sources import source_files
from utils.data.tokenization import Row, RowCounts, encode_pairs, train_tokenizer
from utils.errors import UserError, first_line

# Part of every cache key: raise it when the same settings shall give other tokens.
_FORMAT = 1


@dataclass(frozen=True)
class RunData:
    """The tokenizer and the rows of a run; each row has `input_ids`, `prompt_length` and its `place` in the source."""

    tokenizer: Any
    train: datasets.Dataset
    evaluation: datasets.Dataset
    train_counts: RowCounts
    evaluation_counts: RowCounts


def prepare_data(config: Config, say: Callable[[str], None]) -> RunData:
    """Read, split and tokenize the data of a run, or take all that from the cache.

    Of several processes that want the same data, such as the workers of a run, one makes it and the others wait.

    Raises:
        UserError: the data or the tokenizer cannot be read, or no rows are left.
    """
    key = _cache_key(config)
    directory = Path(config.run.cache_directory) / f"data-{key}"
    make_once(directory, lambda to: _prepare(to, config, say), say)
    say(f"Tokenized data: {directory}")
    counts = json.loads((directory / "counts.json").read_text(encoding="utf-8"))
    return RunData(
        tokenizer=load_tokenizer(str(directory / "tokenizer")),
        train=datasets.load_from_disk(str(directory / "train")),
        evaluation=datasets.load_from_disk(str(directory / "evaluation")),
        train_counts=RowCounts(**counts["train"]),
        evaluation_counts=RowCounts(**counts["evaluation"]),
    )


def _prepare(to: Path, config: Config, say: Callable[[str], None]) -> None:
    """Read, split and tokenize the data of a run into an empty directory of the cache.

    The split is made before anything is learned from the data, so a tokenizer that is trained has not seen the held-out
    rows.
    """
    say("Reading and tokenizing the data (later runs take it from the cache).")
    tokenizer_name = config.model.pretrained or config.tokenizer.pretrained
    held_out, training = _split(read_pairs(config.data), config.data.eval_rows, config.train.seed)
    if tokenizer_name is not None:
        tokenizer = load_tokenizer(tokenizer_name)
    else:
        texts = (pair.prompt + pair.response for pair in training)
        tokenizer = train_tokenizer(texts, config.tokenizer.vocabulary_size)
    _write_rows(to, training, held_out, tokenizer, config)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local directory or of the hub; one without a pad token pads with its end-of-text token.

    Raises:
        UserError: it cannot be loaded or has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the libraries raise many kinds for files that are missing or broken
        raise UserError(f"the tokenizer of {name!r} cannot be loaded: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no end-of-text token, without which no model learns to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _split(pairs: list[Pair], eval_rows: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    if eval_rows >= len(pairs):
        raise UserError(f"data.eval_rows: {eval_rows} rows are to be held out, but the data has only {len(pairs)}")
    shuffled = pairs.copy()
    random.Random(seed).shuffle(shuffled)
    return shuffled[:eval_rows], shuffled[eval_rows:]


def _write_rows(to: Path, training: list[Pair], held_out: list[Pair], tokenizer: Any, config: Config) -> None:
    counts = {}
    for name, pairs in (("train", training), ("evaluation", held_out)):
        rows, row_counts = encode_pairs(pairs, tokenizer, config.data)
        if not rows:
            raise UserError(
                f"no rows are left for {name}: of {len(pairs)} pairs {row_counts.dropped_too_long} have more than "
                f"data.max_length={config.data.max_length} tokens and {row_counts.dropped_without_label} no label"
            )
        _columns(rows).save_to_disk(str(to / name))
        counts[name] = asdict(row_counts)
    tokenizer.save_pretrained(str(to / "tokenizer"))
    (to / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def _columns(rows: list[Row]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "prompt_length": [row.prompt_length for row in rows],
            "place": [row.place for row in rows],
        }
    )


def _cache_key(config: Config) -> str:
    """Changes with everything that the tokens depend on: settings, seed of the split, and the source files' state."""
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
        states,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

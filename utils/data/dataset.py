"""The tokenized data of a run: prepared once, kept in the cache directory, and read from there by later runs."""

import hashlib
import inspect
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets

from utils.config.schema import Config
from utils.data.cache import make_once
from utils.data.content import hash_of_rows, hash_of_tokenizer
from utils.data.conversations import Conversation
from utils.data.records import MakePair, Pair
from utils.data.rows import Row, RowCounts
from utils.data.sources.reading import SourceCounts, read_conversations, read_pairs
from utils.data.sources.states import state_of_data, state_of_tokenizer
from utils.data.tokenization import END_OF_TEXT, MakeExample, encode_conversations, encode_pairs, train_tokenizer
from utils.errors import UserError
from utils.text.chat import CHATML, CHATML_TOKENS, end_of_turn
from utils.text.chat_template import drop_other_chat_template
from utils.text.tokenizers import load_tokenizer

_Example = TypeVar("_Example", Pair, Conversation)
# Part of each cache key: raise it when the same settings are to give other rows.
_FORMAT = 5
# Rows held out where the settings do not say how many: a tenth of them, up to this number.
_MAX_EVAL_ROWS = 200
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
    """The tokenizer and the rows of a run. Rows have the fields of `rows.Row`."""

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
    counts = json.loads((directory / "counts.json").read_text(encoding="utf-8"))
    data = RunData(
        tokenizer=load_tokenizer(str(directory / "tokenizer")),
        train=datasets.load_from_disk(str(directory / "train")),
        evaluation=datasets.load_from_disk(str(directory / "evaluation")),
        train_counts=RowCounts(**counts["train"]),
        evaluation_counts=RowCounts(**counts["evaluation"]),
        content=counts["content"],
    )
    info(f"Rows of the data: {SourceCounts(**counts['source'])}")
    info(f"Training rows: {data.train_counts}")
    info(f"Held-out rows: {data.evaluation_counts}")
    for note in dict.fromkeys(data.train_counts.notes + data.evaluation_counts.notes):
        info(f"Texts: {note}")
    if left_over := len(data.train) % config.train.batch_size:
        info(f"Each epoch leaves out {left_over} of the training rows, others each time, which fill no batch")
    if config.data.format == "pairs" and drop_other_chat_template(data.tokenizer, config.data.template):
        info("The tokenizer's chat template is not saved: training uses data.template, which generate.py applies")
    return data


def _prepare(
    target: Path, config: Config, make_pair: MakePair, make_example: MakeExample, info: Callable[[str], None]
) -> None:
    """Read, split and tokenize the data of a run into an empty directory.

    The split comes before anything is learned from the data, so that a trained tokenizer has seen no held-out row.
    """
    info("Reading and tokenizing the data (later runs take it from the cache).")
    data = config.data
    if data.format == "chat":
        conversations, source_counts = read_conversations(data)
        _write_rows(target, config, conversations, source_counts, partial(encode_conversations, data=data))
    else:
        pairs, source_counts = read_pairs(data, make_pair)
        encode = partial(encode_pairs, data=data, make_example=make_example)
        _write_rows(target, config, pairs, source_counts, encode)


def _write_rows(
    target: Path,
    config: Config,
    examples: list[_Example],
    source_counts: SourceCounts,
    encode: Callable[[list[_Example], Any], tuple[list[Row], RowCounts]],
) -> None:
    held_out, training = _split(examples, config.data.eval_rows, config.train.seed)
    tokenizer = _tokenizer(config, (example.text for example in training))
    counts: dict[str, Any] = {"source": asdict(source_counts), "content": {"tokenizer": hash_of_tokenizer(tokenizer)}}
    for name, examples_of_split in (("train", training), ("evaluation", held_out)):
        rows, row_counts = encode(examples_of_split, tokenizer)
        if not rows:
            raise UserError(
                f"no rows are left for {name}: of {len(examples_of_split)}, {row_counts.dropped_too_long} have more "
                f"than data.max_length={config.data.max_length} tokens, {row_counts.dropped_without_label} no label, "
                f"and {row_counts.unusable} are unusable"
            )
        _to_dataset(rows).save_to_disk(str(target / name))
        counts[name] = asdict(row_counts)
        counts["content"][name] = hash_of_rows(rows)
    tokenizer.save_pretrained(str(target / "tokenizer"))
    (target / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def _tokenizer(config: Config, texts: Iterable[str]) -> Any:
    """The tokenizer of the settings, or one that is trained on the texts; for chats, with its template and end."""
    name, data = config.model.pretrained or config.tokenizer.pretrained, config.data
    trains_chatml = name is None and data.format == "chat" and data.chat_template is None
    if name is not None:
        tokenizer = load_tokenizer(name, data.end_token)
    else:
        control_tokens = CHATML_TOKENS if trains_chatml else ()
        entries = config.tokenizer.entries_to_train()
        tokenizer = train_tokenizer(texts, entries, data.end_token or END_OF_TEXT, control_tokens)
    if data.format == "chat":
        if data.chat_template is not None:
            tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
        elif trains_chatml:
            tokenizer.chat_template = CHATML
        tokenizer.eos_token = end_of_turn(tokenizer)
    return tokenizer


def _split(examples: list[_Example], eval_rows: int | None, seed: int) -> tuple[list[_Example], list[_Example]]:
    """The examples that are held out, and those to train on; equal ones, where they are kept, are on the same side."""
    if eval_rows is None:
        eval_rows = min(_MAX_EVAL_ROWS, max(1, len(examples) // 10))
    if eval_rows >= len(examples):
        raise UserError(f"data.eval_rows: {eval_rows} rows are to be held out, but the data has only {len(examples)}")
    equal: dict[Any, list[_Example]] = {}
    for example in examples:
        equal.setdefault(example.key, []).append(example)
    groups = list(equal.values())
    random.Random(seed).shuffle(groups)
    held_out: list[_Example] = []
    while len(held_out) < eval_rows:
        held_out += groups.pop(0)
    if not groups:
        raise UserError(
            f"data.eval_rows: with {eval_rows} rows held out, none are left to train on: equal ones go along"
        )
    return held_out, [example for group in groups for example in group]


def _to_dataset(rows: list[Row]) -> datasets.Dataset:
    columns = {name: [getattr(row, name) for row in rows] for name in _FEATURES}
    return datasets.Dataset.from_dict(columns, features=_FEATURES)


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

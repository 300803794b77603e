"""Loads the tokenizer of a model, with the end token of the settings."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from utils.config.section import expand_home
from utils.errors import UserError, first_line, in_one_line

# Files of which one is enough to make a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Of these, the tables of other libraries, which need them.
_TABLES = ("tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken")


def load_tokenizer(name: str, end_token: str | None = None) -> Any:
    """The tokenizer of a local directory or of the hub, with another end-of-text token where one is given.

    One without a pad token pads with its end-of-text token. Code that comes with a tokenizer is not run.

    Raises:
        UserError: it cannot be loaded, or has no such token.
    """
    name = expand_home(name)
    if (reason := _reason_for_no_tokenizer(Path(name))) is not None:
        raise UserError(f"the tokenizer of {name!r} cannot be loaded: {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("a", add_special_tokens=False)  # some files are found wanting only here
    except Exception as error:  # transformers raises many types for files that are missing or broken
        raise UserError(f"the tokenizer of {name!r} cannot be loaded: {_remedy(Path(name), error)}") from error
    if tokenizer.eos_token_id is None and end_token is None:
        raise UserError(
            f"the tokenizer of {name!r} has no end-of-text token, without which no model learns to stop: name one of "
            "its tokens in data.end_token"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if end_token is not None:
        _set_end_token(tokenizer, end_token, name)
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """The number of embeddings that a tokenizer needs: its largest id + 1, since its ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def _set_end_token(tokenizer: Any, end_token: str, name: str) -> None:
    if end_token not in tokenizer.get_vocab():
        ids = tokenizer(end_token, add_special_tokens=False)["input_ids"]
        raise UserError(
            f"data.end_token: {end_token!r} is not a token of the tokenizer of {name!r}, but {len(ids)} of them: give "
            f"one token, such as its end-of-text token {tokenizer.eos_token!r}"
        )
    tokenizer.eos_token = end_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = end_token


def _reason_for_no_tokenizer(path: Path) -> str | None:
    """The reason why a directory holds no tokenizer: transformers would make an empty one from a config.json alone."""
    if not path.is_dir() or any((path / file).is_file() for file in (*_TOKENIZER_FILES, *_TABLES)):
        return None
    below = [child for child in sorted(path.iterdir()) if any((child / file).is_file() for file in _TOKENIZER_FILES)]
    if below:
        return f"there is none in it; did you mean {below[0]}?"
    return (
        f"there is none in it, neither {_TOKENIZER_FILES[0]} nor another of its files: copy the files of the model's "
        "tokenizer there, or save it there with tokenizer.save_pretrained"
    )


def _remedy(path: Path, error: Exception) -> str:
    """The remedy for an error of transformers, whose own message stops short if there is only a table."""
    table = next((file for file in _TABLES if (path / file).is_file()), None)
    if table is not None and not (path / "tokenizer.json").is_file():
        return (
            f"{table} alone needs its library (pip install sentencepiece tiktoken) and may need tokenizer_config.json: "
            f"better add the model's tokenizer.json ({type(error).__name__}: {first_line(error)})"
        )
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is not run: give one of a type that transformers has"
    return in_one_line(str(error)) or type(error).__name__

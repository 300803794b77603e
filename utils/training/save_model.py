"""Saves the model of a run with its tokenizer, atomically."""

import shutil
from pathlib import Path
from typing import Any

from moreh.atomic_io import commit_directory, make_staging_directory, staging_path
from moreh.trace import span
from utils.config.schema import DataSection
from utils.errors import UserError, system_word
from utils.text.template import save_template
from utils.training.checkpoint.stopping import resume_command
from utils.workers import rank


def save_model(model: Any, tokenizer: Any, data: DataSection, directory: Path) -> None:
    """Save a model, its tokenizer and the template of its prompts; collective.

    They are written to another directory, which is renamed in the end: nobody finds a model without its tokenizer.

    Raises:
        UserError: the files cannot be written.
    """
    staging = staging_path(directory)
    is_writer = rank() == 0
    try:
        with span("save_model"):
            if is_writer:
                make_staging_directory(directory)
            model.save_pretrained(staging)
            if is_writer:
                tokenizer.save_pretrained(staging)
                save_template(data, staging)
                commit_directory(staging, directory)
    except Exception as error:  # each library that writes has errors of its own
        reason = system_word(error)
        if reason is None:
            raise
        raise UserError(
            f"run.directory: the model cannot be saved in {directory}: {reason}; fix this, and resume from the last "
            f"checkpoint: {resume_command()}"
        ) from error
    finally:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)

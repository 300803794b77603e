"""Export the model of a run as a plain transformers model directory, for other tools.

    python scripts/export.py runs/llama_smollm2_lora exported --merge   merges an adapter
    python scripts/export.py runs/gpt exported --dtype bfloat16         a model without adapters

The directory includes the tokenizer and the prompt template. In float32, results equal those of the
run, to rounding.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from moreh.atomic_io import commit_directory, make_staging_directory
from utils.cli import exit_code_of, show_any_text
from utils.config.section import expand_home
from utils.errors import UserError, first_line, system_word
from utils.text.template import FILE_NAME


def export(source: str, target: Path, *, merge: bool, dtype: str) -> None:
    """Write the model in `source`, which may be the directory of a run, to `target`, complete or not at all.

    Raises:
        UserError: the model cannot be loaded, `merge` does not fit it, or `target` exists.
    """
    # Imported here, so that --help and a mistake in the command line are answered at once.
    import torch
    from transformers import logging

    from utils.text.tokenizers import load_tokenizer
    from utils.training.lora import is_adapter
    from utils.training.pretrained import load_pretrained, reason_for_no_model

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = expand_home(source)
    if (Path(source) / "config.yaml").is_file() and (Path(source) / "model").is_dir():
        source = str(Path(source) / "model")
    if target.exists():
        raise UserError(f"{target} exists already: give another directory")
    if is_adapter(source) and not merge:
        raise UserError(f"{source} holds an adapter, which is not a model by itself: give --merge")
    if (reason := None if is_adapter(source) else reason_for_no_model(source)) is not None:
        raise UserError(f"the model: {reason}")
    if merge and not is_adapter(source):
        raise UserError(f"--merge: {source} holds no adapter to merge: leave --merge out")
    model = load_pretrained(source, "the model", dtype="float32")
    tokenizer = load_tokenizer(source)
    if merge:
        if not hasattr(model, "merge_and_unload"):
            raise UserError(f"--merge: the adapter in {source} is not LoRA or alike: it has no weights to merge")
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # a weight that is not finite
            raise UserError(f"--merge: the adapter in {source} cannot be merged: {first_line(error)}") from error
    model.to(getattr(torch, dtype))
    try:
        directory = make_staging_directory(target)
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            if (template := Path(source) / FILE_NAME).is_file():
                shutil.copy(template, directory)
            commit_directory(directory, target)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    except Exception as error:  # each library that writes has errors of its own
        reason = system_word(error)
        if reason is None:
            raise
        raise UserError(f"{target} cannot be written: {reason}") from error
    print(f"{target} is ready")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="the directory of a run, or of a saved model or adapter")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the directory to write, which must not exist")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base model")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args()
    show_any_text()

    def program() -> None:
        export(options.source, options.target, merge=options.merge, dtype=options.dtype)

    return exit_code_of(program, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())

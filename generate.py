"""Ask a fine-tuned checkpoint: the answer is streamed.

python generate.py runs/gpt/model 'def add(a, b): ...'
python generate.py runs/gpt/model --file prompt.txt --temperature 0.8 --top-p 0.95
cat prompt.txt | python generate.py runs/gpt/model
python generate.py runs/chat/model --chat
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from utils.cli import exit_code_of, show_any_text
from utils.config.section import expand_home
from utils.errors import UserError
from utils.text.chat import end_of_turn, prompt_for_answer
from utils.text.chat_session import RESET, chat, encode_chat_prompt
from utils.text.encoding import encode_prompts
from utils.text.prompt_input import checked_argument, read_prompt
from utils.text.template import PromptTemplate, load_template

DEFAULT_NEW_TOKENS = 128
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def answer(arguments: argparse.Namespace) -> None:
    """Generate a continuation of the prompt, or the answers of a conversation, and print it while it is generated.

    Raises:
        UserError: the checkpoint or the prompt cannot be used.
    """
    question = "" if arguments.chat else read_prompt(arguments)
    # Imported here, so that --help and a mistake in the command line are answered at once.
    import torch
    from transformers import logging

    from utils.text.tokenizers import load_tokenizer
    from utils.training.pretrained import load_pretrained

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # The model comes before the tokenizer because its error says more about a directory that holds neither.
    model = load_pretrained(arguments.checkpoint, "the checkpoint")
    tokenizer = load_tokenizer(arguments.checkpoint)
    generate = partial(_generate, model, tokenizer, arguments)
    torch.manual_seed(arguments.seed or 0)
    if arguments.chat:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, so the model takes no conversation: leave --chat out, and give "
                "a prompt"
            )
        end_of_turn(tokenizer)  # raises for a template whose answers have no end
        chat(_typed_lines(), generate, tokenizer, arguments.system)
        return
    template = None if arguments.raw else load_template(expand_home(arguments.checkpoint))
    if template == "chat":
        prompt = _as_chat(question, arguments)
        prompt_ids = encode_chat_prompt(prompt, tokenizer)
        shown = str(prompt_for_answer(prompt, tokenizer))
    else:
        if arguments.system is not None:
            raise UserError("--system: the checkpoint was not trained on conversations: give --chat, or leave it out")
        shown = _as_trained(question, template, arguments)
        (prompt_ids,) = encode_prompts([shown], tokenizer)
    if arguments.echo:
        _write(shown)
    generate(prompt_ids)


def _generate(model: Any, tokenizer: Any, arguments: argparse.Namespace, prompt_ids: list[int]) -> list[int]:
    """Write the answer to a prompt while it is generated; returns its token ids."""
    import torch

    from utils.text.decoding import AnswerStreamer
    from utils.training.pretrained import end_token_ids

    max_new_tokens = _max_new_tokens(model, len(prompt_ids), arguments.max_new_tokens)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
        if arguments.temperature > 0
        else {"do_sample": False}
    )
    # A real GPU if there is one. The simulated accelerator is not needed, and a training job may be using it.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    input_ids = torch.tensor([prompt_ids], device=device)
    generated = (
        model.to(device)
        .eval()
        .generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            repetition_penalty=arguments.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted({tokenizer.eos_token_id, *end_token_ids(model)}),
            streamer=AnswerStreamer(tokenizer, _write),
            **sampling,
        )
    )
    _write("\n")
    ids: list[int] = generated[0, len(prompt_ids) :].tolist()
    return ids


def answer_to_pipe(arguments: argparse.Namespace) -> None:
    """`answer`, but exit without an error once the reader of the output has closed the pipe, as `| head` does."""
    try:
        answer(arguments)
    except BrokenPipeError:
        # Without this, Python would report the error again when it flushes the rest of the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)


def _typed_lines() -> Iterator[str]:
    """The lines of standard input, each after a mark on a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _as_chat(question: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The question as the first message of a conversation."""
    if arguments.field:
        raise UserError("--field: the checkpoint was trained on conversations, which have no template: leave it out")
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [*system, {"role": "user", "content": question}]


def _as_trained(question: str, template: PromptTemplate | None, arguments: argparse.Namespace) -> str:
    """The question in the template of the model's training, unless it already is, or the model has no template."""
    fields = dict(arguments.field)
    if template is None:
        if fields:
            raise UserError("--field: the checkpoint has no template that is filled: leave it out")
        return question
    if template.is_applied_to(question):
        print(
            "The prompt already contains the model's template, so the template is not applied again.", file=sys.stderr
        )
        return question
    return template.fill(question, fields)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _max_new_tokens(model: Any, prompt_length: int, requested: int | None) -> int:
    """The number of tokens to generate: `requested`, by default 128 or fewer if the model's positions leave fewer."""
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if prompt_length + (requested or 1) > max_positions:
        raise UserError(
            f"the prompt has {prompt_length} tokens and {requested or 1} more are asked for, but the model has only "
            f"{max_positions} positions: shorten the prompt or lower --max-new-tokens"
        )
    return requested or min(DEFAULT_NEW_TOKENS, max_positions - prompt_length)


def _temperature(text: str) -> float:
    return 0.0 if text in {"0", "0.0"} else _number(text, 1e-3, 100)


def _number(text: str, minimum: float, maximum: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not minimum <= number <= maximum:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from {minimum:g} to {maximum:g}")
    return number


def _field(text: str) -> tuple[str, str]:
    name, equals, value = checked_argument(text, "--field").partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=TEXT")
    return name, value.replace("\\n", "\n")


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0 to {2**63 - 1}")
    return int(text)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text with a fine-tuned model; the output is streamed.")
    parser.add_argument("checkpoint", help="directory of a saved model, or a name on the Hub")
    parser.add_argument(
        "prompt", nargs="?", help="the prompt (\\n is a line break); without it, --file or standard input"
    )
    parser.add_argument("--file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"default: {DEFAULT_NEW_TOKENS}, or as many as the model has positions for",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        help="0: greedy decoding; from 0.001: sampling (default: %(default)s)",
    )
    parser.add_argument("--top-p", type=lambda text: _number(text, 0, 1), default=1.0, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=0, help="0: no limit (default: %(default)s)")
    parser.add_argument(
        "--repetition-penalty",
        type=lambda text: _number(text, 0.01, math.inf),
        default=1.0,
        help="default: %(default)s",
    )
    parser.add_argument("--seed", type=_seed, help="random seed for sampling (default: 0)")
    parser.add_argument("--echo", action="store_true", help="print the prompt too")
    parser.add_argument(
        "--raw", action="store_true", help="do not apply the template; names of control tokens become tokens"
    )
    parser.add_argument(
        "--field",
        type=_field,
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a further field of the model's template (default: empty)",
    )
    parser.add_argument(
        "--chat", action="store_true", help=f"chat: each input line is a message; {RESET} starts a new conversation"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message of a conversation")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args()
    if arguments.chat and (arguments.prompt or arguments.file or arguments.raw or arguments.field or arguments.echo):
        parser.error(
            "--chat reads its messages from standard input: leave the prompt, --file, --raw, --field and --echo out"
        )
    if (arguments.max_new_tokens is not None and arguments.max_new_tokens < 1) or arguments.top_k < 0:
        parser.error("--max-new-tokens must be at least 1 and --top-k at least 0")
    if arguments.temperature == 0 and (arguments.top_p != 1.0 or arguments.top_k != 0 or arguments.seed is not None):
        parser.error("--top-p, --top-k and --seed need a --temperature above 0")
    return arguments


def main() -> int:
    """Entry point; returns the exit code."""
    show_any_text()
    options = _parse_arguments()
    return exit_code_of(lambda: answer_to_pipe(options), debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())

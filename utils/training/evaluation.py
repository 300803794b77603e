"""The loss on held-out rows, and a generated sample."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moreh.trace import span
from utils.config.schema import Config
from utils.data.batches import Batch, evaluation_loader
from utils.data.dataset import RunData
from utils.data.labels import count_labels
from utils.errors import UserError
from utils.logging.run_log import RunLog
from utils.text.decoding import decode_answer
from utils.training.docstring_examples import examples_pass, functions_with_examples
from utils.training.rouge import rouge_of_texts, rouge_text

# A little below 1: a small model's text still varies but seldom turns to noise.
SAMPLE_TEMPERATURE = 0.6
SAMPLE_TOP_P = 0.9
# Above this loss, which no trained model has, a perplexity is a number of many digits.
_MAX_SHOWN_LOSS = 20

# A function of the training script: given the prompt, the model's text and the response in the data, the log's text.
ShowSample = Callable[[str, str, str], str]


class Evaluation:
    """Evaluates the model of a run on its held-out rows, and logs the loss and a sample."""

    def __init__(
        self, model: Any, data: RunData, config: Config, show_sample: ShowSample, log: RunLog, total_steps: int
    ) -> None:
        self.first_loss = math.nan
        """The held-out loss before the first step of the run; a resumed run takes it from the checkpoint."""
        self.last_loss = math.nan
        """The held-out loss of the last evaluation."""
        self.last_step = -1
        """The step after which the last evaluation was; -1 before the first."""
        self._model, self._data, self._config = model, data, config
        self._show_sample, self._log, self._total_steps = show_sample, log, total_steps
        self._loader = evaluation_loader(data, config)
        self._functions = self._choose_functions(config.log.example_functions) if config.log.example_functions else []

    def is_due(self, step: int) -> bool:
        """True if the settings ask for an evaluation after a step. After the last step there always is one."""
        every = self._config.log.eval_every_steps
        return step == self._total_steps or (every is not None and step % every == 0)

    def __call__(self, step: int) -> float:
        """Evaluate after a step; returns the loss.

        Raises:
            UserError: the loss is not finite.
        """
        started = time.perf_counter()
        loss = evaluate(self._model, self._loader)
        perplexity = f", perplexity {math.exp(loss):,.1f}" if loss < _MAX_SHOWN_LOSS else ""
        self._log.info(f"[Step {step}/{self._total_steps}] | Held-out loss: {loss:.4f}{perplexity}")
        if not math.isfinite(loss):
            raise UserError(
                f"step {step}: the held-out loss is {loss}, so the model is not saved; try a smaller train.lr"
            )
        if self._config.log.sample_tokens > 0:
            self._log.log_sample(step, self._sample())
        if self._config.log.rouge_rows > 0 and step in (0, self._total_steps):
            scores = self._rouge(self._config.log.rouge_rows)
            self._log.info(f"[Step {step}/{self._total_steps}] | {rouge_text(scores)}")
            self._log.evaluated |= scores
        if self._functions and step in (0, self._total_steps):
            passed, count = self._count_passed(), len(self._functions)
            text = f"Docstring examples: those of {passed} of {count} functions pass"
            self._log.info(f"[Step {step}/{self._total_steps}] | {text}")
            self._log.evaluated["examples_passed"] = passed / count
        self._log.evaluation_s = time.perf_counter() - started
        if math.isnan(self.first_loss):
            self.first_loss = loss
        self.last_loss, self.last_step = loss, step
        return loss

    def _sample(self) -> str:
        tokenizer, row = self._data.tokenizer, self._data.evaluation[0]
        prompt_ids = row["input_ids"][: row["prompt_length"]]
        response_ids = row["input_ids"][row["prompt_length"] :]
        return self._show_sample(
            tokenizer.decode(prompt_ids),
            generate_sample(self._model, prompt_ids, tokenizer, self._config.log.sample_tokens),
            decode_answer(response_ids, tokenizer),
        )

    def _choose_functions(self, count: int) -> list[int]:
        """The held-out rows whose docstring examples are run.

        Raises:
            UserError: there is none.
        """
        rows, tokenizer = self._data.evaluation, self._data.tokenizer
        texts = (
            (
                tokenizer.decode(row["input_ids"][: row["prompt_length"]]),
                decode_answer(row["input_ids"][row["prompt_length"] :], tokenizer),
            )
            for row in rows
        )
        if not (chosen := functions_with_examples(texts, count)):
            raise UserError(
                f"log.example_functions: none of the {len(rows)} held-out rows is a Python function, without a "
                "template around it, whose docstring has examples that pass with its body and fail without: leave the "
                "key out"
            )
        self._log.info(f"Docstring examples of {len(chosen)} held-out functions are run with the model's bodies")
        return chosen

    def _count_passed(self) -> int:
        """The number of the functions whose examples pass with the body of the model's most likely tokens."""
        tokenizer, passed = self._data.tokenizer, 0
        rows = [self._data.evaluation[index] for index in self._functions]
        longest = max(len(row["input_ids"]) - row["prompt_length"] for row in rows)
        for row in rows:
            prompt_ids = row["input_ids"][: row["prompt_length"]]
            body = generate_sample(self._model, prompt_ids, tokenizer, longest, is_drawn=False)
            passed += self._log.is_writer and examples_pass(tokenizer.decode(prompt_ids) + body)
        return passed

    def _rouge(self, count: int) -> dict[str, float]:
        """ROUGE of the first rows: of responses of the most likely tokens, as long as the longest one in the data."""
        tokenizer, rows = (
            self._data.tokenizer,
            self._data.evaluation.select(range(min(count, len(self._data.evaluation)))),
        )
        pairs = [(row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]) for row in rows]
        longest = max(len(reference) for _, reference in pairs)
        return rouge_of_texts(
            [generate_sample(self._model, prompt, tokenizer, longest, is_drawn=False) for prompt, _ in pairs],
            [decode_answer(reference, tokenizer) for _, reference in pairs],
        )


def evaluate(model: Any, batches: Iterable[Batch]) -> float:
    """The mean loss over all label tokens of the batches, however the rows are batched."""
    loss_sum, label_tokens = 0.0, 0
    with _evaluating(model):
        for batch in batches:
            with span("evaluate_batch"):
                outputs = model(
                    batch["input_ids"].cuda(),
                    attention_mask=batch["attention_mask"].cuda(),
                    labels=batch["labels"].cuda(),
                    use_cache=False,
                )
            batch_label_tokens = count_labels(batch["labels"])
            loss_sum += outputs.loss.item() * batch_label_tokens
            label_tokens += batch_label_tokens
    return loss_sum / label_tokens


def generate_sample(
    model: Any, prompt_ids: list[int], tokenizer: Any, max_new_tokens: int, *, is_drawn: bool = True
) -> str:
    """A continuation of a prompt, up to the end of text, `max_new_tokens` or the model's last position.

    It is drawn at random, or is of the most likely tokens. The same weights give the same continuation each time.
    """
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_positions is not None:
        max_new_tokens = min(max_new_tokens, max_positions - len(prompt_ids))
    if max_new_tokens < 1:
        return ""
    input_ids = torch.tensor([prompt_ids])
    # Forked, so that the training draws the same random numbers afterwards as without a sample.
    with span("generate_sample"), _evaluating(model), torch.random.fork_rng():
        torch.manual_seed(0)
        generated = model.generate(
            input_ids.cuda(),
            attention_mask=torch.ones_like(input_ids).cuda(),
            max_new_tokens=max_new_tokens,
            do_sample=is_drawn,
            temperature=SAMPLE_TEMPERATURE if is_drawn else None,
            top_p=SAMPLE_TOP_P if is_drawn else None,
            pad_token_id=tokenizer.pad_token_id,
        )
    return decode_answer(generated[0, len(prompt_ids) :].tolist(), tokenizer)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradients and no dropout while the context is open. Afterwards the model is in its former mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

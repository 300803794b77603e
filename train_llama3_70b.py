"""Fine-tune Llama-3-70B, or a smaller causal language model, to summarize a text.

python train_llama3_70b.py --plan-only accelerator.model=8xLarge.4096GB
python train_llama3_70b.py --config configs/llama_small.yaml
python train_llama3_70b.py --config configs/llama_smollm2.yaml train.steps=20

The training loop is that of a single-GPU script.
One line in `main` makes it parallel.
"""

import sys

from utils.cli import run_script
from utils.config.schema import Config, DataSection
from utils.data.labels import IGNORED, count_labels
from utils.data.records import Record
from utils.logging.run_log import RunLog


# A record of `data.summaries`: {"prompt": "Both sides are filled alike ...", "response": "Pad a sequence."}
def make_pair(record: Record, data: DataSection) -> tuple[str, str]:
    r"""Prompt (the text, in the template) and response (the summary) of a record.

    The template in configs/*.yaml, "Summarize the following:\n{prompt}\nSummary:\n", states the task.
    """
    text, summary = record.text(data.prompt_field), record.text(data.response_field)
    return record.fill(data.template, prompt=text), summary


def make_example(prompt: list[int], summary: list[int], end_of_text: int, loss_on: str) -> tuple[list[int], list[int]]:
    """Token ids and labels: the model sees the text, and learns to write the summary and to stop after it.

    input_ids    Sum   marize   ...   Summary   :      Pad   a   sequence   .   <end>
    labels      -100    -100   -100    -100    -100    Pad   a   sequence   .   <end>

    A new model learns from `loss_on: all`, where the text has labels too: summaries alone are too short.
    """
    input_ids = [*prompt, *summary, end_of_text]
    labels = input_ids if loss_on == "all" else [*[IGNORED] * len(prompt), *summary, end_of_text]
    return input_ids, labels


def show_sample(prompt: str, written: str, summary: str) -> str:
    """Text for the log: the prompt, the generated summary and the reference summary."""
    return f"{prompt}{written.strip()}\nIn the data:\n{summary.strip()}"


def main(config: Config, log: RunLog) -> None:
    """Train with the given settings. Imports are local so that `--plan-only` and `--help` stay fast."""
    import torch

    from utils.data.batches import iter_steps, total_steps, training_loader
    from utils.data.dataset import prepare_data
    from utils.training.checkpoint.checkpoints import Checkpoints
    from utils.training.evaluation import Evaluation
    from utils.training.loss_guard import LossGuard
    from utils.training.lr_schedule import make_scheduler
    from utils.training.model import load_model
    from utils.training.optimizer import make_optimizer
    from utils.training.save_model import save_model
    from utils.training.step_meter import StepMeter

    # The one line: models created after it are planned for and run on all devices of the accelerator. With several
    # workers, it starts this script again in each worker, and only the workers continue after the line.
    torch.moreh.option.enable_advanced_parallelization(**config.accelerator.options())

    torch.manual_seed(config.train.seed)

    # Load the tokenizer, the data and the model
    data = prepare_data(config, make_pair, make_example, log.info)
    tokenizer = data.tokenizer
    loader = training_loader(data, config)
    model = load_model(config, tokenizer, log.info)
    log.info(f"Model: {type(model).__name__} with {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")

    # Prepare the model for training on the accelerator
    model.cuda()
    model.train()

    # Define the optimizer and the learning rate over the steps
    steps = total_steps(loader, config)
    optim = make_optimizer(model, config.train, log.info)
    scheduler = make_scheduler(optim, steps, config.train)

    # Start the run, or resume a checkpoint
    evaluation = Evaluation(model, data, config, show_sample, log, steps)
    checkpoints = Checkpoints(config, data, log, evaluation)
    start_step = checkpoints.start_or_resume(model, optim, scheduler, steps)
    guard = LossGuard(config, log, steps, checkpoints)
    meter = StepMeter(config, log, steps)

    for step, batches in meter.timed(iter_steps(loader, config.train.gradient_accumulation, steps, start_step)):
        # Weight each batch by its label tokens, so the gradient does not depend on how rows are grouped into batches.
        label_tokens = sum(count_labels(batch["labels"]) for batch in batches)
        step_loss = 0.0
        for batch in batches:
            outputs = model(
                batch["input_ids"].cuda(),
                attention_mask=batch["attention_mask"].cuda(),
                labels=batch["labels"].cuda(),
                use_cache=False,
            )
            loss = outputs[0] * (count_labels(batch["labels"]) / label_tokens)
            loss.backward()
            step_loss += loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm).item()
        lr = scheduler.get_last_lr()[0]
        if guard.allows(step, step_loss, grad_norm, batches, model, optim):
            optim.step()
        scheduler.step()
        model.zero_grad(set_to_none=True)

        # Log, evaluate and save
        metrics = meter.finish(step, batches, loss=step_loss, lr=lr, grad_norm=grad_norm)
        if evaluation.is_due(step):
            metrics["eval_loss"] = evaluation(step)
        log.log_step(metrics)
        checkpoints.maybe_save(step, model, optim, scheduler)

    # Save the model, its tokenizer and the prompt template
    checkpoints.flush()
    save_model(model, tokenizer, config.data, log.directory / "model")
    log.finish(evaluation.first_loss, evaluation.last_loss)


if __name__ == "__main__":
    sys.exit(run_script(main, make_pair, make_example, default_config="configs/llama3_70b.yaml", description=__doc__))

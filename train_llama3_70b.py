"""Fine-tune Llama-3-70B, or a smaller model of its kind, for summarization.

python train_llama3_70b.py --plan-only
python train_llama3_70b.py --config configs/llama_small.yaml
python train_llama3_70b.py --config configs/llama_smollm2.yaml train.steps=20

This is the loop that one would write for a single GPU. Everything parallel is in the one line that is marked below.
"""

import math
import sys
import time

from utils.cli import plan_only_fast_path, run_script

if __name__ == "__main__":
    plan_only_fast_path("configs/llama3_70b.yaml")  # before the libraries below are imported, which takes seconds

import torch

from utils.config.schema import Config
from utils.data.batches import evaluation_loader, iter_steps, make_labels, total_steps, training_loader
from utils.data.dataset import prepare_data
from utils.data.masks import count_labels
from utils.errors import UserError
from utils.logging.run_log import RunLog
from utils.training.checkpoint import Checkpoints
from utils.training.evaluation import evaluate, generate_sample
from utils.training.lr_schedule import make_scheduler
from utils.training.model import load_model
from utils.training.workers import prepare_accelerator


def main(config: Config) -> None:
    """Train on the accelerator of the settings, with the log of the run open."""
    prepare_accelerator(config.accelerator)

    # The one line: from here on, models are planned and run on all devices of the accelerator. Where the settings ask for
    # several workers, this script is started again in each of them, and only they get past the line.
    if config.accelerator.advanced_parallelization is not None:
        torch.moreh.option.enable_advanced_parallelization(**config.accelerator.advanced_parallelization.model_dump())

    with RunLog(config) as log:
        train(config, log)


def train(config: Config, log: RunLog) -> None:
    """Train as the settings say; everything is left in the directory of the log."""
    torch.manual_seed(config.train.seed)

    # Load the tokenizer, the data and the model
    data = prepare_data(config, log.say)
    tokenizer = data.tokenizer
    log.say(f"Training rows: {data.train_counts}")
    log.say(f"Held-out rows: {data.evaluation_counts}")
    loader = training_loader(data.train, tokenizer, config)
    held_out = evaluation_loader(data.evaluation, tokenizer, config)
    model = load_model(config, tokenizer)
    log.say(f"Model: {type(model).__name__} with {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")

    # Prepare the model for training on the accelerator
    model.cuda()
    model.train()

    # Define the optimizer and the learning rate over the steps
    steps = total_steps(loader, config)
    optim = torch.optim.AdamW(model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay)
    scheduler = make_scheduler(optim, steps, config.train)

    def evaluate_and_show(step: int) -> float:
        eval_loss = evaluate(model, held_out, config.data.loss_on)
        log.say(f"[Step {step}/{steps}] | Held-out loss: {eval_loss:.4f}")
        if not math.isfinite(eval_loss):
            raise UserError(
                f"step {step}: the held-out loss is {eval_loss}, so the model is not saved; try a smaller train.lr"
            )
        if config.log.sample_tokens > 0:
            row = data.evaluation[0]
            prompt_ids = row["input_ids"][: row["prompt_length"]]
            sample = generate_sample(model, prompt_ids, tokenizer, config.log.sample_tokens)
            summary = tokenizer.decode(row["input_ids"][row["prompt_length"] :], skip_special_tokens=True)
            log.say(f"Sample:\n{tokenizer.decode(prompt_ids)}{sample.strip()}\nSummary in the data:\n{summary.strip()}")
        return eval_loss

    # Begin, or go on after the last step of a checkpoint
    checkpoints = Checkpoints(config, log.directory)
    if checkpoints.to_resume is None:
        log.begin()
        done, first_eval_loss = 0, evaluate_and_show(0)
        log.log_step({"step": 0, "eval_loss": first_eval_loss})
    else:
        done, first_eval_loss = checkpoints.resume(model, optim, scheduler, steps)
        log.resume(done)
        log.say(f"[Step {done}/{steps}] | Resumed from {checkpoints.to_resume}")
    log.show_progress(steps)
    tokens_since_log, seconds_since_log = 0, 0.0

    start = time.perf_counter()
    for step, batches in enumerate(iter_steps(loader, config.train.gradient_accumulation, steps, done), start=done + 1):
        labels_of_batches = [make_labels(batch, config.data.loss_on) for batch in batches]
        label_tokens = sum(count_labels(labels) for labels in labels_of_batches)

        # Each batch counts by its label tokens, so the gradient is the same however the rows are cut into batches.
        loss = 0.0
        for batch, labels in zip(batches, labels_of_batches, strict=True):
            outputs = model(
                batch["input_ids"].cuda(),
                attention_mask=batch["attention_mask"].cuda(),
                labels=labels.cuda(),
                use_cache=False,
            )
            batch_loss = outputs[0] * (count_labels(labels) / label_tokens)
            batch_loss.backward()
            loss += batch_loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            places = ", ".join(place for batch in batches for place in batch["places"])
            log.say(f"[Step {step}/{steps}] | Loss: {loss} | Gradient norm: {grad_norm} | Rows: {places}")
            raise UserError(
                f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the rows of the step are in "
                f"{log.directory / 'train.log'}. A smaller train.lr, a longer train.warmup_steps or those rows may be the cause"
            )
        lr = scheduler.get_last_lr()[0]
        optim.step()
        scheduler.step()
        model.zero_grad(set_to_none=True)

        # Log
        seconds = time.perf_counter() - start
        real_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        padded_tokens = sum(batch["input_ids"].numel() for batch in batches)
        metrics = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "real_tokens_per_s": real_tokens / seconds,
            "label_tokens_per_s": label_tokens / seconds,
            "padded_tokens_per_s": padded_tokens / seconds,
            "memory_bytes": torch.cuda.max_memory_allocated(),
        }
        tokens_since_log += real_tokens
        seconds_since_log += seconds
        if step % config.log.every_steps == 0 or step == steps:
            log.say(
                f"[Step {step}/{steps}] | Loss: {loss:.4f} | Duration: {seconds_since_log:.2f} sec | "
                f"Throughput: {tokens_since_log / seconds_since_log:.2f} tokens/sec"
            )
            tokens_since_log, seconds_since_log = 0, 0.0
        if step == steps or (config.log.eval_every_steps and step % config.log.eval_every_steps == 0):
            metrics["eval_loss"] = eval_loss = evaluate_and_show(step)
        log.log_step(metrics)
        checkpoints.maybe_save(step, model, optim, scheduler, first_eval_loss)
        start = time.perf_counter()

    # Save the model and its tokenizer
    checkpoints.wait()
    model.save_pretrained(log.directory / "model")
    if log.is_writer:
        tokenizer.save_pretrained(log.directory / "model")
    log.say(
        f"Held-out loss: {first_eval_loss:.4f} before, {eval_loss:.4f} after ({1 - eval_loss / first_eval_loss:.1%} less)"
    )
    log.say(f"Loss curves: {log.draw_losses()}")
    log.say(f"Model: {log.directory / 'model'}")


if __name__ == "__main__":
    sys.exit(run_script(main, description="Fine-tune for summarization.", default_config="configs/llama3_70b.yaml"))

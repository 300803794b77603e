"""The columns of published runs under other headings, and cells that a model's name or a plan's other sizes tell."""

import csv
import re
from functools import cache
from pathlib import Path

from published_programs import RunRow, Unusable, cell, measurement, optional

_MODELS = Path(__file__).parent.parent / "data" / "known_models.csv"
# Other headings of each column, in lower case and with underscores between words.
_HEADINGS = {
    "gpu": "device accelerator gpu_type gpu_name device_name hardware",
    "n_gpus": "gpus num_gpus gpu_count world_size devices n_devices num_devices",
    "tp": "tensor_parallel tensor_parallel_size tensor_model_parallel_size tp_size",
    "pp": "pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size pp_size",
    "dp": "data_parallel data_parallel_size dp_size",
    "cp": "context_parallel context_parallel_size cp_size",
    "ep": "expert_parallel expert_parallel_size expert_model_parallel_size ep_size",
    "vpp": "vp virtual_pipeline virtual_pipeline_model_parallel_size interleaved_stages",
    "mbs": "micro_batch_size microbatch_size micro_batch per_device_train_batch_size per_device_batch_size "
    "per_gpu_batch_size local_batch_size",
    "gbs": "global_batch_size global_batch train_batch_size",
    "grad_accum": "gradient_accumulation_steps gradient_accumulation grad_acc accumulation_steps",
    "seq_len": "sequence_length seq_length seqlen context_length max_seq_len max_seq_length",
    "layers": "num_layers n_layers n_layer num_hidden_layers",
    "hidden": "hidden_size d_model n_embd dim",
    "heads": "num_heads n_heads n_head num_attention_heads",
    "kv_heads": "num_kv_heads n_kv_heads num_key_value_heads num_query_groups",
    "ffn": "intermediate_size ffn_hidden_size ffn_hidden d_ff",
    "vocab": "vocab_size vocabulary vocabulary_size",
    "precision": "dtype mixed_precision",
    "recompute": "recomputation activation_recomputation activation_checkpointing gradient_checkpointing",
    "sharding": "sharding_strategy zero_stage zero",
    "step_time_s": "step_time step_seconds seconds_per_step s_per_step time_per_step iteration_time_s iteration_time",
    "tok_s_per_gpu": "tokens_per_second_per_gpu tokens_per_sec_per_gpu tokens_per_s_per_gpu tokens_s_gpu tok_s_gpu tgs "
    "tokens_per_gpu_per_second tokens_per_second_per_device",
    "tok_s_total": "tokens_per_second tokens_per_sec tokens_per_s tok_s",
    "samples_s_total": "samples_per_second samples_per_sec samples_per_s sequences_per_second",
    "tflops_per_gpu": "tflops tflop_s_gpu tflops_gpu tflop_s_per_gpu tflops_s_gpu model_tflop_s_gpu "
    "model_tflops_per_gpu model_tflop_per_sec_per_gpu tflops_per_device",
    "mfu_pct": "mfu model_flops_utilization",
    "peak_mem_gib_per_gpu": "peak_mem_gib peak_memory_gib max_memory_gib memory_gib",
}
_COLUMN_OF = {heading: column for column, headings in _HEADINGS.items() for heading in headings.split()}
_MILLISECONDS = ("step_time_ms", "iteration_time_ms", "ms_per_step", "time_per_step_ms")
_ONE_RANK_A_MODEL = r"fsdp|hsdp|\bddp\b|zero[-_ ]?\d|deepspeed|\bfull_shard|shard_grad_op|hybrid_shard|single.?gpu"


def with_known_columns(row: RunRow) -> RunRow:
    """A row with the columns of published_runs.csv, where it has others that say the same. Its own cells stay."""
    cells = dict(row)
    for heading in row:
        text, name = cell(row, heading), re.sub(r"[^a-z0-9]+", "_", heading.strip().lower()).strip("_")
        if not text or (name == heading and name not in (*_COLUMN_OF, *_MILLISECONDS)):
            continue
        column = _COLUMN_OF.get(name, name)
        if name in _MILLISECONDS:
            column, milliseconds = "step_time_s", measurement(row, heading)
            text = "" if milliseconds is None else repr(milliseconds / 1000)
        if column == "sharding" and re.fullmatch(r"[0-3]", text):
            text = f"ZeRO-{text}"
        if text and not cell(cells, column):
            cells[column] = text
    return cells


@cache
def _known_models() -> tuple[dict[str, str], ...]:
    with _MODELS.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def with_known_model(row: RunRow) -> RunRow:
    """A row with the sizes of the model that it names, where it leaves them out. A row may have cut off layers."""
    name = re.sub(r"[-_ ]+", "-", cell(row, "model").lower())
    for known in _known_models():
        if re.search(known["pattern"], name) and cell(row, "hidden") in ("", known["hidden"]):
            sizes = {column: text for column, text in known.items() if column != "pattern" and not cell(row, column)}
            return {**row, **sizes}
    return row


def parallel_sizes(row: RunRow, devices: int) -> tuple[int, int, int]:
    """Tensor-, pipeline- and context-parallel ranks.

    A size that is not given is 1 where the other sizes fill the devices, and in programs that only shard or copy.

    Raises:
        Unusable: a size is not given and may be anything.
    """
    tensor, pipeline, context = optional(row, "tp"), optional(row, "pp"), optional(row, "cp") or 1
    if tensor is None or pipeline is None:
        known = (tensor or 1) * (pipeline or 1) * context
        data = optional(row, "dp")
        words = " ".join(cell(row, column) for column in ("framework", "sharding", "flag", "notes")).lower()
        copies = re.search(_ONE_RANK_A_MODEL, words) is not None and "megatron" not in words
        if not (known == devices or (data is not None and known * data == devices) or copies):
            raise Unusable("the plan is not given (tp, pp)")
    return tensor or 1, pipeline or 1, context

"""The precision of a row, and its mechanisms that the planner does not model.

A number for such a row would be wrong by a factor of two or more, so that there is none.
"""

import re

from published_programs import RunRow, Unusable, cell, optional

# Patterns, and the columns in which they are looked for.
_NOT_MODELED = (
    (r"\bmoe\b|mixtral|\d+x\d+(\.\d+)?b|[-_]a\d+(\.\d+)?b\b|deepseek.?(v[23]|r1)|dbrx|gpt.?oss|switch", "model"),
    (r"\bq?lora\b|\bpeft\b|\bdora\b|\bia3\b|adapters?\b|prompt.?tuning", "model framework flag"),
    (r"\bm?t5\b|\bul2\b|bert\b|\bm?bart\b|pegasus|\bnllb\b|\bvit\b|diffusion|whisper|\bclip\b|\bdit\b", "model"),
    (r"llava|\bvlm?\b|[-_ ]vl\b|vision|pixtral|paligemma|internvl|idefics|multimodal|omni\b|audio", "model"),
    (r"mamba|jamba|zamba|\bbamba\b|nemotron.?h\b|rwkv|hyena|retnet|griffin|recurrent|qwen.?3.?next|kimi", "model"),
    (r"\b(dpo|grpo|ppo|rlhf|orpo|kto|reward|distill\w*)\b", "model framework flag"),
    (r"offload(ing)?\b(?! ?= ?(false|no|none|0))", "flag sharding recompute"),
)
_REASONS = (
    "how tokens are routed to experts is not modeled",
    "the rank of adapters and what they adapt are not given",
    "the model is not a decoder of text",
    "the model is not a decoder of text only",
    "layers with a state-space model or linear attention are not in the columns",
    "the training is not on next tokens",
    "offloading to the host is not modeled",
)


def check_modeled(row: RunRow) -> None:
    """Refuse a row with a mechanism that the planner does not model.

    Raises:
        Unusable: the row has such a mechanism.
    """
    if (optional(row, "ep") or 1) > 1:
        raise Unusable("expert parallelism is not modeled")
    for (pattern, columns), reason in zip(_NOT_MODELED, _REASONS, strict=True):
        if any(re.search(pattern, cell(row, column).lower()) for column in columns.split()):
            raise Unusable(reason)
    compute_of(row)


def compute_of(row: RunRow) -> str:
    """The precision of arithmetic as a `SoftwareProfile` has it. Where no cell tells, it is half.

    Raises:
        Unusable: the precision is not modeled.
    """
    given = (cell(row, "precision") or cell(row, "dtype")).lower()
    # Programs write the precision into names too.
    text = given or " ".join(cell(row, column) for column in ("model", "framework", "group", "flag", "notes")).lower()
    if re.search(r"(nv|mx)?fp4|float4|int8|int4|e2m1", text):
        raise Unusable(f"precision {given or 'fp4'} is not modeled")
    if re.search(r"fp8|float8|e4m3|e5m2", text):
        return "float8"
    if re.search(r"tf32", text) or re.fullmatch(r"fp32|float32|32(-true)?|single", given):
        raise Unusable(f"precision {given or 'tf32'} is not modeled: no published run with it was compared with")
    return "half"

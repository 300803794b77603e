"""The parts of the check in their order, with the seconds that each may take."""

from gpu_check.isolation import Part

# As in parts/families.py, parts/workers.py, parts/workloads.py and parts/systems.py, which import torch.
FAMILIES = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "phi",
    "phi3",
    "olmo2",
    "starcoder2",
    "cohere",
)
PRECISIONS = ("float32", "bfloat16")
WORKLOADS = ("chats", "smollm2", "llama-1.3b")
# The most informative parts first: the last ones are skipped if the time runs out.
SYSTEMS = ("line", "trainer, compiled", "loop, bfloat16", "trainer", "plain loop", "liger", "trl, packed")
# The whole check, in seconds.
BUDGET_S, SMOKE_BUDGET_S = 480.0, 90.0
# Two workers on one GPU talk over gloo, which needs CPUs' memory and no NCCL.
_TWO_WORKERS = (("MOREH_WORKERS", "2"), ("MOREH_SHARE_GPUS", "1"))


def full_check(*, dry: bool) -> list[Part]:
    """The parts of `make gpu-check`; the dry mode leaves some of those out that start slowly."""
    references = tuple(f"{precision}/{family}" for precision in PRECISIONS for family in FAMILIES)
    speed = tuple(f"{workload}/{system}" for system in SYSTEMS for workload in WORKLOADS)
    if dry:
        speed = tuple(case for case in speed if case.startswith(WORKLOADS[0]) or case.endswith(SYSTEMS[0]))
    return [
        Part("machine", "Machine", ("versions", "device", "bfloat16 matmul"), 40, alone=True),
        Part("reference", "References without the line", references, 60, alone=True),
        *_correctness(FAMILIES, 45),
        Part("resume", "A resumed run", ("whole", "first half", "second half"), 60, own_processes=True),
        Part("gpu_tests", "Tests that need a GPU", ("runtime/test_gpu.py",), 60),
        *_workers(("tp2", "pp2", "dp2", "dp2 sharded"), 80),
        Part("speed", "Speed and memory", speed, 330, own_processes=True, alone=True),
    ]


def smoke_check() -> list[Part]:
    """The parts of `make gpu-smoke`, for the report of a bug."""
    families = FAMILIES[:4]
    references = tuple(f"{precision}/{family}" for precision in PRECISIONS for family in families)
    speed = tuple(f"smollm2/{system}" for system in ("line", "loop, bfloat16"))
    return [
        Part("machine", "Machine", ("versions", "device", "bfloat16 matmul"), 25, alone=True),
        Part("reference", "References without the line", references, 25, alone=True),
        *_correctness(families, 20),
        Part("speed", "Speed and memory", speed, 40, own_processes=True, alone=True),
    ]


def in_turns(parts: list[Part]) -> list[list[Part]]:
    """The parts in groups: those of a group may run at the same time, as most of their time is Python's."""
    groups: list[list[Part]] = []
    for part in parts:
        if part.alone or not groups or groups[-1][0].alone:
            groups.append([part])
        else:
            groups[-1].append(part)
    return groups


def _correctness(families: tuple[str, ...], budget_s: float) -> list[Part]:
    titles = {
        "float32": "With the line against without, float32 (TF32 off, 1e-5)",
        "bfloat16": "With the line against without, bfloat16 (errors against float32)",
    }
    return [
        Part(
            f"correctness-{precision}",
            title,
            tuple(f"{precision}/{family}" for family in families),
            budget_s,
            module="correctness",
        )
        for precision, title in titles.items()
    ]


def _workers(cases: tuple[str, ...], budget_s: float) -> list[Part]:
    one = Part("workers-1", "One worker", ("one worker",), 30, module="workers")
    two = Part(
        "workers-2",
        "Two workers on one GPU, over gloo (losses of one worker to 1e-5)",
        cases,
        budget_s,
        module="workers",
        own_processes=True,
        environment=_TWO_WORKERS,
        alone=True,
    )
    return [one, two]

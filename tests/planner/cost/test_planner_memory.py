"""Memory that the planner predicts, against live tensors of real training steps, published formulas and arithmetic."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moreh.models.describe.from_module import describe_module
from moreh.planner.cost.memory.activation_memory import layer_activations
from moreh.planner.cost.memory.memory_parts import PeakMemory
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.software_profile import MOREH, TRANSFORMERS, TRANSFORMERS_AUTOCAST, SoftwareProfile, worker_software

TOLERANCE = 0.05
HEADS = 4


@dataclass(frozen=True)
class Case:
    """A model and a training step."""

    family: str
    batch: int  # sequences of a micro-batch
    length: int  # tokens of a sequence
    recomputation: str = "none"
    micro_batches: int = 1
    tied: bool = False
    hidden: int = 128
    layers: int = 3
    vocabulary: int = 500
    kv_heads: int = 4  # of a Llama
    inner: int = 3  # width of a Llama's feed-forward network, in hidden sizes
    dropout: float = 0.1
    autocast: bool = False
    bfloat16: bool = False  # the weights

    def __str__(self):
        # pytest shows what differs from the defaults.
        changed = [f for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        return f"{self.family} {self.batch}x{self.length}" + "".join(
            f" {f.name}={getattr(self, f.name)}" for f in changed
        )

    def build(self, device="cpu"):
        return self._build(device).to(torch.bfloat16 if self.bfloat16 else torch.float32)

    def _build(self, device):
        common = {"vocab_size": self.vocabulary, "tie_word_embeddings": self.tied, "bos_token_id": 0, "eos_token_id": 0}
        torch.manual_seed(0)
        with torch.device(device):
            if self.family == "gpt2":
                drops = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), self.dropout)
                sizes = {"n_embd": self.hidden, "n_layer": self.layers, "n_head": HEADS, "n_positions": self.length}
                return GPT2LMHeadModel(GPT2Config(**sizes, **drops, **common))
            return LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=self.hidden,
                    num_hidden_layers=self.layers,
                    num_attention_heads=HEADS,
                    num_key_value_heads=self.kv_heads,
                    intermediate_size=self.inner * self.hidden,
                    max_position_embeddings=self.length,
                    **common,
                )
            )

    def predict(self):
        plan = Plan(
            (self.layers,),
            micro_batch_size=self.batch,
            micro_batches=self.micro_batches,
            recomputation=self.recomputation,
        )
        training = Training(describe_module(self.build("meta")), self.batch * self.micro_batches, self.length)
        software = worker_software(bfloat16=self.autocast, half_weights=self.bfloat16)
        return peak_memory(PlanTable.from_plans([plan]), training, software)

    def measure(self):
        """The highest number of bytes in live tensors during the second step of a plain loop."""
        model = self.build().train()
        if self.recomputation == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters())
        batches = [torch.randint(0, self.vocabulary, (self.batch, self.length)) for _ in range(self.micro_batches)]
        masks = [torch.ones_like(batch) for batch in batches]

        tracker = MemTracker()

        def step():
            for batch, mask in zip(batches, masks, strict=True):
                # The tracker counts each module's calls for itself and takes one of each; the step's peak stays.
                tracker.reset_mod_stats()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
                    loss = model(batch, attention_mask=mask, labels=batch, use_cache=False).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        # Now there is optimizer state.
        tracker.track_external(model, optimizer, *batches, *masks)
        with tracker:
            step()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


SHAPES = ((1, 256), (4, 64), (4, 256), (8, 128))
# Each family has each shape, and each shape has both recomputations, as each family does.
CASES = [
    Case(family, batch, length, ("none", "full")[(first + number) % 2], tied=family == "gpt2")
    for first, family in enumerate(("gpt2", "llama"))
    for number, (batch, length) in enumerate(SHAPES)
] + [
    Case("gpt2", 4, 128, tied=False, vocabulary=3000),
    Case("gpt2", 4, 128, "full", tied=True, micro_batches=2, vocabulary=3000),
    Case("gpt2", 2, 128, "none", tied=True, micro_batches=2, hidden=192),
    Case("gpt2", 4, 256, dropout=0.0),
    Case("gpt2", 1, 64, hidden=256, vocabulary=5000),
    Case("gpt2", 1, 64, "full", tied=True, hidden=256, vocabulary=5000, micro_batches=2),
    Case("llama", 4, 128, tied=True, vocabulary=3000),
    Case("llama", 4, 128, "full", tied=True, micro_batches=2, vocabulary=3000),
    Case("llama", 2, 128, micro_batches=3, hidden=192),
    Case("llama", 4, 256, kv_heads=2, inner=2),
    Case("llama", 4, 256, "full", kv_heads=1, inner=4),
    Case("llama", 1, 64, hidden=256, layers=2, vocabulary=5000),
    Case("llama", 1, 64, "full", hidden=256, layers=2),
    Case("gpt2", 4, 128, autocast=True, tied=True),
    Case("gpt2", 4, 128, "full", autocast=True, tied=True, micro_batches=2),
    Case("llama", 4, 256, autocast=True),
    Case("llama", 4, 256, "full", autocast=True, kv_heads=2),
    Case("llama", 2, 64, "full", autocast=True, micro_batches=2, hidden=256, vocabulary=2000),
    Case("gpt2", 4, 128, bfloat16=True, tied=True),
    Case("gpt2", 1, 64, "full", bfloat16=True, tied=True, hidden=256, vocabulary=5000, micro_batches=2),
    Case("llama", 4, 256, bfloat16=True),
    Case("llama", 4, 256, "full", bfloat16=True, kv_heads=2),
    Case("llama", 2, 64, "full", bfloat16=True, micro_batches=2, hidden=256, vocabulary=2000),
]


def agrees(predicted, measured):
    return predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_predicted_peak_is_that_of_a_real_step(case):
    assert agrees(case.predict().total[0, 0], case.measure())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_comparison_notices_wrong_and_nan_predictions(family):
    case = Case(family, 4, 128, vocabulary=1000)
    full = replace(case, recomputation="full")
    measured, measured_full = case.measure(), full.measure()
    wrong = {
        "recomputation ignored": (case.predict().total, measured_full),
        "recomputation imagined": (full.predict().total, measured),
        "one layer less": (replace(case, layers=2).predict().total, measured),
        "no logits": (case.predict().total - case.predict().logits, measured),
        "no optimizer state": (full.predict().total - full.predict().optimizer, measured_full),
        "other precision": (replace(case, autocast=True).predict().total, measured),
        "NaN": (case.predict().total * np.nan, measured),
    }
    unnoticed = [name for name, (predicted, peak) in wrong.items() if agrees(predicted[0, 0], peak)]
    assert not unnoticed


def test_cases_have_their_peaks_at_different_moments():
    def moment(peak):
        if peak.logits[0, 0]:
            return "loss or output layer"
        return "layer" if peak.activations[0, 0] > peak.buffers[0, 0] else "embedding or optimizer"

    moments = {(case.family, moment(case.predict())) for case in CASES if not case.autocast}
    assert moments == {
        (f, m) for f in ("gpt2", "llama") for m in ("loss or output layer", "layer", "embedding or optimizer")
    }


def architecture(family="gpt2", **changes):
    return describe_module(Case(family, 1, 1024, **{"hidden": 256, "layers": 8, **changes}).build("meta"))


def memory_of(plan, software=MOREH, family="gpt2", **changes):
    training = Training(architecture(family, **changes), plan.global_batch_size, 1024)
    return peak_memory(PlanTable.from_plans([plan]), training, software)


@pytest.mark.parametrize("tensor", [1, 4])
def test_gpt_layer_keeps_what_korthikanti_et_al_count(tensor):
    """Equations 1 and 4 of https://arxiv.org/abs/2205.05198: s b h (34 + 5 a s / h) bytes, 1 / t of it on each rank."""
    batch, length, hidden = 3, 1024, 256
    plan = Plan((8,), tensor=tensor, micro_batch_size=batch, sequence_parallel=tensor > 1)
    unfused = SoftwareProfile("unfused", fused_attention=False)
    table, training = PlanTable.from_plans([plan]), Training(architecture(), batch, length)
    everything = length * batch * hidden * (34 + 5 * HEADS * length / hidden) / tensor
    assert layer_activations(table, training, unfused).kept[0] == pytest.approx(everything, rel=1e-12)
    # Selective recomputation leaves out the second term (equation 6), full recomputation keeps the input: 2 s b h.
    selective = PlanTable.from_plans([replace(plan, recomputation="selective")])
    assert layer_activations(selective, training, unfused).kept[0] == pytest.approx(
        length * batch * hidden * 34 / tensor
    )
    full = PlanTable.from_plans([replace(plan, recomputation="full")])
    assert layer_activations(full, training, unfused).kept[0] == pytest.approx(length * batch * hidden * 2 / tensor)


@pytest.mark.parametrize("software", [MOREH, TRANSFORMERS, TRANSFORMERS_AUTOCAST], ids=lambda i: i.name)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_more_recomputation_needs_less_memory(family, software):
    totals = [
        memory_of(Plan((8,), micro_batch_size=4, recomputation=recomputation), software, family).total[0, 0]
        for recomputation in ("none", "selective", "full")
    ]
    assert totals[0] > totals[1] > totals[2]


@pytest.mark.parametrize("software", [MOREH, TRANSFORMERS], ids=lambda i: i.name)
@pytest.mark.parametrize(
    ("sharding", "sharded"),
    [
        ("none", ()),
        ("optimizer", ("optimizer",)),
        ("gradients", ("optimizer", "gradients")),
        ("parameters", ("optimizer", "gradients", "parameters")),
    ],
)
def test_sharding_splits_the_states_that_it_names(sharding, sharded, software):
    """As figure 1 of https://arxiv.org/abs/1910.02054, over data-parallel and context-parallel ranks."""
    alone = memory_of(Plan((8,), micro_batches=2), replace(software, weight_copy_bytes=0))
    plan = Plan((8,), data=2, context=2, micro_batches=2, sharding=sharding)
    split = memory_of(plan, replace(software, weight_copy_bytes=0))
    for name in ("parameters", "gradients", "optimizer"):
        shards = 4 if name in sharded else 1
        # A tied matrix has a second gradient, which is not sharded, in the backward passes of TRANSFORMERS.
        slack = 256 * 500 * 4 if (name, software) == ("gradients", TRANSFORMERS) else 0
        assert getattr(split, name) * shards == pytest.approx(getattr(alone, name), abs=slack * shards), name


@pytest.mark.parametrize("software", [MOREH, TRANSFORMERS], ids=lambda i: i.name)
def test_first_stage_of_1f1b_holds_a_micro_batch_for_each_stage(software):
    """Section 2.2.1 of https://arxiv.org/abs/2104.04473: rank r of p holds min(m, p - r) micro-batches."""

    def activations(micro_batches):
        return memory_of(Plan((2,) * 4, pipeline=4, micro_batches=micro_batches), software).activations[0]

    one = activations(1)
    for micro_batches in (2, 3, 4, 5, 16):
        held = np.minimum(micro_batches, 4 - np.arange(4))
        if software is MOREH:
            assert activations(micro_batches) == pytest.approx(held * one)
        else:
            # The gradients inside the layer that is computed do not grow with the micro-batches.
            growth = activations(micro_batches) - one
            assert growth[:3] == pytest.approx((held - 1)[:3] * (activations(2) - one)[:3])


def test_parts_of_memory_add_up_and_are_never_negative():
    plans = [
        Plan((2,) * 4, pipeline=4, data=data, micro_batches=4, sharding=sharding, recomputation=recomputation)
        for data in (1, 4)
        for sharding in ("none", "parameters")
        for recomputation in ("none", "full")
    ]
    training = Training(architecture("llama"), 16, 1024)
    for software in (MOREH, TRANSFORMERS, replace(TRANSFORMERS_AUTOCAST, fragmentation=0.1)):
        memory = peak_memory(PlanTable.from_plans(plans), training, software)
        parts = [getattr(memory, field.name) for field in fields(PeakMemory)]
        assert all(part.shape == (len(plans), 4) and (part >= 0).all() for part in parts)
        assert np.sum(parts, axis=0) == pytest.approx(memory.total)
        # The table gives for each plan what it gives for the plan alone.
        for row, plan in enumerate(plans):
            alone = peak_memory(PlanTable.from_plans([plan]), training, software)
            assert alone.total[0] == pytest.approx(memory.total[row])

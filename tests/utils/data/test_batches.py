"""Padded batches: masks and labels that come from lengths, the order of the rows, and the labels that a loss counts."""

import pytest
import torch

from tests.helpers.scripts.tiny_runs import prepare
from utils.config.yaml_file import load_config
from utils.data.batches import collate_padded, evaluation_loader, iter_steps, total_steps, training_loader
from utils.data.labels import count_labels
from utils.errors import UserError

P = 9  # the pad token
# Token ids of a row of at most 5 tokens, and whether comparing ids with the pad token would give another mask.
ROWS = {
    "short": ([1, 2, 3], False),
    "full": ([1, 2, 3, 4, 5], False),
    "one token": ([1], False),
    "pad token inside": ([1, P, 3], True),
    "pad tokens inside": ([1, P, P, 3], True),
    "ends with the pad token": ([1, 2, P], True),
    "ends with the pad token, full": ([1, 2, 3, 4, P], True),
    "ends with the pad token, and inside": ([1, P, 2, P], True),
    "begins with the pad token": ([P, 1, 2, P], True),
}


def row_of(input_ids, prompt_length=0):
    labels = [-100] * prompt_length + input_ids[prompt_length:]
    return {"input_ids": input_ids, "labels": labels, "prompt_length": prompt_length, "location": "x"}


@pytest.mark.parametrize("case", ROWS)
def test_masks_and_labels_come_from_the_length_of_a_row(case):
    input_ids, ids_are_wrong = ROWS[case]
    batch = collate_padded([row_of(input_ids)], P, 5)
    padding = 5 - len(input_ids)
    assert batch["input_ids"].tolist() == [input_ids + [P] * padding]
    assert batch["attention_mask"].tolist() == [[1] * len(input_ids) + [0] * padding]
    assert batch["labels"].tolist() == [input_ids + [-100] * padding]
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}
    # The mask of the platform's tutorial, and of many others: the end of the text then has no label.
    by_ids = (batch["input_ids"] != P).long()
    assert torch.equal(by_ids, batch["attention_mask"]) != ids_are_wrong


def test_rows_of_a_batch_are_independent():
    rows = [row_of(input_ids, len(input_ids) // 2) for input_ids, _ in ROWS.values()]
    batch = collate_padded(rows, P, 5)
    for index, row in enumerate(rows):
        alone = collate_padded([row], P, 5)
        assert all(torch.equal(batch[name][index], alone[name][0]) for name in alone if name != "locations")


def test_label_count_is_what_the_loss_is_the_mean_of(make_gpt2):
    torch.manual_seed(0)
    ids = torch.randint(64, (3, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2, 7:] = -100
    model = make_gpt2()
    log_probs = model(ids).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)[labels[:, 1:] != -100]
    assert count_labels(labels) == len(chosen) == 7 + 11 + 6
    assert torch.allclose(model(ids, labels=labels).loss, -chosen.sum() / count_labels(labels))


def test_batches_come_in_a_fixed_order_whatever_their_size(tiny_config):
    orders = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        config = load_config(str(tiny_config), [f"train.batch_size={batch_size}"])
        data = prepare(config)
        steps = list(iter_steps(training_loader(data, config), accumulation, 6))
        assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
        orders.append([[location for batch in batches for location in batch["locations"]] for _, batches in steps])
    assert orders[0] == orders[1] == orders[2]
    # 32 rows, so the fifth step begins a new epoch.
    assert sorted(location for step in orders[0][:4] for location in step) == sorted(data.train["location"])
    assert orders[0][4] != orders[0][0]


def test_steps_after_a_checkpoint_are_those_of_a_run_that_was_not_stopped(tiny_config):
    config = load_config(str(tiny_config), ["train.batch_size=4"])
    data = prepare(config)

    def steps(start_step):
        loader = training_loader(data, config)
        return [
            (step, [batch["locations"] for batch in batches]) for step, batches in iter_steps(loader, 2, 7, start_step)
        ]

    for start_step in range(7):
        assert steps(start_step) == steps(0)[start_step:]


def test_evaluation_sees_every_row(tiny_config):
    config = load_config(str(tiny_config), ["log.eval_batch_size=3"])
    data = prepare(config)
    batches = list(evaluation_loader(data, config))
    assert [len(batch["locations"]) for batch in batches] == [3, 3, 2]
    assert [location for batch in batches for location in batch["locations"]] == data.evaluation["location"][:]
    assert batches[0]["input_ids"].shape == torch.Size([3, 48])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.warmup_steps=6"], r"train\.warmup_steps is 6, but train\.epochs makes only 5 steps"),
        (
            ["train.warmup_steps=2", "train.schedule=wsd", "train.decay_steps=4"],
            r"warmup_steps is 2 and train\.decay_steps is 4, but train\.epochs makes only 5 steps",
        ),
        (["train.gradient_accumulation=6"], r"1 epoch\(s\) of 5 batches are less than the 6 batches of one step"),
    ],
)
def test_epochs_that_are_too_short_are_refused(tiny_config, overrides, message):
    settings = ["train.epochs=1", "train.steps=null"]
    assert total_steps(range(5), load_config(str(tiny_config), settings)) == 5
    with pytest.raises(UserError, match=message):
        total_steps(range(5), load_config(str(tiny_config), [*settings, *overrides]))

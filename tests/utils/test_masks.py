"""Masks and labels, against rows written out by hand, and against the tutorial's version where that one is wrong."""

import copy

import pytest
import torch

from utils.data.masks import count_labels, create_mask, mask_pads, mask_prompts

P = 9  # the pad token
# Name of the case, ids, mask, and what the tokenizer is like.
CASES = [
    ("right", [1, 2, 3, P, P], [1, 1, 1, 0, 0], {"pad": P, "eos": 5}),
    ("left", [P, P, 1, 2, 3], [0, 0, 1, 1, 1], {"pad": P, "eos": 5, "side": "left"}),
    ("none", [1, 2, 3, 4, 5], [1, 1, 1, 1, 1], {"pad": P, "eos": 5}),
    ("pad inside the text", [1, P, 3, P, P], [1, 1, 1, 0, 0], {"pad": P, "eos": 5}),
    ("pads inside the text", [1, P, P, 3, P], [1, 1, 1, 1, 0], {"pad": P, "eos": 5}),
    ("all padding", [P, P, P, P, P], [0, 0, 0, 0, 0], {"pad": P, "eos": 5}),
    ("pad is id 0", [1, 2, 0, 3, 0], [1, 1, 1, 1, 0], {"pad": 0, "eos": 5}),
    ("end of text is the pad", [1, 2, P, P, P], [1, 1, 1, 0, 0], {"pad": P, "eos": P}),
    ("end of text is the pad, full row", [1, 2, 3, 4, P], [1, 1, 1, 1, 1], {"pad": P, "eos": P}),
    ("end of text is the pad, cut row", [1, 2, 3, 4, 5], [1, 1, 1, 1, 1], {"pad": P, "eos": P}),
    ("end of text is the pad and inside", [1, P, 2, P, P], [1, 1, 1, 1, 0], {"pad": P, "eos": P}),
    ("end of text is the pad, left", [P, P, 1, 2, P], [0, 0, 1, 1, 1], {"pad": P, "eos": P, "side": "left"}),
    ("no pad token", [1, 2, P, P, P], [1, 1, 1, 0, 0], {"pad": None, "eos": P}),
    ("begin of text is the pad", [P, 1, 2, P, P], [1, 1, 1, 1, 0], {"pad": P, "eos": P, "bos": P}),
    (
        "begin of text is the pad, left",
        [P, P, 1, 2, P],
        [0, 0, 1, 1, 1],
        {"pad": P, "eos": P, "bos": P, "side": "left"},
    ),
    ("all padding, end of text is the pad", [P, P, P, P, P], [0, 0, 0, 0, 0], {"pad": P, "eos": P, "bos": P}),
]
# Where comparing ids gives another mask.
TUTORIAL_IS_WRONG = {
    "pad inside the text",
    "pads inside the text",
    "pad is id 0",
    "end of text is the pad",
    "end of text is the pad, full row",
    "end of text is the pad and inside",
    "end of text is the pad, left",
    "no pad token",
    "begin of text is the pad",
    "begin of text is the pad, left",
}


def tutorial_create_mask(input_ids, tokenizer):
    pad_token_ids = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return (input_ids != pad_token_ids).long()


@pytest.mark.parametrize(("name", "ids", "mask", "tokenizer"), CASES)
def test_mask(name, ids, mask, tokenizer, fake_tokenizer):
    tokenizer = fake_tokenizer(**tokenizer)
    found = create_mask(torch.tensor([ids]), tokenizer)
    assert found.tolist() == [mask]
    assert found.dtype == torch.int64
    tutorial = tutorial_create_mask(torch.tensor([ids]), tokenizer)
    assert (tutorial.tolist() != [mask]) == (name in TUTORIAL_IS_WRONG)


def test_rows_of_a_batch_are_independent(fake_tokenizer):
    right = [(ids, mask) for _, ids, mask, like in CASES if like == {"pad": P, "eos": P}]
    ids, masks = torch.tensor([i for i, _ in right]), [m for _, m in right]
    assert create_mask(ids, fake_tokenizer(P, P)).tolist() == masks


def test_labels_are_the_ids_of_the_text(fake_tokenizer):
    ids = torch.tensor([[1, 2, P, P, P], [1, P, 3, 4, P]])
    before = copy.deepcopy(ids)
    assert mask_pads(ids, fake_tokenizer(P, P)).tolist() == [[1, 2, P, -100, -100], [1, P, 3, 4, P]]
    assert mask_pads(ids, fake_tokenizer(P, P), ignore_index=-1).tolist()[0] == [1, 2, P, -1, -1]
    assert torch.equal(ids, before)


def test_the_end_of_text_keeps_its_label_so_the_model_learns_to_stop(fake_tokenizer):
    labels = mask_pads(torch.tensor([[1, 2, 3, P, P, P]]), fake_tokenizer(P, P))
    assert P in labels
    tutorial = torch.tensor([[1, 2, 3, P, P, P]])
    tutorial[tutorial_create_mask(tutorial, fake_tokenizer(P, P)) == 0] = -100
    assert P not in tutorial  # the mistake that this guards against


@pytest.mark.parametrize(("side", "row"), [("right", [1, 2, 3, 4, P, P]), ("left", [P, P, 1, 2, 3, 4])])
def test_prompts_have_no_labels(fake_tokenizer, side, row):
    tokenizer = fake_tokenizer(P, 5, side=side)
    ids = torch.tensor([row, row])
    labels = mask_prompts(mask_pads(ids, tokenizer), create_mask(ids, tokenizer), torch.tensor([3, 0]))
    assert [label for label in labels[0].tolist() if label != -100] == [4]
    assert [label for label in labels[1].tolist() if label != -100] == [1, 2, 3, 4]


def test_label_count_is_what_the_loss_is_the_mean_of(make_gpt2):
    torch.manual_seed(0)
    ids = torch.randint(64, (3, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2, 7:] = -100
    model = make_gpt2()
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)[labels[:, 1:] != -100]
    assert count_labels(labels) == len(chosen) == 7 + 11 + 6
    assert torch.allclose(model(ids, labels=labels).loss, -chosen.sum() / count_labels(labels))


@pytest.mark.parametrize(("ids", "tokenizer"), [([[1, 2]], {"pad": None}), ([1, 2], {"pad": 0})])
def test_what_cannot_be_masked_is_refused(ids, tokenizer, fake_tokenizer):
    with pytest.raises(ValueError, match=r"neither a pad token|expected"):
        create_mask(torch.tensor(ids), fake_tokenizer(**tokenizer))

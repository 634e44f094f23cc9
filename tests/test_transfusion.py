"""One loss of words and actions: what each part sees, and what it does not."""

import pytest
import torch
from torch.nn import functional as F

from hf_vla_actions.heads import HeadError, token_loss, transfusion_loss


def batch(n_rows=3, length=7, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_rows, length, vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocabulary, (n_rows, length), generator=generator)
    labels[0, :4] = labels[1, 3:] = -100
    return logits, labels


def by_definition(logits, labels):
    """Token by token, from the definition."""
    losses = [
        -torch.log_softmax(logits[row, place - 1], dim=0)[labels[row, place]]
        for row in range(len(labels))
        for place in range(1, labels.shape[1])
        if labels[row, place] != -100
    ]
    return torch.stack(losses).mean()


def test_the_sum_and_its_parts():
    logits, labels = batch()
    action = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = transfusion_loss(logits, labels, action, weight=5.0)
    torch.testing.assert_close(found.language, by_definition(logits, labels))
    torch.testing.assert_close(found.loss, found.language + 3.5)
    assert found.action is action
    gradients = torch.autograd.grad(found.loss, [logits, action])
    (alone,) = torch.autograd.grad(by_definition(logits, labels), logits)
    torch.testing.assert_close(gradients[0], alone)
    assert gradients[1].item() == 5.0


def test_what_has_no_label_gets_no_gradient_and_may_hold_anything():
    logits, labels = batch()
    with torch.no_grad():
        logits[1, 4] = float("nan")
        logits[:, -1] = float("inf")
    loss = transfusion_loss(logits, labels, torch.zeros(())).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    unlabelled = F.pad(labels[:, 1:], (0, 1), value=-100) == -100
    assert (gradient[unlabelled] == 0).all()
    assert (gradient[~unlabelled] != 0).any(dim=-1).all()


def test_padding_of_the_words_changes_nothing():
    logits, labels = batch()
    padded = transfusion_loss(F.pad(logits, (0, 0, 0, 5)), F.pad(labels, (0, 5), value=-100), torch.ones(()))
    torch.testing.assert_close(padded.loss, transfusion_loss(logits, labels, torch.ones(())).loss)


def test_a_batch_without_words_is_the_actions_alone():
    logits, labels = batch()
    action = torch.tensor(0.5, requires_grad=True)
    found = transfusion_loss(logits, torch.full_like(labels, -100), action, weight=2.0)
    found.loss.backward()
    assert (found.loss.item(), found.language.item(), action.grad.item()) == (1.0, 0.0, 2.0)
    assert logits.grad is None or not logits.grad.any()


def test_split_batches_add_up_to_the_whole_one():
    logits, labels = batch()
    n_tokens = (labels[:, 1:] != -100).sum()
    parts = [token_loss(logits[i : i + 1], labels[i : i + 1], n_tokens=n_tokens) for i in range(3)]
    torch.testing.assert_close(sum(parts), token_loss(logits, labels))


def test_half_precision_is_summed_in_float32():
    logits, labels = batch()
    assert token_loss(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, 6, dtype=torch.int64)}, "labels"),
        ({"labels": torch.full((3, 7), 11)}, r"ids below 11.*\[11\]"),
        ({"labels": torch.full((3, 7), -1)}, "ids below 11"),
        ({"logits": torch.zeros(3, 7)}, "vocabulary"),
        ({"action_loss": torch.zeros(3)}, "scalar"),
        ({"weight": -1.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_shapes_and_labels_that_do_not_fit_raise(change, message):
    logits, labels = batch()
    with pytest.raises(HeadError, match=message):
        transfusion_loss(**{"logits": logits, "labels": labels, "action_loss": torch.zeros(()), **change})

"""A2-A6: losses number for number, gradients, edge rows; the metrics of localisation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification


def test_response_reward_is_mean_or_sum_of_response_tokens(reward_model):
    rewards = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert reward_model.response_reward(rewards, mask, "mean").tolist() == [1.5, 4.0]          # A3
    assert reward_model.response_reward(rewards, mask, "sum").tolist() == [3.0, 12.0]


def test_kept_tokens_are_what_no_operation_touches(reward_model):
    # kitten -> sitting: k/s and e/i replaced, g inserted; kept are i t t and n
    ops = [["replace", 0, 0], ["replace", 4, 4], ["insert", 6, 6]]
    assert reward_model.kept_tokens(ops, 6, 7) == [(1, 1), (2, 2), (3, 3), (5, 5)]             # A4
    assert reward_model.kept_tokens([["delete", 1, 1]], 3, 2) == [(0, 0), (2, 1)]
    assert reward_model.kept_tokens([["replace", 0, 0]], 1, 1) == []


def test_fine_grained_loss_worked_by_hand(reward_model):
    # edited (1, 2), rejected (0, 1, -1), kept: first with first and second with third
    rewards_w, mask_w = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
    rewards_l, mask_l = torch.tensor([[0.0, 1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    kept = [[(0, 0), (2, 1)]]
    margin = 1.5 - 0.0
    preference = -math.log(1 / (1 + math.exp(-2 * margin)))
    consistency = ((1 - 0) ** 2 + (2 - -1) ** 2) / 2
    zero = ((1 ** 2 + 0 ** 2) / 2 + (2 ** 2 + 1 ** 2) / 2) / 2
    loss = reward_model.fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, 2.0, 3.0, 0.0, "mean")
    assert loss.item() == pytest.approx(preference + 3 * consistency)                          # A5
    loss = reward_model.fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, 2.0, 3.0, 5.0, "mean")
    assert loss.item() == pytest.approx(preference + 3 * consistency + 5 * zero)


def test_fine_grained_loss_is_a_mean_over_pairs_each_with_its_own_u0(reward_model):
    torch.manual_seed(0)
    rewards_w, rewards_l = torch.randn(3, 4), torch.randn(3, 5)
    mask_w, mask_l = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    kept = [[(0, 0)], [(0, 0), (1, 2), (4, 3)], []]
    whole = reward_model.fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, 1.5, 2.0, 0.5, "sum")
    each = [reward_model.fine_grained_loss(rewards_w[k:k + 1], mask_w[:1], rewards_l[k:k + 1], mask_l[:1],
                                           kept[k:k + 1], 1.5, 2.0, 0.5, "sum") for k in range(3)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss in each) / 3, rel=1e-5)


def test_without_kept_tokens_a5_is_bradley_terry(reward_model):
    rewards_w, rewards_l, mask = torch.tensor([[0.3, 0.1]]), torch.tensor([[0.2, -0.4]]), torch.ones(1, 2).bool()
    loss = reward_model.fine_grained_loss(rewards_w, mask, rewards_l, mask, [[]], 1.0, 7.0, 7.0, "mean")
    assert loss.item() == pytest.approx(-F.logsigmoid(torch.tensor(0.2 - -0.1)).item())


def test_signs_of_the_gradient_of_a5(reward_model):
    """Edited tokens rise, original tokens fall; beta pulls a kept pair together; zero pulls it to zero."""
    rewards_w = torch.tensor([[0.5, 0.0]], requires_grad=True)
    rewards_l = torch.tensor([[0.1, 0.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = reward_model.fine_grained_loss(rewards_w, mask, rewards_l, mask, [[(0, 0)]], 1.0, 0.0, 0.0, "sum")
    grad_w, grad_l = torch.autograd.grad(loss, (rewards_w, rewards_l))
    assert grad_w[0, 1] < 0 < grad_l[0, 1]
    loss = reward_model.fine_grained_loss(rewards_w, mask, rewards_l, mask, [[(0, 0)]], 0.0, 1.0, 0.0, "sum")
    grad_w, grad_l = torch.autograd.grad(loss, (rewards_w, rewards_l))
    assert grad_w[0].tolist() == pytest.approx([0.8, 0.0])            # 2 (0.5 - 0.1)
    assert grad_l[0].tolist() == pytest.approx([-0.8, 0.0])
    loss = reward_model.fine_grained_loss(rewards_w, mask, rewards_l, mask, [[(0, 0)]], 0.0, 0.0, 1.0, "sum")
    grad_w, grad_l = torch.autograd.grad(loss, (rewards_w, rewards_l))
    assert grad_w[0].tolist() == pytest.approx([0.5, 0.0]) and grad_l[0].tolist() == pytest.approx([0.1, 0.0])


def test_sequence_loss(reward_model):
    loss = reward_model.sequence_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))      # A6
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_padding_changes_no_reward(reward_model, tiny_run, kind):
    """The same response alone and beside longer ones, prompt and response, gets the same rewards."""
    auto = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    model = reward_model.open_model(auto, tiny_run / f"reward_{kind}")
    torch.nn.init.normal_(model.score.weight)
    short = {"prompt_ids": [5, 6, 7], "preferred_ids": [8, 9, 2]}
    long = {"prompt_ids": [5] * 9, "preferred_ids": [9] * 11 + [2]}
    alone, _ = reward_model.score(kind, model, [short], "preferred", 0)
    beside, mask = reward_model.score(kind, model, [long, short], "preferred", 0)
    if kind == "token":
        assert mask.sum(1).tolist() == [12, 3]
        assert torch.allclose(alone[0], beside[1, :3], atol=1e-5) and beside[1, 3:].abs().max() == 0
        plain = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 2]])).logits[0, 3:, 0]
        assert torch.allclose(alone[0], plain, atol=1e-5)             # A2: read at the token's own position
    else:
        assert torch.allclose(alone[0], beside[1], atol=1e-5)
        hidden = model.model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 2]])).last_hidden_state[0, -1]
        assert torch.allclose(alone[0], model.score(hidden)[0], atol=1e-5)     # A6: read at the last token


def test_auroc_and_average_precision_by_hand(reward_model):
    # ranked: 3+ 2- 1+ 0-: of four pairs three are in order; precision 1/1 at 3 and 2/3 at 1
    assert reward_model.auroc([3.0, 1.0], [2.0, 0.0]) == 0.75
    assert reward_model.average_precision([3.0, 1.0], [2.0, 0.0]) == pytest.approx((1 + 2 / 3) / 2)
    assert reward_model.auroc([1.0, 1.0], [1.0]) == 0.5               # ties count one half
    assert reward_model.average_precision([1.0], [1.0]) == 0.5        # and stand last
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 40), rng.integers(0, 7, 60)
    pairs = np.sign(positive[:, None] - negative[None]) / 2 + 0.5
    assert reward_model.auroc(positive, negative) == pytest.approx(pairs.mean())


def test_one_optimiser_step_raises_the_edited_token(reward_model, tiny_run):
    """A5 learns: after a few steps on one pair the edited token beats the original at the same place."""
    model = reward_model.open_reward_model("token", tiny_run / "policy", "float32",
                                           reward_model.open_tokenizer(tiny_run / "policy"))
    row = {"prompt_ids": [5, 6], "edited_ids": [7, 8, 2], "rejected_ids": [7, 9, 2],
           "edit_ops": [["replace", 1, 1]]}
    args = reward_model.Args()
    assert reward_model.score("token", model, [row], "edited", 0)[0].abs().max() == 0         # head of zeros
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        reward_model.pair_loss("token", model, [row], 0, args).backward()
        optimizer.step()
    edited = reward_model.score("token", model, [row], "edited", 0)[0][0]
    rejected = reward_model.score("token", model, [row], "rejected", 0)[0][0]
    assert edited[1] > rejected[1]
    assert edited[0].item() == pytest.approx(rejected[0].item(), abs=1e-5)     # causal: same prefix, same reward

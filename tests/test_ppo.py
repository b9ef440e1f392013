"""A7-A9: hand-worked numbers, quadratic-time references, gradients, padding, the start of PPO."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification


def full(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def test_gae_over_three_tokens_by_hand(ppo):
    # gamma 0.5, lambda 0.5, rewards 1 0 2, values 1 2 3:
    # delta3 = 2 - 3 = -1; delta2 = 0 + 1.5 - 2 = -0.5; delta1 = 1 + 1 - 1 = 1
    # A3 = -1; A2 = -0.5 - 0.25 = -0.75; A1 = 1 - 0.1875 = 0.8125
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    advantages, returns = ppo.gae(rewards, values, full(1, 3), 0.5, 0.5)                       # A8
    assert advantages[0].tolist() == pytest.approx([0.8125, -0.75, -1.0])
    assert returns[0].tolist() == pytest.approx([1.8125, 1.25, 2.0])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (0.7, 0.0), (1.0, 1.0)])
def test_gae_equals_the_double_sum(ppo, gamma, lam):
    torch.manual_seed(1)
    lengths, T = [5, 1, 3], 5
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(3, T) * mask, torch.randn(3, T) * mask
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        for t in range(length):
            total = 0.0
            for l in range(length - t):
                following = values[row, t + l + 1].item() if t + l + 1 < length else 0.0
                delta = rewards[row, t + l].item() + gamma * following - values[row, t + l].item()
                total += (gamma * lam) ** l * delta
            assert advantages[row, t].item() == pytest.approx(total, abs=1e-5)
    assert (advantages * ~mask).abs().max() == 0 and (returns * ~mask).abs().max() == 0


def test_gae_with_gamma_and_lambda_one_is_reward_to_go_minus_value(ppo):
    rewards, values = torch.randn(2, 4), torch.randn(2, 4)
    advantages, returns = ppo.gae(rewards, values, full(2, 4), 1.0, 1.0)
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-5)


def test_kl_reward_by_hand(ppo):
    scores, old, ref = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    rewards = ppo.kl_rewards(scores, old.requires_grad_(), ref, 0.1)                           # A7
    assert rewards[0].tolist() == pytest.approx([1 - 0.05, 0.1])
    assert not rewards.requires_grad                                  # detached: it lives in the reward


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.1, 1.0, -1.1, -1.1),        # inside: d(-rho A)/d logprob = -rho A
    (1.5, 1.0, -1.2, 0.0),         # above and good: clipped, no gradient
    (0.5, 1.0, -0.5, -0.5),        # below and good: the minimum keeps rho A
    (1.5, -1.0, 1.5, 1.5),         # above and bad: the minimum keeps rho A
    (0.5, -1.0, 0.8, 0.0),         # below and bad: clipped, no gradient
])
def test_policy_loss_on_each_side_of_the_clip(ppo, ratio, advantage, loss, gradient):
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    value = ppo.policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), full(1, 1), 0.2)   # A9
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value, logprobs)[0].item() == pytest.approx(gradient)


def test_policy_loss_counts_tokens_not_responses(ppo):
    """N is the number of response tokens of the minibatch: a long response weighs more, padding nothing."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [5.0, 99.0, 99.0]])
    loss = ppo.policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-(3 * 1.0 + 5.0) / 4)


def test_value_loss_by_hand(ppo):
    # old 0, clip 0.2: V = 1 against return 0.5 gives max(0.25, (0.2 - 0.5)^2) / 2; V = 0.1 is not clipped
    loss = ppo.value_loss(torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]), full(1, 2), 0.2)
    assert loss.item() == pytest.approx((0.25 + 0.16) / 2 / 2)


def test_whitening_ignores_padding(ppo):
    x = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    mask = torch.tensor([[True, True, True, False]])
    white = ppo.masked_whiten(x, mask)
    assert white[0].tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449, 0.0], abs=1e-5)
    assert ppo.masked_mean(x, mask).item() == 2.0


def test_logprob_of_a_token_is_read_one_position_before(ppo, tiny_run):
    """Against F.log_softmax on the bare sequence, without padding, position by position."""
    model = ppo.open_model(AutoModelForCausalLM, tiny_run / "policy")
    prompt, response = [5, 6, 7], [8, 9, 2]
    inputs, mask = ppo.pack([prompt, [4] * 7], [response, [3] * 5], 0, "cpu")
    ours = ppo.token_logprobs(ppo.response_logits(model, inputs, mask), inputs, mask)
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    for t, token in enumerate(response):
        expected = F.log_softmax(logits[len(prompt) + t - 1], dim=-1)[token]
        assert ours[0, t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert ours[0, 3:].abs().max() == 0


def test_value_is_read_before_the_token_and_reward_at_it(ppo, tiny_run):
    model = ppo.open_model(AutoModelForTokenClassification, tiny_run / "reward_token")
    torch.nn.init.normal_(model.score.weight)
    inputs, mask = ppo.pack([[5, 6, 7]], [[8, 9, 2]], 0, "cpu")
    outputs = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 2]])).logits[0, :, 0]
    assert torch.allclose(ppo.token_values(model, inputs, mask)[0], outputs[2:5], atol=1e-5)
    assert torch.allclose(ppo.token_rewards(model, inputs, mask)[0], outputs[3:6], atol=1e-5)


def test_sequence_score_sits_on_the_end_token_alone(ppo, monkeypatch):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    monkeypatch.setattr(ppo, "sequence_reward", lambda model, inputs: torch.tensor([5.0, 3.0]))
    scores = ppo.scores_of("sequence", None, {}, mask, {"mean": 1.0, "std": 2.0})
    assert scores.tolist() == [[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]
    monkeypatch.setattr(ppo, "token_rewards", lambda model, inputs, mask: torch.tensor([[2.0, 4.0, 6.0]]))
    assert ppo.scores_of("token", None, {}, mask[:1], {"mean": 1.0, "std": 2.0}).tolist() == [[1.0, 2.0, 3.0]]


def test_a_reward_on_one_token_raises_that_token_and_with_lambda_zero_only_that(ppo, tiny_run):
    model = ppo.open_model(AutoModelForCausalLM, tiny_run / "policy")
    inputs, mask = ppo.pack([[5, 6]], [[7, 8, 9, 2]], 0, "cpu")
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    advantages, _ = ppo.gae(rewards, torch.zeros(1, 4), mask, 1.0, 0.0)
    logits = ppo.response_logits(model, inputs, mask)
    logits.retain_grad()
    logprobs = ppo.token_logprobs(logits, inputs, mask)
    ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2).backward()
    assert logits.grad[0, 1, 8] < 0                                   # descent raises the rewarded token
    assert (logits.grad[0, 1, :8] >= 0).all() and (logits.grad[0, 1, 9:] >= 0).all()
    assert logits.grad[0, [0, 2, 3]].abs().max() == 0                 # lambda = 0: no other token moves


def test_packing_marks_exactly_the_response_tokens(ppo):
    inputs, mask = ppo.pack([[5, 6, 7], [5]], [[2], [8, 9, 2]], 0, "cpu")
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 2, 0, 0], [0, 0, 5, 8, 9, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert inputs["position_ids"][0, :4].tolist() == [0, 1, 2, 3]
    assert inputs["position_ids"][1, 2:].tolist() == [0, 1, 2, 3]
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_extra_padding_changes_neither_loss_nor_statistics(ppo, tiny_run):
    """A rollout batch packed with one much longer row: the short rows keep log-probs, values and advantages."""
    policy = ppo.open_model(AutoModelForCausalLM, tiny_run / "policy")
    value = ppo.open_model(AutoModelForTokenClassification, tiny_run / "reward_token")
    prompts, responses = [[5, 6], [7, 8, 9]], [[8, 9, 2], [4, 2]]
    results = []
    for more in ([], [3] * 20):
        extra = [more] if more else []
        inputs, mask = ppo.pack(prompts + extra, responses + extra, 0, "cpu")
        logprobs = ppo.token_logprobs(ppo.response_logits(policy, inputs, mask), inputs, mask)
        values = ppo.token_values(value, inputs, mask)
        advantages, returns = ppo.gae(logprobs, values, mask, 1.0, 0.95)
        rows = slice(0, 2)
        loss = ppo.policy_loss(logprobs[rows], logprobs[rows] - 0.1, advantages[rows], mask[rows], 0.2)
        results.append((loss.item(), ppo.value_loss(values[rows], values[rows] + 1, returns[rows], mask[rows], 0.2).item()))
    assert results[0] == pytest.approx(results[1], abs=1e-5)


def test_samples_stop_at_the_end_token_and_follow_the_policy(ppo, tiny_run):
    """Pure sampling: the frequency of the first token is its probability, whatever the checkpoint's settings say."""
    policy = ppo.open_model(AutoModelForCausalLM, tiny_run / "policy")
    tokenizer = ppo.open_tokenizer(tiny_run / "policy")
    policy.generation_config.top_k, policy.generation_config.temperature = 1, 0.1
    prompt = tokenizer("Q: What do Ada and Bob send to Cleo, and where?\nA:").input_ids
    responses = ppo.sample(policy, [prompt] * 2000, tokenizer, 2, temperature=2.0)
    assert all(len(r) == 2 or r[-1] == tokenizer.eos_token_id for r in responses)
    counts = torch.bincount(torch.tensor([r[0] for r in responses]), minlength=len(tokenizer)) / 2000
    probs = torch.softmax(policy(input_ids=torch.tensor([prompt])).logits[0, -1] / 2.0, dim=-1)
    assert (counts - probs).abs().max() < 0.05


@pytest.mark.parametrize("target_kl, expected", [(None, 6), (1e-7, 2)])
def test_an_update_takes_all_minibatches_or_stops_on_kl(ppo, tiny_run, target_kl, expected):
    """Three epochs of two minibatches, the short one included; the KL of the first is 0, the second stops it."""
    models = {"policy": ppo.open_model(AutoModelForCausalLM, tiny_run / "policy"),
              "value": ppo.open_model(AutoModelForTokenClassification, tiny_run / "reward_token")}
    inputs, mask = ppo.pack([[5, 6]] * 3, [[7, 8, 2], [9, 2], [4, 2]], 0, "cpu")
    with torch.no_grad():
        logprobs = ppo.token_logprobs(ppo.response_logits(models["policy"], inputs, mask), inputs, mask)
    batch = {"mask": mask, "old_logprobs": logprobs, "advantages": torch.randn(3, 3), "old_values": mask * 0.0,
             "returns": torch.randn(3, 3)}
    optimizer = ppo.Optimizer((models["policy"], 0.1), (models["value"], 0.1))
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    args = ppo.Args(ppo_epochs=3, minibatch=2, target_kl=target_kl)
    ppo.update(models, optimizer, inputs, batch, args, 1)
    assert len(steps) == expected

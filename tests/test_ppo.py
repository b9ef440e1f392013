"""Stage 3 in the order of its script: the equations A7 to A9, B3 to B6 and C1 by hand; a rollout
and PPO's loop; sampling; the off-line methods (B7, B8, C1, C2); what stands below the line."""

import csv
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import judge_by_the_end, rows_of, three, two
from torch import tensor
from transformers import LlamaConfig, LlamaForCausalLM


END = 2
CONFIG = LlamaConfig(
    vocab_size=12, pad_token_id=0, eos_token_id=END, max_position_embeddings=24,
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.4,  # large: a wrong position or mask shows
)


@pytest.fixture
def policy():
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture
def job_of(tiny_run, tokenizer):
    """A method's job on the tiny run, and its flags. Learning rates are 0: the models stay."""
    def open_job(method, **flags):
        stay = {"lr": 0.0, "value_lr": 0.0}
        defaults = {"run": str(tiny_run), "device": "cpu", "max_new_tokens": 24} | stay
        args = three.Args(**(defaults | flags))
        return three.open_job(method, [], {}, tokenizer, args), args
    return open_job


@pytest.fixture
def sft(job_of):
    """The tiny run's policy, with which every job begins."""
    job, _ = job_of("rlmec")
    return job.models["policy"]


def plain_logprobs(model, prompt, response, temperature=1.0):
    """log pi(a_t | s_t) of one row, without padding."""
    ids = tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1:-1].detach()
    logprobs = (logits / temperature).log_softmax(dim=-1)
    return logprobs[range(len(response)), response]


def close(x, numbers):
    """Whether a tensor (or a number) is this list (or number) but for rounding."""
    x = torch.as_tensor(x).tolist()
    return x == pytest.approx(numbers, rel=1e-5, abs=1e-5)


def assert_same(a, b):
    """Two gradients are equal but for rounding, and are no zeros."""
    assert a.norm() > 0
    assert (a - b).norm() < 1e-5 * a.norm()


# --- What is read from a model: the index convention ---

class Positions:
    """A dummy model: what it says of a token is the token's position; of padding, 99."""
    config = SimpleNamespace(pad_token_id=0)
    device = "cpu"

    def __call__(self, position_ids, attention_mask, **_):
        says = torch.where(attention_mask == 1, position_ids, 99)
        says = says[:, :, None].float()
        return SimpleNamespace(logits=says, hidden_states=[says])

    def score(self, hidden):
        return hidden


@pytest.fixture
def packed():
    """The inputs and the mask of two rows; the second response is a token that is also padding.
        tokens      5  6  7 |8  9  2          .  5  6 |0  .  .
        positions   0  1  2  3  4  5             0  1  2        """
    prompts = [[5, 6, 7], [5, 6]]
    responses = [[8, 9, END], [0]]
    return three.pack(prompts, responses, Positions)


def test_a_value_is_read_one_place_before_its_token(packed):
    values = three.token_values(Positions(), *packed)
    assert values.tolist() == [[2, 3, 4], [1, 0, 0]]


# --- A7: rewards ---

SCALE = {"mean": 1.0, "std": 2.0}


@pytest.mark.parametrize("kind", ["token", "token_sibling"])
def test_token_scores_are_divided_by_the_deviation_and_not_centred(packed, kind):
    scores = three.scores_of(Positions(), *packed, kind, SCALE)
    assert scores.tolist() == [[3 / 2, 4 / 2, 5 / 2], [2 / 2, 0, 0]]


@pytest.mark.parametrize("kind", ["sequence", "sequence_edit"])
def test_the_sequence_score_is_centred_and_stands_on_the_last_token_alone(packed, kind):
    scores = three.scores_of(Positions(), *packed, kind, SCALE)
    assert scores.tolist() == [[0, 0, (5 - 1) / 2], [(2 - 1) / 2, 0, 0]]


def test_rewards_that_do_not_vary_are_not_divided(job_of, run):
    path = run / "reward_metrics.json"
    scores = []
    for std in (0.0, 1.0):
        path.write_text(json.dumps({"token": {"scale": {"mean": 0.0, "std": std}}}))
        job, args = job_of("ppo_token", run=str(run), updates=1, rollout_batch=4)
        three.train_ppo(job, rows_of(run / "problems.jsonl"), args)
        scores.append(job.log[0]["score"])
    assert scores[0] == scores[1] != 0


@pytest.fixture
def cross(run):
    """A run with the two reward models of `--kind cross`: here copies of the others."""
    shutil.copytree(run / "reward_token", run / "reward_token_sibling")
    shutil.copytree(run / "reward_sequence", run / "reward_sequence_edit")
    return run


def test_each_ppo_has_the_scale_of_its_own_reward_model(cross, job_of):
    # the models are the same, the responses too; the scores are divided by 1, by 4
    (cross / "reward_metrics.json").write_text(json.dumps({
        "token": {"scale": {"mean": 0.0, "std": 1.0}},
        "token_sibling": {"scale": {"mean": 0.0, "std": 4.0}},
    }))
    scores = []
    for method in ("ppo_token", "ppo_token_sibling"):
        job, args = job_of(method, run=str(cross), updates=1, rollout_batch=4)
        three.train_ppo(job, rows_of(cross / "problems.jsonl"), args)
        scores.append(job.log[0]["score"])
    assert close(scores[0], 4 * scores[1])
    assert scores[0] != 0


def test_the_kl_penalty_is_subtracted_token_by_token_and_has_no_gradient():
    # 1 - 0.1 (-1.0 + 1.5) = 0.95 and 0 - 0.1 (-2.0 + 1.0) = 0.1
    scores = tensor([1.0, 0.0])
    old_logprobs = tensor([-1.0, -2.0], requires_grad=True)
    ref_logprobs = tensor([-1.5, -1.0])
    rewards = three.kl_rewards(scores, old_logprobs, ref_logprobs, kappa=0.1)
    assert close(rewards, [0.95, 0.1])
    assert not rewards.requires_grad


# --- A8: advantages ---

def test_gae_over_three_tokens_and_over_one_by_hand():
    rewards = tensor([
        [1.0, 0.0, 2.0],
        [3.0, 0.0, 0.0],  # the second row has one token, and padding
    ])
    values = tensor([
        [0.5, 1.0, -0.5],
        [1.0, 0.0, 0.0],
    ])
    # delta_3 = 2 + 0 - (-0.5) =  2.5      A_3 =  2.5
    # delta_2 = 0 - 0.5 - 1.0  = -1.5      A_2 = -1.5 + 0.5 * 2.5     = -0.25
    # delta_1 = 1 + 1.0 - 0.5  =  1.5      A_1 =  1.5 + 0.5 * (-0.25) =  1.375
    # delta_1 of the second row = 3 + 0 - 1 = A_1
    advantages, returns = three.gae(rewards, values, lam=0.5)
    assert advantages.tolist() == [
        [1.375, -0.25, 2.5],
        [2, 0, 0],
    ]
    assert returns.tolist() == [
        [1.375 + 0.5, -0.25 + 1, 2.5 - 0.5],
        [2 + 1, 0, 0],
    ]


def test_gae_discounts_the_next_value_and_the_next_advantage():
    # gamma = 0.5, lambda = 0.5: delta_2 = 3 - 2 = 1 and delta_1 = 0 + 0.5 * 2 - 0 = 1,
    # so that A_2 = 1 and A_1 = 1 + 0.5 * 0.5 * 1
    rewards = tensor([[0.0, 3.0]])
    values = tensor([[0.0, 2.0]])
    advantages, _ = three.gae(rewards, values, lam=0.5, gamma=0.5)
    assert advantages.tolist() == [[1.25, 1]]


# --- A9: the losses of PPO ---

FIRST = tensor([True, False])  # two tokens, the second of which is padding


def test_whitening_takes_mean_and_deviation_of_the_masked_tokens():
    # 1 2 3: mean 2, variance (1 + 0 + 1) / 3, so that 3 becomes 1 / sqrt(2/3) = sqrt(1.5)
    mask = tensor([True, True, True, False])
    white = three.masked_whiten(tensor([1.0, 2.0, 3.0, 99.0]), mask)
    assert close(white, [-math.sqrt(1.5), 0, math.sqrt(1.5), 0])


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    pytest.param(1.1, 1.0, -1.1, -1.1, id="good, inside the range"),
    pytest.param(1.5, 1.0, -1.2, 0.0, id="good, above: clipped, no gradient"),
    pytest.param(0.5, 1.0, -0.5, -0.5, id="good, below: may come back"),
    pytest.param(1.5, -1.0, 1.5, 1.5, id="bad, above: may come back"),
    pytest.param(0.5, -1.0, 0.8, 0.0, id="bad, below: clipped, no gradient"),
])
def test_policy_loss_on_each_side_of_the_clip(ratio, advantage, loss, gradient):
    logprobs = tensor([ratio, 9.0]).log().requires_grad_()
    advantages = tensor([advantage, 9.0])
    value = three.policy_loss(logprobs, torch.zeros(2), advantages, FIRST, clip=0.2, N=4)
    value.backward()
    assert close(value, loss / 4)
    assert close(logprobs.grad, [gradient / 4, 0])  # the derivative of rho by log pi is rho


def test_a_reward_moves_its_token_and_with_lambda_0_no_other():
    rewards = tensor([[0.0, 3.0, -2.0, 0.0]])
    zeros = torch.zeros(1, 4)
    advantages, _ = three.gae(rewards, zeros, lam=0.0)
    logprobs = torch.zeros(1, 4, requires_grad=True)
    three.policy_loss(logprobs, zeros, advantages, torch.ones(1, 4), 0.2, 4).backward()
    # a step goes against the gradient: it raises what is good, lowers what is bad
    assert logprobs.grad.tolist() == [[0, -3 / 4, 2 / 4, 0]]


@pytest.mark.parametrize("value, target, error", [
    pytest.param(1.1, 1.5, 0.4, id="V moved by 0.1: inside the range"),
    pytest.param(2.0, 1.5, 0.5, id="V moved too far, beyond the return"),
    pytest.param(2.0, 3.0, 1.8, id="the clipped V, 1.2, has the larger error"),
    pytest.param(0.0, -1.0, 1.8, id="clipped on the other side, to 0.8"),
])
def test_value_loss_takes_the_larger_error_of_v_and_of_v_near_the_old_v(value, target, error):
    values = tensor([value, 9.0])
    returns = tensor([target, 0.0])
    loss = three.value_loss(values, torch.ones(2), returns, FIRST, clip=0.2, N=5)
    assert close(loss, 0.5 * error ** 2 / 5)


# --- B3, B5, B6, C1: the losses of the off-line methods ---

@pytest.mark.parametrize("right, rewards", [
    pytest.param(True, [0.4, 0.1, 0, 0], id="right: praised where the rewriter agrees"),
    pytest.param(False, [0, 0, -0.1, -0.05], id="wrong: punished, mildly, where it does not"),
])
def test_generative_rewards_by_hand(right, rewards):
    p = tensor([0.9, 0.6, 0.3, 0.45])
    assert close(three.generative_rewards(p, right), rewards)


@pytest.mark.parametrize("reward, ratio, weight", [
    pytest.param(0.4, 2.0, 1.3 * 0.4, id="good, above: clipped"),
    pytest.param(0.4, 0.5, 0.5 * 0.4, id="good, below"),
    pytest.param(-0.1, 2.0, 2.0 * -0.1, id="bad, above"),
    pytest.param(-0.1, 0.5, 0.7 * -0.1, id="bad, below: clipped"),
])
def test_rlmec_clips_the_weight_and_keeps_the_gradient_of_log_pi(reward, ratio, weight):
    logprobs = tensor([-1.0, -2.0], requires_grad=True)
    old_logprobs = tensor([-1.0 - math.log(ratio), -2.3])
    rewards = tensor([reward, 0.0])  # a token without a reward adds nothing
    loss = three.rlmec_loss(logprobs, old_logprobs, rewards, clip=0.3, N=2)
    loss.backward()
    assert close(loss, -weight * -1.0 / 2)
    assert close(logprobs.grad, [-weight / 2, 0])  # w itself has none


def test_rlmec_loss_is_0_where_no_token_has_a_reward():
    zeros = torch.zeros(2)
    assert three.rlmec_loss(tensor([-1.0, -2.0]), zeros, zeros, clip=0.3, N=0) == 0


@pytest.mark.parametrize("response, rewrite, gamma", [
    pytest.param([4, 5, 6], [4, 5, 6], [0.5, 0.5, 0.5], id="right: its own rewrite"),
    pytest.param([4, 5, 6], [4, 7, 6], [0.5, 1, 0.5], id="replaced"),
    pytest.param([4, 5], [8, 9, 4, 5], [1, 1, 0.5, 0.5], id="inserted"),
    pytest.param([4, 9, 5], [4, 5], [0.5, 0.5], id="deleted: nothing is marked"),
])
def test_imitation_gamma_marks_what_the_rewrite_changes(response, rewrite, gamma):
    assert three.imitation_gamma(response, rewrite).tolist() == gamma


def test_imitation_loss_by_hand():
    # (1 * 1 + 0.5 * 2 + 0.5 * 3 + 0 * 4) / 7
    logprobs = tensor([[-1.0, -2.0], [-3.0, -4.0]])
    gamma = tensor([[1.0, 0.5], [0.5, 0.0]])
    assert close(three.imitation_loss(logprobs, gamma, M=7), 3.5 / 7)


def test_dpo_loss_by_hand():
    # margins 1 - (-1) = 2 and -1 - 0 = -1, times b = 0.5; -log sigmoid(x) = log(1 + e^-x)
    preferred = tensor([1.0, -1.0])
    rejected = tensor([-1.0, 0.0])
    loss = three.dpo_loss(preferred, rejected, beta=0.5, N=3)
    first = math.log(1 + math.exp(-1))
    second = math.log(1 + math.exp(0.5))
    assert close(loss, (first + second) / 3)


# --- A rollout ---

@pytest.fixture
def rollout(job_of, tiny_run):
    """Seven responses at temperature 0.5, lambda 0; `factor` multiplies the reference's inputs."""
    def sample(kind="token", factor=1.0):
        job, args = job_of(f"ppo_{kind}", temperature=0.5, lam=0.0)
        job.models["reference"].get_input_embeddings().weight.data *= factor
        prompts = three.column(rows_of(tiny_run / "problems.jsonl")[:7], "prompt_ids")
        _, batch, row = three.rollout(kind, job.models, prompts, SCALE, args)
        return batch, row
    return sample


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_at_first_policy_and_reference_agree_and_values_are_0(rollout, kind):
    batch, row = rollout(kind)
    assert row["kl"] == 0
    assert row["reward"] == row["score"] != 0
    assert not batch["values"].any()


def test_advantages_are_whitened_over_the_response_tokens(rollout):
    batch, _ = rollout()
    # V = 0 and lambda = 0: before that they are the rewards, and so are the returns
    white = three.masked_whiten(batch["returns"], batch["mask"])
    assert batch["advantages"].equal(white)
    assert white.any()


def test_reward_is_score_minus_kappa_times_kl(rollout):
    batch, row = rollout(factor=1.5)
    assert row["kl"] > 0.1  # a mean over samples of the policy: positive but for noise
    assert close(row["reward"], row["score"] - 0.1 * row["kl"])
    # returns are rewards, as above: sums over tokens, means over responses
    assert close(row["reward"], batch["returns"].sum().item() / 7)


def test_length_is_a_mean_over_responses_and_entropy_one_over_tokens(rollout):
    batch, row = rollout()
    tokens = batch["mask"].sum().item()
    assert close(row["length"], tokens / 7)
    assert close(row["entropy"], -batch["logprobs"].sum().item() / tokens)


# --- PPO's loop ---

@pytest.fixture
def update(job_of, packed, monkeypatch):
    """The row of the log of one update of `train_ppo` on a given rollout, of three tokens and of
    one. log pi_old is `shift` below log pi; V is 0, and was `old_values`."""
    inputs, mask = packed
    batch = {
        "mask": mask,
        "returns": tensor([
            [1.0, -1.0, 0.0],
            [3.0, 0.0, 0.0],
        ]),
        "advantages": tensor([
            [1.0, 1.0, 1.0],
            [2.0, 0.0, 0.0],
        ]),
    }

    def run(shift=0.0, old_values=0.0, **flags):
        job, args = job_of("ppo_token", updates=1, rollout_batch=2, **flags)
        logprobs = three.response_logprobs(job.models["policy"], inputs, mask).detach()
        batch["logprobs"] = logprobs - shift * mask
        batch["values"] = old_values * mask
        monkeypatch.setattr(three, "rollout", lambda *_, **__: (inputs, batch, {}))
        three.train_ppo(job, [{"prompt_ids": [5]}], args)
        return job.log[0]
    return run


@pytest.mark.parametrize("micro_batch", [32, 1])
def test_losses_are_divided_by_the_tokens_of_the_whole_minibatch(update, micro_batch):
    row = update(micro_batch=micro_batch)
    # rho is 1: -(1 + 1 + 1 + 2) / 4; V is 0: (1 + 1 + 0 + 9) / (2 * 4)
    assert close(row["policy_loss"], -5 / 4)
    assert close(row["value_loss"], 11 / 8)


def test_the_values_of_the_rollout_are_those_that_v_is_clipped_around(update):
    # V is 0, was 0.5, is clipped to 0.3: the larger errors are 1, -1.3, 0.3, 3
    row = update(old_values=0.5)
    assert close(row["value_loss"], (1 + 1.3 ** 2 + 0.3 ** 2 + 9) / 8)


def test_in_every_step_micro_batches_add_up_to_the_gradient(update, grads):
    update(ppo_epochs=1)
    update(ppo_epochs=2, micro_batch=1)
    policy, value, *others = grads
    for k in (0, 2):  # the epochs: nothing has moved, and no step leaves a gradient behind
        assert_same(policy, others[k])
        assert_same(value, others[k + 1])


@pytest.mark.parametrize("shift, flags, clipfrac, loss", [
    pytest.param(0.25, {}, 1, 1.2 * -5 / 4, id="rho, 1.28, is outside 1.2"),
    pytest.param(-0.25, {}, 1, math.exp(-0.25) * -5 / 4, id="0.78 is outside 0.8, and good"),
    pytest.param(0.25, {"clip": 0.3}, 0, math.exp(0.25) * -5 / 4, id="1.28 is inside --clip 0.3"),
])
def test_ppo_clips_at_0_2_or_at_the_flag(update, shift, flags, clipfrac, loss):
    row = update(shift, **flags)
    assert row["clipfrac"] == clipfrac
    assert close(row["policy_loss"], loss)


def test_approx_kl_is_the_mean_of_rho_minus_1_minus_log_rho(update):
    row = update(0.25, micro_batch=1)
    assert close(row["approx_kl"], math.exp(0.25) - 1 - 0.25)


@pytest.fixture
def ppo(job_of, tiny_run):
    """The row of the log of a real update of seven responses, after which the models are as they
    were."""
    def run(**flags):
        job, args = job_of("ppo_token", updates=1, rollout_batch=7, **flags)
        three.train_ppo(job, rows_of(tiny_run / "problems.jsonl"), args)
        return job.log[0]
    return run


def test_the_first_step_of_an_update_has_ratio_1(ppo):
    row = ppo(temperature=0.5)
    assert abs(row["approx_kl"]) < 1e-7
    assert row["clipfrac"] == 0


def test_each_epoch_takes_each_row_once(ppo, grads):
    ppo(max_new_tokens=1, minibatch=7, ppo_epochs=1)
    ppo(max_new_tokens=1, minibatch=3, ppo_epochs=2)
    # responses of one token: a minibatch's gradient is the mean of its rows' gradients
    whole, *parts = grads[::2]  # those of the policy
    for a, b, c in (parts[:3], parts[3:]):
        assert_same(7 * whole, 3 * a + 3 * b + 1 * c)


# --- Sampling ---

def surprise(tokens, policy, context, temperature):
    """How far tokens are from the policy's behind a context: chi squared, in its deviations."""
    logits = policy(tensor([context])).logits[0, -1].detach()
    expected = (logits / temperature).softmax(dim=-1) * len(tokens)
    seen = torch.bincount(tensor(tokens), minlength=12)
    chi2 = ((seen - expected) ** 2 / expected).sum()
    return (chi2 - 11) / math.sqrt(2 * 11)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_policy(policy, temperature):
    prompts = [[5, 6], [4, 9, 3, 7, 8]] * 2000  # the short ones are padded, and looked at
    args = three.Args(device="cpu", max_new_tokens=2)
    rows = three.sample(policy, prompts, args, temperature)[::2]
    first = [row[0] for row in rows]
    assert surprise(first, policy, [5, 6], temperature) < 4

    # the second token behind a frequent first one
    seen = Counter(token for token in first if token != END)
    token = seen.most_common(2)[1][0]
    second = [row[1] for row in rows if row[0] == token]
    assert surprise(second, policy, [5, 6, token], temperature) < 4
    assert surprise(second, policy, [5, 6], temperature) > 10


@pytest.mark.parametrize("micro_batch", [256, 1])  # 1: parts of eight rows
def test_likeliest_samples_are_those_of_generate_without_a_cache(policy, micro_batch):
    expected = []
    prompts = []
    for k in range(18):
        prompt = [3 + k // 2, 4 + 3 * (k % 2)] * (1 + k // 2 % 3)
        ids = policy.generate(
            tensor([prompt]), max_new_tokens=9, do_sample=False, use_cache=False)
        expected.append(ids[0, len(prompt):].tolist())
        prompts.append(prompt)

    args = three.Args(device="cpu", max_new_tokens=9, micro_batch=micro_batch)
    assert three.sample(policy, prompts, args, temperature=0.0) == expected
    assert len({len(response) for response in expected}) > 2  # they end at several times


def test_each_of_several_end_tokens_ends_a_sample(policy, monkeypatch):
    monkeypatch.setattr(policy.config, "eos_token_id", [END, 7])
    args = three.Args(device="cpu", max_new_tokens=12)
    last = set()
    for response in three.sample(policy, [[5, 6], [4, 9, 3]] * 50, args, 1.0):
        assert not {END, 7} & {*response[:-1]}
        if len(response) < 12:
            last.add(response[-1])
    assert last == {END, 7}


@pytest.fixture
def long_samples(policy):
    """Prompts of several lengths and their responses, with more room than the context has."""
    prompts = [[5, 6], [4, 9, 3, 7, 8], [3] * 20] * 20
    args = three.Args(device="cpu", micro_batch=3, max_new_tokens=48)
    return prompts, three.sample(policy, prompts, args, 1.0)


def test_a_response_keeps_its_end_token_or_fills_the_context(long_samples):
    prompts, responses = long_samples
    ended = 0
    for prompt, response in zip(prompts, responses):
        assert END not in response[:-1]
        if response[-1] == END:
            ended += 1
        else:
            assert len(prompt + response) == 24
    assert 0 < ended < 60


def test_forward_all_reads_long_and_short_rows_in_their_order(policy, long_samples):
    prompts, responses = long_samples
    args = three.Args(device="cpu", micro_batch=25)
    rows = three.forward_all(three.response_logprobs, policy, prompts, responses, args, 0.5)
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        plain = plain_logprobs(policy, prompt, response, 0.5).tolist()
        padding = [0] * (len(row) - len(response))
        assert close(row, plain + padding)


# --- B3, B4, B8, C1: what the off-line methods learn from ---

RIGHT = " One makes jam. The other makes tea. The friend lives in Rome.</s>"
WRONG = " One makes jam. The other makes tea. The friend in Oslo.</s>"
LAST = " The friend lives in Rome.</s>"


@pytest.fixture
def b8(sft, tiny_run, tokenizer, monkeypatch):
    """`draw_samples` and `collect` on two problems whose solution is RIGHT, where each call of
    `sample` gives the next list of texts, and `asked` keeps its prompts."""
    args = three.Args(run=str(tiny_run), device="cpu", temperature=0.7)
    ids = lambda text: three.ids_of(text, tokenizer)
    problem = {
        "prompt_ids": ids("Q:"),
        "solution_ids": ids(RIGHT),
        "solutions": [RIGHT[:-4]],
    }
    problems = [problem, problem | {"prompt_ids": ids("A:")}]
    asked = []

    def collect(*answers):
        answers = iter(answers)

        def sample(model, prompts, *_, **__):
            asked.append(tokenizer.decode(prompts))
            return [ids(text) for text in next(answers)]

        monkeypatch.setattr(three, "sample", sample)
        samples = three.draw_samples(sft, problems, tokenizer, args)
        return three.collect(sft, samples, tokenizer, args)

    return SimpleNamespace(collect=collect, asked=asked, ids=ids, problems=problems)


def test_a_right_sample_is_its_own_rewrite_and_a_wrong_one_keeps_its_right_steps(b8):
    right, wrong = b8.collect([WRONG, RIGHT], ["[3]</s>"], [LAST])
    assert right["response_ids"] == b8.ids(RIGHT)
    assert right["rewrite_ids"] == b8.ids(RIGHT)
    assert wrong["response_ids"] == b8.ids(WRONG)
    assert wrong["rewrite_ids"] == b8.ids(RIGHT)


def test_the_grm_goes_on_behind_the_steps_before_the_one_that_it_names(b8):
    b8.collect([WRONG, RIGHT], ["[3]</s>"], [LAST])
    [locate], [rewrite] = b8.asked[1:]
    assert locate.startswith("Q:\nReference solution:\n[1] One makes jam.[2] The other")
    assert locate.endswith("[3] The friend in Oslo.\nFirst wrong step:\n")
    assert rewrite.startswith("Q:\nReference solution:\n One makes jam.")
    assert rewrite.endswith("\nCorrected attempt:\n One makes jam. The other makes tea.")


def test_gamma_marks_what_the_rewrite_has_inserted_and_replaced(b8):
    _, row = b8.collect([WRONG, RIGHT], ["[3]</s>"], [LAST])
    gamma = []
    for token in b8.ids(RIGHT):
        gamma.append(1 if token in b8.ids(" lives Rome") else 0.5)
    assert row["gamma"].tolist() == gamma


def test_the_log_probs_of_the_sampler_are_at_its_temperature(b8, sft):
    right, wrong = b8.collect([WRONG, RIGHT], ["[3]</s>"], [LAST])
    plain = plain_logprobs(sft, b8.ids("A:"), b8.ids(RIGHT), 0.7)
    assert close(right["old_logprobs"], plain.tolist())
    plain = plain_logprobs(sft, b8.ids("Q:"), b8.ids(WRONG), 0.7)
    assert close(wrong["old_logprobs"], plain.tolist())


@pytest.mark.parametrize("label, endings, reason", [
    pytest.param("</s>", [LAST], "the locator names no step", id="no label"),
    pytest.param("[12]</s>", [RIGHT], "the locator names no step", id="no such step"),
    pytest.param("[1][2]</s>", [RIGHT], "the locator names no step", id="two labels"),
    pytest.param("[1]</s>", [LAST], "the rewrite is wrong", id="half a solution"),
    pytest.param("[1]</s>", [RIGHT[:-4]], "the rewrite is wrong", id="without the end token"),
])
def test_a_wrong_sample_is_never_praised(b8, capsys, label, endings, reason):
    [row] = b8.collect([WRONG, RIGHT], [label], endings)
    assert row["response_ids"] == b8.ids(RIGHT)
    assert f"'{reason}': 1" in capsys.readouterr().out


def test_a_sample_that_is_too_long_for_the_grm_is_left_out(b8, capsys):
    b8.problems[0]["prompt_ids"] = b8.ids("Q:") * 120  # of 256 tokens
    [row] = b8.collect([WRONG, RIGHT], [], [])
    assert row["prompt_ids"] == b8.ids("A:")
    assert "GRM's context\": 1" in capsys.readouterr().out


def test_no_usable_sample_is_refused(b8, fails):
    fails("no sample is right, and none was", b8.collect, [WRONG] * 2, ["</s>"] * 2, [])


def test_a_sample_is_a_problem_with_its_response_and_whether_it_is_right(
        sft, tokenizer, monkeypatch):
    wrong = three.ids_of(WRONG, tokenizer)
    right = three.ids_of(RIGHT, tokenizer)
    monkeypatch.setattr(three, "sample", lambda *_, **__: [wrong, right, right[:-1]])
    problem = {"id": "a", "prompt_ids": [5], "solutions": [RIGHT[:-4]]}
    args = three.Args(updates=1, rollout_batch=3)  # of five problems
    samples = three.draw_samples(sft, [problem] * 5, tokenizer, args)
    assert samples == [
        problem | {"response_ids": wrong, "is_right": False},
        problem | {"response_ids": right, "is_right": True},
        problem | {"response_ids": right[:-1], "is_right": False},
    ]


@pytest.mark.parametrize("last", [END, 9])
def test_a_response_that_ends_in_any_end_token_may_be_right(tokenizer, last):
    ids = three.ids_of(RIGHT[:-4], tokenizer)
    problem = {"solutions": [RIGHT[:-4]]}
    assert three.is_right(ids + [last], problem, tokenizer, [END, 9])
    assert not three.is_right(ids, problem, tokenizer, [END, 9])
    assert not three.is_right(ids + [last, 11], problem, tokenizer, [END, 9])


def test_a_response_with_a_right_final_answer_is_right(tokenizer):
    problem = {"right": "Rome[.]$"}
    right = [three.is_right(three.ids_of(text, tokenizer), problem, tokenizer, [END])
             for text in (RIGHT, WRONG)]
    assert right == [True, False]


@pytest.mark.parametrize("is_right", [True, False])
def test_rewards_are_read_from_the_grm_behind_the_rewrite_prompt(policy, is_right):
    grm = LlamaForCausalLM(CONFIG).eval()
    response = [2, 1, 1, 1, 1, 1]
    row = {
        "prompt_ids": [7, 8],
        "rewrite_prompt": [4, 9, 3],
        "response_ids": response,
        "rewrite_ids": [1],
        "is_right": is_right,
    }
    longer = row | {"response_ids": [1] * 9}
    args = three.Args(device="cpu", temperature=0.5)
    rewarded, _ = three.reward_samples([row, longer], policy, grm, args)

    p = plain_logprobs(grm, [4, 9, 3], response).exp()  # at temperature 1
    expected = three.generative_rewards(p, is_right).tolist()  # B3
    assert close(rewarded["rewards"], expected)
    assert len({*expected}) > 2  # not all at the bounds of the clip


@pytest.mark.parametrize("method, name, limit", [
    pytest.param("dpo", "chosen_token_ids", 5, id="dpo: the sibling; of five pairs"),
    pytest.param("dpo_edit", "edited_ids", 999, id="dpo_edit: the edit; of all for training"),
])
def test_dpo_prefers_the_sibling_or_the_edit_in_the_token_models_pairs(
        job_of, tiny_run, method, name, limit):
    job, args = job_of(method, pairs=limit)
    pairs = three.preference_pairs(method, job.models["reference"], tiny_run, args)
    edits = rows_of(tiny_run / "edits.jsonl")
    learnt = [row for row in two.pairs_of("token", edits) if row["split"] == "train"]
    assert len(learnt) > 5
    assert three.column(pairs, "preferred_ids") == three.column(learnt[:limit], name)


@pytest.fixture
def no_edits(run):
    """A run whose preferred responses have no edit, in part since nobody has edited."""
    rows = rows_of(run / "edits.jsonl")
    for row in rows[::2]:
        row["edit_ops"] = []
    for row in rows[1::2]:
        row["edit_ops"] = None
    (run / "edits.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return run


def test_without_edits_dpo_learns_from_all_preferred_siblings(job_of, no_edits):
    job, args = job_of("dpo")
    pairs = three.preference_pairs("dpo", job.models["reference"], no_edits, args)
    edits = rows_of(no_edits / "edits.jsonl")
    learnt = [row for row in edits if row["split"] == "train" and row["chosen"] is not None]
    assert three.column(pairs, "preferred_ids") == three.column(learnt, "chosen_token_ids")


def test_without_edits_dpo_on_edits_has_no_pair(job_of, no_edits):
    job, args = job_of("dpo_edit")
    reference = job.models["reference"]
    assert three.preference_pairs("dpo_edit", reference, no_edits, args) == []


# --- B7, B8, C2: the loop of the off-line methods ---

@pytest.fixture
def samples(sft):
    """A wrong and two right ones, as `collect` makes them; log pi_old is 0.25 below log pi.
    N = 2 + 2 + 1 tokens have a reward, the rewrites have M = 4 + 2 + 1."""
    rows = []
    for prompt, response, rewrite, rewards, gamma in [
        ([5], [6, 7, 2], [6, 8, 9, 2], [-0.1, 0.0, -0.05], [0.5, 1.0, 1.0, 0.5]),
        ([5, 6, 7, 8, 9], [11, 2], [11, 2], [0.5, 0.25], [0.5, 0.5]),
        ([3, 4], [2], [2], [0.3], [0.5]),
    ]:
        rows.append({
            "prompt_ids": prompt,
            "response_ids": response,
            "rewrite_ids": rewrite,
            "is_right": response == rewrite,
            "old_logprobs": plain_logprobs(sft, prompt, response, 0.5) - 0.25,
            "rewards": tensor(rewards),
            "gamma": tensor(gamma),
        })
    return rows


@pytest.fixture
def losses(job_of):
    """The losses in the log of `train_offline` at temperature 0.5, where the policy stays."""
    def train(method, rows, **flags):
        job, args = job_of(method, temperature=0.5, imitation_weight=3.0, **flags)
        three.train_offline(job, rows, args)
        return three.column(job.log, "loss")
    return train


@pytest.mark.parametrize("micro_batch", [32, 2])
@pytest.mark.parametrize("method, weight", [
    pytest.param("rlmec", 1, id="L_RL + lambda L_IR"),
    pytest.param("rlmec_imitation", 0, id="lambda L_IR alone"),
])
def test_b7_row_by_row(losses, samples, sft, method, weight, micro_batch):
    L_RL = 0.0
    L_IR = 0.0
    for row in samples:
        # B5 at temperature 0.5; rho is e^0.25 = 1.28, inside 1 + 0.3
        logprobs = plain_logprobs(sft, row["prompt_ids"], row["response_ids"], 0.5)
        L_RL -= math.exp(0.25) * (row["rewards"] * logprobs).sum().item() / 5
        # B6 is not divided by the temperature
        logprobs = plain_logprobs(sft, row["prompt_ids"], row["rewrite_ids"])
        L_IR -= (row["gamma"] * logprobs).sum().item() / 7

    total = weight * L_RL + 3 * L_IR
    assert close(losses(method, samples, micro_batch=micro_batch), [total] * 3)


@pytest.mark.parametrize("micro_batch", [32, 1])
def test_rejection_learns_all_tokens_of_the_right_samples_alone(losses, samples, sft, micro_batch):
    right = three.right_samples(samples, three.Args(device="cpu"))
    # C2: -(1/3) log pi of the three tokens of the two right samples
    first = plain_logprobs(sft, [5, 6, 7, 8, 9], [11, 2])
    second = plain_logprobs(sft, [3, 4], [2])
    total = -(first.sum() + second.sum()).item() / 3
    assert close(losses("rejection", right, micro_batch=micro_batch), [total] * 3)


def test_rejection_sampling_without_a_right_sample_is_refused(run, samples, fails, monkeypatch):
    monkeypatch.setattr(three, "draw_samples", lambda *_, **__: samples[:1])
    args = three.Args(run=str(run), method="rejection", device="cpu", overwrite=True)
    fails("rejection is left out: .* no right sample", three.main, args)


def test_one_of_several_methods_without_rows_is_left_out(run, samples, capsys, monkeypatch):
    monkeypatch.setattr(three, "draw_samples", lambda *_, **__: samples[:1])
    monkeypatch.setattr(three, "SETS", {"all": ["rejection", "dpo"]})
    three.main(three.Args(run=str(run), device="cpu", overwrite=True, pairs=2))
    assert "rejection is left out: " in capsys.readouterr().out
    assert (run / "dpo.csv").exists()
    assert not (run / "rejection.csv").exists()


def test_main_gives_rejection_sampling_the_right_samples_alone(run, samples, monkeypatch):
    monkeypatch.setattr(three, "draw_samples", lambda *_, **__: samples)
    args = three.Args(run=str(run), method="rejection", device="cpu", overwrite=True)
    three.main(args)
    row = next(csv.DictReader(open(run / "rejection.csv")))
    assert row["episodes"] == "2"


def test_rejection_sampling_is_the_same_without_a_reward_model_and_behind_rlmec(
        run, tmp_path, monkeypatch):
    solutions = lambda grm, wrong, *_, **__: [row["solution_ids"] for row in wrong]
    monkeypatch.setattr(three, "rewrite", solutions)
    monkeypatch.setitem(three.SETS, "all", ["rlmec", "rejection"])
    judge_by_the_end(run)
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("reward_*"))
    flags = {"updates": 2, "rollout_batch": 32, "device": "cpu", "overwrite": True}
    three.main(three.Args(run=str(run), method="all", **flags))
    three.main(three.Args(run=str(alone), method="rejection", **flags))

    assert (run / "rlmec.csv").exists()
    policies = []
    for path in (run, alone):
        policies.append((path / "rejection" / "model.safetensors").read_bytes())
    assert policies[0] == policies[1] != (run / "policy" / "model.safetensors").read_bytes()


def test_micro_batches_of_rlmec_add_up_to_the_gradient(losses, samples, grads):
    losses("rlmec", samples, micro_batch=32)
    losses("rlmec", samples, micro_batch=2)
    assert_same(grads[0], grads[-1])


def test_the_learning_rate_falls_to_0(job_of, samples):
    job, args = job_of("rlmec", lr=1e-3)
    three.train_offline(job, samples, args)
    assert job.optimizer.param_groups[0]["lr"] == 0


# --- C1: the same loop for DPO ---

@pytest.fixture
def dpo(job_of, tiny_run):
    """DPO on four pairs: the job and the pairs."""
    def run(method="dpo", **flags):
        job, args = job_of(method, **flags)
        pairs = three.preference_pairs(method, job.models["reference"], tiny_run, args)[:4]
        three.train_offline(job, pairs, args)
        return job, pairs
    return run


@pytest.mark.parametrize("method", ["dpo", "dpo_edit"])
def test_dpo_starts_at_log_2(dpo, method):
    job, _ = dpo(method)
    row = job.log[0]
    assert close(row["loss"], math.log(2))
    assert close(row["logratio_preferred"], 0)
    assert close(row["logratio_rejected"], 0)


def test_dpo_widens_the_gap_and_lowers_the_rejected(dpo, sft):
    job, pairs = dpo(lr=1e-3)
    for pair in pairs:
        logratios = []
        for response in (pair["preferred_ids"], pair["rejected_ids"]):
            after = plain_logprobs(job.models["policy"], pair["prompt_ids"], response)
            before = plain_logprobs(sft, pair["prompt_ids"], response)
            logratios.append((after - before).sum())
        assert logratios[0] > logratios[1]
        assert logratios[1] < 0
    assert job.log[-1]["logratio_preferred"] > job.log[-1]["logratio_rejected"]


@pytest.mark.parametrize("flags, factor", [
    pytest.param({"micro_batch": 3}, 1, id="micro-batches add up"),
    pytest.param({"dpo_beta": 2.0}, 2, id="b stands inside the sigmoid"),
])
def test_the_first_gradient_of_dpo_is_that_of_the_batch_times_b(dpo, grads, flags, factor):
    dpo()
    dpo(**flags)
    assert_same(factor * grads[0], grads[-1])


# --- Below the line: learning rates, a step, validation, the log, bad input ---

@pytest.mark.parametrize("model, method, rates", [
    pytest.param(None, "ppo_token", [1e-4, 1e-3], id="PPO, the small policy"),
    pytest.param("org/name", "ppo_sequence", [1e-6, 1e-5], id="PPO, --model's"),
    pytest.param(None, "dpo", [3e-5], id="DPO, the small policy"),
    pytest.param("org/name", "dpo_edit", [5e-7], id="DPO, --model's"),
    pytest.param(None, "rlmec", [1e-3], id="RLMEC, the small policy"),
    pytest.param("org/name", "rlmec_imitation", [5e-6], id="RLMEC, --model's"),
    pytest.param(None, "rejection", [1e-3], id="rejection, the small policy"),
    pytest.param("org/name", "rejection", [5e-6], id="rejection, --model's"),
])
def test_the_default_learning_rates_fit_the_policy(job_of, run, capsys, model, method, rates):
    (run / "01_args.json").write_text(json.dumps({"model": model}))
    job, _ = job_of(method, run=str(run), lr=None, value_lr=None)
    found = three.column(job.optimizer.param_groups, "lr")
    assert found == pytest.approx(rates)
    said = " ".join(f"{rate:g}" for rate in rates)
    assert f"{method}: learning rates {said}\n" in capsys.readouterr().out


def test_a_run_folder_from_elsewhere_gets_the_rates_of_a_small_policy(job_of, run):
    (run / "01_args.json").unlink()
    job, _ = job_of("dpo", run=str(run), lr=None)
    assert three.column(job.optimizer.param_groups, "lr") == [3e-5]


@pytest.mark.parametrize("flags, rates", [
    pytest.param({"lr": 0.5}, [0.5, 5.0], id="--lr: of the value model ten times as much"),
    pytest.param({"value_lr": 0.5}, [1e-4, 0.5], id="--value_lr alone"),
    pytest.param({"lr": 0.25, "value_lr": 0.5}, [0.25, 0.5], id="both"),
    pytest.param({"lr": 0.0}, [0, 0], id="0 is a rate"),
    pytest.param({"value_lr": 0.0}, [1e-4, 0], id="0 for the value model alone"),
])
def test_flags_are_the_learning_rates(job_of, flags, rates):
    job, _ = job_of("ppo_token", **({"lr": None, "value_lr": None} | flags))
    assert three.column(job.optimizer.param_groups, "lr") == pytest.approx(rates)



def test_the_gradient_of_each_model_is_clipped_to_norm_1():
    large = torch.zeros(2, requires_grad=True)
    small = torch.zeros(2, requires_grad=True)
    large.grad = tensor([3.0, 4.0])  # of norm 5
    small.grad = tensor([0.3, 0.4])  # of norm 0.5
    models = [{"params": [large]}, {"params": [small]}]
    optimizer = torch.optim.SGD(models, lr=1.0)
    three.optimizer_step(optimizer, three.Args())
    assert close(large, [-0.6, -0.8])
    assert close(small, [-0.3, -0.4])


@pytest.fixture
def validation(job_of, monkeypatch):
    """A job with two held-out problems, whose samples are a right and a wrong response."""
    job, args = job_of("ppo_token", temperature=0.5)
    right = three.ids_of(RIGHT, job.tokenizer)
    problem = {"prompt_ids": [5, 6], "solutions": [RIGHT[:-4]]}
    job.validation = [problem, problem]
    monkeypatch.setattr(three, "sample", lambda *_, **__: [right, [7, 8]])
    return job, args


def test_accuracy_is_the_share_of_right_held_out_samples(validation):
    job, args = validation
    assert three.validate(job, 1, 1, args)["accuracy"] == 0.5


def test_val_kl_is_the_mean_log_ratio_of_a_response_to_the_reference(validation):
    job, args = validation
    job.models["reference"].get_input_embeddings().weight.data *= 1.5
    val_kl = three.validate(job, 1, 1, args)["val_kl"]

    total = 0.0
    for response in (three.ids_of(RIGHT, job.tokenizer), [7, 8]):
        total += plain_logprobs(job.models["policy"], [5, 6], response, 0.5).sum()
        total -= plain_logprobs(job.models["reference"], [5, 6], response, 0.5).sum()
    assert close(val_kl, total.item() / 2)


@pytest.mark.parametrize("updates, validated", [
    pytest.param(3, [1, 2, 3], id="few: all"),
    pytest.param(17, [2, 4, 6, 8, 10, 12, 14, 16, 17], id="every second, and the last"),
])
def test_validation_comes_on_evenly_spread_updates_and_the_last(validation, updates, validated):
    job, args = validation
    numbers = range(1, updates + 1)
    assert [k for k in numbers if three.validate(job, k, updates, args)] == validated


def test_the_csv_has_a_row_for_each_update(tiny_run):
    first, second = csv.DictReader(open(tiny_run / "ppo_token.csv"))
    assert first["update"] == "1"
    assert first["episodes"] == "32"
    assert float(first["kl"]) == 0
    assert second["update"] == "2"
    assert second["episodes"] == "64"
    assert float(second["kl"]) != 0  # the first update has moved the policy


def test_columns_of_validation_are_empty_in_between(job_of, run):
    job, args = job_of("rlmec", run=str(run))
    job.log = [{"update": 1}, {"update": 2, "accuracy": 0.5}]
    three.save_policy(job, args)
    assert (run / "rlmec.csv").read_text() == "update,accuracy\n1,\n2,0.5\n"


def test_a_loss_that_is_not_finite_ends_the_stage(job_of, fails):
    job, args = job_of("rlmec")
    row = {"update": 1, "loss": math.nan}
    fails("rlmec: not finite any more.*lower --lr", three.finish_update, job, row, None, args)


def test_responses_are_as_long_as_those_of_stage_1(tiny_run):
    assert json.loads((tiny_run / "03_args.json").read_text())["max_new_tokens"] == 48


def test_a_reward_model_of_another_vocabulary_is_refused(run, fails):
    path = run / "reward_token" / "tokenizer.json"
    path.write_text(path.read_text().replace('"[9]"', '"[ten]"'))
    args = three.Args(run=str(run), method="ppo_token", overwrite=True)
    fails("reward_token: its vocabulary is not that of", three.main, args)


def test_a_missing_reward_model_is_named(run, fails):
    (run / "reward_token").rename(run / "gone")
    args = three.Args(run=str(run), method="ppo_token", overwrite=True)
    fails("no reward model for --method ppo_token; run 02_reward_model.py", three.main, args)


@pytest.mark.parametrize("method, methods", [
    ("all", ["ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation"]),
    ("cross", ["ppo_token_sibling", "ppo_sequence_edit"]),
    ("ppo_sequence_edit", ["ppo_sequence_edit"]),
])
def test_method_names_a_method_or_a_set_of_them(cross, tokenizer, method, methods):
    args = three.Args(run=str(cross), method=method)
    assert three.chosen_methods(args, tokenizer, {}) == methods


def test_the_cross_is_left_out_without_its_reward_models(run, fails):
    args = three.Args(run=str(run), method="cross", overwrite=True)
    fails("no reward model for --method cross; run 02_reward_model.py", three.main, args)


@pytest.mark.parametrize("method", sorted(three.PPO))
def test_the_ppos_differ_in_their_reward_model_alone(method):
    assert three.METHODS[method] == (method.removeprefix("ppo_"), 1e-4, 1e-6)


def test_the_cross_is_trained_with_what_stage_2_made(run):
    two.main(two.Args(run=str(run), kind="cross", epochs=1, overwrite=True))
    flags = {"updates": 1, "rollout_batch": 8, "max_new_tokens": 24}
    three.main(three.Args(run=str(run), method="cross", **flags))
    for name in ("ppo_token_sibling", "ppo_sequence_edit"):
        [row] = csv.DictReader(open(run / f"{name}.csv"))
        assert float(row["score"]) != 0
        assert (run / name / "model.safetensors").exists()


def test_without_a_reward_model_the_methods_that_need_none_are_trained(run, tokenizer, capsys):
    for kind in ("token", "sequence", "generative"):
        shutil.rmtree(run / f"reward_{kind}")
    args = three.Args(run=str(run), method="all_baselines")
    assert three.chosen_methods(args, tokenizer, {}) == ["dpo", "dpo_edit", "rejection"]
    assert "rlmec is left out: no " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    {"updates": 0}, {"rollout_batch": 0}, {"minibatch": -1}, {"micro_batch": 0},
    {"temperature": 0.0}, {"temperature": -0.5},
], ids=str)
def test_a_number_that_must_be_above_0_is_refused(run, fails, flags):
    [name] = flags
    args = three.Args(run=str(run), overwrite=True, **flags)
    fails(f"--{name} must be above 0", three.main, args)
    assert (run / "eval.json").exists()  # nothing was removed

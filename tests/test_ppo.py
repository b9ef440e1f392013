"""Stage 3, A7 to A9 and B3 to B8: by hand, against slow versions, under padding, and in parts."""

import math, random
from collections import Counter
import pytest, torch
import torch.nn.functional as F
from conftest import rows_of, three, two
from transformers import LlamaConfig, LlamaForCausalLM

SCALE = {"mean": 1.0, "std": 2.0}

@pytest.fixture
def policy():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=2, max_position_embeddings=24, initializer_range=0.4)).eval()

def plain_logprobs(model, prompt, response, temperature=1.0):
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(-1)[range(len(response)), response]

def test_scores_kl_rewards_value_loss_and_whitening_by_hand(monkeypatch):
    mask = torch.tensor([[True] * 3, [True, False, False]])
    monkeypatch.setattr(three, "sequence_reward", lambda *_: torch.tensor([5.0, 4.0]))
    monkeypatch.setattr(three, "token_rewards", lambda *_: torch.tensor([[2.0, 4.0, 6.0]]))
    scores = three.scores_of(None, {}, mask, "sequence", SCALE)
    assert scores.tolist() == [[0.0, 0.0, 2.0], [1.5, 0.0, 0.0]]   # A7: on the last token alone
    assert three.scores_of(None, {}, mask[:1], "token", SCALE).tolist() == [[1.0, 2.0, 3.0]]
    old, ref = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.0])
    rewards = three.kl_rewards(torch.tensor([1.0, 0.0]), old, ref, 0.1)
    assert rewards.tolist() == pytest.approx([1 - 0.05, 0.1]) and not rewards.requires_grad
    mask, old = torch.tensor([True, True, True, False]), torch.ones(4)
    values, returns = torch.tensor([2.0, 1.1, 0.0, 9.0]), torch.tensor([1.5, 1.5, -1.0, 0.0])
    loss = three.value_loss(values, old, returns, mask, 0.2, 5)    # clipped to 1.2 1.1 0.8
    assert loss.item() == pytest.approx(0.5 * (0.5 ** 2 + 0.4 ** 2 + 1.8 ** 2) / 5)
    white = three.masked_whiten(torch.tensor([1.0, 2.0, 3.0, 99.0]), mask)
    assert white.tolist() == pytest.approx([-1.5 ** 0.5, 0.0, 1.5 ** 0.5, 0.0])

@pytest.mark.parametrize("lam, gamma", [(0.95, 1.0), (1.0, 0.9), (0.0, 0.7)])
def test_gae_equals_the_double_sum_and_ignores_padding(lam, gamma):
    mask = torch.arange(7) < torch.tensor([5, 1, 3])[:, None]
    rewards, values = torch.randn(3, 7) * mask, torch.randn(3, 7) * mask
    advantages, returns = three.gae(rewards, values, lam, gamma)
    delta = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values    # V(s_{T+1}) = 0
    slow = torch.stack([sum((gamma * lam) ** l * delta[:, t + l] for l in range(7 - t))
                        for t in range(7)], dim=1)
    assert torch.allclose(torch.cat([advantages, returns - values]), slow.repeat(2, 1), atol=1e-5)

@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.1, 1.0, -1.1, -1.1), (1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5),
    (1.5, -1.0, 1.5, 1.5), (0.5, -1.0, 0.8, 0.0)])                 # A9: min, for bad tokens too
def test_policy_loss_on_each_side_of_the_clip(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([ratio, 9.0]).log().requires_grad_()
    value = three.policy_loss(logprobs, torch.zeros(2), torch.tensor([advantage, 9.0]),
                              torch.tensor([True, False]), 0.2, 4)
    value.backward()
    assert value.item() == pytest.approx(loss / 4)
    assert logprobs.grad.tolist() == pytest.approx([gradient / 4, 0.0])

def test_a_reward_moves_its_token_and_with_lambda_0_no_other():
    logprobs = torch.zeros(1, 4, requires_grad=True)
    advantages, _ = three.gae(torch.tensor([[0.0, 3.0, -2.0, 0.0]]), torch.zeros(1, 4), 0.0)
    three.policy_loss(logprobs, torch.zeros(1, 4), advantages, torch.ones(1, 4), 0.2, 4).backward()
    assert logprobs.grad.tolist() == [[0, -0.75, 0.5, 0]]          # a step down raises what is good

@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_first_rollout_and_its_micro_batches(tiny_run, kind, grads, monkeypatch):
    args = three.Args(device="cpu", max_new_tokens=12, temperature=0.5, lam=0.0)
    models = three.open_models(f"ppo_{kind}", tiny_run, args)
    problems = rows_of(tiny_run / "problems.jsonl")[:7]
    prompts = three.column(problems, "prompt_ids")
    row, inputs, batch = three.rollout(kind, models, prompts, SCALE, args)
    assert row["kl"] == 0 and row["reward"] == row["score"] and not batch["old_values"].any()
    assert batch["advantages"].equal(three.masked_whiten(batch["returns"], batch["mask"]))  # V = 0
    stay = torch.optim.SGD([*models["policy"].parameters(), *models["value"].parameters()], 0.0)
    losses = three.partial(three.ppo_loss, models, inputs, batch, args)
    for args.micro_batch in (256, 1):                              # 1: all padding is cut off
        step = three.gradient_step(losses, range(7), stay, args)
        assert abs(step["approx_kl"]) < 1e-7 and step["clipfrac"] == 0
    whole, parts = torch.cat(grads).chunk(2)                       # of the policy and of V
    assert (whole - parts).norm() < 1e-5 * whole.norm()
    batch["old_logprobs"] -= 0.25 * batch["mask"]                  # rho is e^0.25, about 1.28
    step = three.gradient_step(losses, range(7), stay, args)
    assert [step["approx_kl"], step["clipfrac"]] == pytest.approx([math.exp(0.25) - 1.25, 1], 1e-3)
    models["reference"].get_input_embeddings().weight.data *= 1.5
    row, _, batch = three.rollout(kind, models, prompts, SCALE, args)
    assert row["reward"] == pytest.approx(row["score"] - 0.1 * row["kl"]) and row["kl"] > 0.1
    assert batch["returns"].sum(dim=1).mean().item() == pytest.approx(row["reward"])
    args.rollout_batch, args.minibatch, steps = 7, 3, []           # each epoch takes each row once
    monkeypatch.setattr(three, "gradient_step", lambda _, rows, *__: steps.append(rows) or {})
    three.ppo(kind, models, stay, problems, SCALE, random.Random(0), args)
    assert [sorted(sum(steps[k:k + 3], [])) for k in (0, 3)] == [[*range(7)]] * 2

def chi_squared(tokens, probabilities):
    expected = probabilities.detach() * len(tokens)
    seen = torch.bincount(torch.tensor(tokens), minlength=12)
    return (((seen - expected) ** 2 / expected).sum() - 11) / 22 ** 0.5

@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_policy(policy, temperature):
    prompts = [[5, 6], [4, 9, 3, 7, 8]] * 2000                     # half of the rows are padded
    rows = three.sample(policy, prompts, three.Args(device="cpu", max_new_tokens=2),
                        temperature)[::2]
    share = lambda ids: (policy(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
    assert chi_squared([row[0] for row in rows], share([5, 6])) < 4
    a = Counter(row[0] for row in rows if row[0] != 2).most_common(2)[1][0]
    second = [row[1] for row in rows if row[0] == a]
    assert chi_squared(second, share([5, 6, a])) < 4 and chi_squared(second, share([5, 6])) > 10

def test_likeliest_samples_equal_one_by_one_without_a_cache(policy):
    prompts = [[k, j] * (1 + k % 3) for k in range(3, 12) for j in (4, 7)]
    args = three.Args(device="cpu", max_new_tokens=9)
    expected = [policy.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False,
                                use_cache=False)[0, len(prompt):].tolist() for prompt in prompts]
    assert len({len(row) for row in expected}) > 2                 # they end at several times
    for args.micro_batch in (256, 1):                              # parts of 8 rows
        assert three.sample(policy, prompts, args, 0.0) == expected

def test_samples_fit_the_context_and_teacher_forcing_agrees(policy):
    prompts = [[5, 6], [4, 9, 3, 7, 8], [3] * 20] * 20
    args = three.Args(device="cpu", micro_batch=25, max_new_tokens=48)
    responses = three.sample(policy, prompts, args, 1.0)
    assert all(y[-1] == 2 or len(x + y) == 24 for x, y in zip(prompts, responses))  # its own room
    assert any(y[-1] == 2 for y in responses) and not any(2 in y[:-1] for y in responses)
    rows = three.read(three.response_logprobs, policy, prompts, responses, args, 0.5)
    for row, x, y in zip(rows, prompts, responses, strict=True):
        plain = plain_logprobs(policy, x, y, 0.5).tolist()
        assert row.tolist() == pytest.approx(plain + [0] * (len(row) - len(y)), abs=1e-5)

def test_b3_b5_b6_and_c1_by_hand():
    r = [three.generative_rewards(torch.tensor([0.9, 0.6, 0.3, 0.45]), right).tolist()
         for right in (True, False)]
    assert sum(r, []) == pytest.approx([0.4, 0.1, 0, 0, 0, 0, -0.1, -0.05])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    assert three.imitation_loss(logprobs, torch.tensor([[1, 0.5], [0.5, 0]]), 7).item() == 3.5 / 7
    loss = three.rlmec_loss(logprobs, logprobs.detach(), torch.zeros(2, 2), 0.3, 0)
    loss.backward()                                                # no token has a reward
    assert loss.item() == 0 and not logprobs.grad.any()
    # C1: two tokens each, -1 -1 and -2 -1 of y+ and y-, under the reference -2 -1 and -1 -1
    better, worse, ref_w, ref_l = torch.tensor([[-2.0], [-3.0], [-3.0], [-2.0]])
    loss = three.dpo_loss(better, worse, ref_w, ref_l, 0.5, 2)     # 1 - (-1) = 2, times b
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 2)) / 2)

@pytest.mark.parametrize("reward, ratio, weight", [
    (0.4, 2.0, 1.3 * 0.4), (0.4, 0.5, 0.5 * 0.4), (-0.1, 2, 2 * -0.1), (-0.1, 0.5, 0.7 * -0.1)])
def test_b5_stops_the_weights_gradient_and_keeps_that_of_log_pi(reward, ratio, weight):
    old = torch.tensor([-1.0, -2.0])
    logprobs = (old + torch.tensor([math.log(ratio), 0.3])).requires_grad_()
    loss = three.rlmec_loss(logprobs, old, torch.tensor([reward, 0.0]), 0.3, 2)
    loss.backward()
    assert loss.item() == pytest.approx(-weight * (math.log(ratio) - 1) / 2)
    assert logprobs.grad.tolist() == pytest.approx([-weight / 2, 0.0])

@pytest.mark.parametrize("method", ["rlmec", "rlmec_imitation", "rejection"])
def test_b7_and_c2_of_single_rows(policy, tokenizer, method, tiny_run, monkeypatch, grads):
    """And of micro-batches. L_RL is at the temperature, L_IR is not; rho is e^0.25, about 1.28."""
    samples, expected = [], 0.0
    for prompt, response, rewrite, rewards, gamma in (
            ([5], [6, 7, 2], [6, 8, 9, 2], [-0.1, 0.0, -0.05], [0.5, 1.0, 1.0, 0.5]),
            ([5, 6, 7, 8, 9], [11, 2], [11, 2], [0.5, 0.25], [0.5, 0.5]),
            ([3, 4], [2], [2], [0.3], [0.5])):
        logpi, rewards = plain_logprobs(policy, prompt, response, 0.5), torch.tensor(rewards)
        imitation = (gamma := torch.tensor(gamma)) * plain_logprobs(policy, prompt, rewrite)
        if method == "rejection":
            expected -= (response == rewrite) * plain_logprobs(policy, prompt, response).sum() / 3
        else:
            expected -= 3 * imitation.sum() / 7                    # M = 4 + 2 + 1
            expected -= (method == "rlmec") * math.exp(0.25) * (rewards * logpi).sum() / 5
        samples.append({"prompt_ids": prompt, "response_ids": response, "rewrite_ids": rewrite,
                        "fate": "right" if response == rewrite else "rewritten",
                        "rewards": rewards, "old_logprobs": logpi.detach() - 0.25, "gamma": gamma})
    monkeypatch.setattr(three, "open_model", lambda *_, **__: policy)
    monkeypatch.setattr(three, "collect", lambda *_: samples)
    args = three.Args(lr=1e-30, temperature=0.5, imitation_weight=3.0, device="cpu")
    problems = [{"split": "train", "solution_ids": [2]}]
    for args.micro_batch in (256, 2):
        _, log = three.train_policy(method, problems, [], {}, tokenizer, tiny_run, args)
        assert [row["loss"] for row in log] == pytest.approx([expected.item()] * 3, rel=1e-5)
    assert (grads[0] - grads[-1]).norm() < 1e-5 * grads[0].norm()

@pytest.mark.parametrize("method, name", [("dpo", "chosen_token_ids"), ("dpo_edit", "edited_ids")])
def test_c1_starts_at_log_2_widens_the_gap_and_lowers_the_worse(tiny_run, method, name):
    args = three.Args(device="cpu", run=str(tiny_run))
    policy = three.open_model(three.hf.AutoModelForCausalLM, tiny_run / "policy", args)
    rows = three.pairs_of(method, policy, tiny_run, args)
    assert [row["better"] for row in rows] == [row[name] for row in rows_of(
        tiny_run / "edits.jsonl") if row["split"] == "train" and row["chosen"] is not None]
    losses = three.partial(three.offline_loss, method, policy, args, rows := rows[:4])
    start, part = dict(losses(rows)), dict(losses(rows[:1]))
    seen = start["loss"].item(), start["logprob_better"], part["loss"].item()
    assert seen == pytest.approx([math.log(2), 0, math.log(2) / 4], abs=1e-5)  # sums of 60 nats
    start["loss"].backward()
    torch.optim.SGD(policy.parameters(), 1e-3).step()
    after = dict(losses(rows))
    assert after["logprob_better"] > after["logprob_worse"] and after["logprob_worse"] < 0

@pytest.fixture
def collect(tiny_run, tokenizer, monkeypatch):
    """B8 on two problems: `collect` with a `sample` that gives these responses, call after call."""
    args = three.Args(device="cpu", temperature=0.7)
    grm = three.open_model(three.hf.AutoModelForCausalLM, tiny_run / "policy", args)
    problems, seen = rows_of(tiny_run / "problems.jsonl")[:2], []
    def collect_of(*answers):
        monkeypatch.setattr(three, "sample", lambda model, prompts, *_: (
            seen.append(prompts) or answers[len(seen) - 1]))
        return three.collect(grm, grm, problems, tokenizer, args)
    return collect_of, grm, problems, seen, *(problem["solution_ids"] for problem in problems)

def test_collect_keeps_ids_and_the_steps_before_the_error(tokenizer, collect, monkeypatch):
    collect_of, grm, problems, seen, solution, right = collect
    start = len(sum(three.steps_of(solution, tokenizer)[:2], []))
    wrong = [*solution[:start], solution[0], *solution[start + 1:]]
    monkeypatch.setattr(three, "generative_rewards", lambda p, right: p)
    rows = collect_of([wrong, right], [tokenizer("[3]").input_ids + [2]], [solution[start:]])
    assert seen[1] == [three.grm_prompt("locate", problems[0], wrong, tokenizer)]
    assert seen[2] == [rows[1]["rewrite"] + solution[:start]]   # B4
    assert [(row["fate"], row["response_ids"], row["rewrite_ids"]) for row in rows] == [
        ("right", right, right), ("rewritten", wrong, solution)]
    for row, problem in zip(rows, problems[::-1]):
        ids = row["response_ids"]
        plain = plain_logprobs(grm, problem["prompt_ids"], ids, 0.7)
        assert torch.allclose(row["old_logprobs"], plain, atol=1e-5)
        p = plain_logprobs(grm, three.grm_prompt("rewrite", problem, ids, tokenizer), ids).exp()
        assert torch.allclose(row["rewards"], p, rtol=1e-3, atol=0)    # B3, before its clip
        assert row["gamma"].equal(three.imitation_weights(ids, row["rewrite_ids"]))

@pytest.mark.parametrize("answer, ending, reason", [
    (None, None, "the locator names no step"), (12, None, "the locator names no step"),
    (1, slice(0, 5), "the rewrite is wrong"), (1, slice(0, -1), "the rewrite is wrong")])  # no end
def test_a_wrong_sample_is_never_praised(tokenizer, collect, answer, ending, reason, capsys):
    collect_of, *_, solution, right = collect
    answer = tokenizer(f"[{answer}]").input_ids + [2] if answer else [2]
    rows = collect_of([solution[:5] + [2], right], [answer], [solution[ending]] if ending else [])
    assert [row["response_ids"] for row in rows] == [right]
    assert str({reason: 1, "right": 1}) in capsys.readouterr().out

@pytest.mark.parametrize("name, old, new, message", [
    ("edits.jsonl", '"split"', '"part"', "edits.jsonl, line 1: KeyError.*'split'.*'chosen'"),
    ("reward_token/tokenizer.json", '"[9]"', '"[ten]"', "its vocabulary is not that of"),
    ("reward_token", "", "", "no reward model for ppo_token; 02_reward_model.py")])
def test_bad_input_is_named(fails, run, name, old, new, message):
    path = run / name
    path.write_text(path.read_text().replace(old, new)) if old else path.rename(run / "gone")
    stage, kind = (two, "token") if name == "edits.jsonl" else (three, "ppo_token")
    fails(message, stage.main, stage.Args(str(run), 1, True, kind))

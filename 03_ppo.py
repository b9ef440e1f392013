"""Stage 3: PPO with a reward on every token, or one per response; RLMEC; DPO; rejection sampling.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, 2401.06081): A7 to A9, B3 to
B8, E1; C1 (DPO, Rafailov et al., 2023), C2 (rejection sampling). A batch has B responses of at most
T tokens; what a loss is divided by, N (in B6 M), is counted over the whole batch.

    symbol        name                    shape
    x             prompt_ids              (P,)     the prompt
    y^, a_t       response_ids            (T,)     a sampled response, its end token included
    y~            rewrite_ids             (T~,)    the generative model's correction of it
    pi, pi_old    logprobs, old_logprobs  (B, T)   log pi(a_t | s_t), of the policy, of the sampler
    pi_ref        ref_logprobs            (B, T)   of the reference, the frozen SFT policy
    r_phi         scores                  (B, T)   of a reward model, standardised (below, 3)
    r^_t          rewards                 (B, T)   A7: scores minus the KL penalty
    r_t           rewards                 (T,)     B3: p_t - 0.5, clipped
    V(s_t), A^_t  values, advantages      (B, T)   A8
    p_t           probabilities           (T,)     B3: of the generative reward model (GRM)
    gamma_t       gamma                   (T~,)    B6: imitation weights

One index convention, for a prompt p1 p2 and a response a1 a2 a3, in columns -T: of the batch:
    input_ids      <pad>  p1   p2   a1   a2   a3      logits at t-1 score token t, so
    logits of             .    a1   a2   a3   .       log-prob and value of a1 are read at p2,
    score of                        a1   a2   a3      its score is read at a1 itself.

Simplified against the papers:
  1. GAE is kept with token rewards, our reading; a response that did not end counts as terminal.
  2. The value model is a second model, started from the SFT policy.
  3. Scores are divided by the standard deviation of a response's total (stage 2); the sequence
     score is centred first, because A6 knows it only up to a constant.
  4. B8: one sample a problem (RLMEC's code: five at temperature 0.7) and the GRM's likeliest
     rewrite. `is_right` decides what is right, never the locator.
Reads RUN/policy, problems.jsonl, edits.jsonl, reward_*. Writes a policy and a CSV for each method.
Command: python 03_ppo.py
"""

import atexit, csv, io, json, os, random, re, shutil, sys, time
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm, trange

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

# torchrun sets these two: which of how many processes this is
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

METHODS = {  # the reward model that a method needs; its learning rate; that of --model's policy
    "ppo_token": ("token", 1e-4, 1e-6),
    "ppo_sequence": ("sequence", 1e-4, 1e-6),
    "ppo_token_sibling": ("token_sibling", 1e-4, 1e-6),
    "ppo_sequence_edit": ("sequence_edit", 1e-4, 1e-6),
    "dpo": (None, 3e-5, 5e-7),
    "dpo_edit": (None, 3e-5, 5e-7),
    "rlmec": ("generative", 1e-3, 5e-6),
    "rlmec_imitation": ("generative", 1e-3, 5e-6),
    "rejection": (None, 1e-3, 5e-6),
}
ABOVE_0 = (
    "updates rollout_batch ppo_epochs minibatch micro_batch pairs max_new_tokens save_every "
    "temperature"
).split()
PPO = {"ppo_token", "ppo_sequence", "ppo_token_sibling", "ppo_sequence_edit"}
DPO = {"dpo", "dpo_edit"}
SETS = {  # what --method may name beside a method
    "all": ["ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation"],
    "cross": ["ppo_token_sibling", "ppo_sequence_edit"],
    "all_baselines": [*METHODS],
}
TOKEN = ("token", "token_sibling")  # A5: a reward on every token; the sequence kinds have one
# gather the weights of all processes, on the CPU
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
arg = lambda default, help: hf.hf_argparser.HfArg(default=default, help=help)


@dataclass
class Args:
    run: str = "runs/default"
    seed: int = arg(1, "of prompts and samples")
    overwrite: bool = arg(False, "remove what stage 4 made")
    method: Literal[(*SETS, *METHODS)] = arg(
        "all", "to train; all: ppo_token, ppo_sequence, RLMEC; cross: the two other PPOs; "
        "all_baselines: every method")
    updates: int = arg(20, "PPO: rollouts; RLMEC, rejection: as many responses are drawn, once")
    rollout_batch: int = arg(256, "responses sampled per update")
    ppo_epochs: int = arg(2, "A9: passes over a rollout")
    minibatch: int = arg(64, "responses per optimiser step")
    lr: float = arg(
        None, "of the policy; default: PPO 1e-4, DPO 3e-5, others 1e-3; where the policy came from "
        "--model: PPO 1e-6, DPO 5e-7, others 5e-6")
    value_lr: float = arg(None, "A9: learning rate of the value model; default: 10 times --lr")
    kappa: float = arg(0.1, "A7: KL coefficient, kappa, in reward per nat")
    lam: float = arg(0.95, "A8: lambda of GAE")
    clip: float = arg(None, "clip range, epsilon; default: A9 0.2, B5 0.3")
    imitation_weight: float = arg(1.0, "B7: weight of L_IR, lambda")
    pairs: int = arg(7500, "C1: preference pairs for DPO, at most")
    dpo_beta: float = arg(1.0, "C1: beta, the scale of the log ratios")
    temperature: float = arg(1.0, "of samples, and of log-probs in A7, A9, B5; above 0")
    max_new_tokens: int = arg(None, "longest response in tokens; default: stage 1's")
    micro_batch: int = arg(32, "rows per forward pass; sampling takes 8 times as many")
    bf16: bool = arg(False, "autocast to bfloat16; weights stay float32")
    save_every: int = arg(10, "updates from one saved state to the next")
    fsdp: bool = arg(False, "shard the models over torchrun's processes")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


# --- A batch ---

def pack(prompts, responses, model):
    """Prompts padded on the left to P, responses on the right to T: the model inputs (B, P + T),
    and response_mask (B, T), made from lengths: the only mask of losses and metrics."""
    P = max(len(prompt) for prompt in prompts)
    T = max(len(response) for response in responses)
    pad = [model.config.pad_token_id]
    ids = []
    mask = []
    for prompt, response in zip(prompts, responses):
        left = P - len(prompt)
        right = T - len(response)
        ids.append(pad * left + prompt + response + pad * right)
        mask.append([0] * left + [1] * len(prompt + response) + [0] * right)

    ids = torch.tensor(ids, device=model.device)
    mask = torch.tensor(mask, device=model.device)
    position = (mask.cumsum(dim=1) - 1) * mask  # of a token in its row; padding has none
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    return inputs, mask[:, P:].bool()


# --- The equations: what is read from a model ---

def response_logprobs(model, inputs, response_mask, temperature=1.0):
    """log pi(a_t | s_t) (B, T) of the response tokens, 0 outside: logits at t-1 score token t."""
    T = response_mask.shape[1]
    tokens = inputs["input_ids"][:, -T:]  # (B, T)
    before = torch.arange(-T - 1, -1, device=tokens.device)  # the positions t-1, from the end
    logits = model(**inputs, logits_to_keep=before, use_cache=False).logits.float()  # (B, T, V)
    if temperature != 1:
        logits = logits / temperature

    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")  # (B T,)
    return -losses.view(tokens.shape) * response_mask


def token_scores(model, inputs, response_mask):
    """A2: r_phi(s_t, a_t) (B, T), read at the position of token t itself; 0 outside."""
    T = response_mask.shape[1]
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
    scores = model.score(hidden[:, -T:])  # (B, T, 1)
    return scores[:, :, 0].float() * response_mask


def token_values(model, inputs, response_mask):
    """V(s_t) (B, T), read at position t-1, where token t is not yet known; 0 outside."""
    T = response_mask.shape[1]
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
    values = model.score(hidden[:, -T - 1:-1])  # (B, T, 1)
    return values[:, :, 0].float() * response_mask


def sequence_score(model, inputs):
    """A6: R_phi(x, y) (B,), read at the last token of the response."""
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
    # the last token has the largest position. (The model's own forward would take the last token
    # that is no padding token, but a response may contain that token.) model.score is the head
    last = inputs["position_ids"].argmax(dim=1)  # (B,)
    return model.score(hidden[range(len(last)), last])[:, 0].float()


# --- The equations of PPO ---

def scores_of(reward_model, inputs, response_mask, kind, scale):
    """A7: scores (B, T) in standard deviations of a response's total, the one place where the kinds
    of PPO differ. token: r_phi(s_t, a_t) / std. sequence: 1[t = T] (R_phi(x, y) - mean) / std."""
    if kind in TOKEN:
        return token_scores(reward_model, inputs, response_mask) / scale["std"]

    score = (sequence_score(reward_model, inputs) - scale["mean"]) / scale["std"]  # (B,)
    t = response_mask.cumsum(dim=1) * response_mask  # (B, T): 1, 2, ... T, and 0 on padding
    T = response_mask.sum(dim=1, keepdim=True)  # (B, 1)
    return (t == T) * score[:, None]  # 1[t = T] R


def kl_rewards(scores, old_logprobs, ref_logprobs, kappa):
    """A7: r^_t = r_phi - kappa log(pi_old(a_t | s_t) / pi_ref(a_t | s_t)), all (B, T). The KL term
    is a reward and carries no gradient."""
    return scores - kappa * (old_logprobs - ref_logprobs).detach()


def gae(rewards, values, lam, gamma=1.0):
    """A8: advantages and returns (B, T). delta_t = r^_t + gamma V(s_{t+1}) - V(s_t); rewards and
    values are 0 after the last token, so V(s_{T+1}) = 0, and advantages are 0 there as well."""
    advantages = torch.zeros_like(rewards)
    advantage = next_value = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage  # A^_t = delta_t + gamma lambda A^_{t+1}
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def masked_whiten(x, mask):
    """x with mean 0 and standard deviation 1 over the tokens of the mask; 0 elsewhere."""
    x = x - masked_mean(x, mask)
    return x * torch.rsqrt(masked_mean(x ** 2, mask) + 1e-8) * mask


def policy_loss(logprobs, old_logprobs, advantages, response_mask, clip, N):
    """A9: -(1/N) sum_t min(rho_t A^_t, clip(rho_t, 1-eps, 1+eps) A^_t), all (B, T); N: response
    tokens of the whole minibatch."""
    ratio = torch.exp(logprobs - old_logprobs)  # rho_t
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -(torch.min(ratio * advantages, clipped * advantages) * response_mask).sum() / N


def value_loss(values, old_values, returns, response_mask, clip, N):
    """A9: (1/2N) sum of the larger squared error, of V and of V clipped around the old V."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (errors * response_mask).sum() / N


# --- The equations of RLMEC, rejection sampling and DPO ---

def generative_rewards(probabilities, right):
    """B3: r_t (T,) of a response from p_t = P_GRM(a_t | rewrite prompt, a_<t) (T,):
    clip(p_t - 0.5, 0, 0.5) if it is right, clip(p_t - 0.5, -0.1, 0) if it is wrong."""
    r = probabilities - 0.5
    if right:
        return r.clamp(0, 0.5)
    return r.clamp(-0.1, 0)


def rlmec_loss(logprobs, old_logprobs, rewards, clip, N):
    """B5: -(1/N) sum_t w_t log pi(a_t | s_t), all (B, T), rewards 0 outside the response, with
    w_t = stopgrad[min(rho_t r_t, clip(rho_t, 1-eps, 1+eps) r_t)]; N: tokens of the batch with
    r_t != 0, or 1. Unlike PPO's, this clip leaves log pi its gradient."""
    ratio = torch.exp(logprobs - old_logprobs)  # rho_t
    clipped = ratio.clamp(1 - clip, 1 + clip)
    weights = torch.min(ratio * rewards, clipped * rewards).detach()  # w_t
    return -(weights * logprobs).sum() / max(N, 1)


def imitation_gamma(response_ids, rewrite_ids):
    """B6: gamma_t (T~,) of the tokens of the rewrite: 1 where the alignment (E1) replaces or
    inserts, 0.5 where it keeps; so 0.5 for a right response, which is its own rewrite."""
    gamma = torch.full((len(rewrite_ids),), 0.5)
    for op, i, j in edit_ops(response_ids, rewrite_ids):
        if op != "delete":
            gamma[j] = 1.0
    return gamma


def imitation_loss(logprobs, gamma, M):
    """B6: -(1/M) sum_t gamma_t log pi(y~_t | x, y~_<t), all (B, T~); M: the rewrites' tokens.
    C2, rejection sampling: the same of right responses alone, with gamma_t = 1."""
    return -(gamma * logprobs).sum() / M


def dpo_loss(logratio_w, logratio_l, beta, N):
    """C1: -(1/N) sum of log sigmoid(beta [log pi / pi_ref (y_w) - log pi / pi_ref (y_l)]) of the
    given pairs; log ratios (B,) of whole responses."""
    return -F.logsigmoid(beta * (logratio_w - logratio_l)).sum() / N


# --- PPO ---

def train_ppo(job, problems, args):
    """A7 to A9: sample, score, take a few clipped steps; args.updates times. `job` (see Job) has
    the models, the optimiser and the log."""
    kind = METHODS[job.method][0]
    scale = json.load(open(f"{args.run}/reward_metrics.json"))[kind]["scale"]
    scale["std"] = scale["std"] or 1.0  # it is 0 where rewards do not vary
    models = job.models
    clip = 0.2 if args.clip is None else args.clip
    if job.state:
        resume(job)

    bar = trange(len(job.log) + 1, args.updates + 1, desc=job.method, disable=RANK > 0)
    for update in bar:
        start = time.time()
        rng = seed_update(args, update)
        drawn = rng.choices(problems, k=args.rollout_batch)
        prompts = [problem["prompt_ids"] for problem in drawn]  # the same for every reward
        inputs, batch, row = rollout(kind, models, prompts, scale, args)  # A7, A8
        lengths = batch["mask"].sum(dim=1).tolist()
        totals = Counter()
        steps = 0

        for _ in range(args.ppo_epochs):
            order = rng.sample(range(len(prompts)), len(prompts))
            for minibatch in batches(order, args.minibatch):
                N = batch["mask"][minibatch].sum().item()  # response tokens of the whole minibatch
                minibatch.sort(key=lengths.__getitem__)  # less padding in a micro-batch

                # micro-batches are for memory, not mathematics: their gradients add up
                for _, mine, weight in micro_batches(minibatch, args.micro_batch):
                    micro_inputs, old = select(inputs, batch, mine)
                    mask = old["mask"]

                    logprobs = response_logprobs(
                        models["policy"], micro_inputs, mask, args.temperature)
                    loss = weight * policy_loss(  # A9
                        logprobs, old["logprobs"], old["advantages"], mask, clip, N)
                    loss.backward()
                    totals["policy_loss"] += loss.item()

                    values = token_values(models["value"], micro_inputs, mask)
                    loss = weight * value_loss(  # A9
                        values, old["values"], old["returns"], mask, clip, N)
                    loss.backward()
                    totals["value_loss"] += loss.item()

                    logratio = (logprobs - old["logprobs"]).detach()
                    ratio = logratio.exp()  # rho_t
                    k3 = (ratio - 1 - logratio) * mask  # Schulman's KL(pi_old || pi), never < 0
                    clipped = ((ratio - 1).abs() > clip) * mask
                    totals["approx_kl"] += weight * k3.sum().item() / N
                    totals["clipfrac"] += weight * clipped.sum().item() / N

                optimizer_step(job.optimizer, args)
                steps += 1

        row |= {name: x / steps for name, x in sum_over_processes(totals).items()}
        job.seconds += time.time() - start
        row = {"update": update, "episodes": update * len(prompts), **row, "seconds": job.seconds}
        row |= validate(job, update, args.updates, args)
        finish_update(job, row, bar, args)


def rollout(kind, models, prompts, scale, args):
    """A response to each prompt, with all that A9 needs of it: the model inputs, a dictionary of
    (B, T) tensors, and the row of the log."""
    responses = sample(models["policy"], prompts, args, args.temperature)
    inputs, mask = pack(prompts, responses, models["policy"])

    logprobs = forward_all(
        response_logprobs, models["policy"], prompts, responses, args, args.temperature)
    ref_logprobs = forward_all(
        response_logprobs, models["reference"], prompts, responses, args, args.temperature)
    values = forward_all(token_values, models["value"], prompts, responses, args)
    scores = forward_all(scores_of, models["reward"], prompts, responses, args, kind, scale)

    rewards = kl_rewards(scores, logprobs, ref_logprobs, args.kappa)  # A7
    advantages, returns = gae(rewards, values, args.lam)  # A8
    batch = {
        "mask": mask,
        "logprobs": logprobs,  # from here on those of pi_old
        "values": values,
        "returns": returns,
        "advantages": masked_whiten(advantages, mask),  # A9
    }

    # score, reward, kl: sums over the tokens of a response, means over responses
    score = scores.sum(dim=1)
    row = {
        "score": score.mean().item(),
        "score_std": score.std(correction=0).item(),
        "reward": rewards.sum(dim=1).mean().item(),
        "kl": (logprobs - ref_logprobs).sum(dim=1).mean().item(),
        "entropy": -masked_mean(logprobs, mask).item(),  # estimated from the samples
        "advantage_rms": masked_mean(advantages ** 2, mask).sqrt().item(),
        "length": mask.sum().item() / len(mask),
    }
    return inputs, batch, row


@torch.no_grad()
def sample(model, prompts, args, temperature):
    """A response (ids) to each prompt (ids), drawn from pi(a_t | s_t), with its end token."""
    ends = np.atleast_1d(model.config.eos_token_id)  # one id or several
    context = model.config.max_position_embeddings
    parts = [*micro_batches(prompts, 8 * args.micro_batch)]  # 8: no activations are kept
    drawn = []

    for part, mine, _ in tqdm(parts, desc="sampling", leave=False, delay=2, disable=RANK > 0):
        responses = [[] for _ in mine]
        running = responses  # the same lists, those that have not ended: rows of the model's batch
        inputs, _ = pack(mine, responses, model)  # the prompts alone
        cache = None

        for _ in range(args.max_new_tokens):
            output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            tokens = draw(output.logits[:, -1].float(), temperature)  # (rows,)
            for response, token in zip(running, tokens.tolist()):
                response.append(token)

            # a response goes on until its end token, or until the context is full: the token just
            # drawn stands one position on; is there room for another one after it?
            room = (inputs["position_ids"][:, -1] + 2 < context).tolist()
            going = [k for k, row in enumerate(running) if room[k] and row[-1] not in ends]
            if not any(gather([going], WORLD)):  # all processes stop at the same token
                break

            # the others leave the batch; a process that has none left keeps a row, to take part
            running = [running[k] for k in going]
            stay = tokens.new_tensor(going or [0])
            if len(stay) < len(tokens):
                cache.reorder_cache(stay)
            seen = inputs["attention_mask"][stay]
            position = inputs["position_ids"][stay, -1:] + 1
            inputs = {
                "input_ids": tokens[stay, None],
                "attention_mask": torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1),
                "position_ids": position.clamp(max=context - 1),  # of a row that only takes part
            }
        drawn += gather(responses, len(part))
    return drawn


def draw(logits, temperature):
    """A token (B,) of each row of logits (B, V): the one in whose share of (0, 1) a random number
    falls, as torch.multinomial does, but faster. Temperature 0: the likeliest one."""
    if temperature == 0:
        return logits.argmax(dim=1)

    shares = (logits / temperature).softmax(dim=1).cumsum(dim=1)  # (B, V), rises to about 1
    u = torch.rand(len(logits), 1, device=logits.device) * shares[:, -1:]
    return (shares[:, :-1] <= u).sum(dim=1)


# --- The off-line methods: RLMEC, rejection sampling, DPO ---

def draw_samples(policy, problems, tokenizer, args):
    """B8: one sample for each of at most updates * rollout_batch problems: the problem with
    response_ids as drawn, and is_right."""
    size = min(len(problems), args.updates * args.rollout_batch)
    problems = seed_update(args, 0).sample(problems, size)  # seeds the samples, too
    responses = sample(policy, column(problems, "prompt_ids"), args, args.temperature)
    ends = np.atleast_1d(policy.config.eos_token_id)
    samples = []
    for problem, ids in zip(problems, responses):
        right = is_right(ids, problem, tokenizer, ends)
        samples.append({**problem, "response_ids": ids, "is_right": right})
    return samples


def collect(policy, samples, tokenizer, args):
    """B8: the samples rewritten (B4), rewarded (B3) and aligned (B6): each with rewrite_ids,
    old_logprobs and rewards (T,), gamma (T~,)."""
    grm = open_model(hf.AutoModelForCausalLM, f"{args.run}/reward_generative", args)
    ends = np.atleast_1d(policy.config.eos_token_id)
    fates = Counter()
    right = []
    wrong = []
    for row in samples:
        ids = row["response_ids"]
        row = {**row, "rewrite_prompt": grm_prompt("rewrite", row, ids, tokenizer, ends)}
        longest = len(row["rewrite_prompt"])
        if not row["is_right"]:
            row["locate_prompt"] = grm_prompt("locate", row, ids, tokenizer, ends)
            longest = max(longest, len(row["locate_prompt"]))

        if longest + len(ids) > grm.config.max_position_embeddings:
            fates["beyond the GRM's context"] += 1
        elif row["is_right"]:
            fates["right"] += 1
            right.append(row | {"rewrite_ids": ids})  # it is its own rewrite
        else:
            wrong.append(row)

    # only what is rewritten into a right response is learnt from
    rewritten = []
    for row, rewrite_ids in zip(wrong, rewrite(grm, wrong, tokenizer, args)):
        if rewrite_ids is None:
            fates["the locator names no step"] += 1
        elif not is_right(rewrite_ids, row, tokenizer, ends):
            fates["the rewrite is wrong"] += 1
        else:
            fates["rewritten"] += 1
            rewritten.append(row | {"rewrite_ids": rewrite_ids})
    print("samples:", dict(fates))
    if not right and not rewritten:
        fail("no sample is right, and none was rewritten into a right one: train the policy or the "
             "generative reward model longer")
    return reward_samples(right + rewritten, policy, grm, args)


def rewrite(grm, wrong, tokenizer, args):
    """B4: the GRM locates the first wrong step of each wrong sample, keeps the steps before it and
    writes the rest anew: the ids of each rewrite, None where the locator names no step."""
    kept = {}  # index of a sample -> the ids of the steps before the wrong one
    ends = np.atleast_1d(grm.config.eos_token_id)
    labels = sample(grm, column(wrong, "locate_prompt"), args, temperature=0.0)
    for k, (row, label) in enumerate(zip(wrong, labels)):
        steps = steps_of(row["response_ids"], tokenizer, ends)
        for n in range(len(steps)):
            # compared as ids, so that [12] is never read as step 1; the last token is the end
            if label[:-1] == ids_of(f"[{n + 1}]", tokenizer):
                kept[k] = [*chain.from_iterable(steps[:n])]

    # the kept steps are given as the beginning of the GRM's own output
    prompts = [wrong[k]["rewrite_prompt"] + ids for k, ids in kept.items()]
    endings = sample(grm, prompts, args, temperature=0.0)
    rewrites = [None] * len(wrong)
    for k, ending in zip(kept, endings):
        rewrites[k] = kept[k] + ending
    return rewrites


def reward_samples(samples, policy, grm, args):
    """B3, B6 of each sample, and the log-probs of the policy that drew it."""
    prompts = column(samples, "prompt_ids")
    responses = column(samples, "response_ids")
    logprobs = forward_all(response_logprobs, policy, prompts, responses, args, args.temperature)
    prompts = column(samples, "rewrite_prompt")
    probabilities = forward_all(response_logprobs, grm, prompts, responses, args).exp()  # B3: p_t

    rewarded = []
    for row, old, p in zip(samples, logprobs, probabilities):
        T = len(row["response_ids"])  # the rest is padding
        gamma = imitation_gamma(row["response_ids"], row["rewrite_ids"])  # B6
        rewards = generative_rewards(p[:T], row["is_right"])  # B3
        row = row | {"old_logprobs": old[:T], "rewards": rewards, "gamma": gamma.to(args.device)}
        rewarded.append(row)
    return rewarded


def right_samples(samples, args):
    """C2: rejection sampling learns from the right samples alone, all tokens alike."""
    right = []
    for row in samples:
        if row["is_right"]:
            gamma = torch.ones(len(row["response_ids"]), device=args.device)
            right.append(row | {"rewrite_ids": row["response_ids"], "gamma": gamma})
    return right


def preference_pairs(method, reference, run, args):
    """C1: the first --pairs pairs, by default those that the reward models of paper A learn from;
    y_w is the preferred sibling (dpo) or the edit (dpo_edit). log pi_ref is computed once."""
    rows = [row for row in json_lines(run / "edits.jsonl") if row["split"] == "train"]
    pairs = [row for row in rows if is_pair(row)]
    if not pairs and method == "dpo":  # nobody has edited
        pairs = [row for row in rows if row["chosen"] is not None]
    pairs = pairs[:args.pairs]
    if not pairs:
        return []
    prompts = column(pairs, "prompt_ids")

    preferred = "edited_ids" if method == "dpo_edit" else "chosen_token_ids"
    for pair in pairs:
        pair["preferred_ids"] = pair[preferred]
    for name in ("preferred", "rejected"):
        responses = column(pairs, f"{name}_ids")
        logprobs = forward_all(response_logprobs, reference, prompts, responses, args)
        for pair, ref in zip(pairs, logprobs.sum(dim=1)):
            pair[f"ref_{name}"] = ref
    return pairs


def train_offline(job, rows, args):
    """B8: three passes over `rows`: samples that were rewarded once (`collect`), or pairs
    (`preference_pairs`). An update is one batch."""
    policy = job.models["policy"]
    rng = seed_update(args, 0)
    plan = []
    for _ in range(3):
        plan += batches(rng.sample(rows, len(rows)), args.minibatch)

    schedule = hf.get_scheduler("cosine", job.optimizer, round(0.03 * len(plan)), len(plan))
    if job.state:
        resume(job)
        schedule.last_epoch = len(job.log)  # the learning rate goes on from there

    bar = trange(len(job.log) + 1, len(plan) + 1, desc=job.method, disable=RANK > 0)
    for update in bar:
        start = time.time()
        seed_update(args, update)  # of the samples of `validate`, the same after a restart
        batch = plan[update - 1]
        totals = Counter()

        # micro-batches are for memory, not mathematics: their gradients add up
        for _, mine, weight in micro_batches(batch, args.micro_batch):
            if job.method in DPO:
                logratio_w = logratios(policy, mine, "preferred")
                logratio_l = logratios(policy, mine, "rejected")
                loss = weight * dpo_loss(logratio_w, logratio_l, args.dpo_beta, len(batch))  # C1
                totals["logratio_preferred"] += weight * logratio_w.sum().item() / len(batch)
                totals["logratio_rejected"] += weight * logratio_l.sum().item() / len(batch)
            else:
                loss = weight * rlmec_total(job.method, policy, mine, batch, args)  # B7, C2
            loss.backward()
            totals["loss"] += loss.item()

        optimizer_step(job.optimizer, args)
        schedule.step()

        job.seconds += time.time() - start
        row = {"update": update, "episodes": len(rows), **sum_over_processes(totals)}
        row["seconds"] = job.seconds
        row |= validate(job, update, len(plan), args)
        finish_update(job, row, bar, args)


def rlmec_total(method, policy, rows, batch, args):
    """B7 of some rows of a batch: L_RL + lambda L_IR. rlmec_imitation leaves L_RL out; so does
    rejection (C2), whose rows are right and have gamma 1."""
    prompts = column(rows, "prompt_ids")
    inputs, mask = pack(prompts, column(rows, "rewrite_ids"), policy)
    logprobs = response_logprobs(policy, inputs, mask)  # (B, T~)
    gamma = pad_sequence(column(rows, "gamma"), batch_first=True)
    M = sum(len(row["rewrite_ids"]) for row in batch)
    L_IR = imitation_loss(logprobs, gamma, M)  # B6
    if method == "rejection":
        return L_IR
    if method == "rlmec_imitation":
        return args.imitation_weight * L_IR

    inputs, mask = pack(prompts, column(rows, "response_ids"), policy)
    logprobs = response_logprobs(policy, inputs, mask, args.temperature)  # (B, T)
    old_logprobs = pad_sequence(column(rows, "old_logprobs"), batch_first=True)
    rewards = pad_sequence(column(rows, "rewards"), batch_first=True)
    N = sum(row["rewards"].count_nonzero().item() for row in batch)
    clip = 0.3 if args.clip is None else args.clip
    L_RL = rlmec_loss(logprobs, old_logprobs, rewards, clip, N)  # B5
    return L_RL + args.imitation_weight * L_IR  # B7


def logratios(policy, pairs, name):
    """C1: log pi / pi_ref (B,) of the preferred or the rejected response of each pair."""
    inputs, mask = pack(column(pairs, "prompt_ids"), column(pairs, f"{name}_ids"), policy)
    logprobs = response_logprobs(policy, inputs, mask).sum(dim=1)
    return logprobs - torch.stack(column(pairs, f"ref_{name}"))


# --- Plumbing: nothing to learn below this line ---

@dataclass
class Job:
    """What a method's loop changes, and a killed run needs to go on."""
    method: str
    models: dict  # policy, reference; with PPO value, reward
    trained: torch.nn.ModuleDict  # those of them that the optimiser changes
    optimizer: torch.optim.Optimizer
    validation: list  # held-out problems
    tokenizer: object
    state: dict  # what a killed run had saved; empty: none
    log: list  # a row an update: the CSV
    seconds: float = 0.0


# --- Copies from stage 2: the GRM's prompts, and the steps of a response ---

# B2: the fixed words in the generative model's prompts
INSTRUCTIONS = {
    "solution": "\nReference solution:\n",
    "attempt": "\nAttempt:\n",
    "rewrite": "\nCorrected attempt:\n",
    "locate": "\nFirst wrong step:\n",
}


@cache
def ids_of(text, tokenizer):
    """Token ids of a fixed text: an instruction, or a step's label such as [3]."""
    return tokenizer(text, add_special_tokens=False).input_ids


def grm_prompt(task, problem, response_ids, tokenizer, ends):
    """B2: ids of (x, y*, y^) for `rewrite`; for `locate` with a label before every step, as in
    3+2=4;+1=5 -> [1]3+2=4;[2]+1=5"""
    ids = [*problem["prompt_ids"]]
    for part, text_ids in (("solution", problem["solution_ids"]), ("attempt", response_ids)):
        ids += ids_of(INSTRUCTIONS[part], tokenizer)
        if task == "rewrite":
            ids += [token for token in text_ids if token not in ends]
        else:
            for k, step in enumerate(steps_of(text_ids, tokenizer, ends), 1):
                ids += ids_of(f"[{k}]", tokenizer) + step
    return ids + ids_of(INSTRUCTIONS[task], tokenizer)


# A step of a solution: "3+2=5;" in a chain of sums, a sentence, or a line
STEP = re.compile(r"""
    [^\s;]          # begins with any character but a space,
    [^\n;]*?        # goes on within its line,
    (?: ;           # and ends with a semicolon,
      | \.(?=\s)    # with a full stop before a space,
      | $ )         # or with the line
    """, re.VERBOSE | re.MULTILINE)


def token_texts(ids, tokenizer):
    """The text that each token adds: joined, they are decode(ids). A character of several tokens
    stands at the last of them. A few tokens are decoded at a time, so it is fast for long ids."""
    whole = tokenizer.decode(ids)
    texts = [""] * len(ids)
    place = 0  # in `whole`: where the text that is still missing begins
    first = 0  # the first token whose text is still missing
    back = 0  # where the text before it begins: decoded with it, since it may change spaces

    for k in range(len(ids)):
        waiting = k - first
        if waiting > 32 and waiting.bit_count() > 1:  # no characters: look at 64, 128, 256, ...
            continue

        known = tokenizer.decode(ids[back:first])
        text = tokenizer.decode(ids[back:k + 1])[len(known):]
        if text and not text.endswith("\ufffd") and whole.startswith(text, place):
            texts[k] = text
            place += len(text)
            back = first
            first = k + 1

    if ids:
        texts[-1] += whole[place:]  # a character that the limit cut
    return texts


def steps_of(ids, tokenizer, ends):
    """The steps of a response, each a list of ids, without the end token:
    3+2=4;+1=5</s> -> 3+2=4; and +1=5"""
    ids = [token for token in ids if token not in ends]
    texts = token_texts(ids, tokenizer)
    stops = [*accumulate(map(len, texts))]  # the character behind each token

    starts = []  # the first token of each step
    for step in STEP.finditer("".join(texts)):
        t = bisect(stops, step.start())  # its first character stands at this token
        while t > 0 and not texts[t - 1]:  # the last of its tokens: back to the first
            t -= 1
        starts.append(t)
    borders = [0, *starts[1:], len(ids)]  # what precedes the first step belongs to it
    return [ids[a:b] for a, b in pairwise(borders)]


def is_pair(row):
    """A1: a row of edits.jsonl that has a preferred response and an edit that changes something."""
    return row["chosen"] is not None and bool(row["edit_ops"])


# --- Copies from stage 1: E1, and what is right ---

def edit_ops(a, b):
    """E1: the operations of one optimal path from a to b, each [op, i, j] with op in replace,
    delete, insert, i an index in a, j in b; their number is the edit distance ED(a, b).

    edit_ops("kitten", "sitting") -> [["replace", 0, 0], ["replace", 4, 4], ["insert", 6, 6]]
    """
    # the common beginning is kept; the rest is aligned
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    a = np.array([*a[start:]])
    b = np.array([*b[start:]])
    differ = a[:, None] != b  # (len(a), len(b))

    # D[i, j], the distance of a[:i] and b[:j], is the least of
    #   D[i-1, j] + 1 (delete), D[i-1, j-1] + [a_i != b_j] (replace or keep), D[i, j-1] + 1 (insert)
    offsets = np.arange(len(b) + 1)  # 0, 1, 2, ...: the cost of insertions alone
    D = np.arange(len(a) + 1)[:, None] + offsets
    for i in range(1, len(a) + 1):
        delete = D[i - 1, 1:] + 1
        replace = D[i - 1, :-1] + differ[i - 1]
        D[i, 1:] = np.minimum(delete, replace)
        # insertions run along the row: D[i, j] = min over k <= j of D[i, k] + (j - k)
        D[i] = np.minimum.accumulate(D[i] - offsets) + offsets

    # from the last cell back to the first
    ops = []
    i = len(a)
    j = len(b)
    while i > 0 or j > 0:
        if i > 0 and j > 0 and not differ[i - 1, j - 1]:  # equal: kept
            i -= 1
            j -= 1
        elif i > 0 and D[i, j] == D[i - 1, j] + 1:
            i -= 1
            ops.append(["delete", start + i, start + j])
        elif D[i, j] == D[i, j - 1] + 1:
            j -= 1
            ops.append(["insert", start + i, start + j])
        else:
            i -= 1
            j -= 1
            ops.append(["replace", start + i, start + j])
    return ops[::-1]


def is_right(ids, problem, tokenizer, ends):
    """Whether a response (ids) has ended and breaks no rule; else whether it has the steps of a
    right solution; else its final answer. None where nobody knows."""
    body = [token for token in ids if token not in ends]
    text = tokenizer.decode(body, skip_special_tokens=True)
    if problem.get("rules"):
        right = not any(re.search(rule, text) for rule in problem["rules"])
    elif problem.get("solutions"):
        steps = STEP.findall(text)
        right = any(steps == STEP.findall(solution) for solution in problem["solutions"])
    elif problem.get("right"):
        right = re.search(problem["right"], text) is not None
    else:
        return None
    return right and ids[-1] in ends


# --- Batches ---

def batches(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]


def column(rows, name):
    return [row[name] for row in rows]


def select(inputs, batch, rows):
    """Some rows of the model inputs and of a rollout, without columns in which all have ended."""
    padding = (~batch["mask"][rows]).all(dim=0).sum()
    inputs = {name: x[rows, :x.shape[1] - padding] for name, x in inputs.items()}
    batch = {name: x[rows, :x.shape[1] - padding] for name, x in batch.items()}
    return inputs, batch


@torch.no_grad()
def forward_all(function, model, prompts, responses, args, *more):
    """function(model, inputs, mask, *more) of all rows, a micro-batch at a time: (B, T)."""
    lengths = [len(response) for response in responses]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)  # like lengths: less padding
    outputs = {}  # by the number of the row
    for part, mine, _ in micro_batches(order, args.micro_batch):
        inputs, mask = pack([prompts[k] for k in mine], [responses[k] for k in mine], model)
        output = function(model, inputs, mask, *more)
        own = [row[m].cpu() for row, m in zip(output, mask)]
        outputs.update(zip(part, gather(own, len(part))))

    in_order = [outputs[k] for k in range(len(lengths))]
    return pad_sequence(in_order, batch_first=True).to(args.device)


# --- Over several processes ---

def micro_batches(rows, size):
    """Parts of `size` rows a process: the whole part, the rows of it that are this process's, and
    their weight, 1. A process without a row gets another's with weight 0: all must take part."""
    for part in batches(rows, size * WORLD):
        mine = part[RANK::WORLD]
        if mine:
            yield part, mine, 1.0
        else:
            yield part, part[:1], 0.0


def gather(rows, size):
    """The inverse of part[RANK::WORLD]: all processes' rows of a part of `size`, in its order."""
    shares = [rows] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, rows)
    return [shares[k % WORLD][k // WORLD] for k in range(size)]


def sum_over_processes(numbers):
    """A dictionary of numbers, each summed over all processes."""
    total = Counter()
    for share in gather([numbers], WORLD):
        for name, x in share.items():
            total[name] += x
    return total


def seed_update(args, number):
    """Seed an update: the returned generator is equal on all processes, torch's differs."""
    rng = random.Random(f"{args.seed} {number}")
    torch.manual_seed(rng.getrandbits(60) + RANK)
    return rng


def shard(model, args):
    """--fsdp: every process keeps a part of each weight."""
    if args.fsdp and WORLD > 1:
        mesh = dist.init_device_mesh(torch.device(args.device).type, (WORLD,))
        layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
        for module in [*layers, model]:
            fully_shard(module, mesh=mesh)
            # gradients are sums, not means: losses are divided by the N of the whole batch
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model.to(args.device)


def optimizer_step(optimizer, args):
    """A step on the gradient of the whole batch, clipped to norm 1 for each model."""
    for group in optimizer.param_groups:  # a model each
        parameters = group["params"]
        if WORLD > 1 and not args.fsdp:  # --fsdp has summed them already
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0)

    optimizer.step()
    optimizer.zero_grad()


# --- A job: its models, its log, and how a killed one goes on ---

def open_model(auto_class, path, args, **options):
    """A model of an earlier stage, on the device; weights missing there (the value head) are 0."""
    model, info = auto_class.from_pretrained(path, output_loading_info=True, **options)
    for name in info["missing_keys"]:
        torch.nn.init.zeros_(model.get_parameter(name))
    return shard(model, args) if args.fsdp else model.to(args.device)


def open_job(method, validation, state, tokenizer, args):
    """The models of a method, all but the reward model from the SFT policy, and its optimiser."""
    run = Path(args.run)
    sft = run / "policy"
    policy = open_model(hf.AutoModelForCausalLM, sft, args)
    reference = open_model(hf.AutoModelForCausalLM, sft, args)
    models = {"policy": policy, "reference": reference}
    trained = torch.nn.ModuleDict({"policy": policy})
    made = run / "01_args.json"  # a run folder from elsewhere may not have it
    pretrained = made.exists() and json.load(open(made))["model"]
    kind, lr, pretrained_lr = METHODS[method]
    if pretrained:
        lr = pretrained_lr
    if args.lr is not None:
        lr = args.lr
    value_lr = 10 * lr if args.value_lr is None else args.value_lr
    groups = [{"params": policy.parameters(), "lr": lr}]

    if method in PPO:
        auto_class = hf.AutoModelForSequenceClassification
        value = open_model(auto_class, sft, args, num_labels=1)
        models["value"] = trained["value"] = value
        models["reward"] = open_model(auto_class, run / f"reward_{kind}", args)
        groups.append({"params": value.parameters(), "lr": value_lr})

    print(f"{method}: learning rates", *[f"{group['lr']:g}" for group in groups])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    if state.get("method") != method:  # it is another method's
        state = {}
    return Job(method, models, trained, optimizer, validation, tokenizer, state, log=[])


def read_state(path, args):
    """What a killed run with the same flags had saved; {} if there was none."""
    if not path.exists():
        return {}
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds
        fail(f"{path}: not readable ({type(error).__name__}); remove it to start again")

    for name, value in state["args"].items():
        if name != "overwrite" and vars(args).get(name) != value:
            fail(f"{path}: the killed run had --{name} {value}; remove it to start again")
    return state


def resume(job):
    """Put the job where the killed run had saved it."""
    job.log = job.state["log"]
    job.seconds = job.log[-1]["seconds"]
    set_state_dict(
        job.trained,
        job.optimizer,
        model_state_dict=job.state["weights"],
        optim_state_dict=job.state["moments"],
        options=WHOLE,
    )
    print(f"{job.method}: goes on after update {len(job.log)}; to start again, remove 03_state.pt")


def save_state(job, path, args):
    """Weights, optimiser and log: written aside, then renamed."""
    weights, moments = get_state_dict(job.trained, job.optimizer, options=WHOLE)
    if RANK == 0:
        part = Path(f"{path}.part")
        state = {"args": vars(args), "method": job.method, "log": job.log}
        torch.save(state | {"weights": weights, "moments": moments}, part)
        part.replace(path)


def validate(job, update, updates, args):
    """Eight to fifteen times a run, samples for the held-out problems: val_kl, the mean of
    sum_t log pi - log pi_ref, in nats; accuracy, the share of right responses, where known."""
    every = max(1, updates // 8)
    if not job.validation or (update % every != 0 and update != updates):
        return {}

    prompts = column(job.validation, "prompt_ids")
    responses = sample(job.models["policy"], prompts, args, args.temperature)
    logprobs = forward_all(
        response_logprobs, job.models["policy"], prompts, responses, args, args.temperature)
    ref_logprobs = forward_all(
        response_logprobs, job.models["reference"], prompts, responses, args, args.temperature)
    metrics = {"val_kl": (logprobs - ref_logprobs).sum(dim=1).mean().item()}

    ends = np.atleast_1d(job.models["policy"].config.eos_token_id)
    right = [is_right(ids, problem, job.tokenizer, ends)
             for ids, problem in zip(responses, job.validation)]
    if None not in right:
        metrics["accuracy"] = float(np.mean(right))
    return metrics


def finish_update(job, row, bar, args):
    """Log an update, show it, and now and then save where the job stands."""
    if not np.isfinite(sum(row.values())):
        fail(f"{job.method}: not finite any more, {row}; lower --lr or raise --kappa")

    job.log.append(row)
    bar.set_postfix({name: row[name] for name in ("score", "kl", "accuracy") if name in row})
    if row["update"] % args.save_every == 0:
        save_state(job, f"{args.run}/03_state.pt", args)


# --- Files ---

def fail(message):
    """Bad input ends a stage with one line and exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def json_lines(path):
    if not Path(path).is_file():
        fail(f"{path} is missing; an earlier stage makes it")
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write_text(path, text):
    """Written aside, then renamed: nobody reads half a file."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def save_model(path, model, tokenizer, state_dict=None):
    """A folder for from_pretrained, written aside, then renamed. state_dict: gathered weights of a
    model that is spread over several processes."""
    part = Path(f"{path}.part")
    model.save_pretrained(part, state_dict=state_dict)
    tokenizer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.replace(path)


def start_stage(args, stage, later):
    """Make the run folder and save the arguments. What later stages made from the old outputs would
    be stale: it stops this stage, or goes with --overwrite."""
    run = Path(args.run)
    for pattern in later:
        for path in [*run.glob(pattern)]:
            if not args.overwrite:
                fail(f"{path} would be stale: name another --run, or remove it with --overwrite")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    run.mkdir(parents=True, exist_ok=True)
    write_text(run / f"{stage}_args.json", json.dumps(vars(args)) + "\n")


def save_policy(job, args):
    """The policy and its CSV, a row an update."""
    path = Path(args.run) / job.method
    weights = None
    if args.fsdp:
        weights, _ = get_state_dict(job.models["policy"], [], options=WHOLE)
    if RANK > 0:
        return

    save_model(path, job.models["policy"], job.tokenizer, weights)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=job.log[-1], lineterminator="\n")
    writer.writeheader()
    writer.writerows(job.log)  # between validations their columns are empty
    write_text(f"{path}.csv", text.getvalue())


def chosen_methods(args, tokenizer, state):
    """The methods of --method that need no reward model, or whose reward model is there; it must
    have the policy's vocabulary."""
    there = []
    for method in SETS.get(args.method, [args.method]):
        kind = METHODS[method][0]
        path = f"{args.run}/reward_{kind}"
        if kind and not Path(path).is_dir():
            print(f"{method} is left out: no {path}, which 02_reward_model.py makes")
        elif kind and hf.AutoTokenizer.from_pretrained(path).get_vocab() != tokenizer.get_vocab():
            fail(f"{path}: its vocabulary is not that of the policy; run 02_reward_model.py again")
        else:
            there.append(method)
    if not there:
        fail(f"{args.run}: no reward model for --method {args.method}; run 02_reward_model.py")
    if state:  # those before it are finished
        there = there[there.index(state["method"]):]
    return there


def left_out(method, args):
    """A method without rows to learn from: an error if it alone is to be trained."""
    message = f"{method} is left out: there is no pair, or no right sample, to learn from"
    if args.method == method:
        fail(message)
    print(message)


def main(args):
    run = Path(args.run)
    tokenizer = hf.AutoTokenizer.from_pretrained(run / "policy")
    if args.max_new_tokens is None:
        args.max_new_tokens = json.load(open(run / "01_args.json"))["max_new_tokens"]
    for name in ABOVE_0:
        if getattr(args, name) <= 0:
            fail(f"--{name} must be above 0")
    state = read_state(run / "03_state.pt", args)
    methods = chosen_methods(args, tokenizer, state)
    if RANK == 0:
        start_stage(args, "03", ["responses.*", "eval.*", "report.*"])

    problems = json_lines(run / "problems.jsonl")
    training = [problem for problem in problems if problem["split"] == "train"]
    validation = [problem for problem in problems if problem["split"] == "val"]
    samples = []  # B8: drawn once, for rejection sampling and both kinds of RLMEC
    rewarded = []  # the same samples, rewritten and rewarded once, for both kinds of RLMEC

    for method in methods:
        start = time.time()
        job = open_job(method, validation, state, tokenizer, args)
        reference = job.models["reference"]
        if method in PPO:
            rows = training
        elif method in DPO:
            rows = preference_pairs(method, reference, run, args)
        else:
            samples = samples or draw_samples(reference, training, tokenizer, args)
            if method == "rejection":
                rows = right_samples(samples, args)
            else:
                rewarded = rewarded or collect(reference, samples, tokenizer, args)
                rows = rewarded
        if not rows:
            left_out(method, args)
            continue
        job.seconds = time.time() - start
        train = train_ppo if method in PPO else train_offline
        train(job, rows, args)
        save_policy(job, args)
        del job, reference  # these models go before those of the next method come

    if RANK == 0:
        (run / "03_state.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    args = Args(**vars(hf.HfArgumentParser(Args).parse_args()))
    if WORLD > 1:  # under torchrun
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        if args.device == "cuda":
            torch.cuda.set_device(RANK % torch.cuda.device_count())
    sys.stdout.reconfigure(errors="replace")  # whatever the console can show
    # cache_enabled=False: no stale bfloat16 copies of weights that have changed
    device_type = torch.device(args.device).type
    with torch.autocast(device_type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        main(args)

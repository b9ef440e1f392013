"""Stage 3: PPO with a reward on every token, beside ordinary PPO with one a response; RLMEC; and
the baselines DPO and rejection sampling.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, arXiv 2401.06081).
Equations: A7 to A9, B3 to B8, E1; ours: C1 (DPO, Rafailov et al., 2023), C2 (rejection sampling).
    symbol        variable                     shape
    a_t           input_ids[:, -T:]            (B, T)   response tokens, the end token included
    pi, pi_old    logprobs, old_logprobs       (B, T)   log pi(a_t | s_t)
    pi_ref        ref_logprobs                 (B, T)   the frozen SFT policy
    r_t, r^_t     scores, rewards              (B, T)   of the reward model; minus the KL penalty
    V(s_t), A^_t  values, advantages           (B, T)
    p_t           probabilities                (B, T)   of the generative reward model (GRM)
    y~, gamma_t   rewrite_ids, gamma           (B, T~)  its correction, the imitation weights
One index convention, for a prompt p1 p2 and a response a1 a2 a3, all in columns -T: of the batch:
    input_ids      <pad>  p1   p2   a1   a2   a3      logits at t-1 score token t, so
    logits of             .    a1   a2   a3   .       log-prob and value of a1 are read at p2,
    reward of                       a1   a2   a3      its reward is read at a1 itself.
Simplified against the papers:
  1. GAE is kept with token rewards, our reading; --lam 1 or 0 are the alternatives. A response
     that did not end is treated as terminal.
  2. The value model is a second model, started from the SFT policy, for both kinds of reward.
  3. Rewards are divided by the standard deviation of a response's total reward (stage 2); the
     sequence reward is centred first, because A6 knows it only up to a constant.
  4. B8: one sample a problem, where RLMEC's code draws five at temperature 0.7; rewrites are the
     GRM's likeliest. What is right, the answer says, never the locator.
Reads RUN/policy, problems.jsonl, edits.jsonl, reward_*. Writes a policy and a CSV for each method.
"""

import json, random, re, shutil, sys, time
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, HfArgumentParser,
                          get_cosine_schedule_with_warmup)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

METHODS = {"ppo_token": "token", "ppo_sequence": "sequence", "rlmec": "generative",
           "rlmec_imitation": "generative", "rejection": "generative", "dpo": None,
           "dpo_edit": None}                                   # and their reward models

@dataclass
class Args:
    run: str = HfArg(default="runs/default", help="run folder")
    seed: int = HfArg(default=1, help="seed of prompts and samples")
    overwrite: bool = HfArg(default=False, help="remove what stage 4 made of the old policies")
    method: Literal[("all", "all_baselines", *METHODS)] = HfArg(default="all", help="to train")
    updates: int = HfArg(default=16, help="rollouts; the off-line methods draw all at once")
    rollout_batch: int = HfArg(default=256, help="responses sampled an update")
    ppo_epochs: int = HfArg(default=2, help="A9: passes over a rollout")
    minibatch: int = HfArg(default=64, help="responses an optimiser step")
    lr: float = HfArg(default=1e-4, help="A9: learning rate of the policy")
    value_lr: float = HfArg(default=1e-3, help="A9: learning rate of the value model")
    offline_lr: float = HfArg(default=None, help="B8, C1, C2; default 1e-3, of DPO 3e-5")
    kappa: float = HfArg(default=0.1, help="A7: KL coefficient, kappa, in reward per nat")
    lam: float = HfArg(default=0.95, help="A8: lambda of GAE")
    clip: float = HfArg(default=0.2, help="A9: clip range, epsilon")
    rlmec_clip: float = HfArg(default=0.3, help="B5: clip range, epsilon")
    imitation_weight: float = HfArg(default=1.0, help="B7: weight of L_IR, lambda")
    dpo_beta: float = HfArg(default=1.0, help="C1: b")
    temperature: float = HfArg(default=1.0, help="of samples and of A7, A9, B5")
    max_new_tokens: int = HfArg(default=48, help="longest response, in tokens")
    micro_batch: int = HfArg(default=256, help="rows of a forward pass, at most")
    bf16: bool = HfArg(default=False, help="autocast to bfloat16; the weights stay float32")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="device")

# --- The equations ---
def scores_of(reward_model, inputs, response_mask, kind, scale):
    """A7, the one place where the two runs differ: scores (B, T), in standard deviations.
    token: r_phi(s_t, a_t) on every token. sequence: 1[t = T] R_phi(x, y), all on the last."""
    if kind == "token":
        return token_rewards(reward_model, inputs, response_mask) / scale["std"]
    reward = (sequence_reward(reward_model, inputs) - scale["mean"]) / scale["std"]
    last = response_mask.sum(dim=1, keepdim=True) - 1
    return torch.zeros(response_mask.shape, device=reward.device).scatter(1, last, reward[:, None])

def kl_rewards(scores, old_logprobs, ref_logprobs, kappa):
    """A7: r^_t = r_t - kappa log(pi_old(a_t | s_t) / pi_ref(a_t | s_t)), all (B, T); the KL term
    is a reward and carries no gradient."""
    return scores - kappa * (old_logprobs - ref_logprobs).detach()

def token_values(model, inputs, response_mask):
    """V(s_t) (B, T), read at position t-1, where token t is not yet known; 0 outside."""
    T = response_mask.shape[1]
    return model(**inputs, use_cache=False).logits[:, -T - 1:-1, 0].float() * response_mask

def gae(rewards, values, lam, gamma=1.0):
    """A8: advantages and returns (B, T). delta_t = r^_t + gamma V(s_{t+1}) - V(s_t); rewards and
    values are 0 after the last token, so V(s_{T+1}) = 0, and advantages are 0 there as well."""
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values

def masked_mean(x, mask):
    """Mean of x where mask is true; padding never counts."""
    return (x * mask).sum() / mask.sum()

def masked_whiten(x, mask):
    """x with mean 0 and standard deviation 1 over the tokens of the mask; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

def policy_loss(logprobs, old_logprobs, advantages, response_mask, clip, N):
    """A9: -(1/N) sum_t min(rho_t A^_t, clip(rho_t, 1-eps, 1+eps) A^_t), all (B, T); N: response
    tokens of the whole minibatch, of which these rows may be a part."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -(torch.min(ratio * advantages, clipped * advantages) * response_mask).sum() / N

def value_loss(values, old_values, returns, response_mask, clip, N):
    """A9: (1/2N) sum of the larger squared error, of V and of V clipped around the old V."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (errors * response_mask).sum() / N

def generative_rewards(probabilities, is_right, response_mask):
    """B3: r_t (B, T) from p_t = P_GRM(a_t | rewrite prompt, a_<t) (B, T) and is_right (B,):
    clip(p_t - 0.5, 0, 0.5) in a right response, clip(p_t - 0.5, -0.1, 0) in a wrong one."""
    r = probabilities - 0.5
    return torch.where(is_right[:, None], r.clamp(0, 0.5), r.clamp(-0.1, 0)) * response_mask

def rlmec_loss(logprobs, old_logprobs, rewards, clip, N):
    """B5: -(1/N) sum_t w_t log pi(a_t | s_t), all (B, T), rewards 0 outside the response, with
    w_t = stopgrad[min(rho_t r_t, clip(rho_t, 1-eps, 1+eps) r_t)]; N: tokens with r_t != 0 of the
    whole batch. Where PPO's clip stops the gradient, here the weight is clipped and log pi keeps
    its gradient. No such token: 0, not 0/0."""
    ratio = torch.exp(logprobs - old_logprobs)
    weights = torch.min(ratio * rewards, ratio.clamp(1 - clip, 1 + clip) * rewards).detach()
    return -(weights * logprobs).sum() / max(N, 1)

def imitation_weights(response_ids, rewrite_ids):
    """B6: gamma_t (T~,) of the tokens of the rewrite: 1 where the alignment (E1) replaces or
    inserts, 0.5 where it keeps; so 0.5 for a right response, which is its own rewrite."""
    gamma = torch.full((len(rewrite_ids),), 0.5)
    gamma[[j for op, i, j in edit_ops(response_ids, rewrite_ids) if op != "delete"]] = 1.0
    return gamma

def imitation_loss(logprobs, gamma, M):
    """B6: -(1/M) sum_t gamma_t log pi(y~_t | x, y~_<t), all (B, T~); M: tokens of all rewrites."""
    return -(gamma * logprobs).sum() / M

def dpo_loss(logprob_w, logprob_l, ref_w, ref_l, beta, N):
    """C1: -(1/N) sum of log sigmoid(b [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-
    ))]) over these of N pairs; all (B,), sums over the response tokens."""
    return -F.logsigmoid(beta * ((logprob_w - ref_w) - (logprob_l - ref_l))).sum() / N

def rejection_loss(logprobs, M):
    """C2: -(1/M) sum_t log pi(a_t | s_t) (B, T) of right responses alone; M: all their tokens."""
    return -logprobs.sum() / M

# --- Helpers that stand in several scripts, letter for letter ---
def token_rewards(model, inputs, response_mask):
    """A2: r_t = r_phi(s_t, a_t) (B, T), read at the position of token t; 0 outside."""
    T = response_mask.shape[1]
    return model(**inputs, use_cache=False).logits[:, -T:, 0].float() * response_mask

def sequence_reward(model, inputs):
    """A6: R_phi(x, y) (B,), read at the last token of the response, whatever that token is."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    column = torch.arange(hidden.shape[1], device=hidden.device)
    last = (inputs["attention_mask"] * column).argmax(dim=1)
    return model.score(hidden[torch.arange(len(last)), last])[:, 0].float()

def edit_ops(a, b):
    """E1: the operations of one optimal path from a to b, [op, i, j] with op in replace, delete,
    insert, i in a, j in b; their number is ED(a, b). The first stands where a and b part."""
    number = {item: k for k, item in enumerate([*a, *b])}
    a, b = (np.array([number[item] for item in items], dtype=np.int32) for items in (a, b))
    n = min(len(a), len(b))
    start = int(np.append(a[:n] != b[:n], True).argmax())      # the common beginning is kept
    a, b = a[start:], b[start:]
    column = np.arange(len(b) + 1, dtype=np.int32)
    D = np.tile(column, (len(a) + 1, 1))
    # D[i, j] = min(D[i-1, j] + 1, D[i-1, j-1] + [a_i != b_j], D[i, j-1] + 1)
    for i in range(1, len(a) + 1):
        D[i, 0] = i
        D[i, 1:] = np.minimum(D[i - 1, 1:] + 1, D[i - 1, :-1] + (b != a[i - 1]))
        # insertions run along the row: D[i, j] = min over k <= j of D[i, k] + j - k
        D[i] = np.minimum.accumulate(D[i] - column) + column
    i, j, ops = len(a), len(b), []
    while i or j:                                              # back from the last cell
        keep = i and j and a[i - 1] == b[j - 1]
        op = ("delete" if not keep and i and D[i, j] == D[i - 1, j] + 1 else
              "insert" if not keep and j and D[i, j] == D[i, j - 1] + 1 else "replace")
        i -= op != "insert"
        j -= op != "delete"
        ops += [] if keep else [[op, start + i, start + j]]
    return ops[::-1]

STEP = re.compile(r"[^\s;][^\n;]*?(?:;|\n|\.(?=\s)|$)")        # a line, a sentence, or up to a ;

def final_answer(text):
    """The first number or line behind the last `answer is` or `####`; else the text's last one."""
    *marked, tail = re.split(r"(?i)answer is:?|####", text.strip())
    number = r"(?<![\w:/.])-?\$?\d[\d,]*(?:\.\d+)?(?![\w:/])"
    found = re.findall(number, tail) or tail.strip().split("\n")
    return re.sub(r"[$,]|\.0*$", "", found[0 if marked else -1].strip())

def wrong_steps(text, ended, problem):
    """The one rule of right, 0: hits of the rules, or steps unlike the nearest right solution's,
    place by place, or a wrong answer; 1 more if it did not end. None where nobody knows."""
    steps_of = lambda text: [step.strip() for step in STEP.findall(text)]
    if problem.get("rules"):
        wrong = sum(len(re.findall(rule, text)) for rule in problem["rules"])
    elif problem.get("solutions"):
        wrong = min(sum(a != b for a, b in zip_longest(steps_of(text), steps_of(solution)))
                    for solution in problem["solutions"])
    elif problem.get("answer"):
        wrong = final_answer(text) != final_answer(problem["answer"])
    else:
        return None
    return int(wrong) + (not ended)

def fail(message):
    """Bad input, or a run that cannot go on: one clear line, exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

def read_jsonl(path, *columns):
    """Rows of a JSONL file with their `place`; a fault is named by file, line and column."""
    rows, place = [], path
    try:
        for number, line in enumerate(open(path, encoding="utf-8"), 1):
            place = f"{path}, line {number}"
            row = json.loads(line)
            rows.append({"place": place, **{name: row[name] for name in columns}, **row})
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{place}: no JSON object, or a column is missing ({error!r})")
    return rows or fail(f"{path}: has no rows")

def save(path, *contents):
    """Rows as JSONL, a text, or a model and its tokenizer: written aside, then renamed."""
    part = Path(f"{path}.part")
    for content in contents:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        write = part.write_bytes if isinstance(content, str) else content.save_pretrained
        write(content.encode(errors="backslashreplace") if isinstance(content, str) else part)
    shutil.rmtree(path, ignore_errors=True)
    part.replace(path)

def start_stage(args, stage, later):
    """The run folder, arguments saved. Later stages' outputs stop it, or go with --overwrite."""
    run = Path(args.run)
    for path in [path for pattern in later.split() for path in run.glob(pattern)]:
        if not args.overwrite:
            fail(f"{path} would be stale: name another --run, or remove it with --overwrite")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.mkdir(parents=True, exist_ok=True)
    save(run / f"{stage}_args.json", [asdict(args)])
    torch.manual_seed(args.seed)
    return run

def batches(rows, size):
    """Slices of `size` rows, the last short one included."""
    return [rows[k:k + size] for k in range(0, len(rows), size)]

def pack(prompts, responses, model):
    """Prompts padded on the left to P, responses on the right to T: the model inputs (B, P + T),
    and response_mask (B, T) from lengths, the only mask of losses and metrics."""
    P, T, pad = max(map(len, prompts)), max(map(len, responses)), [model.config.pad_token_id]
    ids = [pad * (P - len(p)) + p + r + pad * (T - len(r)) for p, r in zip(prompts, responses)]
    first = torch.tensor([P - len(p) for p in prompts])[:, None]
    end = torch.tensor([P + len(r) for r in responses])[:, None]
    column = torch.arange(P + T)[None]
    mask = (column >= first) & (column < end)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": mask.long(),
              "position_ids": (column - first).clamp(min=0)}
    return {name: x.to(model.device) for name, x in inputs.items()}, mask[:, P:].to(model.device)

def response_logprobs(model, inputs, response_mask, temperature=1.0):
    """log pi(a_t | s_t) (B, T) of the response tokens, 0 outside: logits at t-1 score token t."""
    T = response_mask.shape[1]
    logits = model(**inputs, logits_to_keep=T + 1, use_cache=False).logits[:, :-1].float()
    logits = logits / temperature if temperature != 1 else logits
    tokens = inputs["input_ids"][:, -T:]
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return -losses.view(tokens.shape) * response_mask

def token_texts(ids, tokenizer):
    """The text that each token adds to the ones before it, spaces included."""
    texts = tokenizer.batch_decode([ids[:k] for k in range(len(ids) + 1)])
    return [longer[len(shorter):] for shorter, longer in zip(texts, texts[1:])]

def steps_of(ids, tokenizer):
    """The steps of a response, each a list of ids, without the end token."""
    ids = [token for token in ids if token != tokenizer.eos_token_id]
    texts = token_texts(ids, tokenizer)
    ends = list(accumulate(map(len, texts)))
    starts = [bisect_right(ends, step.start()) for step in STEP.finditer("".join(texts))]
    return [ids[a:b] for a, b in pairwise([0, *starts[1:], len(ids)])]

INSTRUCTIONS = {"solution": "\nReference solution:\n", "attempt": "\nAttempt:\n",
                "rewrite": "\nCorrected attempt:\n", "locate": "\nFirst wrong step:\n"}

@lru_cache(None)
def words(text, tokenizer):
    """Token ids of fixed words: an instruction, or a step's label, as [3]."""
    return tokenizer(text, add_special_tokens=False).input_ids

def grm_prompt(task, problem, response_ids, tokenizer):
    """B2: ids of (x, y*, y^) for `rewrite`; for `locate` with a label before every step."""
    ids = list(problem["prompt_ids"])
    for part, text in (("solution", problem["solution_ids"]), ("attempt", response_ids)):
        ids += words(INSTRUCTIONS[part], tokenizer)
        if task == "rewrite":
            ids += [token for token in text if token != tokenizer.eos_token_id]
        for k, step in enumerate(steps_of(text, tokenizer) if task == "locate" else [], 1):
            ids += words(f"[{k}]", tokenizer) + step
    return ids + words(INSTRUCTIONS[task], tokenizer)

# --- Sampling ---
@torch.no_grad()
def sample(model, prompts, tokenizer, args, temperature):
    """Draw a response to each prompt (ids) from pi(a_t | s_t), with its end token; 0: likeliest."""
    if len(prompts) > args.micro_batch or not prompts:
        return [row for part in batches(prompts, args.micro_batch)
                for row in sample(model, part, tokenizer, args, temperature)]
    responses, running, cache = [[] for _ in prompts], list(range(len(prompts))), None
    inputs, _ = pack(prompts, responses, model)
    ids, mask, position = inputs.values()
    limit = model.config.max_position_embeddings - ids.shape[1]
    for _ in range(min(args.max_new_tokens, limit)):
        output = model(input_ids=ids, attention_mask=mask, position_ids=position,
                       past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[:, -1].float(), output.past_key_values
        tokens = logits.argmax(dim=1)
        if temperature:                                        # the token in whose share u falls
            shares = (logits / temperature).softmax(dim=1).cumsum(dim=1)
            u = torch.rand(len(tokens), 1, device=args.device) * shares[:, -1:]
            tokens = torch.searchsorted(shares, u, right=True)[:, 0].clamp(max=shares.shape[1] - 1)
        for row, token in zip(running, tokens.tolist()):
            responses[row].append(token)
        alive = (tokens != tokenizer.eos_token_id).nonzero()[:, 0]
        if len(alive) == 0:
            break
        if len(alive) < len(running):                          # who has ended leaves the batch
            cache.batch_select_indices(alive)
            running = [running[k] for k in alive.tolist()]
        ids, position = tokens[alive, None], position[alive, -1:] + 1
        mask = torch.cat([mask[alive], torch.ones_like(ids)], dim=1)
    return responses

def read(function, model, prompts, responses, args, *more):
    """function(model, inputs, mask, *more) of all rows, a micro-batch at a time, as (B, T)."""
    rows = []
    for part in batches([*zip(prompts, responses)], args.micro_batch):
        inputs, mask = pack(*zip(*part), model)
        rows += [values[m] for values, m in zip(function(model, inputs, mask, *more), mask)]
    return pad_sequence(rows, True)

def right_responses(responses, problems, tokenizer):
    """Which responses (ids) are right?"""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [wrong_steps(text, row[-1:] == [tokenizer.eos_token_id], problem) == 0
            for text, row, problem in zip(texts, responses, problems)]

def draw(problems, args):
    """The problems of all updates, in passes of a new order each, the same for all methods."""
    rng, drawn, episodes = random.Random(args.seed), [], args.updates * args.rollout_batch
    while len(drawn) < episodes:
        drawn += rng.sample(problems, len(problems))
    return drawn[:episodes]

@torch.no_grad()
def validate(policy, reference, problems, tokenizer, args):
    """KL(policy, reference), the mean of sum_t log pi - log pi_ref; right responses, if known."""
    prompts = [problem["prompt_ids"] for problem in problems]
    responses = sample(policy, prompts, tokenizer, args, args.temperature)
    logprobs, ref_logprobs = (read(response_logprobs, model, prompts, responses, args,
                                   args.temperature) for model in (policy, reference))
    row = {"val_kl": (logprobs - ref_logprobs).sum(dim=1).mean().item()}
    if {"solutions", "answer", "rules"} & {*problems[0]}:
        row["accuracy"] = float(np.mean(right_responses(responses, problems, tokenizer)))
    return row

def optimizer_step(optimizer):
    """A step with gradients clipped to norm 1 a model (a parameter group); none are left."""
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()

def open_model(auto_class, path, args, **options):
    """A model folder of an earlier stage, on the device."""
    return auto_class.from_pretrained(path, **options).to(args.device)

# --- PPO ---
@torch.no_grad()
def rollout(kind, models, prompts, tokenizer, scale, args):
    """Sample a response to each prompt, and compute what the update needs: statistics, the model
    inputs, and a dictionary of (B, T) tensors."""
    responses = sample(models["policy"], prompts, tokenizer, args, args.temperature)
    inputs, mask = pack(prompts, responses, models["policy"])
    rows = prompts, responses, args
    logprobs = read(response_logprobs, models["policy"], *rows, args.temperature)
    ref_logprobs = read(response_logprobs, models["reference"], *rows, args.temperature)
    values = read(token_values, models["value"], *rows)
    scores = read(scores_of, models["reward"], *rows, kind, scale)
    rewards = kl_rewards(scores, logprobs, ref_logprobs, args.kappa)           # A7
    advantages, returns = gae(rewards, values, args.lam)                       # A8
    total = scores.sum(dim=1)                                  # sums a response, means a rollout
    row = {"score": total.mean().item(), "score_std": total.std().item(),
           "reward": rewards.sum(dim=1).mean().item(),
           "kl": (logprobs - ref_logprobs).sum(dim=1).mean().item(),
           "entropy": -masked_mean(logprobs, mask).item(),     # estimated by the sample itself
           "advantage_rms": masked_mean(advantages ** 2, mask).sqrt().item(),
           "length": mask.sum().item() / len(mask)}
    return row, inputs, {"mask": mask, "old_logprobs": logprobs, "old_values": values,
                         "returns": returns, "advantages": masked_whiten(advantages, mask)}

def minibatch_step(models, optimizer, inputs, batch, rows, args):
    """One optimiser step of A9 on some rows of a rollout; means over the N response tokens."""
    N, total = batch["mask"][rows].sum().item(), Counter()
    for micro in rows.split(args.micro_batch):
        part = {name: x[micro] for name, x in batch.items()}
        part_inputs = {name: x[micro] for name, x in inputs.items()}
        mask, old_logprobs = part["mask"], part["old_logprobs"]
        logprobs = response_logprobs(models["policy"], part_inputs, mask, args.temperature)
        loss = policy_loss(logprobs, old_logprobs, part["advantages"], mask, args.clip, N)
        loss.backward()                                        # its activations go before V's come
        values = token_values(models["value"], part_inputs, mask)
        loss_v = value_loss(values, part["old_values"], part["returns"], mask, args.clip, N)
        loss_v.backward()
        logratio = (logprobs - old_logprobs).detach()
        change = logratio.exp() - 1
        total.update(policy_loss=loss.item(), value_loss=loss_v.item(),
                     approx_kl=((change - logratio) * mask).sum().item() / N,  # Schulman's k3
                     clipfrac=((change.abs() > args.clip) * mask).sum().item() / N)
    if not np.isfinite(sum(total.values())):
        fail(f"PPO: not finite any more, {dict(total)}; lower --lr or raise --kappa")
    optimizer_step(optimizer)
    return total

def open_models(kind, run, args):
    """The four models of PPO; the value model starts from the SFT policy, with V = 0."""
    Reward = (AutoModelForTokenClassification if kind == "token"
              else AutoModelForSequenceClassification)
    value = open_model(AutoModelForTokenClassification, run / "policy", args, num_labels=1)
    for name, weight in value.named_parameters():
        if not name.startswith(value.base_model_prefix + "."):
            torch.nn.init.zeros_(weight)
    return {"policy": open_model(AutoModelForCausalLM, run / "policy", args), "value": value,
            "reference": open_model(AutoModelForCausalLM, run / "policy", args),
            "reward": open_model(Reward, run / f"reward_{kind}", args)}

def ppo(kind, train, val, tokenizer, run, args):
    """A policy trained on one kind of reward, and its log: one row an update."""
    size, log, seconds, drawn = args.rollout_batch, [], 0.0, draw(train, args)
    scale = json.loads((run / "reward_metrics.json").read_text())[kind]["scale"]
    models = open_models(kind, run, args)
    optimizer = torch.optim.AdamW([{"params": models["policy"].parameters(), "lr": args.lr},
                                   {"params": models["value"].parameters(), "lr": args.value_lr}],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    bar = tqdm(batches(drawn, size), desc=f"ppo_{kind}")
    for number, problems in enumerate(bar, 1):
        start = time.time()
        prompts = [problem["prompt_ids"] for problem in problems]
        row, inputs, batch = rollout(kind, models, prompts, tokenizer, scale, args)
        steps = [minibatch_step(models, optimizer, inputs, batch, rows, args)
                 for _ in range(args.ppo_epochs)
                 for rows in torch.randperm(size, device=args.device).split(args.minibatch)]
        row.update({name: float(np.mean([step[name] for step in steps])) for name in steps[0]})
        seconds += time.time() - start
        row = {"update": number, "episodes": number * size, "seconds": seconds, **row}
        if val and (number % 2 == 0 or number == args.updates):
            row.update(validate(models["policy"], models["reference"], val, tokenizer, args))
        log.append(row)
        bar.set_postfix({k: f"{row[k]:.2f}" for k in ("score", "kl", "accuracy") if k in row})
    return models["policy"], log

# --- The off-line methods: RLMEC, rejection sampling, DPO ---
def rewrite(grm, wrong, tokenizer, args, drop):
    """B4: the GRM locates the first wrong step of a wrong sample, keeps the steps before it and
    writes the rest anew, as `rewrite_ids`. Where that is wrong, the sample is dropped."""
    located = []
    answers = sample(grm, [grm_prompt("locate", row["problem"], row["response_ids"], tokenizer)
                           for row in wrong], tokenizer, args, 0.0)
    for row, answer in zip(wrong, answers):
        steps = steps_of(row["response_ids"], tokenizer)
        labels = [words(f"[{k}]", tokenizer) for k in range(1, len(steps) + 1)]
        if answer[:-1] in labels:                              # its last token is the end
            located.append({**row, "kept": sum(steps[:labels.index(answer[:-1])], [])})
    prompts = [row["grm_prompt"] + row["kept"] for row in located]
    for row, ending in zip(located, sample(grm, prompts, tokenizer, args, 0.0)):
        row["rewrite_ids"] = row["kept"] + ending
    right = right_responses([row["rewrite_ids"] for row in located],
                            [row["problem"] for row in located], tokenizer)
    drop["the locator names no step"] = len(wrong) - len(located)
    drop["the rewrite is wrong"] = right.count(False)
    return [row for row, good in zip(located, right) if good]

@torch.no_grad()
def collect(policy, grm, problems, tokenizer, args):
    """B8: one sample a problem, rewarded (B3), rewritten (B4) and aligned (B6) once: dictionaries
    with ids as they were sampled, old_logprobs and rewards (T,), gamma (T~,)."""
    prompts = [problem["prompt_ids"] for problem in problems]
    responses = sample(policy, prompts, tokenizer, args, args.temperature)
    samples = [{"problem": problem, "prompt_ids": problem["prompt_ids"], "response_ids": ids,
                "right": good, "rewrite_ids": ids,
                "grm_prompt": grm_prompt("rewrite", problem, ids, tokenizer)}
               for problem, ids, good in zip(
                   problems, responses, right_responses(responses, problems, tokenizer))]
    fitting = [row for row in samples if len(row["grm_prompt"]) + len(row["response_ids"])
               <= grm.config.max_position_embeddings]
    drop = Counter({"it exceeds the GRM's context": len(samples) - len(fitting)})
    right, wrong = ([row for row in fitting if row["right"] == good] for good in (True, False))
    rewritten = rewrite(grm, wrong, tokenizer, args, drop)
    print(f"{len(samples)} sampled: {len(right)} right, {len(rewritten)} wrong and rewritten, "
          f"dropped: {dict(+drop)}")
    samples = right + rewritten or fail("the GRM could rewrite no sample; train it longer")
    column = lambda name: [row[name] for row in samples]
    rows = column("response_ids"), args
    logprobs = read(response_logprobs, policy, column("prompt_ids"), *rows, args.temperature)
    probabilities = read(response_logprobs, grm, column("grm_prompt"), *rows).exp()
    is_right = torch.tensor(column("right"), device=args.device)
    rewards = generative_rewards(probabilities, is_right, 1)   # B3; padding is cut off below
    for k, row in enumerate(samples):
        T = len(row["response_ids"])
        gamma = imitation_weights(row["response_ids"], row["rewrite_ids"]).to(args.device)
        row.update(old_logprobs=logprobs[k, :T], rewards=rewards[k, :T], gamma=gamma)
    return samples

@torch.no_grad()
def pairs_of(method, run, reference, args):
    """C1: stage 2's pairs, y+ the preferred sibling or the edit; log pi_ref is computed once."""
    count = json.loads((run / "02_args.json").read_text())["pairs"]
    rows = [row for row in read_jsonl(run / "edits.jsonl", "chosen", "edit_ops")
            if row["split"] == "train" and row["chosen"] is not None and row["edit_ops"]][:count]
    name = "edited_ids" if method == "dpo_edit" else "chosen_token_ids"
    prompts, better, worse = ([row[key] for row in rows]
                              for key in ("prompt_ids", name, "rejected_ids"))
    refs = [read(response_logprobs, reference, prompts, ids, args).sum(dim=1)
            for ids in (better, worse)]
    return [dict(zip(("prompt_ids", "better_ids", "worse_ids", "ref_better", "ref_worse"), row))
            for row in zip(prompts, better, worse, *refs)]

def offline_loss(method, policy, rows, batch, args):
    """The part of a batch's loss that some of its rows add, and statistics to log."""
    column = lambda name: [row[name] for row in rows]
    logprobs = lambda name, temperature=1.0: read(
        response_logprobs, policy, column("prompt_ids"), column(name), args, temperature)
    if method.startswith("dpo"):
        w, l = (logprobs(name).sum(dim=1) for name in ("better_ids", "worse_ids"))
        ref_w, ref_l = (torch.stack(column(name)) for name in ("ref_better", "ref_worse"))
        return dpo_loss(w, l, ref_w, ref_l, args.dpo_beta, len(batch)), {                     # C1
            "logprob_better": (w - ref_w).sum().item() / len(batch),
            "logprob_worse": (l - ref_l).sum().item() / len(batch)}
    M = sum(len(row["rewrite_ids"]) for row in batch)
    if method == "rejection":                                  # its rows are right as they are
        return rejection_loss(logprobs("response_ids"), M), {}                                # C2
    old_logprobs, rewards, gamma = (
        pad_sequence(column(name), True) for name in ("old_logprobs", "rewards", "gamma"))
    loss = args.imitation_weight * imitation_loss(logprobs("rewrite_ids"), gamma, M)          # B6
    if method == "rlmec":
        N = sum((row["rewards"] != 0).sum().item() for row in batch)
        loss = loss + rlmec_loss(logprobs("response_ids", args.temperature), old_logprobs,    # B7
                                 rewards, args.rlmec_clip, N)                                 # B5
    return loss, {}

def offline(method, rows, val, tokenizer, run, args):
    """B8: three passes over rows that were made once; the policy and its log, one row a step."""
    rows = rows or fail(f"{method}: no row to train on")
    policy, reference = (open_model(AutoModelForCausalLM, run / "policy", args) for _ in "pr")
    plan = [[rows[k] for k in indices.tolist()] for _ in range(3)
            for indices in torch.randperm(len(rows)).split(args.minibatch)]
    lr = args.offline_lr or (3e-5 if method.startswith("dpo") else 1e-3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(plan)), len(plan))
    log, seconds = [], 0.0
    for number, batch in enumerate(tqdm(plan, desc=method), 1):
        start, total = time.time(), Counter()
        for part in batches(batch, args.micro_batch):
            loss, statistics = offline_loss(method, policy, part, batch, args)
            loss.backward()
            total.update(loss=loss.item(), **statistics)
        if not np.isfinite(total["loss"]):
            fail(f"{method}: the loss is {total['loss']}; lower its learning rate")
        optimizer_step(optimizer)
        schedule.step()
        seconds += time.time() - start
        log.append({"update": number, "episodes": len(rows), "seconds": seconds, **total})
        if val and (number % max(1, len(plan) // 10) == 0 or number == len(plan)):
            log[-1].update(validate(policy, reference, val, tokenizer, args))
    return policy, log

# --- The stage ---
def train_policy(method, problems, samples, tokenizer, run, args):
    """The policy and the log of a method; `samples` are collected once for all that use them."""
    train, val = ([row for row in problems if row["split"] == split] for split in ("train", "val"))
    torch.manual_seed(args.seed)                               # the same prompts for all methods
    if method.startswith("ppo"):
        return ppo(METHODS[method], train, val, tokenizer, run, args)
    policy = open_model(AutoModelForCausalLM, run / "policy", args)
    if method.startswith("dpo"):
        return offline(method, pairs_of(method, run, policy, args), val, tokenizer, run, args)
    if not samples:
        grm = open_model(AutoModelForCausalLM, run / "reward_generative", args)
        solved = [row for row in train if "solution_ids" in row]
        samples += collect(policy, grm, draw(solved, args), tokenizer, args)
    torch.manual_seed(args.seed)
    rows = [row for row in samples if row["right"] or method != "rejection"]
    return offline(method, rows, val, tokenizer, run, args)

def main(args):
    run, samples = Path(args.run), []
    problems = read_jsonl(run / "problems.jsonl", "id", "split", "prompt_ids")
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    methods = {"all": [*METHODS][:4], "all_baselines": METHODS}.get(args.method, [args.method])
    folder = lambda method: run / f"reward_{METHODS[method]}"
    there = [method for method in methods if not METHODS[method] or folder(method).is_dir()]
    print("without a reward model of stage 2:", sorted({*methods} - {*there}) or "none")
    for method in there or fail(f"{run}: no reward model for {args.method}; 02_reward_model.py"):
        if METHODS[method] and (AutoTokenizer.from_pretrained(folder(method)).get_vocab()
                                != tokenizer.get_vocab()):
            fail(f"{folder(method)}: its vocabulary is not that of {run}/policy")
    start_stage(args, "03", "responses.jsonl eval.json *.html")
    for method in there:
        policy, log = train_policy(method, problems, samples, tokenizer, run, args)
        columns = list(dict.fromkeys(name for row in log for name in row))
        lines = [columns] + [[row.get(name, "") for name in columns] for row in log]
        save(run / f"{method}.csv", "".join(",".join(map(str, x)) + "\n" for x in lines))
        save(run / method, policy, tokenizer)

if __name__ == "__main__":
    args = HfArgumentParser(Args).parse_args_into_dataclasses()[0]
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.bf16, False):
        main(args)                                             # False: no cache of old weights

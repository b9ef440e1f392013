"""Stage 3: PPO with a reward on every token, beside ordinary PPO with one a response; and RLMEC.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, arXiv 2401.06081).
Equations: A7 to A9, B3 to B8, E1.
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
Reads RUN/policy, problems.jsonl, reward_*. Writes RUN/ppo_token, ppo_sequence, rlmec,
rlmec_imitation, and a CSV each.
    python 03_ppo.py                               ninety seconds on two CPU cores
"""

import json, random, re, shutil, sys, time
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm, trange
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, HfArgumentParser,
                          get_cosine_schedule_with_warmup)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

METHODS = {"ppo_token": "token", "ppo_sequence": "sequence", "rlmec": "generative",
           "rlmec_imitation": "generative"}                    # and their reward models

@dataclass
class Args:
    run: str = HfArg(default="runs/default", help="run folder")
    seed: int = HfArg(default=1, help="seed of prompts and samples")
    overwrite: bool = HfArg(default=False, help="remove what stage 4 made of the old policies")
    method: Literal[("all", *METHODS)] = HfArg(default="all", help="what to train")
    updates: int = HfArg(default=16, help="rollouts; the off-line methods draw all at once")
    rollout_batch: int = HfArg(default=256, help="responses sampled an update")
    ppo_epochs: int = HfArg(default=2, help="A9: passes over a rollout")
    minibatch: int = HfArg(default=64, help="responses an optimiser step")
    lr: float = HfArg(default=1e-4, help="A9: learning rate of the policy")
    value_lr: float = HfArg(default=1e-3, help="A9: learning rate of the value model")
    offline_lr: float = HfArg(default=1e-3, help="B8: learning rate; cosine with 3 %% warm-up")
    kappa: float = HfArg(default=0.1, help="A7: KL coefficient, kappa, in reward per nat")
    lam: float = HfArg(default=0.95, help="A8: lambda of GAE")
    clip: float = HfArg(default=0.2, help="A9: clip range, epsilon")
    rlmec_clip: float = HfArg(default=0.3, help="B5: clip range, epsilon")
    reward_weight: float = HfArg(default=1.0, help="B7: weight of L_RL; 0 in rlmec_imitation")
    imitation_weight: float = HfArg(default=1.0, help="B7: weight of L_IR, lambda")
    temperature: float = HfArg(default=1.0, help="of samples and of A7, A9, B5")
    max_new_tokens: int = HfArg(default=48, help="longest response, in tokens")
    micro_batch: int = HfArg(default=None, help="rows of a forward pass; default: all")
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

def gae(rewards, values, response_mask, lam, gamma=1.0):
    """A8: advantages and returns (B, T). delta_t = r^_t + gamma V(s_{t+1}) - V(s_t); rewards and
    values are 0 after the last token, so V(s_{T+1}) = 0."""
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * response_mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * response_mask

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
    insert; i indexes a, j indexes b; their number is ED(a, b). An insertion has no token in a, a
    deletion none in b. The first operation stands where a and b part."""
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
NUMBER = r"(?<![\w:/.])-?\$?\d[\d,]*(?:\.\d+)?(?![\w:/])"

def final_answer(text):
    """The first number or line behind the last `answer is` or `####`; else the text's last one."""
    *marked, tail = re.split(r"(?i)answer is:?|####", text.strip())
    found = re.findall(NUMBER, tail) or tail.strip().split("\n")
    return re.sub(r"[$,]|\.0*$", "", found[0 if marked else -1].strip())

def wrong_steps(text, ended, problem):
    """The one rule of all stages, 0 is right: hits of the rules, or steps that differ from the
    nearest right solution (E1), or a wrong answer; and one more for a response that did not end.
    None where nobody knows."""
    if problem.get("rules"):
        wrong = sum(len(list(re.finditer(rule, text))) for rule in problem["rules"])
    elif problem.get("solutions"):
        steps = [[step.strip() for step in STEP.findall(t)] for t in [text, *problem["solutions"]]]
        wrong = min(len(edit_ops(steps[0], solution)) for solution in steps[1:])
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

def write_text(path, text):
    """A file, written aside and renamed: a reader never sees half of it."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)

def start_stage(args, stage, later):
    """Save the arguments and seed torch; the run folder. Stale outputs of later stages (patterns)
    stop the stage, or go with --overwrite."""
    run = Path(args.run)
    for path in [path for pattern in later.split() for path in run.glob(pattern)]:
        if not args.overwrite:
            fail(f"{path} would be stale: name another --run, or remove it with --overwrite")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.mkdir(parents=True, exist_ok=True)
    print(f"stage {stage}:", asdict(args), flush=True)
    write_text(run / f"{stage}_args.json", json.dumps(asdict(args)) + "\n")
    torch.manual_seed(args.seed)
    return run

def open_model(auto_class, path, args, frozen=False, **options):
    """from_pretrained, dropout off; frozen: no gradients, and bfloat16 with --bf16."""
    try:
        model = auto_class.from_pretrained(
            path, dtype=torch.bfloat16 if frozen and args.bf16 else torch.float32, **options)
    except Exception as error:                                 # transformers raises many kinds
        fail(f"{path}: no {auto_class.__name__} to open ({str(error).splitlines()[0]})")
    return model.requires_grad_(not frozen).to(args.device).eval()

def context_of(model):
    """The longest sequence of a model, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9

def save_model(model, tokenizer, path):
    """A model folder, written aside and renamed."""
    part = Path(f"{path}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)

def pack(prompts, responses, pad_id, device):
    """Ids of prompts padded on the left to P, of responses on the right to T. The model inputs
    (B, P + T), and response_mask (B, T) from lengths, the only mask of losses and metrics."""
    P, T = max(map(len, prompts)), max(map(len, responses))
    ids = [[pad_id] * (P - len(p)) + p + r + [pad_id] * (T - len(r))
           for p, r in zip(prompts, responses)]
    first = torch.tensor([P - len(p) for p in prompts])[:, None]
    end = torch.tensor([P + len(r) for r in responses])[:, None]
    column = torch.arange(P + T)[None]
    mask = (column >= first) & (column < end)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": mask.long(),
              "position_ids": (column - first).clamp(min=0)}
    return {name: x.to(device) for name, x in inputs.items()}, mask[:, P:].to(device)

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

def step_starts(ids, tokenizer):
    """Index of the first token of every step of a response."""
    texts = token_texts([token for token in ids if token != tokenizer.eos_token_id], tokenizer)
    ends = list(accumulate(map(len, texts)))
    return [bisect_right(ends, step.start()) for step in STEP.finditer("".join(texts))]

# B2: the fixed words in the prompts of the generative model; a small policy has a token for each
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
        text = [token for token in text if token != tokenizer.eos_token_id]
        starts = step_starts(text, tokenizer) if task == "locate" else []
        ids += words(INSTRUCTIONS[part], tokenizer)
        for t, token in enumerate(text):
            ids += words(f"[{starts.index(t) + 1}]", tokenizer) if t in starts else []
            ids.append(token)
    return ids + words(INSTRUCTIONS[task], tokenizer)

def locate_answer(step, tokenizer):
    """B2: the output of `locate`: the label of the first wrong step, from 1, and the end."""
    return words(f"[{step}]", tokenizer) + [tokenizer.eos_token_id]

# --- Sampling ---

@torch.no_grad()
def sample(model, prompts, tokenizer, args, temperature):
    """Draw a response to each prompt (ids) from pi(a_t | s_t); temperature 0 takes the likeliest
    tokens. The end token, where a response has one, is its last."""
    size = args.micro_batch or 512
    if len(prompts) > size or not prompts:
        return [row for k in range(0, len(prompts), size)
                for row in sample(model, prompts[k:k + size], tokenizer, args, temperature)]
    responses, running, cache = [[] for _ in prompts], list(range(len(prompts))), None
    inputs, _ = pack(prompts, responses, tokenizer.pad_token_id, args.device)
    ids, mask, position = inputs.values()
    for _ in range(min(args.max_new_tokens, context_of(model) - ids.shape[1])):
        if not running:                                        # the rows that have not ended
            break
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
        if len(alive) < len(running):                          # who has ended leaves the batch
            cache.batch_select_indices(alive)
            running = [running[k] for k in alive.tolist()]
        ids, position = tokens[alive, None], position[alive, -1:] + 1
        mask = torch.cat([mask[alive], torch.ones_like(ids)], dim=1)
    return responses

def right_responses(responses, problems, tokenizer):
    """Which responses (ids) are right?"""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [wrong_steps(text, row[-1:] == [tokenizer.eos_token_id], problem) == 0
            for text, row, problem in zip(texts, responses, problems)]

def draw(problems, args):
    """The problems of all updates, in passes of a new order each, the same for all methods."""
    rng, drawn, episodes = random.Random(args.seed), [], args.updates * args.rollout_batch
    if not problems:
        fail(f"{args.run}/problems.jsonl: no problem to train on")
    while len(drawn) < episodes:
        drawn += rng.sample(problems, len(problems))
    return drawn[:episodes]

def accuracy(policy, problems, tokenizer, args):
    """Share of right responses to the validation problems."""
    prompts = [problem["prompt_ids"] for problem in problems]
    responses = sample(policy, prompts, tokenizer, args, args.temperature)
    return float(np.mean(right_responses(responses, problems, tokenizer)))

def read(function, model, prompts, responses, tokenizer, args, *more):
    """function(model, inputs, mask, *more) of all rows, a micro-batch at a time, as (B, T): the
    logits of a whole rollout may need more memory than its training."""
    size, rows = args.micro_batch or len(prompts), []
    for k in range(0, len(prompts), size):
        inputs, mask = pack(prompts[k:k + size], responses[k:k + size], tokenizer.pad_token_id,
                            args.device)
        rows += [values[m] for values, m in zip(function(model, inputs, mask, *more), mask)]
    return pad_sequence(rows, True)

# --- PPO ---

@torch.no_grad()
def rollout(kind, models, prompts, tokenizer, scale, args):
    """Sample a response to each prompt and compute what the update needs, by the same forward pass
    as in training: the model inputs, and a dictionary of (B, T) tensors."""
    responses = sample(models["policy"], prompts, tokenizer, args, args.temperature)
    inputs, mask = pack(prompts, responses, tokenizer.pad_token_id, args.device)
    rows = (prompts, responses, tokenizer, args)
    logprobs = read(response_logprobs, models["policy"], *rows, args.temperature)
    ref_logprobs = read(response_logprobs, models["reference"], *rows, args.temperature)
    values = read(token_values, models["value"], *rows)
    scores = read(scores_of, models["reward"], *rows, kind, scale)
    rewards = kl_rewards(scores, logprobs, ref_logprobs, args.kappa)           # A7
    advantages, returns = gae(rewards, values, mask, args.lam)                 # A8
    residual = masked_mean((returns - values) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    ended = sum(row[-1] == tokenizer.eos_token_id for row in responses)
    total = scores.sum(dim=1)                                  # sums a response, means a rollout
    row = {"score": total.mean().item(), "score_std": total.std().item(),
           "reward": rewards.sum(dim=1).mean().item(),
           "kl": (logprobs - ref_logprobs).sum(dim=1).mean().item(),
           "entropy": -masked_mean(logprobs, mask).item(),     # estimated by the sample itself
           "advantage_rms": masked_mean(advantages ** 2, mask).sqrt().item(),
           "explained_variance": (1 - residual / variance.clamp(min=1e-8)).item(),
           "length": mask.sum().item() / len(mask), "ended": ended / len(mask)}
    return row, inputs, {"mask": mask, "old_logprobs": logprobs, "old_values": values,
                         "returns": returns, "advantages": masked_whiten(advantages, mask)}

def minibatch_step(models, optimizer, inputs, batch, rows, args):
    """One optimiser step of A9 on some rows of a rollout, a micro-batch at a time; statistics are
    means over the N response tokens."""
    N, total = batch["mask"][rows].sum().item(), Counter()
    for micro in rows.split(args.micro_batch or len(rows)):
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

def optimizer_step(optimizer):
    """A step with gradients clipped to norm 1 a model (a parameter group); none are left."""
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()

def open_models(kind, run, args):
    """The four models of PPO; the value model starts from the SFT policy, with V = 0."""
    folder = run / "policy"
    reward_class = (AutoModelForTokenClassification if kind == "token"
                    else AutoModelForSequenceClassification)
    value = open_model(AutoModelForTokenClassification, folder, args, num_labels=1)
    for name, weight in value.named_parameters():
        if not name.startswith(value.base_model_prefix + "."):
            torch.nn.init.zeros_(weight)
    return {"policy": open_model(AutoModelForCausalLM, folder, args), "value": value,
            "reference": open_model(AutoModelForCausalLM, folder, args, frozen=True),
            "reward": open_model(reward_class, run / f"reward_{kind}", args, frozen=True)}

def ppo(method, train, val, tokenizer, run, args):
    """A policy trained on one kind of reward, and its log: one row an update."""
    kind, size, log, seconds = METHODS[method], args.rollout_batch, [], 0.0
    scale = json.loads((run / "reward_metrics.json").read_text())[kind]["scale"]
    models, drawn = open_models(kind, run, args), draw(train, args)
    optimizer = torch.optim.AdamW([{"params": models["policy"].parameters(), "lr": args.lr},
                                   {"params": models["value"].parameters(), "lr": args.value_lr}],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    bar = trange(1, args.updates + 1, desc=method)
    for number in bar:
        start, episodes = time.time(), number * size
        prompts = [problem["prompt_ids"] for problem in drawn[episodes - size:episodes]]
        row, inputs, batch = rollout(kind, models, prompts, tokenizer, scale, args)
        steps = [minibatch_step(models, optimizer, inputs, batch, rows, args)
                 for _ in range(args.ppo_epochs)
                 for rows in torch.randperm(size, device=args.device).split(args.minibatch)]
        if number == 1:                                        # rho = 1, pi = pi_ref at the start
            assert steps[0]["approx_kl"] < (1e-2 if args.bf16 else 1e-6) and abs(row["kl"]) < 1e-2
        row.update({name: float(np.mean([step[name] for step in steps])) for name in steps[0]})
        seconds += time.time() - start
        row = {"update": number, "episodes": episodes, "seconds": seconds, **row}
        if val and (number % 2 == 0 or number == args.updates):
            row["accuracy"] = accuracy(models["policy"], val, tokenizer, args)
        log.append(row)
        bar.set_postfix({k: f"{row[k]:.2f}" for k in ("score", "kl", "accuracy") if k in row})
    return models["policy"], log

# --- RLMEC ---

def rewrite(grm, samples, tokenizer, args, drop):
    """B4: for every wrong sample the GRM locates the first wrong step, keeps the steps before it
    and writes the rest anew, as `rewrite_ids`. Where that is wrong, the sample is dropped."""
    wrong, located = [row for row in samples if not row["right"]], []
    answers = sample(grm, [grm_prompt("locate", row["problem"], row["response_ids"], tokenizer)
                           for row in wrong], tokenizer, args, 0.0)
    for row, answer in zip(wrong, answers):
        starts = step_starts(row["response_ids"], tokenizer)
        labels = [locate_answer(k, tokenizer) for k in range(1, len(starts) + 1)]
        if answer in labels:
            row["kept"] = row["response_ids"][:starts[labels.index(answer)]]
            located.append(row)
    drop["the locator names no step"] += len(wrong) - len(located)
    prompts = [row["grm_prompt"] + row["kept"] for row in located]
    endings = sample(grm, prompts, tokenizer, args, 0.0)
    rewrites = [row["kept"] + ending for row, ending in zip(located, endings)]
    right = right_responses(rewrites, [row["problem"] for row in located], tokenizer)
    drop["the rewrite is wrong"] += right.count(False)
    for row, ids, good in zip(located, rewrites, right):
        row["rewrite_ids"] = ids if good else None

@torch.no_grad()
def collect(policy, grm, problems, tokenizer, args):
    """B8: one sample a problem, rewarded (B3), rewritten (B4) and aligned (B6) once: dictionaries
    with ids as they were sampled, old_logprobs and rewards (T,), gamma (T~,)."""
    drop, prompts = Counter(), [problem["prompt_ids"] for problem in problems]
    responses = sample(policy, prompts, tokenizer, args, args.temperature)
    right = right_responses(responses, problems, tokenizer)
    samples = [{"problem": problem, "prompt_ids": problem["prompt_ids"], "response_ids": ids,
                "right": good, "rewrite_ids": ids if good else None,
                "grm_prompt": grm_prompt("rewrite", problem, ids, tokenizer)}
               for problem, ids, good in zip(problems, responses, right)]
    fitting = [row for row in samples
               if len(row["grm_prompt"]) + len(row["response_ids"]) <= context_of(grm)]
    drop["it exceeds the GRM's context"] += len(samples) - len(fitting)
    rewrite(grm, fitting, tokenizer, args, drop)
    samples = [row for row in fitting if row["rewrite_ids"]]
    column = lambda name: [row[name] for row in samples]
    print(f"{len(problems)} sampled: {sum(column('right'))} right, "
          f"{len(samples) - sum(column('right'))} wrong and rewritten, dropped: {dict(+drop)}")
    if not samples:
        fail("the GRM could rewrite no sample; train it longer in stage 2")
    rows = (column("response_ids"), tokenizer, args)
    logprobs = read(response_logprobs, policy, column("prompt_ids"), *rows, args.temperature)
    probabilities = read(response_logprobs, grm, column("grm_prompt"), *rows).exp()
    right = torch.tensor(column("right"), device=args.device)
    rewards = generative_rewards(probabilities, right, 1)      # B3; padding is cut off below
    for k, row in enumerate(samples):
        T = len(row["response_ids"])
        gamma = imitation_weights(row["response_ids"], row["rewrite_ids"]).to(args.device)
        row.update(old_logprobs=logprobs[k, :T], rewards=rewards[k, :T], gamma=gamma)
    return samples

def rlmec_part(policy, rows, N, M, weights, tokenizer, args):
    """B7 on some rows of a batch: their part of L_RL + lambda L_IR, and the largest |log rho|."""
    column = lambda name: [row[name] for row in rows]
    read_policy = lambda name, temperature: read(response_logprobs, policy, column("prompt_ids"),
                                                 column(name), tokenizer, args, temperature)
    old_logprobs, rewards, gamma = (
        pad_sequence(column(name), True) for name in ("old_logprobs", "rewards", "gamma"))
    logprobs = read_policy("response_ids", args.temperature)
    loss_reward = rlmec_loss(logprobs, old_logprobs, rewards, args.rlmec_clip, N)             # B5
    loss_imitation = imitation_loss(read_policy("rewrite_ids", 1.0), gamma, M)                # B6
    logratio = (logprobs - old_logprobs).abs().max().item()
    return weights[0] * loss_reward + weights[1] * loss_imitation, logratio                   # B7

def rlmec(method, train, val, tokenizer, run, args):
    """B8: sample once, reward once, then three passes of B7; the policy and its log."""
    weights = 0.0 if method == "rlmec_imitation" else args.reward_weight, args.imitation_weight
    policy = open_model(AutoModelForCausalLM, run / "policy", args)
    grm = open_model(AutoModelForCausalLM, run / "reward_generative", args, frozen=True)
    start, drawn, log = time.time(), draw(train, args), []
    samples = collect(policy, grm, drawn, tokenizer, args)
    batches = [[samples[k] for k in indices.tolist()] for _ in range(3)
               for indices in torch.randperm(len(samples)).split(args.minibatch)]
    optimizer = torch.optim.AdamW(policy.parameters(), args.offline_lr, (0.9, 0.95),
                                  weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(batches)), len(batches))
    seconds = time.time() - start
    for number, rows in enumerate(tqdm(batches, desc=method), 1):
        start = time.time()
        N = sum((row["rewards"] != 0).sum().item() for row in rows)
        M = sum(len(row["rewrite_ids"]) for row in rows)
        size, total = args.micro_batch or len(rows), 0.0
        for k in range(0, len(rows), size):
            loss, logratio = rlmec_part(policy, rows[k:k + size], N, M, weights, tokenizer, args)
            assert number > 1 or logratio < (0.1 if args.bf16 else 1e-3), "rho is not 1"
            loss.backward()
            total += loss.item()
        if not np.isfinite(total):
            fail(f"{method}: the loss is {total}; lower --offline_lr")
        optimizer_step(optimizer)
        schedule.step()
        seconds += time.time() - start
        log.append({"update": number, "episodes": len(drawn), "seconds": seconds, "loss": total})
        if val and (number % max(1, len(batches) // 10) == 0 or number == len(batches)):
            log[-1]["accuracy"] = accuracy(policy, val, tokenizer, args)
    return policy, log

# --- The stage ---

def main(args):
    run = Path(args.run)
    problems = read_jsonl(run / "problems.jsonl", "id", "split", "prompt_ids")
    train = [row for row in problems if row["split"] == "train"]
    solved = [row for row in train if "solution_ids" in row]   # RLMEC needs them
    val = [row for row in problems if row["split"] == "val"
           and {"solutions", "answer", "rules"} & {*row}]
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    methods = METHODS if args.method == "all" else [args.method]
    there = [method for method in methods if (run / f"reward_{METHODS[method]}").is_dir()]
    print("without a reward model of stage 2:", sorted({*methods} - {*there}) or "none")
    for method in there or fail(f"{run}: no reward model for {args.method}; 02_reward_model.py"):
        folder = run / f"reward_{METHODS[method]}"
        if AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
            fail(f"{folder}: its vocabulary is not that of {run}/policy")
    start_stage(args, "03", "responses.jsonl eval.json report.html")
    for method in there:
        torch.manual_seed(args.seed)                           # the same prompts for all methods
        policy, log = (ppo(method, train, val, tokenizer, run, args) if method.startswith("ppo")
                       else rlmec(method, solved, val, tokenizer, run, args))
        columns = list(dict.fromkeys(name for row in log for name in row))
        lines = [columns] + [[row.get(name, "") for name in columns] for row in log]
        write_text(run / f"{method}.csv", "".join(",".join(map(str, x)) + "\n" for x in lines))
        save_model(policy, tokenizer, run / method)

if __name__ == "__main__":
    args = HfArgumentParser(Args).parse_args_into_dataclasses()[0]
    # without its cache, autocast never uses the weights of an older step
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.bf16, False):
        main(args)

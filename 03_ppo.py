"""Stage 3: PPO with a reward on every token, or one a response; RLMEC; DPO; rejection sampling.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, 2401.06081): A7 to A9, B3 to
B8, E1; C1 (DPO, Rafailov et al., 2023), C2 (rejection sampling).
    symbol        variable                shape
    a_t           input_ids[:, -T:]       (B, T)   response tokens, the end token included
    pi, pi_old    logprobs, old_logprobs  (B, T)   log pi(a_t | s_t)
    pi_ref        ref_logprobs            (B, T)   the frozen SFT policy
    r_t, r^_t     scores, rewards         (B, T)   of the reward model; minus the KL penalty
    V(s_t), A^_t  values, advantages      (B, T)
    p_t           probabilities           (T,)     of the generative reward model (GRM)
    y~, gamma_t   rewrite_ids, gamma      (B, T~)  its correction, the imitation weights
One index convention, for a prompt p1 p2 and a response a1 a2 a3, in columns -T: of the batch:
    input_ids      <pad>  p1   p2   a1   a2   a3      logits at t-1 score token t, so
    logits of             .    a1   a2   a3   .       log-prob and value of a1 are read at p2,
    reward of                       a1   a2   a3      its reward is read at a1 itself.
Simplified against the papers:
  1. GAE is kept with token rewards, our reading; a response that did not end counts as terminal.
  2. The value model is a second model, started from the SFT policy.
  3. Rewards are divided by the standard deviation of a response's total (stage 2); the sequence
     reward is centred first, because A6 knows it only up to a constant.
  4. B8: one sample a problem (RLMEC's code: five at temperature 0.7) and the GRM's likeliest
     rewrite. What is right, `wrong_steps` says, never the locator.
Reads RUN/policy, problems.jsonl, edits.jsonl, reward_*. Writes a policy and a CSV for each method.
Command: python 03_ppo.py
"""

import atexit, json, os, random, re, shutil, sys, time
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, zip_longest
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

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
KINDS = {"token": hf.AutoModelForTokenClassification,
         "sequence": hf.AutoModelForSequenceClassification, "generative": hf.AutoModelForCausalLM}
METHODS = {"dpo": ("token", 3e-5), "dpo_edit": ("token", 3e-5),  # kind, learning rate
           "ppo_token": ("token", 1e-4), "ppo_sequence": ("sequence", 1e-4),
           "rlmec": ("generative", 1e-3), "rlmec_imitation": ("generative", 1e-3),
           "rejection": ("generative", 1e-3)}
arg = lambda default, help: hf.hf_argparser.HfArg(default=default, help=help)

@dataclass
class Args:
    run: str = "runs/default"
    seed: int = arg(1, "of prompts and samples")
    overwrite: bool = arg(False, "remove stage 4's outputs")
    method: Literal[("all", "all_baselines", *METHODS)] = arg("all", "to train")
    updates: int = arg(20, "rollouts; off-line: drawn at once")
    rollout_batch: int = arg(256, "responses sampled an update")
    ppo_epochs: int = arg(2, "A9: passes over a rollout")
    minibatch: int = arg(64, "responses an optimiser step")
    lr: float = arg(None, "policy's learning rate; default: METHODS")
    value_lr: float = arg(1e-3, "A9: learning rate of the value model")
    kappa: float = arg(0.1, "A7: KL coefficient, kappa, in reward per nat")
    lam: float = arg(0.95, "A8: lambda of GAE")
    clip: float = arg(None, "clip range, epsilon; default: A9 0.2, B5 0.3")
    imitation_weight: float = arg(1.0, "B7: weight of L_IR, lambda")
    dpo_beta: float = arg(1.0, "C1: b")
    temperature: float = arg(1.0, "over 0: of samples, A7, A9, B5")
    max_new_tokens: int = arg(None, "longest response; default: stage 1's")
    micro_batch: int = arg(32, "rows of a pass; a draw has 8 times as many")
    bf16: bool = arg(False, "autocast; the weights stay float32")
    save_every: int = arg(10, "updates between saved states")
    fsdp: bool = arg(False, "shard the models over torchrun's processes")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

# --- The equations ---
def scores_of(reward_model, inputs, response_mask, kind, scale):
    """A7, the one place where the two runs differ: scores (B, T), in standard deviations.
    token: r_phi(s_t, a_t) on every token. sequence: 1[t = T] R_phi(x, y)."""
    if kind == "token":
        return token_rewards(reward_model, inputs, response_mask) / scale["std"]
    reward = (sequence_reward(reward_model, inputs) - scale["mean"]) / scale["std"]
    last = response_mask.sum(dim=1, keepdim=True) - 1
    return (0.0 * response_mask).scatter(1, last, reward[:, None])

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
    advantage = next_value = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
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
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -(torch.min(ratio * advantages, clipped * advantages) * response_mask).sum() / N

def value_loss(values, old_values, returns, response_mask, clip, N):
    """A9: (1/2N) sum of the larger squared error, of V and of V clipped around the old V."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (errors * response_mask).sum() / N

def generative_rewards(probabilities, is_right):
    """B3: r_t (T,) of a response from p_t = P_GRM(a_t | rewrite prompt, a_<t) (T,):
    clip(p_t - 0.5, 0, 0.5) if it is right, clip(p_t - 0.5, -0.1, 0) if it is wrong."""
    r = probabilities - 0.5
    return r.clamp(0, 0.5) if is_right else r.clamp(-0.1, 0)

def rlmec_loss(logprobs, old_logprobs, rewards, clip, N):
    """B5: -(1/N) sum_t w_t log pi(a_t | s_t), all (B, T), rewards 0 outside the response, with
    w_t = stopgrad[min(rho_t r_t, clip(rho_t, 1-eps, 1+eps) r_t)]; N: tokens of the batch with
    r_t != 0, or 1. Unlike PPO's, this clip leaves log pi its gradient."""
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
    """B6: -(1/M) sum_t gamma_t log pi(y~_t | x, y~_<t), all (B, T~); M: tokens of all rewrites.
    C2, rejection sampling: the same of right responses alone, with gamma_t = 1."""
    return -(gamma * logprobs).sum() / M

def dpo_loss(logprob_w, logprob_l, ref_w, ref_l, beta, N):
    """C1: -(1/N) sum of log sigmoid(b [log pi / pi_ref (y+) - log pi / pi_ref (y-)]) over some of
    N pairs; all (B,): y+ is w, y- is l, sums over the response tokens."""
    return -F.logsigmoid(beta * ((logprob_w - ref_w) - (logprob_l - ref_l))).sum() / N

# --- Helpers, the same in several scripts ---
def token_rewards(model, inputs, response_mask):
    """A2: r_t = r_phi(s_t, a_t) (B, T), read at the position of token t; 0 outside."""
    T = response_mask.shape[1]
    return model(**inputs, use_cache=False).logits[:, -T:, 0].float() * response_mask

def sequence_reward(model, inputs):
    """A6: R_phi(x, y) (B,), read at the response's last token, whatever that is."""
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
    last = inputs["position_ids"].argmax(dim=1)
    return model.score(hidden[range(len(last)), last])[:, 0].float()

def edit_ops(a, b):
    """E1: the operations of one optimal path from a to b, [op, i, j] with op in replace, delete,
    insert, i in a, j in b; their number is ED(a, b). The first stands where a and b part."""
    n = min(len(a), len(b))
    start = next((k for k in range(n) if a[k] != b[k]), n)  # the common beginning is kept
    a, b = np.array([*a[start:]]), np.array([*b[start:]])
    column, differ = np.arange(len(b) + 1), a[:, None] != b
    D = np.arange(len(a) + 1)[:, None] + column
    # D[i, j] = min(D[i-1, j] + 1, D[i-1, j-1] + [a_i != b_j], D[i, j-1] + 1)
    for i in range(1, len(a) + 1):
        D[i, 1:] = np.minimum(D[i - 1, 1:] + 1, D[i - 1, :-1] + differ[i - 1])
        # insertions run along the row: D[i, j] = min over k <= j of D[i, k] + j - k
        D[i] = np.minimum.accumulate(D[i] - column) + column
    i, j, ops = len(a), len(b), []
    while i or j:  # back from the last cell
        op = ("keep" if i and j and not differ[i - 1, j - 1] else
              "delete" if i and D[i, j] == D[i - 1, j] + 1 else
              "insert" if D[i, j] == D[i, j - 1] + 1 else "replace")
        i -= op != "insert"
        j -= op != "delete"
        if op != "keep":
            ops.append([op, start + i, start + j])
    return ops[::-1]

STEP = re.compile(r"(?m)[^\s;][^\n;]*?(?:;|\.(?=\s)|$)")  # a line, a sentence, or up to a ;

def final_answer(text):
    """The first number or line behind the last `answer is` or `####`; else the text's last one."""
    *marked, tail = re.split(r"(?i)answer is:?|####", text)
    number = r"(?<![\w:/.])(?<!}{)-?\$?\d[\d,]*(?:\.\d+)?(?![\w:/]|[.,]\d|}{)"  # no \frac{1}{2}
    found = re.findall(number, tail) or tail.strip().split("\n")
    return re.sub(r"[$,]|(\.\d*?)0*$", r"\1", found[0 if marked else -1].strip()).rstrip(".")

def wrong_steps(text, ended, problem):
    """Errors, 0 is right: hits of the rules, or steps unlike the nearest right solution's at the
    same place, or a wrong answer; 1 more if it did not end. None where nobody knows."""
    if problem.get("rules"):
        wrong = sum(len(re.findall(rule, text)) for rule in problem["rules"])
    elif problem.get("solutions"):
        wrong = min(sum(a != b for a, b in zip_longest(STEP.findall(text), STEP.findall(right)))
                    for right in problem["solutions"])
    elif problem.get("answer"):
        wrong = final_answer(text) != final_answer(problem["answer"])
    else:
        return None
    return wrong + (not ended)

def fail(message):
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

def save(path, *contents, **options):
    """Rows as JSONL, a text, or a model and its tokenizer: written aside, then renamed."""
    part = Path(f"{path}.part")
    for content in contents:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            part.write_text(content, "utf-8")
        else:
            content.save_pretrained(part, **options)
    shutil.rmtree(path, ignore_errors=True)
    part.replace(path)

def start_stage(args, stage, later):
    """Make the run folder. Later stages' outputs stop it, or go with --overwrite."""
    run = Path(args.run)
    for path in [path for pattern in later.split() for path in run.glob(pattern)]:
        if not args.overwrite:
            fail(f"{path} would be stale: name another --run, or remove it with --overwrite")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.mkdir(parents=True, exist_ok=True)
    save(run / f"{stage}_args.json", [vars(args)])

def batches(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]

def pack(prompts, responses, model):
    """Prompts padded on the left to P, responses on the right to T: the model inputs (B, P + T),
    and response_mask (B, T) from lengths, the only mask of losses and metrics."""
    P, T, pad = max(map(len, prompts)), max(map(len, responses)), [model.config.pad_token_id]
    rows = [(P - len(p), p + r, T - len(r)) for p, r in zip(prompts, responses)]
    ids = [pad * left + row + pad * right for left, row, right in rows]
    mask = [[0] * left + [1] * len(row) + [0] * right for left, row, right in rows]
    ids, mask = torch.tensor([ids, mask], device=model.device)
    position = (mask.cumsum(dim=1) - 1) * mask  # of a token in its row; padding has none
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    return inputs, mask[:, P:].bool()

def response_logprobs(model, inputs, response_mask, temperature=1.0):
    """log pi(a_t | s_t) (B, T) of the response tokens, 0 outside: logits at t-1 score token t."""
    tokens = inputs["input_ids"][:, -response_mask.shape[1]:]
    before = torch.arange(-tokens.shape[1] - 1, -1, device=tokens.device)
    logits = model(**inputs, logits_to_keep=before, use_cache=False).logits.float()
    logits = logits / temperature if temperature != 1 else logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return -losses.view(tokens.shape) * response_mask

def steps_of(ids, tokenizer):
    """The steps of a response, each a list of ids, without the end token."""
    ids = [token for token in ids if token != tokenizer.eos_token_id]
    *texts, text = tokenizer.decode([ids[:k] for k in range(len(ids) + 1)])
    starts = [bisect(texts, step.start(), key=len) - 1 for step in STEP.finditer(text)]
    return [ids[a:b] for a, b in pairwise([0, *starts[1:], len(ids)])]

INSTRUCTIONS = {"solution": "\nReference solution:\n", "attempt": "\nAttempt:\n",
                "rewrite": "\nCorrected attempt:\n", "locate": "\nFirst wrong step:\n"}

@cache
def words(text, tokenizer):
    """Token ids of fixed words: an instruction, or a step's label, as [3]."""
    return tokenizer(text, add_special_tokens=False).input_ids

def grm_prompt(task, problem, response_ids, tokenizer):
    """B2: ids of (x, y*, y^) for `rewrite`; for `locate` with a label before every step."""
    ids = [*problem["prompt_ids"]]
    for part, text in (("solution", problem["solution_ids"]), ("attempt", response_ids)):
        ids += words(INSTRUCTIONS[part], tokenizer)
        if task == "rewrite":
            ids += [token for token in text if token != tokenizer.eos_token_id]
        else:
            for k, step in enumerate(steps_of(text, tokenizer), 1):
                ids += words(f"[{k}]", tokenizer) + step
    return ids + words(INSTRUCTIONS[task], tokenizer)

# --- Over several processes ---
def shard(model, args):
    """--fsdp: every process keeps a part of each weight; gradients are sums, as N is global."""
    if args.fsdp and WORLD > 1:
        mesh = dist.init_device_mesh(torch.device(args.device).type, (WORLD,))
        layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
        for module in [*layers, model]:
            fully_shard(module, mesh=mesh)
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model.to(args.device)

def optimizer_step(optimizer, args):
    """A step on the sum of all processes' gradients, clipped to norm 1 a parameter group."""
    for group in optimizer.param_groups:
        for p in group["params"] if WORLD > 1 and not args.fsdp else []:  # else summed already
            dist.all_reduce(p.grad)
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()

def micro_batches(rows, size):
    """Parts of `size` rows a process, each with this one's share; if none, a row not to count."""
    for part in batches(rows, size * WORLD):
        yield part, part[RANK::WORLD] or part[:1]

def gather(rows, size):
    """Put all processes' shares of `size` rows together again, in order."""
    parts = [rows] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, rows)
    return [parts[k % WORLD][k // WORLD] for k in range(size)]

def streams(args, number):
    """Seed an update: the returned generator is equal on all processes, torch's differs."""
    rng = random.Random(f"{args.seed} {number}")
    torch.manual_seed(rng.getrandbits(60) + RANK)
    return rng

# --- A killed run goes on ---
def read_state(path, args):
    """What a killed run with the same flags had saved, if any."""
    try:
        state = torch.load(path, weights_only=True) if path.exists() else {"args": {}}
    except Exception as error:  # torch raises many kinds
        fail(f"{path}: not readable ({type(error).__name__}); remove it to start again")
    for name, value in state["args"].items() - vars(args).items():
        if name != "overwrite":
            fail(f"{path}: the killed run had --{name} {value}; remove it to start again")
    return state

def save_state(path, args, models, optimizer, **place):
    """Weights, optimiser, method and log: written aside, then renamed."""
    weights, moments = get_state_dict(models, optimizer, options=WHOLE)
    part = Path(f"{path}.part")
    if RANK == 0:
        torch.save({"args": vars(args), "weights": weights, "moments": moments, **place}, part)
        part.replace(path)

# --- Sampling ---
@torch.no_grad()
def sample(model, prompts, args, temperature):
    """Draw a response to each prompt (ids) from pi(a_t | s_t), with its end token; 0: likeliest."""
    drawn, end, context = [], model.config.eos_token_id, model.config.max_position_embeddings
    parts = [*micro_batches(prompts, 8 * args.micro_batch)]  # no activations are kept
    few = RANK > 0 or len(parts) < 9  # a rollout of PPO has a bar around it
    for part, mine in tqdm(parts, desc="sampling", leave=False, disable=few):
        responses, cache = [[] for _ in mine], None
        running = responses
        ids, mask, position = pack(mine, responses, model)[0].values()
        for _ in range(args.max_new_tokens):
            output = model(input_ids=ids, attention_mask=mask, position_ids=position,
                           past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = output.logits[:, -1].float(), output.past_key_values
            tokens = logits.argmax(dim=1)
            if temperature:  # the token in whose share of (0, 1) u falls
                shares = (logits / temperature).softmax(dim=1).cumsum(dim=1)
                u = torch.rand(len(tokens), 1, device=args.device) * shares[:, -1:]
                tokens = (shares[:, :-1] <= u).sum(dim=1)
            for row, token in zip(running, tokens.tolist()):
                row.append(token)
            room = (position[:, -1] + 2 < context).tolist()
            going = [k for k, row in enumerate(running) if room[k] and row[-1] != end]
            if not any(gather([going], WORLD)):  # processes stop together
                break
            running, kept = [running[k] for k in going], tokens.new_tensor(going or [0])
            if len(kept) < len(tokens):  # who has ended leaves the batch
                cache.reorder_cache(kept)
            ids, position = tokens[kept, None], (position[kept, -1:] + 1).clamp(max=context - 1)
            mask = torch.cat([mask[kept], torch.ones_like(ids)], dim=1)
        drawn += gather(responses, len(part))
    return drawn

@torch.no_grad()
def read(function, model, prompts, responses, args, *more):
    """function(model, inputs, mask, *more) of all rows, a micro-batch at a time, as (B, T)."""
    rows, order = {}, sorted(range(len(responses)), key=lambda k: len(responses[k]))
    for part, mine in micro_batches(order, args.micro_batch):  # of like lengths: little padding
        inputs, mask = pack([prompts[k] for k in mine], [responses[k] for k in mine], model)
        values = function(model, inputs, mask, *more)
        rows.update(zip(part, gather([x[m].cpu() for x, m in zip(values, mask)], len(part))))
    return pad_sequence([rows[k] for k in sorted(rows)], True).to(args.device)

def column(rows, name):
    return [row[name] for row in rows]

def is_right(ids, problem, tokenizer):
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return wrong_steps(text, ids[-1:] == [tokenizer.eos_token_id], problem) == 0

# --- Training ---
def open_model(auto_class, path, args, **options):
    """A model of an earlier stage, on the device; weights missing there (the value head) are 0."""
    model, info = auto_class.from_pretrained(path, output_loading_info=True, **options)
    for name in info["missing_keys"]:
        torch.nn.init.zeros_(model.get_parameter(name))
    return shard(model, args)

def open_models(method, run, args):
    """The policy and pi_ref, and V and r of PPO; all but r start from the SFT policy."""
    kind, sft = METHODS[method][0], run / "policy"
    models = {name: open_model(hf.AutoModelForCausalLM, sft, args)
              for name in ("policy", "reference")}
    if method.startswith("ppo"):
        models["value"] = open_model(KINDS["token"], sft, args, num_labels=1)
        models["reward"] = open_model(KINDS[kind], run / f"reward_{kind}", args)
    return models

def gradient_step(losses, rows, optimizer, args):
    """A step on a batch. losses(rows, mine) yields (name, what `mine` add): a loss, run backward at
    once so that its activations go, or a number to log."""
    total = Counter()
    for part, mine in micro_batches(rows, args.micro_batch):
        for name, x in losses(rows, mine):
            x = x * (RANK < len(part))
            if torch.is_tensor(x):
                x.backward()
                x = x.item()
            total[name] += x
    optimizer_step(optimizer, args)
    parts = gather([total], WORLD)
    return {name: sum(column(parts, name)) for name in total}

# --- PPO ---
def rollout(kind, models, prompts, scale, args):
    """A response to each prompt: statistics, the model inputs, a dictionary of (B, T) tensors."""
    responses = sample(models["policy"], prompts, args, args.temperature)
    inputs, mask = pack(prompts, responses, models["policy"])
    rows = prompts, responses, args
    logprobs = read(response_logprobs, models["policy"], *rows, args.temperature)
    ref_logprobs = read(response_logprobs, models["reference"], *rows, args.temperature)
    values = read(token_values, models["value"], *rows)
    scores = read(scores_of, models["reward"], *rows, kind, scale)
    rewards = kl_rewards(scores, logprobs, ref_logprobs, args.kappa)  # A7
    advantages, returns = gae(rewards, values, args.lam)  # A8
    total = scores.sum(dim=1)  # score, reward, kl: sums over T, means over B
    row = {"score": total.mean().item(), "score_std": total.std(correction=0).item(),
           "reward": rewards.sum(dim=1).mean().item(),
           "kl": (logprobs - ref_logprobs).sum(dim=1).mean().item(),
           "entropy": -masked_mean(logprobs, mask).item(),  # of the sample
           "advantage_rms": masked_mean(advantages ** 2, mask).sqrt().item(),
           "length": mask.sum().item() / len(mask)}
    return row, inputs, {"mask": mask, "old_logprobs": logprobs, "old_values": values,
                         "returns": returns, "advantages": masked_whiten(advantages, mask)}

def ppo_loss(models, inputs, batch, args, rows, mine):
    """A9 of some rows of a minibatch; means over the N response tokens of the minibatch."""
    N, clip = batch["mask"][rows].sum().item(), 0.2 if args.clip is None else args.clip
    padding = (~batch["mask"][mine]).all(dim=0).sum()  # columns where all of these have ended
    inputs, part = ({name: x[mine, :x.shape[1] - padding] for name, x in whole.items()}
                    for whole in (inputs, batch))
    mask, old_logprobs = part["mask"], part["old_logprobs"]
    logprobs = response_logprobs(models["policy"], inputs, mask, args.temperature)
    yield "policy_loss", policy_loss(logprobs, old_logprobs, part["advantages"], mask, clip, N)
    values = token_values(models["value"], inputs, mask)
    yield "value_loss", value_loss(values, part["old_values"], part["returns"], mask, clip, N)
    logratio = (logprobs - old_logprobs).detach()
    change = logratio.exp() - 1
    yield "approx_kl", ((change - logratio) * mask).sum().item() / N  # Schulman's k3
    yield "clipfrac", ((change.abs() > clip) * mask).sum().item() / N

def ppo(kind, models, optimizer, problems, scale, rng, args):
    """An update: a rollout, and A9's steps on it; their statistics are averaged."""
    size = args.rollout_batch
    prompts = column(rng.choices(problems, k=size), "prompt_ids")  # the same for both rewards
    row, inputs, batch = rollout(kind, models, prompts, scale, args)
    losses, length = partial(ppo_loss, models, inputs, batch, args), batch["mask"].sum(1).tolist()
    steps = [gradient_step(losses, sorted(rows, key=length.__getitem__), optimizer, args)
             for _ in range(args.ppo_epochs)
             for rows in batches(rng.sample(range(size), size), args.minibatch)]
    return row | {name: float(np.mean(column(steps, name))) for name in steps[0]}

# --- The off-line methods: RLMEC, rejection sampling, DPO ---
def rewrite(grm, wrong, tokenizer, args):
    """B4: the GRM locates the first wrong step of each wrong sample, keeps the steps before it and
    writes the rest anew, as `rewrite_ids`; `fate` says what came of it."""
    located = []
    for row, label in zip(wrong, sample(grm, column(wrong, "locate"), args, 0.0)):
        steps, row["fate"] = steps_of(row["response_ids"], tokenizer), "the locator names no step"
        for k in range(len(steps)):
            if label[:-1] == words(f"[{k + 1}]", tokenizer):  # its last token is the end
                located.append((row, sum(steps[:k], [])))
    prompts = [row["rewrite"] + kept for row, kept in located]
    for (row, kept), rest in zip(located, sample(grm, prompts, args, 0.0)):
        row["rewrite_ids"] = ids = kept + rest
        row["fate"] = "rewritten" if is_right(ids, row, tokenizer) else "the rewrite is wrong"

def collect(policy, grm, problems, tokenizer, args):
    """B8: one sample a problem, rewarded (B3), rewritten (B4) and aligned (B6) once: `problems`
    with ids as they were sampled, old_logprobs and rewards (T,), gamma (T~,)."""
    samples, prompts = [], column(problems, "prompt_ids")
    for problem, ids in zip(problems, sample(policy, prompts, args, args.temperature)):
        fate = "right" if is_right(ids, problem, tokenizer) else "wrong"
        row = {**problem, "response_ids": ids, "rewrite_ids": ids, "fate": fate}
        for task in ("rewrite", "locate") if fate == "wrong" else ("rewrite",):
            row[task] = grm_prompt(task, problem, ids, tokenizer)
            if len(row[task] + ids) > grm.config.max_position_embeddings:
                row["fate"] = "beyond the GRM's context"
        samples.append(row)
    rewrite(grm, [row for row in samples if row["fate"] == "wrong"], tokenizer, args)
    print("samples:", dict(Counter(column(samples, "fate"))))
    samples = ([row for fate in ("right", "rewritten") for row in samples if row["fate"] == fate]
               or fail("no sample is right or rewritten"))
    prompts, responses = column(samples, "prompt_ids"), column(samples, "response_ids")
    logprobs = read(response_logprobs, policy, prompts, responses, args, args.temperature)
    p = read(response_logprobs, grm, column(samples, "rewrite"), responses, args).exp()
    for row, old, p_t in zip(samples, logprobs, p):
        T = len(row["response_ids"])  # behind it is padding
        rewards = generative_rewards(p_t[:T], row["fate"] == "right")  # B3
        gamma = imitation_weights(row["response_ids"], row["rewrite_ids"]).to(args.device)
        row.update(old_logprobs=old[:T], rewards=rewards, gamma=gamma)
    return samples

def pairs_of(method, reference, run, args):
    """C1: A5's pairs, y+ the preferred sibling or the edit; log pi_ref is computed once."""
    count = json.load(open(run / "reward_metrics.json"))["token"]["training_rows"]
    pairs = [row for row in map(json.loads, open(run / "edits.jsonl"))
             if row["split"] == "train" and row["chosen"] is not None and row["edit_ops"]][:count]
    better = "edited_ids" if method == "dpo_edit" else "chosen_token_ids"
    for name, ids in (("better", better), ("worse", "rejected_ids")):
        rows = column(pairs, "prompt_ids"), column(pairs, ids), args
        for pair, ref in zip(pairs, read(response_logprobs, reference, *rows).sum(dim=1)):
            pair.update({name: pair[ids], f"ref_{name}": ref})
    return pairs

def rows_of(method, problems, samples, reference, tokenizer, run, args):
    """What an off-line method learns from; `samples` are collected once for all that use them."""
    if method.startswith("dpo"):
        return pairs_of(method, reference, run, args)
    if not samples:
        grm = open_model(hf.AutoModelForCausalLM, run / "reward_generative", args)
        size = min(len(problems), args.updates * args.rollout_batch)
        drawn = streams(args, 0).sample(problems, size)
        samples += collect(reference, grm, drawn, tokenizer, args)
    return ([row for row in samples if row["fate"] == "right" or method != "rejection"]
            or fail(f"{method}: no sample is right"))

def offline_loss(method, policy, args, batch, rows):
    """C1, C2, B6 or B7: what some rows add to a batch's loss, and to what else is logged."""
    logprobs = lambda name, temperature=1.0: response_logprobs(
        policy, *pack(column(rows, "prompt_ids"), column(rows, name), policy), temperature)
    if method.startswith("dpo"):
        w, l = (logprobs(name).sum(dim=1) for name in ("better", "worse"))
        ref_w, ref_l = (torch.stack(column(rows, name)) for name in ("ref_better", "ref_worse"))
        yield "loss", dpo_loss(w, l, ref_w, ref_l, args.dpo_beta, len(batch))
        yield "logprob_better", ((w - ref_w).sum() / len(batch)).item()
        yield "logprob_worse", ((l - ref_l).sum() / len(batch)).item()
        return
    M = sum(map(len, column(batch, "rewrite_ids")))
    gamma, old, rewards = (pad_sequence(column(rows, name), True)
                           for name in ("gamma", "old_logprobs", "rewards"))
    weight, gamma = (1.0, 1.0) if method == "rejection" else (args.imitation_weight, gamma)
    loss = weight * imitation_loss(logprobs("rewrite_ids"), gamma, M)
    if method == "rlmec":
        N = torch.cat(column(batch, "rewards")).count_nonzero().item()
        clip = 0.3 if args.clip is None else args.clip
        loss = loss + rlmec_loss(logprobs("response_ids", args.temperature), old, rewards, clip, N)
    yield "loss", loss

# --- The stage ---
def validate(models, problems, tokenizer, args):
    """KL(policy, reference), the mean of sum_t log pi - log pi_ref; right responses, if known."""
    prompts = column(problems, "prompt_ids")
    responses = sample(models["policy"], prompts, args, args.temperature)
    rows = prompts, responses, args, args.temperature
    logprobs, ref_logprobs = (read(response_logprobs, models[name], *rows)
                              for name in ("policy", "reference"))
    row = {"val_kl": (logprobs - ref_logprobs).sum(dim=1).mean().item()}
    if {"solutions", "answer", "rules"} & {*problems[0]}:
        right = [is_right(ids, problem, tokenizer) for ids, problem in zip(responses, problems)]
        row["accuracy"] = float(np.mean(right))
    return row

def train_policy(method, problems, samples, state, tokenizer, run, args):
    """The policy and the log of a method, a row an update; `state` is of a run that was killed."""
    (kind, lr), log, on_policy = METHODS[method], [], method.startswith("ppo")
    train, val = ([row for row in problems if row["split"] == split] for split in ("train", "val"))
    start, lr = time.time(), lr if args.lr is None else args.lr
    models = open_models(method, run, args)
    trained = torch.nn.ModuleDict({"policy": models["policy"]})
    optimizer = torch.optim.AdamW(trained.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    if on_policy:
        trained["value"] = models["value"]
        optimizer.add_param_group({"params": models["value"].parameters(), "lr": args.value_lr})
        scale = json.load(open(run / "reward_metrics.json"))[kind]["scale"]
        plan = range(args.updates)
    else:  # B8: three passes, a batch an update
        rows = rows_of(method, train, samples, models["reference"], tokenizer, run, args)
        rng, losses = streams(args, 0), partial(offline_loss, method, models["policy"], args)
        plan = [x for _ in range(3) for x in batches(rng.sample(rows, len(rows)), args.minibatch)]
    updates, shape = len(plan), "constant" if on_policy else "cosine"
    schedule = hf.get_scheduler(shape, optimizer, round(0.03 * updates), updates)
    if state.get("method") == method:
        log, schedule.last_epoch = state["log"], len(state["log"])
        print(f"{method}: goes on after update {len(log)}; to start again, remove 03_state.pt")
        set_state_dict(trained, optimizer, options=WHOLE,
                       model_state_dict=state["weights"], optim_state_dict=state["moments"])
    seconds = log[-1]["seconds"] if log else time.time() - start  # B8's one sample is in it
    bar = trange(len(log) + 1, updates + 1, desc=method, disable=RANK > 0)
    for number in bar:
        start, rng = time.time() - seconds, streams(args, number)
        row = (ppo(kind, models, optimizer, train, scale, rng, args) if on_policy else
               gradient_step(losses, plan[number - 1], optimizer, args))
        schedule.step()
        episodes = number * args.rollout_batch if on_policy else len(rows)
        row = {"update": number, "episodes": episodes, **row}
        if not np.isfinite(sum(row.values())):
            fail(f"{method}: not finite any more, {row}; lower --lr, raise --kappa")
        seconds = row["seconds"] = time.time() - start
        if val and (number % max(1, updates // 8) == 0 or number == updates):
            row.update(validate(models, val, tokenizer, args))
        log.append(row)
        bar.set_postfix({k: row[k] for k in ("score", "kl", "accuracy") if k in row})
        if number % args.save_every == 0:
            save_state(run / "03_state.pt", args, trained, optimizer, method=method, log=log)
    return models["policy"], log

def main(args):
    run, samples = Path(args.run), []
    methods = {"all": [*METHODS][2:6], "all_baselines": METHODS}.get(args.method, [args.method])
    paths = {method: run / f"reward_{METHODS[method][0]}" for method in methods}
    there = ([method for method, path in paths.items() if path.is_dir()]
             or fail(f"{run}: no reward model for {args.method}; 02_reward_model.py"))
    print("without a reward model of stage 2:", sorted({*methods} - {*there}) or "none")
    problems = [*map(json.loads, open(run / "problems.jsonl"))]
    args.max_new_tokens = (args.max_new_tokens or
                           json.load(open(run / "01_args.json"))["max_new_tokens"])
    tokenizer = hf.AutoTokenizer.from_pretrained(run / "policy")
    for method in there:
        if hf.AutoTokenizer.from_pretrained(paths[method]).get_vocab() != tokenizer.get_vocab():
            fail(f"{paths[method]}: its vocabulary is not that of {run}/policy")
    state = read_state(run / "03_state.pt", args)
    if RANK == 0:
        start_stage(args, "03", "responses.* eval.* report.*")
    for method in there[there.index(state.get("method", there[0])):]:
        policy, log = train_policy(method, problems, samples, state, tokenizer, run, args)
        weights = get_state_dict(policy, [], options=WHOLE)[0] if args.fsdp else None
        lines = [log[-1]] + [[row.get(name, "") for name in log[-1]] for row in log]
        if RANK == 0:
            save(run / method, policy, tokenizer, state_dict=weights)
            save(run / f"{method}.csv", "".join(",".join(map(str, x)) + "\n" for x in lines))
    if RANK == 0:
        (run / "03_state.pt").unlink(missing_ok=True)

if __name__ == "__main__":
    args = hf.HfArgumentParser(Args).parse_args_into_dataclasses()[0]
    if WORLD > 1:  # under torchrun
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
        if args.device == "cuda":
            torch.cuda.set_device(RANK % torch.cuda.device_count())
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.bf16, False):
        main(args)  # False: no stale bfloat16 copies

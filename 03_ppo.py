"""Stage 3: PPO with a reward on every token, beside ordinary PPO with one reward a response.

Paper: Xu et al., "Aligning Large Language Models via Fine-grained Supervision" (ACL 2024, arXiv 2406.02756).
Equations: A7 (reward), A8 (advantages), A9 (PPO).

    symbol      variable                    shape
    a_t         inputs["input_ids"][:, -T:] (B, T)     response tokens, the end token included
    pi, pi_old  logprobs, old_logprobs      (B, T)     log pi(a_t | s_t)
    pi_ref      ref_logprobs                (B, T)     the frozen SFT policy
    r_t         scores                      (B, T)     from the reward model
    r^_t        rewards                     (B, T)     scores minus the KL penalty
    V(s_t)      values                      (B, T)     before token t is written
    A^_t        advantages                  (B, T)

    One index convention, for a prompt p1 p2 and a response a1 a2 a3, all in columns -T: of the batch:
        input_ids      <pad>  p1   p2   a1   a2   a3        logits at t-1 score token t, so
        logits of             .    a1   a2   a3   .         log-prob and value of a1 are read at p2,
        reward of                       a1   a2   a3        its reward is read at a1 itself.

Simplified against the paper:
  1. The value model is a second model beside the policy, started from the SFT policy in both runs.
  2. Rewards are divided by the standard deviation of a response's total reward (stage 2 measured it).

Reads:  RUN/policy/  RUN/problems.jsonl  RUN/reward_token/  RUN/reward_sequence/  RUN/reward_metrics.json
Writes: RUN/ppo_token/  RUN/ppo_sequence/  RUN/ppo_token.csv  RUN/ppo_sequence.csv  RUN/03_args.json

    python 03_ppo.py                      about 1 minute on two CPU cores (no GPU was at hand to measure)
"""

import csv
import json
import os
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.utils import logging


@dataclass
class Args:
    run: str = field(default="runs/default", metadata={"help": "run folder"})
    seed: int = field(default=1, metadata={"help": "seed of prompts and samples, the same for both runs"})
    overwrite: bool = field(default=False, metadata={"help": "train again even if the policies exist"})
    policy: Optional[str] = field(default=None, metadata={"help": "SFT policy, pi_ref; default RUN/policy"})
    problems: Optional[str] = field(default=None, metadata={"help": "prompts; default RUN/problems.jsonl"})
    reward: str = field(default="both", metadata={
        "help": "which reward to train on", "choices": ["both", "token", "sequence"]})
    reward_model: Optional[str] = field(default=None, metadata={
        "help": "with --reward token or sequence: its folder; default RUN/reward_token, RUN/reward_sequence"})
    updates: int = field(default=40, metadata={"help": "PPO updates: rollout, then ppo_epochs over it"})
    rollout_batch: int = field(default=256, metadata={"help": "responses sampled an update (episodes)"})
    ppo_epochs: int = field(default=2, metadata={"help": "passes over a rollout"})
    minibatch: int = field(default=64, metadata={"help": "responses an optimiser step"})
    lr: float = field(default=1e-4, metadata={"help": "learning rate of the policy (AdamW)"})
    value_lr: float = field(default=1e-3, metadata={"help": "learning rate of the value model (AdamW)"})
    kappa: float = field(default=0.1, metadata={"help": "A7: KL coefficient, kappa, in reward per nat"})
    gamma: float = field(default=1.0, metadata={"help": "A8: discount a token, gamma"})
    lam: float = field(default=0.95, metadata={"help": "A8: lambda of generalised advantage estimation"})
    clip: float = field(default=0.2, metadata={"help": "A9: clip range of the ratio, epsilon"})
    value_clip: float = field(default=0.2, metadata={"help": "A9: clip range of the value, in reward units"})
    target_kl: Optional[float] = field(default=None, metadata={
        "help": "stop the passes over a rollout when the mean KL(pi_old, pi) exceeds this many nats a token"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of sampling and of all log-probs"})
    max_new_tokens: int = field(default=48, metadata={"help": "longest response, in tokens"})
    eval_every: int = field(default=2, metadata={"help": "updates between looks at the validation prompts"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={
        "help": "torch device"})


# --- The equations -----------------------------------------------------------------------------------------

@torch.no_grad()
def scores_of(kind, reward_model, inputs, response_mask, scale):
    """A7, the one place where the two runs differ: scores (B, T), in standard deviations of the total reward.

    token: r_phi(s_t, a_t) on every token. sequence: 1[t = T] R_phi(x, y), everything on the last token.
    """
    if kind == "token":
        return token_rewards(reward_model, inputs, response_mask) / scale["std"]
    scores = torch.zeros_like(response_mask, dtype=torch.float32)
    last = response_mask.sum(dim=1, keepdim=True) - 1
    reward = (sequence_reward(reward_model, inputs) - scale["mean"]) / scale["std"]
    return scores.scatter(1, last, reward[:, None])


def kl_rewards(scores, old_logprobs, ref_logprobs, kappa):
    """A7: r^_t = r_t - kappa log(pi_old(a_t | s_t) / pi_ref(a_t | s_t)), all (B, T). The KL term is a reward
    and carries no gradient."""
    return scores - kappa * (old_logprobs - ref_logprobs).detach()


def token_values(value_model, inputs, response_mask):
    """V(s_t) (B, T): the output at position t-1, where token t is not yet known. 0 outside the response."""
    T = response_mask.shape[1]
    return value_model(**inputs).logits[:, -T - 1:-1, 0].float() * response_mask


def gae(rewards, values, response_mask, gamma, lam):
    """A8: advantages and returns (B, T). rewards and values are 0 after the last token, so V(s_{T+1}) = 0."""
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
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


def policy_loss(logprobs, old_logprobs, advantages, response_mask, clip):
    """A9: -(1/N) sum_t min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t), N response tokens in the minibatch."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), response_mask)


def value_loss(values, old_values, returns, response_mask, clip):
    """A9: half the mean over tokens of the larger squared error, of V and of V clipped around old V."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), response_mask)


# --- Helpers that stand in several scripts, letter for letter ----------------------------------------------

def fail(message):
    """One clear line on standard error, exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)            # on a line of its own, not behind a bar
    raise SystemExit(2)


def read_jsonl(path, columns, fault=lambda row: None):
    """Rows of a JSONL file as dictionaries. columns: name -> allowed types; what may be null may be empty.
    fault(row): what else is wrong with a row, or None. A fault names file and line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            json.dumps(row, ensure_ascii=False).encode("utf-8")          # half a surrogate pair is no text
        except ValueError as error:
            fail(f"{path}, line {number}: not a line of JSON in UTF-8 ({error})")
        if not isinstance(row, dict):
            fail(f"{path}, line {number}: not a JSON object with named columns")
        for name, types in columns.items():
            if name not in row:
                fail(f"{path}, line {number}: column `{name}` is missing")
            if not isinstance(row[name], types):
                fail(f"{path}, line {number}: column `{name}` has the wrong type, {type(row[name]).__name__}")
            empty = not row[name].strip() if isinstance(row[name], str) else row[name] == []
            if empty and not isinstance(None, types):
                fail(f"{path}, line {number}: column `{name}` is empty")
        if fault(row):
            fail(f"{path}, line {number}: {fault(row)}")
        rows.append(row)
    if not rows:
        fail(f"{path}: has no rows")
    return rows


def start_stage(args, stage):
    """Print the resolved arguments, save them as RUN/stage_args.json, seed torch; returns the run folder."""
    settings = [f"{name}={value}" for name, value in asdict(args).items() if value is not None]
    print(f"stage {stage}: {' '.join(settings)}", flush=True)
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    (run / f"{stage}_args.json").write_text(json.dumps(asdict(args), indent=1) + "\n")
    torch.manual_seed(args.seed)
    return run


def check_folder(path):
    """A model folder of the run must be there: a missing one would be looked up on the net as a name."""
    if isinstance(path, Path) and not path.is_dir():
        fail(f"{path}: no model folder; run the stage that writes it first, or name another one")


def open_model(auto_class, path, **options):
    """from_pretrained in float32 (log-probs must not round), eval mode (dropout off), or a readable error."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_folder(path)
    try:
        model, info = auto_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True,
                                                 **options)
    except Exception as error:                     # transformers and safetensors raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{path}: no model that {auto_class.__name__} can open ({reason})")
    if info["missing_keys"] and not options:       # transformers would make the weights up
        fail(f"{path}: no {auto_class.__name__}, it has no {sorted(info['missing_keys'])[0]}")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        fail(f"{path}: a weight of the model is not finite")
    return model.eval()


def open_tokenizer(path):
    """The tokenizer of a model folder, with an end token and a pad token that is never the end token."""
    check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{path}: no tokenizer that AutoTokenizer can open ({reason})")
    if tokenizer.eos_token is None:
        fail(f"{path}: the tokenizer has no end token, so no response could end")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = [token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token]
        if others:
            tokenizer.pad_token = others[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def save_model(model, tokenizer, path):
    """save_pretrained beside the target first, so that a model folder is whole or absent."""
    model.config.pad_token_id = tokenizer.pad_token_id
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: a plain string, or chat messages through the tokenizer's own template."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    if tokenizer.chat_template is None:
        fail(f"{tokenizer.name_or_path}: no chat template, but a prompt is a list of chat messages")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def read_metrics(path):
    """reward_metrics.json, one entry a reward model; empty where stage 2 has not run."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {kind: {**row, "scale": {**row["scale"]}} for kind, row in metrics.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        fail(f"{path}: not what 02_reward_model.py writes; delete it and run 02_reward_model.py again")


def encode_problems(path, problems, tokenizer, context, max_new_tokens):
    """Add prompt_ids to the problems, checked against the tokenizer and the context of the policy."""
    for problem in problems:
        problem["prompt_ids"] = encode_prompt(tokenizer, problem["prompt"])
        if len(problem["prompt_ids"]) + max_new_tokens > context:
            fail(f"{path}, {problem['id']}: a prompt of {len(problem['prompt_ids'])} tokens and "
                 f"--max_new_tokens {max_new_tokens} do not fit the context of {context}")
    if all(tokenizer.unk_token_id in problem["prompt_ids"] for problem in problems):
        fail(f"{path}: every prompt has words that {tokenizer.name_or_path} does not know: another run?")


def pack(prompts, responses, pad_id, device):
    """Prompts padded on the left, responses on the right: every response starts in the same column.

    prompts, responses: B lists of token ids, the longest P and T long. Returns the model inputs (B, P + T)
    and response_mask (B, T), made from lengths, the only mask of losses and metrics.
    """
    P = max(map(len, prompts))
    T = max(map(len, responses))
    ids = [[pad_id] * (P - len(p)) + p + r + [pad_id] * (T - len(r)) for p, r in zip(prompts, responses)]
    first = torch.tensor([P - len(p) for p in prompts])[:, None]
    end = torch.tensor([P + len(r) for r in responses])[:, None]
    column = torch.arange(P + T)[None]
    mask = (column >= first) & (column < end)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": mask.long(),
              "position_ids": (column - first).clamp(min=0)}
    return {name: tensor.to(device) for name, tensor in inputs.items()}, mask[:, P:].to(device)


def response_logits(model, inputs, response_mask):
    """Logits (B, T, vocabulary) in float32 that score the response tokens: those at t-1 score token t."""
    T = response_mask.shape[1]
    return model(**inputs, logits_to_keep=T + 1).logits[:, :-1].float()


def token_logprobs(logits, inputs, response_mask):
    """log pi(a_t | s_t) (B, T) of the response tokens, 0 where the mask is."""
    tokens = inputs["input_ids"][:, -response_mask.shape[1]:]
    return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * response_mask


@torch.no_grad()
def sample(model, prompts, tokenizer, max_new_tokens, temperature=1.0):
    """Sample one response to each prompt (lists of ids) from the policy as it is, without the top-k, top-p or
    penalty of a checkpoint's own settings. The end token, where there is one, is the last response token."""
    inputs, _ = pack(prompts, [[]] * len(prompts), tokenizer.pad_token_id, model.device)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    rows = ids[:, inputs["input_ids"].shape[1]:].tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


def paint(text, code):
    """Text in an ANSI colour; plain where the output is no terminal or NO_COLOR is set."""
    colour = code and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{code}m{text}\033[0m" if colour else text


def token_rewards(model, inputs, response_mask):
    """A2: r_t = r_phi(s_t, a_t) (B, T), read at the position of token t itself; 0 outside the response."""
    T = response_mask.shape[1]
    return model(**inputs).logits[:, -T:, 0].float() * response_mask


def sequence_reward(model, inputs):
    """A6: R_phi(x, y) (B,), read at the last token of the response."""
    return model(**inputs).logits[:, 0].float()


def edit_columns(a, b):
    """E1: the Levenshtein table D of a (rows) against b (columns), one pair of big integers a column.

    Neighbours in a column of D differ by -1, 0 or +1, so two sets of bits hold it: bit i of `up` says
    D[i+1][j] = D[i][j] + 1, bit i of `down` says D[i+1][j] = D[i][j] - 1. A column follows from the last with
    a dozen integer operations, all rows at once (Myers 1999, Hyyrö 2003). Returns len(b) + 1 pairs.
    """
    rows_with = {}
    for i, token in enumerate(a):
        rows_with[token] = rows_with.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    up, down = full, 0
    columns = [(up, down)]
    for token in b:
        equal = rows_with.get(token, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down    # D[i+1][j+1] = D[i][j]
        right_up = down | ~(diagonal | up)                      # D[i+1][j+1] = D[i+1][j] + 1
        right_down = diagonal & up                              # D[i+1][j+1] = D[i+1][j] - 1
        right_up = right_up << 1 | 1                            # one row down; the top row is 0, 1, 2, ...
        right_down = right_down << 1
        up = (right_down | ~(diagonal | right_up)) & full
        down = right_up & diagonal & full
        columns.append((up, down))
    return columns


def edit_distance(a, b):
    """E1: the least number of replaced, deleted and inserted items that turns sequence a into b."""
    up, down = edit_columns(a, b)[-1]
    return len(b) + up.bit_count() - down.bit_count()


@lru_cache(maxsize=200_000)
def split_steps(text):
    """The steps of a response: its lines, its sentences, or what stands between semicolons."""
    return tuple(step.strip() for step in re.split(r"\n|(?<=;)|(?<=\.)\s", text) if step.strip())


def judge(response, solutions):
    """(wrong steps, answer right?) of a response. Its steps against those of the nearest right solution (E1):
    a step replaced, deleted or inserted on the way there is a wrong one; the last step is the answer."""
    steps = split_steps(response)
    wrong_steps = min(edit_distance(steps, split_steps(solution)) for solution in solutions)
    answer_right = any(steps[-1:] == split_steps(solution)[-1:] for solution in solutions)
    return wrong_steps, answer_right


# --- One update --------------------------------------------------------------------------------------------

@torch.no_grad()
def rollout(kind, models, prompts, tokenizer, scale, args):
    """Sample a response to each prompt and compute all that the update needs, from the same forward pass as
    training: a dictionary of (B, T) tensors, the model inputs, and the responses as lists of ids."""
    responses = sample(models["policy"], prompts, tokenizer, args.max_new_tokens, args.temperature)
    inputs, mask = pack(prompts, responses, tokenizer.pad_token_id, args.device)
    logits = response_logits(models["policy"], inputs, mask) / args.temperature
    ref_logits = response_logits(models["reference"], inputs, mask) / args.temperature
    logprobs = token_logprobs(logits, inputs, mask)
    ref_logprobs = token_logprobs(ref_logits, inputs, mask)
    values = token_values(models["value"], inputs, mask)
    scores = scores_of(kind, models["reward"], inputs, mask, scale)
    rewards = kl_rewards(scores, logprobs, ref_logprobs, args.kappa)                # A7
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)          # A8
    return responses, inputs, {"mask": mask, "old_logprobs": logprobs, "ref_logprobs": ref_logprobs,
                               "old_values": values, "scores": scores, "rewards": rewards, "returns": returns,
                               "advantages": masked_whiten(advantages, mask)}       # A9: normalised


def update(models, optimizer, inputs, batch, args, update_number):
    """args.ppo_epochs passes of clipped policy and value steps (A9) over a rollout; mean statistics."""
    statistics = []
    B = len(batch["mask"])
    for epoch in range(args.ppo_epochs):
        for rows in torch.randperm(B, device=batch["mask"].device).split(args.minibatch):
            part = {name: tensor[rows] for name, tensor in batch.items()}
            part_inputs = {name: tensor[rows] for name, tensor in inputs.items()}
            mask = part["mask"]
            logits = response_logits(models["policy"], part_inputs, mask) / args.temperature
            logprobs = token_logprobs(logits, part_inputs, mask)
            values = token_values(models["value"], part_inputs, mask)
            loss_policy = policy_loss(logprobs, part["old_logprobs"], part["advantages"], mask, args.clip)
            loss_value = value_loss(values, part["old_values"], part["returns"], mask, args.value_clip)
            loss = loss_policy + loss_value          # two models: neither loss reaches the other's weights
            if not loss.isfinite():
                fail(f"update {update_number}: the loss is {loss.item()}; lower --lr or raise --kappa")
            with torch.no_grad():
                logratio = logprobs - part["old_logprobs"]
                clipfrac = masked_mean(((logratio.exp() - 1).abs() > args.clip).float(), mask).item()
                approx_kl = masked_mean(logratio.exp() - 1 - logratio, mask).item()          # k3
                if update_number == 1 and not statistics:
                    assert logratio.abs().max() < 1e-3 and clipfrac == 0, "rho is not 1 before the first step"
                entropy = masked_mean(torch.distributions.Categorical(logits=logits).entropy(), mask).item()
            loss.backward()
            for name in ("policy", "value"):
                torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            statistics.append({"policy_loss": loss_policy.item(), "value_loss": loss_value.item(),
                               "approx_kl": approx_kl, "clipfrac": clipfrac, "entropy": entropy})
            if args.target_kl and approx_kl > args.target_kl:
                return average(statistics)
    return average(statistics)


def average(statistics):
    """Mean of every entry of a list of dictionaries with the same keys."""
    return {name: sum(s[name] for s in statistics) / len(statistics) for name in statistics[0]}


@torch.no_grad()
def validate(policy, problems, tokenizer, args):
    """Share of sampled responses without a wrong step, and wrong steps a response, on validation problems."""
    prompts = [problem["prompt_ids"] for problem in problems]
    responses = []
    for start in range(0, len(prompts), args.rollout_batch):
        responses += sample(policy, prompts[start:start + args.rollout_batch], tokenizer, args.max_new_tokens,
                            args.temperature)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    wrong = [judge(text, problem["solutions"])[0] for text, problem in zip(texts, problems)]
    return {"accuracy": sum(w == 0 for w in wrong) / len(wrong), "wrong_steps": sum(wrong) / len(wrong)}


def statistics_of(batch, responses, tokenizer):
    """What one looks at while PPO runs; sums are over a response, means over the rollout."""
    mask = batch["mask"]
    variance = masked_mean((batch["returns"] - masked_mean(batch["returns"], mask)) ** 2, mask)
    residual = masked_mean((batch["returns"] - batch["old_values"]) ** 2, mask)
    return {"score": batch["scores"].sum(1).mean().item(),                # from the reward model, without KL
            "reward": batch["rewards"].sum(1).mean().item(),              # A7, with KL
            "kl": ((batch["old_logprobs"] - batch["ref_logprobs"]).sum(1)).mean().item(),   # nats a response
            "explained_variance": (1 - residual / variance.clamp(min=1e-8)).item(),
            "length": mask.sum(1).float().mean().item(),
            "ended": sum(r[-1] == tokenizer.eos_token_id for r in responses) / len(responses)}


def token_texts(ids, tokenizer):
    """The text that each token adds to the ones before it, spaces included."""
    texts = [tokenizer.decode(ids[:k]) for k in range(len(ids) + 1)]
    return [longer[len(shorter):] for shorter, longer in zip(texts, texts[1:])]


def show_sample(response, scores, tokenizer):
    """One response, every token coloured by its score: red is punished, green is praised."""
    return "".join(paint(text, 31 if score < -0.25 else 32 if score > 0.25 else 0)
                   for text, score in zip(token_texts(response, tokenizer), scores.tolist()))


def ppo(kind, problems, tokenizer, scale, args, paths):
    """Train one policy on one kind of reward; one CSV row and one progress-bar line an update."""
    torch.manual_seed(args.seed)                       # the same prompts and seeds for both kinds
    auto_class = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    models = {"policy": open_model(AutoModelForCausalLM, paths["policy"]),
              "reference": open_model(AutoModelForCausalLM, paths["policy"]),
              "value": open_model(AutoModelForTokenClassification, paths["policy"], num_labels=1),
              "reward": open_model(auto_class, paths["reward"])}
    for name, parameter in models["value"].named_parameters():
        if not name.startswith(models["value"].base_model_prefix + "."):
            torch.nn.init.zeros_(parameter)            # a head of zeros: V = 0 at the start
    if models["reward"].config.vocab_size != models["policy"].config.vocab_size:
        fail(f"{paths['reward']} and {paths['policy']} differ in vocabulary; rewards need the same tokens")
    for model in models.values():
        model.to(args.device)
    optimizer = torch.optim.AdamW([{"params": models["policy"].parameters(), "lr": args.lr},
                                   {"params": models["value"].parameters(), "lr": args.value_lr}],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    train = [problem for problem in problems if problem["split"] == "train"]
    val = [problem for problem in problems if problem["split"] == "val" and problem.get("solutions")]
    rng = random.Random(args.seed)
    queue = []
    seconds = 0.0
    log = []
    bar = trange(1, args.updates + 1, desc=f"ppo_{kind}", unit="update")
    for number in bar:
        start = time.time()
        while len(queue) < args.rollout_batch:
            queue += rng.sample(train, len(train))
        prompts = [problem["prompt_ids"] for problem in queue[:args.rollout_batch]]
        queue = queue[args.rollout_batch:]
        responses, inputs, batch = rollout(kind, models, prompts, tokenizer, scale, args)
        if not batch["rewards"].isfinite().all():
            fail(f"update {number}: a reward is not finite; look at {paths['reward']}")
        row = {"update": number, "episodes": number * args.rollout_batch,
               **statistics_of(batch, responses, tokenizer)}
        if number == 1:
            assert abs(row["kl"]) < 1e-3, "the policy does not start as the reference"
        row.update(update(models, optimizer, inputs, batch, args, number))
        with torch.no_grad():
            if not models["policy"](**{name: x[:8] for name, x in inputs.items()}).logits.isfinite().all():
                fail(f"update {number}: the policy is not finite any more; lower --lr or raise --kappa")
        elapsed = time.time() - start
        seconds += elapsed
        row.update(seconds=round(seconds, 2), tokens_per_second=batch["mask"].sum().item() / elapsed)
        if val and (number % args.eval_every == 0 or number == args.updates):
            row.update(validate(models["policy"], val, tokenizer, args))
        log.append(row)
        shown = {name: f"{row[name]:.2f}" for name in ("score", "kl", "clipfrac", "accuracy") if name in row}
        bar.set_postfix(shown, refresh=False)
    print(f"  a last sample: {show_sample(responses[0], batch['scores'][0], tokenizer)}")
    return models["policy"], log


def write_csv(path, rows):
    """One line an update; a column that an update did not measure stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    part = Path(f"{path}.part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: round(value, 5) if isinstance(value, float) else value
                          for name, value in row.items()} for row in rows)
    part.replace(path)


def main(args):
    run = Path(args.run)
    policy_path = args.policy or run / "policy"
    problems_path = Path(args.problems or run / "problems.jsonl")
    if not problems_path.exists():
        fail(f"{problems_path} is missing: run 01_edit_data.py first, or name the file with --problems")
    kinds = ("token", "sequence") if args.reward == "both" else (args.reward,)
    metrics_path = (Path(args.reward_model).parent if args.reward_model else run) / "reward_metrics.json"
    if not metrics_path.exists():
        fail(f"{metrics_path} is missing: run 02_reward_model.py first")
    metrics = read_metrics(metrics_path)
    tokenizer = open_tokenizer(policy_path)
    problems = read_jsonl(problems_path, {"id": str, "prompt": (str, list), "split": str})
    context = open_model(AutoModelForCausalLM, policy_path).config.max_position_embeddings
    if not any(problem["split"] == "train" for problem in problems):
        fail(f"{problems_path}: no problem has the split train")
    encode_problems(problems_path, problems, tokenizer, context, args.max_new_tokens)
    todo = []
    for kind in kinds:
        target = run / f"ppo_{kind}"
        reward_path = args.reward_model or run / f"reward_{kind}"
        if target.exists() and not args.overwrite:
            print(f"{target} is there already; --overwrite trains it again")
        elif args.reward == "both" and kind not in metrics:
            print(f"ppo_{kind}: skipped, stage 2 made no reward_{kind}")
        elif kind not in metrics or not args.reward_model and not reward_path.is_dir():
            fail(f"{reward_path} or its entry in {metrics_path} is missing: run 02_reward_model.py first")
        else:
            todo.append((kind, reward_path, target))
    if todo:
        start_stage(args, "03")
    for kind, reward_path, target in todo:
        paths = {"policy": policy_path, "reward": reward_path}
        policy, log = ppo(kind, problems, tokenizer, metrics[kind]["scale"], args, paths)
        write_csv(run / f"ppo_{kind}.csv", log)
        save_model(policy, tokenizer, target)


if __name__ == "__main__":
    main(HfArgumentParser(Args).parse_args_into_dataclasses()[0])

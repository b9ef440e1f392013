"""Stage 3: PPO with a reward on every token, beside ordinary PPO with one reward a response; and RLMEC.

Papers: A, Xu et al., "Aligning Large Language Models via Fine-grained Supervision" (ACL 2024, 2406.02756).
        B, Chen et al., "Improving Large Language Models via Fine-grained Reinforcement Learning with Minimum
        Editing Constraint" (RLMEC, ACL 2024, 2401.06081).
Equations: A7 (reward), A8 (advantages), A9 (PPO); B3 (token reward), B4 (rewrite), B5 (token-level
objective), B6 (imitation), B7 (total), B8 (recipe), E1 (alignment).

    symbol      variable                    shape
    a_t         inputs["input_ids"][:, -T:] (B, T)     response tokens, the end token included
    pi, pi_old  logprobs, old_logprobs      (B, T)     log pi(a_t | s_t)
    pi_ref      ref_logprobs                (B, T)     the frozen SFT policy
    r_t         scores                      (B, T)     from the reward model
    r^_t        rewards                     (B, T)     scores minus the KL penalty
    V(s_t)      values                      (B, T)     before token t is written
    A^_t        advantages                  (B, T)
    p_t         probabilities               (B, T)     of the generative reward model (GRM)
    w_t         weights                     (B, T)     rlmec_loss
    y~          rewrite_ids                 (B, T~)    the GRM's correction of the response
    gamma_t     gamma                       (B, T~)    imitation weights

    One index convention, for a prompt p1 p2 and a response a1 a2 a3, all in columns -T: of the batch:
        input_ids      <pad>  p1   p2   a1   a2   a3        logits at t-1 score token t, so
        logits of             .    a1   a2   a3   .         log-prob and value of a1 are read at p2,
        reward of                       a1   a2   a3        its reward is read at a1 itself.

Simplified against the papers:
  1. The value model is a second model beside the policy, started from the SFT policy in both runs.
  2. Rewards are divided by the standard deviation of a response's total reward (stage 2 measured it); the
     sequence reward is centred first, because A6 knows it only up to a constant.
  3. RLMEC takes one sample a problem, and its rewrites are the GRM's likeliest ones.

Reads:  RUN/policy/  RUN/problems.jsonl  RUN/reward_*/  RUN/reward_metrics.json
Writes: RUN/ppo_token/  RUN/ppo_sequence/  RUN/rlmec/  RUN/rlmec_imitation/, a CSV each, RUN/03_args.json
        RUN/value_token/  RUN/value_sequence/, the value models of PPO

    python 03_ppo.py                      about 2 minutes on two CPU cores (no GPU was at hand to measure)
    python 03_ppo.py --method rlmec_reward     an ablation of RLMEC: imitation, reward, uniform or noclip
"""

import csv
import json
import math
import os
import random
import re
import shutil
import sys
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging


@dataclass
class Args:
    run: str = field(default="runs/default", metadata={"help": "run folder"})
    seed: int = field(default=1, metadata={"help": "seed of prompts and samples, the same for both runs"})
    overwrite: bool = field(default=False, metadata={"help": "train again even if the policies exist"})
    policy: Optional[str] = field(default=None, metadata={
        "help": "SFT policy, pi_ref; default RUN/policy", "aliases": ["--model"]})
    problems: Optional[str] = field(default=None, metadata={"help": "prompts; default RUN/problems.jsonl"})
    method: str = field(default="all", metadata={
        "help": "what to train; all: the first four; the last three: RLMEC with --imitation_weight 0, "
                "--uniform_gamma, --rlmec_clip inf",
        "choices": ["all", "ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation", "rlmec_reward",
                    "rlmec_uniform", "rlmec_noclip"]})
    reward_model: Optional[str] = field(default=None, metadata={
        "help": "with one --method: its reward model; default RUN/reward_token, _sequence or _generative"})
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
    rlmec_samples: int = field(default=4096, metadata={"help": "B8: responses sampled a round (episodes)"})
    rounds: int = field(default=1, metadata={
        "help": "B8: times to sample, reward and train; 1 is off-line, more go on from the current policy"})
    rlmec_epochs: int = field(default=3, metadata={"help": "B8: passes over the samples of a round"})
    rlmec_batch: int = field(default=128, metadata={"help": "B8: samples an optimiser step"})
    rlmec_lr: float = field(default=1e-3, metadata={"help": "B8: learning rate; cosine with 3 %% warm-up"})
    rlmec_clip: float = field(default=0.3, metadata={"help": "B5: clip range of the ratio, epsilon"})
    reward_weight: float = field(default=1.0, metadata={"help": "B7: weight of L_RL; 0 is imitation alone"})
    imitation_weight: float = field(default=1.0, metadata={"help": "B7: weight of L_IR, lambda"})
    uniform_gamma: bool = field(default=False, metadata={"help": "B6: gamma_t = 1 for every token"})
    eval_every: int = field(default=2, metadata={"help": "updates between looks at the validation prompts"})
    dtype: str = field(default="float32", metadata={
        "help": "of the weights; log-probs, losses and optimiser steps are float32 in any case",
        "choices": ["float32", "bfloat16"]})
    gradient_checkpointing: bool = field(default=False, metadata={
        "help": "less memory, a third more time: activations are computed again in the backward pass"})
    micro_batch: Optional[int] = field(default=None, metadata={
        "help": "responses a forward pass; their gradients add up to those of the whole batch; default: all"})
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
    return value_model(**inputs, use_cache=False).logits[:, -T - 1:-1, 0].float() * response_mask


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


def generative_rewards(probabilities, is_right, response_mask):
    """B3: r_t (B, T) from p_t = P_GRM(a_t | rewrite prompt, a_<t) (B, T) and is_right (B,), boolean:
    clip(p_t - 0.5, 0, 0.5) in a right response, clip(p_t - 0.5, -0.1, 0) in a wrong one."""
    r = probabilities - 0.5
    return torch.where(is_right[:, None], r.clamp(0, 0.5), r.clamp(-0.1, 0)) * response_mask


def rlmec_loss(logprobs, old_logprobs, rewards, clip):
    """B5: -(1/N) sum_t w_t log pi(a_t | s_t), w_t = stopgrad[min(rho_t r_t, clip(rho_t, 1-eps, 1+eps) r_t)],
    N tokens with r_t != 0; all (B, T), rewards 0 outside the response. Not PPO's clip: a clipped ratio stops
    PPO's gradient; here the weight is clipped and log pi keeps its gradient."""
    ratio = torch.exp(logprobs - old_logprobs)
    weights = torch.min(ratio * rewards, ratio.clamp(1 - clip, 1 + clip) * rewards).detach()
    N = (rewards != 0).sum().clamp(min=1)                     # no such token: the term is 0, not 0/0
    return -(weights * logprobs).sum() / N


def imitation_weights(response_ids, rewrite_ids, uniform=False):
    """B6: gamma_t of every token of the rewrite: 1 where the alignment (E1) replaces or inserts, 0.5 where it
    keeps; so 0.5 throughout for a right response, which is its own rewrite. uniform: 1 everywhere."""
    return [1.0 if uniform or op != "keep" else 0.5
            for op, i, j in align(response_ids, rewrite_ids) if op != "delete"]


def imitation_loss(logprobs, gamma, rewrite_mask):
    """B6: -(1/M) sum_t gamma_t log pi(y~_t | x, y~_<t), all (B, T), M tokens of the rewrites."""
    return -(gamma * logprobs).sum() / rewrite_mask.sum()


# --- The generative reward model: its prompts, the same in training, scoring and generation ----------------

def instructions(tokenizer):
    """B2: token ids of the fixed parts of both prompts. A vocabulary of a built-in task has no words for
    instructions: there the end token separates the parts, and a step is numbered by a bare digit."""
    texts = {"solution": "\nReference solution:\n", "attempt": "\nAttempt:\n",
             "rewrite": "\nThe attempt, corrected with as few changes as possible:\n",
             "locate": "\nThe first wrong step of the attempt:\n"}
    label = "[{}] "
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    parts = {name: encode(text) for name, text in texts.items()}
    if any(tokenizer.unk_token_id in ids for ids in [*parts.values(), encode(label.format(1))]):
        end = [tokenizer.eos_token_id]
        parts = {"solution": [], "attempt": end, "rewrite": end, "locate": end}
        label = "{}"
    return {**parts, "label": lambda k: encode(label.format(k))}


def rewrite_prompt(parts, prompt_ids, solution_ids, response_ids, end):
    """B2: the prompt of `rewrite`, from (x, y*, y^), as token ids; the ids of y^ stand in it as they are."""
    solution = [token for token in solution_ids if token != end]
    attempt = [token for token in response_ids if token != end]
    return prompt_ids + parts["solution"] + solution + parts["attempt"] + attempt + parts["rewrite"]


def locate_prompt(parts, prompt_ids, solution_ids, response_ids, end, tokenizer):
    """B2: the prompt of `locate`: the same with numbered steps in y* and y^, as token ids."""

    def numbered(ids):
        ids = [token for token in ids if token != end]
        starts = step_starts(ids, tokenizer)
        steps = [ids[a:b] for a, b in zip(starts, starts[1:] + [len(ids)])]
        return [token for k, step in enumerate(steps, 1) for token in parts["label"](k) + step]

    solution, attempt = numbered(solution_ids), numbered(response_ids)
    return prompt_ids + parts["solution"] + solution + parts["attempt"] + attempt + parts["locate"]


def locate_answer(parts, step, end):
    """B2: the output of `locate`: the labels of the steps in turn, up to that of the first wrong one."""
    return [token for k in range(1, step + 1) for token in parts["label"](k)] + [end]


def located_step(parts, answer_ids, steps, end):
    """The step, from 1, that an answer to `locate` names; None if it is no such answer, or the response has
    no such step."""
    return next((k for k in range(1, steps + 1) if locate_answer(parts, k, end) == answer_ids), None)


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


def check_args(args):
    """Counts are 1 or more (a few may be 0), no number is below 0, and the device is there."""
    may_be_0 = ("seed", "sft_steps", "val_prompts", "test_prompts", "rewrite_epochs", "locate_epochs",
                "human_eval", "examples", "llm_retries")
    for name, value in asdict(args).items():
        least = 0 if name in may_be_0 else 1
        if type(value) is int and value < least:
            fail(f"--{name} {value}: it must be {least} or more")
        if type(value) is float and not value >= 0:                     # or no number at all
            fail(f"--{name} {value}: it must be 0 or more")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: not to be used here ({str(error).splitlines()[0]})")


def start_stage(args, stage):
    """Print the resolved arguments, save them as RUN/stage_args.json, seed torch; returns the run folder."""
    settings = [f"{name}={value}" for name, value in asdict(args).items() if value is not None]
    print(f"stage {stage}: {' '.join(settings)}", flush=True)
    if hasattr(sys.stdout, "reconfigure"):         # a console that is not UTF-8 stops no stage
        sys.stdout.reconfigure(errors="replace")
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    (run / f"{stage}_args.json").write_text(json.dumps(asdict(args), indent=1) + "\n")
    torch.manual_seed(args.seed)
    return run


def say_kept(path, args, stage):
    """Say that an output stays as it is, and which settings of the last call were not those of this one."""
    print(f"{path} is there already; --overwrite trains it again")
    try:
        saved = json.loads((Path(args.run) / f"{stage}_args.json").read_text())
        ours = ("run", "overwrite", "kind", "method", "reward_model", "micro_batch", "device")
        other = [f"--{name} {saved[name]}" for name, value in asdict(args).items()
                 if name not in ours and name in saved and saved[name] != value]
    except (OSError, ValueError, TypeError):
        return
    if other:
        print(f"  the stage's last call had other settings: {' '.join(other)}")


def check_folder(path):
    """A model folder of the run must be there: a missing one would be looked up on the net as a name."""
    if (isinstance(path, Path) or path.startswith(("/", "."))) and not Path(path).is_dir():
        fail(f"{path}: no model folder; run the stage that writes it first, or name another one")


def open_model(auto_class, path, dtype="float32", **options):
    """from_pretrained in eval mode, so that dropout is off, or a readable error."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_folder(path)
    try:
        model, info = auto_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:                     # transformers and safetensors raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{path}: no model that {auto_class.__name__} can open ({reason})")
    body = model.base_model_prefix + "."           # a new head (options) is no fault, a new body is
    missing = [name for name in sorted(info["missing_keys"]) if not options or name.startswith(body)]
    if missing:                                    # transformers would make the weights up
        fail(f"{path}: no {auto_class.__name__}, it has no {missing[0]}")
    heads = [name for name in info["unexpected_keys"] if name.startswith(("score.", "classifier."))]
    if heads and not options:                      # a reward model of another kind, or of any
        fail(f"{path}: no {auto_class.__name__}, it has a {heads[0]}")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        fail(f"{path}: a weight of the model is not finite")
    return model.eval()


def end_of_turn(tokenizer):
    """The special token with which the chat template ends an answer, as <|im_end|>; else the end token."""
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "?"},
                                              {"role": "assistant", "content": "!!"}], tokenize=False)
    except Exception:                              # a template may raise what it likes; encode_prompt says it
        return tokenizer.eos_token
    rest = tokenizer(text.rpartition("!!")[2].strip(), add_special_tokens=False).input_ids
    special = [k for k in rest[:1] if k in tokenizer.added_tokens_decoder]
    return tokenizer.convert_ids_to_tokens(special)[0] if special else tokenizer.eos_token


def open_tokenizer(path, chat=False):
    """The tokenizer of a model folder, with an end token and a pad token that is never the end token. chat:
    prompts are chat messages, so that a response ends as the chat template ends an answer."""
    check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{path}: no tokenizer that AutoTokenizer can open ({reason})")
    if tokenizer.eos_token is None:
        fail(f"{path}: the tokenizer has no end token, so no response could end")
    tokenizer.clean_up_tokenization_spaces = False          # text of ids as they are, " ." stays " ."
    if tokenizer.unk_token in (tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.unk_token = None                 # GPT-2: one token in all roles, and no word is unknown
    if chat and tokenizer.chat_template is not None:
        tokenizer.eos_token = end_of_turn(tokenizer)
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = [token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token]
        if others:
            tokenizer.pad_token = others[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def vocabulary_size(tokenizer):
    """One more than the largest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def fit(model, tokenizer):
    """One embedding for each token id, in place: a new pad token gets a row, the same in every stage; rows
    without a token, with which checkpoints are padded, go, or the policy would sample them."""
    if model.get_input_embeddings().num_embeddings != vocabulary_size(tokenizer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(vocabulary_size(tokenizer))
    return model


def same_vocabulary(path, tokenizer, policy_path):
    """Refuse a model whose tokenizer gives a token of the policy another id; more tokens do no harm."""
    here, there = tokenizer.get_vocab(), open_tokenizer(path).get_vocab()
    for token in sorted(here, key=here.get):
        if there.get(token) != here[token] and token != tokenizer.pad_token:
            fail(f"{path} and {policy_path} differ in vocabulary: {token!r} is {there.get(token)} in one, "
                 f"{here[token]} in the other; name a model with the tokens of the policy")


def context_of(model):
    """The longest sequence of a model in tokens; no limit where its configuration names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def check_context(model, path, length):
    """Refuse a model whose context is shorter than the longest sequence that it will see, in tokens."""
    if length > context_of(model):
        fail(f"{path}: its context of {context_of(model)} tokens is too short for {length}, a prompt and a "
             "response (--max_new_tokens)")


def checkpoint_layers(model):
    """Gradient checkpointing: every layer keeps its input alone and computes the rest again in the backward
    pass. The model's own switch for it would need training mode, which turns dropout on."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        fail(f"--gradient_checkpointing: {type(model).__name__} has no layers for it")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class Optimizer(torch.optim.AdamW):
    """AdamW with gradients clipped to norm 1 a model. groups: pairs (model, learning rate).

    Small steps would be lost in the rounding of weights in bfloat16: float32 copies of them take the steps
    and add up the gradients.
    """

    def __init__(self, *groups):
        self.copies = []                                       # (weight in bfloat16, its copy in float32)
        parameters = [{"params": [self.float32(weight) for weight in model.parameters()], "lr": lr}
                      for model, lr in groups]
        super().__init__(parameters, betas=(0.9, 0.95), weight_decay=0.0)

    def float32(self, weight):
        if weight.dtype == torch.float32:
            return weight
        copy = weight.detach().float()
        copy.grad = torch.zeros_like(copy)
        self.copies.append((weight, copy))
        weight.register_post_accumulate_grad_hook(partial(self.move_gradient, copy))
        return copy

    @staticmethod
    def move_gradient(copy, weight):
        copy.grad += weight.grad
        weight.grad = None

    @torch.no_grad()
    def clip_and_step(self):
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.step()
        self.zero_grad(set_to_none=not self.copies)
        for weight, copy in self.copies:
            weight.copy_(copy)


def save_model(model, tokenizer, path):
    """save_pretrained beside the target first, so that a model folder is whole or absent."""
    model.config.pad_token_id = tokenizer.pad_token_id
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def encode_prompt(tokenizer, prompt, where="a prompt"):
    """Token ids of a prompt: a plain string, or chat messages through the tokenizer's own template. where:
    file and row, for the error."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        ended = ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token)
        return ids[:-1] if ended else ids          # some tokenizers end every text
    if tokenizer.chat_template is None:
        fail(f"{tokenizer.name_or_path}: no chat template, but {where} is a list of chat messages")
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:                     # a template may raise what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{where}: the chat template of {tokenizer.name_or_path} does not take its messages ({reason})")
    return tokenizer(text, add_special_tokens=False).input_ids


def read_metrics(path):
    """reward_metrics.json, one entry a reward model; empty where stage 2 has not run."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for row in metrics.values():
            if not (math.isfinite(row["scale"]["mean"]) and 0 < row["scale"]["std"] < math.inf):
                raise ValueError
        return metrics
    except (ValueError, AttributeError, KeyError, TypeError):
        fail(f"{path}: not what 02_reward_model.py writes; delete it and run 02_reward_model.py again")


def fault_of_problem(row):
    """What is wrong with the answer or the oracle of a row of problems.jsonl, or None."""
    if not isinstance(row.get("answer"), (str, type(None))):
        return "column `answer` is no text"
    for name in ("solutions", "rules"):
        texts = row.get(name) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"column `{name}` is no list of texts"
    try:
        for rule in row.get("rules") or []:
            re.compile(rule)
    except re.error as error:
        return f"column `rules` holds no regular expression ({error})"


def encode_problems(path, problems, tokenizer, context, max_new_tokens):
    """Add prompt_ids to the problems, checked against the tokenizer and the context of the policy."""
    for problem in problems:
        problem["prompt_ids"] = encode_prompt(tokenizer, problem["prompt"], f"{path}, {problem['id']}")
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
    return model(**inputs, logits_to_keep=T + 1, use_cache=False).logits[:, :-1].float()


def token_logprobs(logits, inputs, response_mask):
    """log pi(a_t | s_t) (B, T) of the response tokens, 0 where the mask is."""
    tokens = inputs["input_ids"][:, -response_mask.shape[1]:]
    return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * response_mask


def response_logprobs(model, inputs, response_mask, temperature=1.0):
    """log pi(a_t | s_t) (B, T) of a model."""
    return token_logprobs(response_logits(model, inputs, response_mask) / temperature, inputs, response_mask)


@torch.no_grad()
def in_parts(function, inputs, response_mask, size):
    """function(inputs, response_mask) in parts of `size` rows (None: all), because the logits of a whole
    rollout may need more memory than its training."""
    size = size or len(response_mask)
    return torch.cat([function({name: tensor[k:k + size] for name, tensor in inputs.items()},
                               response_mask[k:k + size]) for k in range(0, len(response_mask), size)])


@torch.no_grad()
def sample(model, prompts, tokenizer, max_new_tokens, temperature=1.0):
    """Sample one response to each prompt (lists of ids) from the policy as it is, without the top-k, top-p or
    penalty of a checkpoint's own settings; temperature 0 takes the likeliest tokens. The end token, where
    there is one, is the last response token."""
    inputs, _ = pack(prompts, [[]] * len(prompts), tokenizer.pad_token_id, model.device)
    end = tokenizer.eos_token_id
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    model.generation_config = GenerationConfig(
        **how, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
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
    return model(**inputs, use_cache=False).logits[:, -T:, 0].float() * response_mask


def sequence_reward(model, inputs):
    """A6: R_phi(x, y) (B,), read at the last token of the response. The model's own forward reads it at the
    last token that is no pad token, but a response that is cut off may end in a pad token."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    mask = inputs["attention_mask"]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    return model.score(hidden)[torch.arange(len(last), device=mask.device), last, 0].float()


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


def align(a, b):
    """E1: one optimal path from a to b as a list of [op, i, j], op in keep, replace, delete, insert; i
    indexes a, j indexes b. The common beginning is kept first, so the first operation stands where the two
    part. A deletion marks nothing in b and an insertion nothing in a: there j and i only say where."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    columns = edit_columns(a[start:], b[start:])
    path = []
    i, j = len(a), len(b)
    while i > start or j > start:
        row = 1 << (i - start - 1) if i > start else 0
        if row and j > start and a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            path.append(["keep", i, j])
        elif row and (j == start or columns[j - start][0] & row):      # D[i][j] = D[i-1][j] + 1
            i = i - 1
            path.append(["delete", i, j])
        elif not row or columns[j - start - 1][1] & row:               # D[i][j] = D[i][j-1] + 1
            j = j - 1
            path.append(["insert", i, j])
        else:
            i, j = i - 1, j - 1
            path.append(["replace", i, j])
    return [["keep", k, k] for k in range(start)] + path[::-1]


@lru_cache(maxsize=200_000)
def split_steps(text):
    """The steps of a response: its lines, its sentences, or what stands between semicolons."""
    return tuple(step.strip() for step in re.split(r"\n|(?<=;)|(?<=\.)\s", text) if step.strip())


def judge(response, problem):
    """The oracle of a problem: (wrong steps, answer right?) of a response. Its steps against those of the
    nearest right solution (E1): a step replaced, deleted or inserted on the way there is a wrong one; the
    last step is the answer. With `rules`, regular expressions, every hit is wrong, and right is no hit."""
    if problem.get("rules"):
        hits = sum(1 for rule in problem["rules"] for _ in re.finditer(rule, response))
        return hits, hits == 0
    steps = split_steps(response)
    solutions = [split_steps(solution) for solution in problem["solutions"]]
    wrong_steps = min(edit_distance(steps, solution) for solution in solutions)
    return wrong_steps, any(steps[-1:] == solution[-1:] for solution in solutions)


def has_oracle(problem):
    """Does a problem carry what `judge` needs: all its right solutions, or rules?"""
    return bool(problem.get("solutions") or problem.get("rules"))


def final_answer(text):
    """The number behind the last `answer is` or `####` of a solution, else its last number; None without."""
    number = r"-?\$?\d[\d,]*(?:\.\d+)?"
    marked = re.findall(rf"(?i)(?:answer is:?|####)\s*({number})", text)
    found = (marked or re.findall(number, text))[-1:]
    return float(re.sub("[$,]", "", found[0])) if found else None


def final_text(text):
    """The words behind the last `answer is` or `####` of a solution, else its last step; no full stop."""
    parts = re.split(r"(?i)answer is:?|####", text)
    steps = split_steps(parts[-1]) or ("",)
    return steps[0 if len(parts) > 1 else -1].rstrip(".")


def right(response, problem):
    """Is a response right? With an oracle: nothing is wrong. Else its final answer counts: the same number as
    `answer`, or, where that is not one number (a name, 1/2, 12:30), the same words."""
    if has_oracle(problem):
        return judge(response, problem)[0] == 0
    answer = final_text(problem["answer"])
    if len(re.findall(r"\d[\d,]*(?:\.\d+)?", answer)) == 1:
        return final_answer(response) == final_answer(answer)
    return final_text(response) == answer


def step_starts(ids, tokenizer):
    """Index of the first token of every step of a response, from the ids as they are."""
    text_of = lambda k: tokenizer.decode(ids[:k + 1], skip_special_tokens=True)
    text = text_of(len(ids))
    starts, position = [], 0
    for step in split_steps(text):
        position = text.index(step, position)
        starts.append(bisect_right(range(len(ids) - 1), position, key=lambda k: len(text_of(k))))
        position += len(step)
    return starts


# --- PPO: one update ---------------------------------------------------------------------------------------

ROUNDING = {"float32": 1e-6, "bfloat16": 1e-2}      # largest approx_kl of one policy in two batch shapes


@torch.no_grad()
def rollout(kind, models, prompts, tokenizer, scale, args):
    """Sample a response to each prompt and compute all that the update needs, from the same forward pass as
    training: a dictionary of (B, T) tensors, the model inputs, and the responses as lists of ids."""
    responses = sample(models["policy"], prompts, tokenizer, args.max_new_tokens, args.temperature)
    inputs, mask = pack(prompts, responses, tokenizer.pad_token_id, args.device)
    in_rows = lambda function: in_parts(function, inputs, mask, args.micro_batch)
    logprobs = in_rows(partial(response_logprobs, models["policy"], temperature=args.temperature))
    ref_logprobs = in_rows(partial(response_logprobs, models["reference"], temperature=args.temperature))
    values = in_rows(partial(token_values, models["value"]))
    scores = in_rows(partial(scores_of, kind, models["reward"], scale=scale))
    rewards = kl_rewards(scores, logprobs, ref_logprobs, args.kappa)                # A7
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)          # A8
    return responses, inputs, {"mask": mask, "old_logprobs": logprobs, "ref_logprobs": ref_logprobs,
                               "old_values": values, "scores": scores, "rewards": rewards, "returns": returns,
                               "advantages": masked_whiten(advantages, mask)}       # A9: normalised


def backward(models, inputs, part, share, args):
    """The losses of A9 on some rows of a minibatch and their gradients, times share: the rows' part of the
    minibatch's response tokens, so that N in A9 counts them all. Returns the statistics, also times share."""
    mask = part["mask"]
    logits = response_logits(models["policy"], inputs, mask) / args.temperature
    logprobs = token_logprobs(logits, inputs, mask)
    loss_policy = policy_loss(logprobs, part["old_logprobs"], part["advantages"], mask, args.clip)
    (loss_policy * share).backward()                 # two models: what the first kept goes before the second
    values = token_values(models["value"], inputs, mask)
    loss_value = value_loss(values, part["old_values"], part["returns"], mask, args.value_clip)
    (loss_value * share).backward()
    logratio = (logprobs - part["old_logprobs"]).detach()
    entropy = torch.distributions.Categorical(logits=logits.detach(), validate_args=False).entropy()
    statistics = {"policy_loss": loss_policy, "value_loss": loss_value,
                  "approx_kl": masked_mean(logratio.exp() - 1 - logratio, mask),                   # k3
                  "clipfrac": masked_mean(((logratio.exp() - 1).abs() > args.clip).float(), mask),
                  "entropy": masked_mean(entropy, mask)}
    return {name: value.item() * share for name, value in statistics.items()}


def update(models, optimizer, inputs, batch, args, update_number):
    """args.ppo_epochs passes of clipped policy and value steps (A9) over a rollout; mean statistics."""
    statistics = []
    B = len(batch["mask"])
    for epoch in range(args.ppo_epochs):
        for rows in torch.randperm(B, device=batch["mask"].device).split(args.minibatch):
            tokens = batch["mask"][rows].sum()
            parts = []
            for micro in rows.split(args.micro_batch or len(rows)):
                part = {name: tensor[micro] for name, tensor in batch.items()}
                part_inputs = {name: tensor[micro] for name, tensor in inputs.items()}
                share = (part["mask"].sum() / tokens).item()
                parts.append(backward(models, part_inputs, part, share, args))
            row = {name: sum(part[name] for part in parts) for name in parts[0]}
            loss = row["policy_loss"] + row["value_loss"]
            if not math.isfinite(loss):
                fail(f"update {update_number}: the loss is {loss}; lower --lr or raise --kappa")
            if update_number == 1 and not statistics:
                assert row["approx_kl"] < ROUNDING[args.dtype], "rho is not 1 before the first step"
            optimizer.clip_and_step()
            statistics.append(row)
            if args.target_kl is not None and row["approx_kl"] > args.target_kl:
                return average(statistics)
    return average(statistics)


def average(statistics):
    """Mean of every entry of a list of dictionaries with the same keys."""
    return {name: sum(s[name] for s in statistics) / len(statistics) for name in statistics[0]}


@torch.no_grad()
def validate(policy, problems, tokenizer, args):
    """Share of right responses on validation problems and, with an oracle, wrong steps a response."""
    prompts = [problem["prompt_ids"] for problem in problems]
    responses = []
    for start in range(0, len(prompts), args.rollout_batch):
        responses += sample(policy, prompts[start:start + args.rollout_batch], tokenizer, args.max_new_tokens,
                            args.temperature)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    result = {"accuracy": sum(map(right, texts, problems)) / len(texts)}
    if all(map(has_oracle, problems)):
        wrong = [judge(text, problem)[0] for text, problem in zip(texts, problems)]
        result["wrong_steps"] = sum(wrong) / len(wrong)
    return result


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
    texts = [tokenizer.decode(ids[:k]).rstrip("\ufffd") for k in range(len(ids))]       # half a character
    texts.append(tokenizer.decode(ids))
    return [longer[len(shorter):] for shorter, longer in zip(texts, texts[1:])]


def show_sample(response, scores, tokenizer):
    """One response, every token coloured by its score: red is punished, green is praised."""
    return "".join(paint(text, 31 if score < -0.25 else 32 if score > 0.25 else 0)
                   for text, score in zip(token_texts(response, tokenizer), scores.tolist()))


def ppo(kind, problems, tokenizer, scale, args, paths):
    """Train one policy on one kind of reward; one CSV row and one progress-bar line an update."""
    torch.manual_seed(args.seed)                       # the same prompts and seeds for both kinds
    auto_class = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    models = {"policy": open_model(AutoModelForCausalLM, paths["policy"], args.dtype),
              "reference": open_model(AutoModelForCausalLM, paths["policy"], args.dtype),
              "value": open_model(AutoModelForTokenClassification, paths["policy"], args.dtype, num_labels=1),
              "reward": open_model(auto_class, paths["reward"], args.dtype)}
    for name in ("reference", "reward"):
        models[name].requires_grad_(False)
    for name, parameter in models["value"].named_parameters():
        if not name.startswith(models["value"].base_model_prefix + "."):
            torch.nn.init.zeros_(parameter)            # a head of zeros: V = 0 at the start
    for model in models.values():
        fit(model, tokenizer).to(args.device)
    if args.gradient_checkpointing:
        checkpoint_layers(models["policy"])
        checkpoint_layers(models["value"])
    longest = max(len(problem["prompt_ids"]) for problem in problems) + args.max_new_tokens
    check_context(models["reward"], paths["reward"], longest)
    optimizer = Optimizer((models["policy"], args.lr), (models["value"], args.value_lr))
    train = [problem for problem in problems if problem["split"] == "train"]
    val = [problem for problem in problems if problem["split"] == "val"
           and (has_oracle(problem) or problem.get("answer"))]
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
            few = {name: tensor[:8] for name, tensor in inputs.items()}
            if not models["policy"](**few, logits_to_keep=1).logits.isfinite().all():
                fail(f"update {number}: the policy is not finite any more; lower --lr or raise --kappa")
        elapsed = time.time() - start
        seconds += elapsed
        row.update(seconds=round(seconds, 2), tokens_per_second=batch["mask"].sum().item() / elapsed)
        if val and (number % args.eval_every == 0 or number == args.updates):
            row.update(validate(models["policy"], val, tokenizer, args))
        log.append(row)
        shown = {name: f"{row[name]:.2f}" for name in ("score", "kl", "clipfrac", "accuracy") if name in row}
        bar.set_postfix(shown, refresh=False)
    save_model(models["value"], tokenizer, Path(args.run) / f"value_{kind}")
    print(f"  a last sample: {show_sample(responses[0], batch['scores'][0], tokenizer)}")
    return models["policy"], log


# --- RLMEC -------------------------------------------------------------------------------------------------

VARIANTS = {"rlmec": {}, "rlmec_imitation": {"reward_weight": 0.0}, "rlmec_reward": {"imitation_weight": 0.0},
            "rlmec_uniform": {"uniform_gamma": True}, "rlmec_noclip": {"rlmec_clip": float("inf")}}


@torch.no_grad()
def rewrite(grm, problems, responses, tokenizer, args, drop):
    """B4: for every wrong response the GRM locates the first wrong step, keeps the steps before it and writes
    the rest anew. Returns lists of ids; None where that fails or the result is wrong, counted in drop."""
    parts, end = instructions(tokenizer), tokenizer.eos_token_id
    context = context_of(grm)
    rewrites = [None] * len(responses)
    pending = {}                                               # number of the response -> prompt of `locate`
    rewrite_prompts = []
    for k, (problem, response) in enumerate(zip(problems, responses)):
        x_and_solution = (parts, problem["prompt_ids"], problem["solution_ids"])
        rewrite_prompts.append(rewrite_prompt(*x_and_solution, response, end))
        prompt = locate_prompt(*x_and_solution, response, end, tokenizer)
        if max(len(prompt), len(rewrite_prompts[k]) + len(response)) + args.max_new_tokens > context:
            drop["the rewrite may be longer than the GRM's context"] += 1
        else:
            pending[k] = prompt
    if not pending:
        return rewrites
    answers = sample(grm, list(pending.values()), tokenizer, args.max_new_tokens, temperature=0.0)
    prefixes = {}                                              # number of the response -> the steps that stay
    for k, answer in zip(pending, answers):
        starts = step_starts(responses[k], tokenizer)
        step = located_step(parts, answer, len(starts), end)
        if step is None:
            drop["the locator names no step that is there"] += 1
        else:
            prefixes[k] = responses[k][:starts[step - 1]]
    if not prefixes:
        return rewrites
    prompts = [rewrite_prompts[k] + kept for k, kept in prefixes.items()]
    endings = sample(grm, prompts, tokenizer, args.max_new_tokens, temperature=0.0)
    for (k, kept), ending in zip(prefixes.items(), endings):
        text = tokenizer.decode(kept + ending, skip_special_tokens=True)
        if ending[-1] != end:
            drop["the rewrite does not end"] += 1
        elif not right(text, problems[k]):
            drop["the rewrite is wrong"] += 1
        else:
            rewrites[k] = kept + ending
    return rewrites


@torch.no_grad()
def collect(policy, grm, problems, tokenizer, args):
    """B8: one sample for each problem, scored (B3), corrected (B4) and aligned (B6) once. Wrong is what the
    answer says, never what the locator says. Returns a list of dictionaries: ids carried as they were made,
    old_logprobs and rewards (T,) of the response, gamma (T~,) of the rewrite."""
    parts, end, pad_id = instructions(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    drop = Counter()
    samples = []
    for start in trange(0, len(problems), args.rollout_batch, desc="sample and rewrite", unit="batch"):
        batch = problems[start:start + args.rollout_batch]
        prompts = [problem["prompt_ids"] for problem in batch]
        responses = sample(policy, prompts, tokenizer, args.max_new_tokens, args.temperature)
        grm_prompts = [rewrite_prompt(parts, problem["prompt_ids"], problem["solution_ids"], response, end)
                       for problem, response in zip(batch, responses)]
        fits = [k for k, response in enumerate(responses)
                if len(grm_prompts[k]) + len(response) <= context_of(grm)]
        if len(fits) < len(batch):
            drop["the GRM's context is too short to score it"] += len(batch) - len(fits)
        if not fits:
            continue
        batch, prompts, responses, grm_prompts = (
            [rows[k] for k in fits] for rows in (batch, prompts, responses, grm_prompts))
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        is_right = [response[-1] == end and right(text, problem)
                    for response, text, problem in zip(responses, texts, batch)]
        wrong = [k for k in range(len(batch)) if not is_right[k]]
        wrong_responses = [responses[k] for k in wrong]
        rewrites = dict(zip(wrong, rewrite(grm, [batch[k] for k in wrong], wrong_responses, tokenizer, args,
                                           drop)))
        inputs, mask = pack(prompts, responses, pad_id, args.device)
        logprobs_of = partial(response_logprobs, policy, temperature=args.temperature)
        old_logprobs = in_parts(logprobs_of, inputs, mask, args.micro_batch)
        inputs, mask = pack(grm_prompts, responses, pad_id, args.device)
        probabilities = in_parts(partial(response_logprobs, grm), inputs, mask, args.micro_batch).exp()
        rewards = generative_rewards(probabilities, torch.tensor(is_right, device=args.device), mask)
        for k, response in enumerate(responses):
            rewrite_ids = response if is_right[k] else rewrites[k]
            if rewrite_ids is None:
                continue
            gamma = imitation_weights(response, rewrite_ids, args.uniform_gamma)
            samples.append({"prompt_ids": prompts[k], "response_ids": response, "right": is_right[k],
                            "old_logprobs": old_logprobs[k, :len(response)],
                            "rewards": rewards[k, :len(response)],
                            "rewrite_ids": rewrite_ids, "gamma": torch.tensor(gamma)})
    n_right = sum(row["right"] for row in samples)
    reasons = ", ".join(f"{count} because {reason}" for reason, count in drop.items())
    print(f"  {len(problems)} sampled: {n_right} right, {len(samples) - n_right} wrong and rewritten; "
          f"dropped: {reasons or 'none'}")
    return samples


def add_solutions(path, problems, tokenizer):
    """Add solution_ids to the problems: RLMEC needs a reference solution and an answer for each."""
    for problem in problems:
        for name in ("solution", "answer"):
            if not isinstance(problem.get(name), str) or not problem[name].strip():
                fail(f"{path}, {problem['id']}: column `{name}` is missing or empty, and RLMEC needs it: "
                     "choose another --method, or add it")
        problem["solution_ids"] = tokenizer(problem["solution"], add_special_tokens=False).input_ids


def rlmec_step(policy, optimizer, rows, tokenizer, args):
    """One optimiser step of B7, L_RL + lambda L_IR, on a batch of samples; its statistics."""
    size = args.micro_batch or len(rows)
    N = sum((row["rewards"] != 0).sum().item() for row in rows)
    M = sum(len(row["rewrite_ids"]) for row in rows)
    tokens = sum(len(row["response_ids"]) for row in rows)
    total = Counter({"reward": sum(row["rewards"].sum().item() for row in rows) / len(rows),
                     "length": tokens / len(rows)})
    for micro in [rows[start:start + size] for start in range(0, len(rows), size)]:
        padded = lambda name: pad_sequence([row[name] for row in micro], True).to(args.device)
        logprobs, masks = {}, {}
        for name in ("response_ids", "rewrite_ids"):
            inputs, masks[name] = pack([row["prompt_ids"] for row in micro], [row[name] for row in micro],
                                       tokenizer.pad_token_id, args.device)
            logprobs[name] = response_logprobs(policy, inputs, masks[name], args.temperature)
        old_logprobs, rewards, mask = padded("old_logprobs"), padded("rewards"), masks["response_ids"]
        loss_reward = rlmec_loss(logprobs["response_ids"], old_logprobs, rewards, args.rlmec_clip)        # B5
        loss_imitation = imitation_loss(logprobs["rewrite_ids"], padded("gamma"), masks["rewrite_ids"])   # B6
        loss_reward = loss_reward * ((rewards != 0).sum().item() / max(N, 1))         # N and M of the batch
        loss_imitation = loss_imitation * (masks["rewrite_ids"].sum().item() / M)
        loss = args.reward_weight * loss_reward + args.imitation_weight * loss_imitation                  # B7
        loss.backward()
        logratio = (logprobs["response_ids"] - old_logprobs).detach()
        clipped = (logratio.exp() - 1).abs() > args.rlmec_clip
        total["reward_loss"] += loss_reward.item()
        total["imitation_loss"] += loss_imitation.item()
        total["approx_kl"] += ((logratio.exp() - 1 - logratio) * mask).sum().item() / tokens
        total["clipfrac"] += (clipped * mask).sum().item() / tokens
    if not math.isfinite(total["reward_loss"] + total["imitation_loss"]):
        fail(f"RLMEC: the loss is not finite: {dict(total)}; lower --rlmec_lr")
    optimizer.clip_and_step()
    return dict(total)


def rlmec(name, problems, tokenizer, args, paths):
    """B8: sample from the policy, reward once, args.rlmec_epochs passes of B7; args.rounds times. Returns the
    policy and its log, one row a step; None where every sample was wrong and could not be rewritten."""
    args = replace(args, **VARIANTS[name])
    torch.manual_seed(args.seed)                       # the same problems and samples for every variant
    policy = fit(open_model(AutoModelForCausalLM, paths["policy"], args.dtype), tokenizer).to(args.device)
    grm = fit(open_model(AutoModelForCausalLM, paths["reward"], args.dtype), tokenizer).to(args.device)
    grm.requires_grad_(False)
    if args.gradient_checkpointing:
        checkpoint_layers(policy)
    train = [problem for problem in problems if problem["split"] == "train"]
    val = [problem for problem in problems if problem["split"] == "val"]
    rng = random.Random(args.seed)
    optimizer = Optimizer((policy, args.rlmec_lr))
    log = []
    seconds = 0.0
    for round_number in range(1, args.rounds + 1):
        start = time.time()
        drawn = [problem for _ in range(-(-args.rlmec_samples // len(train)))
                 for problem in rng.sample(train, len(train))][:args.rlmec_samples]
        samples = collect(policy, grm, drawn, tokenizer, args)
        if not samples:
            return (policy, log) if log else (None, None)
        seconds += time.time() - start
        batches = [rows for _ in range(args.rlmec_epochs)
                   for rows in torch.randperm(len(samples)).split(args.rlmec_batch)]
        schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(batches)), len(batches))
        bar = tqdm(batches, desc=f"{name}, round {round_number}", unit="update")
        for rows in bar:
            start = time.time()
            row = {"update": len(log) + 1, "episodes": round_number * args.rlmec_samples,
                   **rlmec_step(policy, optimizer, [samples[k] for k in rows], tokenizer, args)}
            if rows is batches[0]:
                assert row["approx_kl"] < ROUNDING[args.dtype], "rho is not 1 before the first step"
            schedule.step()
            if not all(parameter.isfinite().all() for parameter in policy.parameters()):
                fail(f"{name}: the policy is not finite any more; lower --rlmec_lr")
            seconds += time.time() - start
            row["seconds"] = round(seconds, 2)
            if val and (len(log) % args.eval_every == 0 or rows is batches[-1]):
                row.update(validate(policy, val, tokenizer, args))
            log.append(row)
            shown = {key: f"{row[key]:.3f}" for key in row if key.endswith("loss") or key == "accuracy"}
            bar.set_postfix(shown, refresh=False)
    return policy, log


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
    check_args(args)
    if not args.temperature:
        fail("--temperature 0: it must be above 0, so that the policy has something to choose from")
    if args.method == "all" and args.reward_model:
        fail("--reward_model: name the one --method that it is for")
    run = Path(args.run)
    policy_path = args.policy or run / "policy"
    problems_path = Path(args.problems or run / "problems.jsonl")
    if not problems_path.exists():
        fail(f"{problems_path} is missing: run 01_edit_data.py first, or name the file with --problems")
    methods = [args.method]
    if args.method == "all":
        methods = ["ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation"]
    metrics_path = (Path(args.reward_model).parent if args.reward_model else run) / "reward_metrics.json"
    if not metrics_path.exists():
        fail(f"{metrics_path} is missing: run 02_reward_model.py first")
    metrics = read_metrics(metrics_path)
    problems = read_jsonl(problems_path, {"id": str, "prompt": (str, list), "split": str},
                          fault_of_problem)
    tokenizer = open_tokenizer(policy_path, any(isinstance(problem["prompt"], list) for problem in problems))
    context = context_of(open_model(AutoModelForCausalLM, policy_path, args.dtype))
    if not any(problem["split"] == "train" for problem in problems):
        fail(f"{problems_path}: no problem has the split train")
    encode_problems(problems_path, problems, tokenizer, context, args.max_new_tokens)
    todo = []
    for method in methods:
        target = run / method
        kind = method.removeprefix("ppo_") if method.startswith("ppo_") else "generative"
        reward_path = Path(args.reward_model or run / f"reward_{kind}")
        if target.exists() and not args.overwrite:
            say_kept(target, args, "03")
        elif args.method == "all" and kind not in metrics:
            print(f"{method}: skipped, stage 2 made no reward_{kind}")
        elif kind not in metrics or not reward_path.is_dir():
            fail(f"{reward_path} or its entry in {metrics_path} is missing: run 02_reward_model.py first")
        else:
            same_vocabulary(reward_path, tokenizer, policy_path)
            todo.append((method, kind, reward_path, target))
    if any(kind == "generative" for method, kind, reward_path, target in todo):
        add_solutions(problems_path, problems, tokenizer)
    if todo:
        start_stage(args, "03")
    for method, kind, reward_path, target in todo:
        paths = {"policy": policy_path, "reward": reward_path}
        if kind == "generative":
            policy, log = rlmec(method, problems, tokenizer, args, paths)
        else:
            policy, log = ppo(kind, problems, tokenizer, metrics[kind]["scale"], args, paths)
        if policy is None and args.method == "all":
            print(f"{method}: skipped, the reward model could not rewrite one sample")
            continue
        if policy is None:
            fail(f"{method}: {reward_path} could not rewrite one sample; train it longer in stage 2")
        write_csv(run / f"{method}.csv", log)
        save_model(policy, tokenizer, target)


if __name__ == "__main__":
    main(HfArgumentParser(Args).parse_args_into_dataclasses()[0])

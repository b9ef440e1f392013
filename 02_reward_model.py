"""Stage 2: a reward for every token, learnt from minimal edits: a token reward model, the sequence reward it
is compared with, and a generative reward model that rewrites.

Papers: A, Xu et al., "Aligning Large Language Models via Fine-grained Supervision" (ACL 2024, 2406.02756).
        B, Chen et al., "Improving Large Language Models via Fine-grained Reinforcement Learning with Minimum
        Editing Constraint" (RLMEC, ACL 2024, 2401.06081).
Equations: A2 (token reward), A3 (reward of a response), A4 (kept tokens), A5 (loss), A6 (sequence baseline),
B2 (generative reward model, GRM).

    symbol      variable                 shape
    x           prompt_ids               lists of token ids
    tau^w       edited_ids               the minimal edit (for A6: y_w, preferred_ids)
    tau^l       rejected_ids             the response that was edited (A6: y_l)
    r_t         rewards                  (B, T)
    R(tau)      response_reward(...)     (B,)
    U_0         kept                     (row, i in rejected, j in edited) of every pair of kept tokens
    alpha, beta args.alpha, args.beta
    x, y*, y^   prompt_ids, solution_ids, response_ids     problem, reference, response that may be wrong
    y~          edited_ids               the minimal edit of y^, which `rewrite` learns
    p_t - 0.5   score("generative")      (B, T), what B3 clips

Simplified against the papers:
  1. A3 and A5 are our reading of the paper's words (A3 as a mean or a sum: --response_reward).
  2. Our addition to A5, off with --zero 0: the reward of kept tokens is pulled towards zero, because A5 only
     asks that it is the same in both responses. It makes the heat map readable.
  3. Both models start from the SFT policy with a head of zeros, and see the same prompts as often.
  4. The GRM's answer to `locate` names the steps in turn and stops at the first wrong one; the last label is
     B2's answer. A small model learns that three times as fast. Both tasks weigh the same in the loss.

Reads:  RUN/policy/  RUN/edits.jsonl
Writes: RUN/reward_token/  RUN/reward_sequence/  RUN/reward_generative/  RUN/reward_metrics.json
        RUN/02_args.json

    python 02_reward_model.py             3 to 4 minutes on two CPU cores (no GPU was at hand to measure)
"""

import json
import math
import os
import random
import re
import shutil
import sys
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging


@dataclass
class Args:
    run: str = field(default="runs/default", metadata={"help": "run folder"})
    seed: int = field(default=1, metadata={"help": "seed of the order of the pairs"})
    overwrite: bool = field(default=False, metadata={"help": "train again even if the models exist"})
    edits: Optional[str] = field(default=None, metadata={"help": "pairs; default RUN/edits.jsonl"})
    model: Optional[str] = field(default=None, metadata={"help": "model to start from; default RUN/policy"})
    kind: str = field(default="all", metadata={
        "help": "which reward model", "choices": ["all", "token", "sequence", "generative"]})
    alpha: float = field(default=2.0, metadata={"help": "A5: scale of the preference, alpha"})
    beta: float = field(default=1.0, metadata={"help": "A5: weight of equal rewards on kept tokens, beta"})
    zero: float = field(default=5.0, metadata={
        "help": "ours, not in A5: weight of the mean squared reward of kept tokens; 0 is the paper's loss"})
    response_reward: str = field(default="sum", metadata={
        "help": "A3: R as mean or sum of the token rewards", "choices": ["mean", "sum"]})
    epochs: int = field(default=8, metadata={"help": "epochs over the training pairs, for both models"})
    batch: int = field(default=32, metadata={"help": "pairs an optimiser step"})
    lr: float = field(default=7e-4, metadata={"help": "learning rate of AdamW; cosine with 3 %% warm-up"})
    rewrite_epochs: int = field(default=1, metadata={"help": "B2: epochs over the task `rewrite`"})
    locate_epochs: int = field(default=4, metadata={"help": "B2: epochs over the task `locate`"})
    grm_batch: int = field(default=64, metadata={"help": "B2: examples an optimiser step"})
    grm_lr: float = field(default=2e-3, metadata={"help": "B2: learning rate; cosine with 3 %% warm-up"})
    max_new_tokens: int = field(default=48, metadata={"help": "B2: longest rewrite that is tried, in tokens"})
    dtype: str = field(default="float32", metadata={
        "help": "of the weights; log-probs, losses and optimiser steps are float32 in any case",
        "choices": ["float32", "bfloat16"]})
    gradient_checkpointing: bool = field(default=False, metadata={
        "help": "less memory, a third more time: activations are computed again in the backward pass"})
    micro_batch: Optional[int] = field(default=None, metadata={
        "help": "pairs a forward pass; their gradients add up to those of the whole batch; default: all"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={
        "help": "torch device"})


# --- The equations -----------------------------------------------------------------------------------------

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


def response_reward(rewards, response_mask, how):
    """A3: R(tau) (B,), the mean (or the sum) over the T response tokens of rewards (B, T)."""
    total = (rewards * response_mask).sum(dim=1)
    return total / response_mask.sum(dim=1) if how == "mean" else total


def kept_tokens(edit_ops, rejected_length, edited_length):
    """A4: U_0 as index pairs (i in rejected, j in edited): what no operation touches, in order."""
    touched_i = {i for op, i, j in edit_ops if op != "insert"}
    touched_j = {j for op, i, j in edit_ops if op != "delete"}
    kept_i = [i for i in range(rejected_length) if i not in touched_i]
    kept_j = [j for j in range(edited_length) if j not in touched_j]
    return list(zip(kept_i, kept_j, strict=True))


def fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, alpha, beta, zero=0.0, how="mean"):
    """A5, the mean over B pairs, a scalar. rewards and masks (B, T_w), (B, T_l); kept: U_0 of every pair.

    -log sigmoid(alpha (R(tau^w) - R(tau^l))) + beta 1[U_0 not empty] 1/|U_0| sum_U0 (r^w - r^l)^2
    and, ours, + zero 1[U_0 not empty] 1/|U_0| sum_U0 ((r^w)^2 + (r^l)^2) / 2.
    """
    margin = response_reward(rewards_w, mask_w, how) - response_reward(rewards_l, mask_l, how)
    loss = -F.logsigmoid(alpha * margin).mean()                            # A5, first term
    flat = [(row, i, j) for row, pairs in enumerate(kept) for i, j in pairs]
    if not flat:                                                           # A5: 1[U_0 not empty]
        return loss
    row, i, j = torch.tensor(flat, device=loss.device).T
    sizes = torch.tensor([len(pairs) for pairs in kept], device=loss.device)
    weight = 1 / sizes[row] / len(kept)                                    # 1/|U_0|, then the mean over B
    r_w, r_l = rewards_w[row, j], rewards_l[row, i]
    loss = loss + beta * (weight * (r_w - r_l) ** 2).sum()                 # A5, second term
    return loss + zero * (weight * (r_w ** 2 + r_l ** 2) / 2).sum()        # ours


def sequence_loss(reward_w, reward_l):
    """A6: -log sigmoid(R(x, y_w) - R(x, y_l)), the mean over B pairs."""
    return -F.logsigmoid(reward_w - reward_l).mean()


# --- The generative reward model: its prompts are written here, once, for training, scoring and generation -

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


def generative_loss(model, examples, batch, pad_id):
    """B2: maximum likelihood of the outputs given the prompts: the mean over the output tokens of each task,
    summed over tasks, so that the few tokens of `locate` count as much as those of `rewrite`.

    examples: (prompt ids, output ids, task); batch: all examples of the step, whose tokens are counted.
    """
    prompts, outputs, tasks = zip(*examples)
    inputs, mask = pack(prompts, outputs, pad_id, model.device)
    logprobs = token_logprobs(response_logits(model, inputs, mask), inputs, mask)
    loss = 0.0
    for task in sorted(set(tasks)):
        rows = torch.tensor([name == task for name in tasks], device=mask.device)
        loss = loss - logprobs[rows].sum() / sum(len(output) for _, output, name in batch if name == task)
    return loss


# --- Files, models and batches: helpers that stand in several scripts, letter for letter -------------------

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


def paint(text, code):
    """Text in an ANSI colour; plain where the output is no terminal or NO_COLOR is set."""
    colour = code and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{code}m{text}\033[0m" if colour else text


# --- Training ----------------------------------------------------------------------------------------------

def score(kind, model, rows, column, pad_id):
    """Rewards of a column of responses (rejected, edited, preferred): (B, T) and its mask, or (B,) and None.
    generative: p_t - 0.5 after the rewrite prompt, which is B3 before its clip."""
    prompts = [row["rewrite_prompt" if kind == "generative" else "prompt_ids"] for row in rows]
    inputs, mask = pack(prompts, [row[f"{column}_ids"] for row in rows], pad_id, model.device)
    if kind == "sequence":
        return sequence_reward(model, inputs), None
    if kind == "token":
        return token_rewards(model, inputs, mask), mask
    probabilities = token_logprobs(response_logits(model, inputs, mask), inputs, mask).exp()
    return (probabilities - 0.5) * mask, mask


def pair_loss(kind, model, rows, pad_id, args):
    """Loss of a batch of pairs: A5 on (edited, rejected) or A6 on (chosen, rejected)."""
    rewards_l, mask_l = score(kind, model, rows, "rejected", pad_id)
    if kind == "sequence":
        rewards_w, _ = score(kind, model, rows, "preferred", pad_id)
        return sequence_loss(rewards_w, rewards_l)
    rewards_w, mask_w = score(kind, model, rows, "edited", pad_id)
    kept = [kept_tokens(r["edit_ops"], len(r["rejected_ids"]), len(r["edited_ids"])) for r in rows]
    return fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, args.alpha, args.beta, args.zero,
                             args.response_reward)


def train(kind, model, batches, loss_of, lr, micro_batch):
    """One step of AdamW a batch, `micro_batch` rows at a time; loss_of(rows, batch) is their part of A5, A6
    or B2 on the batch."""
    optimizer = Optimizer((model, lr))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(batches)), len(batches))
    bar = tqdm(batches, desc=f"reward_{kind}", unit="step", mininterval=1.0)
    for batch in bar:
        total = 0.0
        size = micro_batch or len(batch)
        for start in range(0, len(batch), size):
            loss = loss_of(batch[start:start + size], batch)
            loss.backward()
            total += loss.item()
        if not np.isfinite(total):
            fail(f"reward_{kind}, step {bar.n}: the loss is {total}; lower the learning rate")
        optimizer.clip_and_step()
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)


def shuffled(rows, epochs, size, rng):
    """Batches of all rows in a new order every epoch, the last short batch of each included."""
    batches = []
    for _ in range(epochs):
        order = rng.sample(rows, len(rows))
        batches += [order[start:start + size] for start in range(0, len(order), size)]
    return batches


def generative_rows(rows, tokenizer, context, args):
    """B2: add the prompts of the GRM to the rows; those too long for its context are dropped and counted."""
    parts, end = instructions(tokenizer), tokenizer.eos_token_id
    fitting = []
    for row in rows:
        solution_ids = tokenizer(row["solution"], add_special_tokens=False).input_ids
        parts_of = (parts, row["prompt_ids"], solution_ids)
        row["rewrite_prompt"] = rewrite_prompt(*parts_of, row["rejected_ids"], end)
        row["locate_prompt"] = locate_prompt(*parts_of, row["rejected_ids"], end, tokenizer)
        chosen = tokenizer.decode(row["preferred_ids"], skip_special_tokens=True)
        row["chosen_right"] = row["preferred_ids"][-1] == end and right(chosen, row)
        row["copy_prompt"] = rewrite_prompt(*parts_of, row["preferred_ids"], end)
        longest = max(len(row[name]) for name in ("rewrite_prompt", "locate_prompt", "copy_prompt"))
        output = max(len(row["edited_ids"]), len(row["preferred_ids"]), args.max_new_tokens)
        if longest + output <= context:
            fitting.append(row)
    if len(fitting) < len(rows):
        print(f"reward_generative: dropped {len(rows) - len(fitting)} of {len(rows)} rows, whose prompt and "
              f"rewrite are longer than the context of {context} tokens")
    return fitting


def fitting_rows(kind, rows, context):
    """A5, A6: the rows whose prompt and responses fit the context of the model; the others are counted."""
    names = ("rejected_ids", "preferred_ids", "edited_ids")
    fitting = [row for row in rows
               if len(row["prompt_ids"]) + max(len(row.get(name) or []) for name in names) <= context]
    if len(fitting) < len(rows):
        print(f"reward_{kind}: dropped {len(rows) - len(fitting)} of {len(rows)} rows, which are longer than "
              f"the context of {context} tokens")
    return fitting


def generative_batches(rows, tokenizer, args):
    """B2: batches of (prompt, output, task). Right responses are rewritten as they are, about as often as
    they are sampled. `locate` is the harder task, so its examples come more often."""
    parts, end = instructions(tokenizer), tokenizer.eos_token_id
    rewrites = [(row["rewrite_prompt"], row["edited_ids"], "rewrite") for row in rows]
    copies = [row for row in rows if row["chosen_right"]]
    rewrites += [(row["copy_prompt"], row["preferred_ids"], "rewrite") for row in copies]
    locations = [(row["locate_prompt"], locate_answer(parts, row["first_wrong_step"], end), "locate")
                 for row in rows if row.get("first_wrong_step")]
    examples = rewrites * args.rewrite_epochs + locations * args.locate_epochs
    return shuffled(examples, 1, args.grm_batch, random.Random(args.seed))


# --- Metrics -----------------------------------------------------------------------------------------------

def auroc(positive, negative):
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counts one half."""
    scores = np.concatenate([positive, negative])
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def average_precision(positive, negative):
    """Mean precision at the positives, ranked by falling score; of tied scores the negatives come first."""
    scores = np.concatenate([positive, negative])
    labels = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    labels = labels[np.lexsort((labels, -scores))]
    precision = np.cumsum(labels) / np.arange(1, len(labels) + 1)
    return float(precision[labels == 1].mean())


@torch.no_grad()
def score_all(kind, model, rows, column, pad_id, args):
    """Rewards of all rows: a list of floats a response, or one float (sequence)."""
    rewards = []
    size = args.micro_batch or 4 * args.batch
    for start in range(0, len(rows), size):
        values, mask = score(kind, model, rows[start:start + size], column, pad_id)
        rewards += values.tolist() if kind == "sequence" else [v[m].tolist() for v, m in zip(values, mask)]
    return rewards


def pair_accuracy(kind, model, rows, better, pad_id, args):
    """Share of pairs whose better column gets a higher reward than `rejected`; a tie counts one half."""
    total = {}
    for column in (better, "rejected"):
        rewards = score_all(kind, model, rows, column, pad_id, args)
        if kind == "token":
            how = np.mean if args.response_reward == "mean" else np.sum
            rewards = [how(r) for r in rewards]
        if kind == "generative":                                # log P_GRM(response | rewrite prompt)
            rewards = [np.sum(np.log(np.clip(np.array(r) + 0.5, 1e-12, 1))) for r in rewards]
        total[column] = np.array(rewards)
    return float(np.mean(np.sign(total[better] - total["rejected"]) + 1) / 2)


def localisation(kind, model, rows, pad_id, args):
    """How well low token rewards find the errors of `rejected`, on held-out pairs.

    auroc, average_precision: the first wrong token against the right tokens before it, scored by -r.
    first_edit_accuracy: share of pairs whose edited token beats the original where the two part, after the
    same prefix. mean_reward: of kept, replaced, deleted (in rejected) and inserted tokens (in edited).
    """
    rejected = score_all(kind, model, rows, "rejected", pad_id, args)
    edited = score_all(kind, model, rows, "edited", pad_id, args)
    wrong, before, beats = [], [], []
    by_operation = {"kept": [], "replace": [], "delete": [], "insert": []}
    for row, r_l, r_w in zip(rows, rejected, edited):
        first = row.get("first_error")
        if first is not None:
            wrong.append(-r_l[first])
            before += [-r for r in r_l[:first]]
        op, i, j = row["edit_ops"][0]
        if i < len(r_l) and j < len(r_w):
            beats.append(r_w[j] > r_l[i])
        for op, i, j in row["edit_ops"]:
            by_operation[op].append(r_w[j] if op == "insert" else r_l[i])
        by_operation["kept"] += [r_l[i] for i, j in kept_tokens(row["edit_ops"], len(r_l), len(r_w))]
    found = bool(wrong and before)
    return {"auroc": auroc(wrong, before) if found else None,
            "average_precision": average_precision(wrong, before) if found else None,
            "first_edit_accuracy": float(np.mean(beats)) if beats else None,
            "mean_reward": {op: float(np.mean(r)) if r else None for op, r in by_operation.items()}}


def reward_scale(kind, model, rows, pad_id, args):
    """What stage 3 needs to scale rewards: mean and standard deviation of the total reward of a response."""
    totals = [np.sum(rewards) for column in ("rejected", "preferred")
              for rewards in score_all(kind, model, rows, column, pad_id, args)]
    return {"mean": float(np.mean(totals)), "std": float(np.std(totals))}


def rewriting(model, rows, tokenizer, args):
    """How well the GRM does its two tasks (B2) on held-out rows, all answers the likeliest ones.

    exact_rewrites: the editor's own edit. right_rewrites: the answer is right. edit_distance: mean E1 between
    a wrong response and its rewrite, beside the editor's. located: the first wrong step is found. copied:
    right responses left as they are.
    """
    parts, end = instructions(tokenizer), tokenizer.eos_token_id

    def answers(prompts):
        size = 4 * args.batch
        batches = [prompts[start:start + size] for start in range(0, len(prompts), size)]
        return [ids for part in batches for ids in sample(model, part, tokenizer, args.max_new_tokens, 0.0)]

    rewrites = answers([row["rewrite_prompt"] for row in rows])
    texts = tokenizer.batch_decode(rewrites, skip_special_tokens=True)
    distances = [edit_distance(row["rejected_ids"], ids) for row, ids in zip(rows, rewrites)]
    numbered = [row for row in rows if row.get("first_wrong_step")]
    steps = [located_step(parts, answer, len(step_starts(row["rejected_ids"], tokenizer)), end)
             for row, answer in zip(numbered, answers([row["locate_prompt"] for row in numbered]))]
    copies = [row["copy_prompt"] for row in rows if row["chosen_right"]]
    chosen = [row["preferred_ids"] for row in rows if row["chosen_right"]]
    share = lambda hits: float(np.mean(list(hits))) if hits else None
    return {"exact_rewrites": share([ids == row["edited_ids"] for row, ids in zip(rows, rewrites)]),
            "right_rewrites": share([right(text, row) for text, row in zip(texts, rows)]),
            "edit_distance": share(distances),
            "editor_edit_distance": share([len(row["edit_ops"]) for row in rows]),
            "located": share([step == row["first_wrong_step"] for row, step in zip(numbered, steps)]),
            "copied": share([ids == row for row, ids in zip(chosen, answers(copies))])}


def token_texts(ids, tokenizer):
    """The text that each token adds to the ones before it, spaces included."""
    texts = [tokenizer.decode(ids[:k]).rstrip("\ufffd") for k in range(len(ids))]       # half a character
    texts.append(tokenizer.decode(ids))
    return [longer[len(shorter):] for shorter, longer in zip(texts, texts[1:])]


def show_rewards(kind, model, rows, tokenizer, args):
    """Print responses with every token coloured by its reward: red is punished, green is praised."""
    print("\nHeld-out responses, red: reward below -0.25, green: above +0.25, [first wrong token]:")
    for row, rewards in zip(rows, score_all(kind, model, rows, "rejected", tokenizer.pad_token_id, args)):
        texts = token_texts(row["rejected_ids"], tokenizer)
        coloured = ""
        for t, (text, reward) in enumerate(zip(texts, rewards)):
            text = f"[{text}]" if t == row.get("first_error") else text
            coloured += paint(text, 31 if reward < -0.25 else 32 if reward > 0.25 else 0)
        lowest = sorted(sorted(range(len(rewards)), key=rewards.__getitem__)[:3])
        print(f"  {' '.join((last_text(row['prompt']) or '').split())}\n    {coloured.strip()}")
        print("    lowest: " + "  ".join(f"{texts[t]!r} {rewards[t]:+.2f}" for t in lowest))


def show_metrics(kind, metrics):
    """The held-out metrics of one model, as they stand in reward_metrics.json."""
    shown = lambda x: "not measured" if x is None else f"{x:.3f}"
    print(f"\nreward_{kind} on {metrics['pairs']} held-out pairs, share in order: (edited, original) "
          f"{shown(metrics['pair_accuracy'])}, (chosen, rejected) {shown(metrics['preference_accuracy'])}")
    found = metrics["localisation"]
    if found:
        means = ", ".join(f"{op} {shown(reward)}" for op, reward in found["mean_reward"].items())
        print(f"  first wrong token against the right tokens before it: AUROC {shown(found['auroc'])}, "
              f"average precision {shown(found['average_precision'])}")
        print(f"  edited above original token at the first edit: {shown(found['first_edit_accuracy'])}")
        print(f"  mean reward: {means}")
    if "exact_rewrites" in metrics:
        print(f"  rewrites: the editor's own {shown(metrics['exact_rewrites'])}, answer right "
              f"{shown(metrics['right_rewrites'])}, edit distance {shown(metrics['edit_distance'])}, "
              f"the editor's {shown(metrics['editor_edit_distance'])}")
        print(f"  first wrong step located: {shown(metrics['located'])}, right responses left as they are: "
              f"{shown(metrics['copied'])}")


# --- The stage ---------------------------------------------------------------------------------------------

def last_text(text):
    """The text of a column that is a plain string or a list of chat messages, whose last one counts; None
    where it has none."""
    if text and isinstance(text, list):
        text = text[-1].get("content") if isinstance(text[-1], dict) else None
    return text if isinstance(text, str) and text.strip() else None


def fault_of_edit(row, vocabulary):
    """What is wrong with the ids and operations of a row of edits.jsonl, or None."""
    ops = row.get("edit_ops")
    names = ["prompt_ids", "preferred_ids", "rejected_ids"] + ["edited_ids"] * bool(ops)
    for name in names:
        ids = row.get(name)
        if not isinstance(ids, list) or not all(type(k) is int and 0 <= k < vocabulary for k in ids):
            return f"column `{name}` holds no ids of this tokenizer (0 to {vocabulary - 1}): another run?"
    if not ops:
        return None
    T_l, T_w = len(row["rejected_ids"]), len(row["edited_ids"])
    try:
        inside = all((op == "insert" or 0 <= i < T_l) and (op == "delete" or 0 <= j < T_w)
                     for op, i, j in ops)
        known = {op for op, i, j in ops} <= {"replace", "delete", "insert"}
        kept_tokens(ops, T_l, T_w)
    except (TypeError, ValueError):
        inside = False
    if not inside or not known:
        return "column `edit_ops` does not lead from `rejected_ids` to `edited_ids`"
    if row.get("first_error") is not None and row["first_error"] not in range(T_l):
        return "column `first_error` is no index into `rejected_ids`"
    if row.get("solution") is None:                                   # no row for the GRM
        return None
    if not isinstance(row["solution"], str) or not isinstance(row.get("answer"), str):
        return "columns `solution` and `answer` must both be texts"
    step = row.get("first_wrong_step")
    if step is not None and not (type(step) is int and 1 <= step <= T_l):
        return "column `first_wrong_step` is no step of `rejected`"
    return None


def open_edits(path, tokenizer):
    """Rows of edits.jsonl, checked against the tokenizer of the model they will train."""
    columns = {"split": str, "prompt": (str, list), "rejected": (str, list), "prompt_ids": list,
               "preferred_ids": list, "rejected_ids": list}
    rows = read_jsonl(path, columns, lambda row: fault_of_edit(row, vocabulary_size(tokenizer)))
    texts = tokenizer.batch_decode([row["rejected_ids"] for row in rows[:50]], skip_special_tokens=True)
    written = [last_text(row["rejected"]) or "" for row in rows[:50]]
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    if all(text != shown and encode(text) != row["rejected_ids"][:-1]      # sampled ids need not encode it
           for text, shown, row in zip(written, texts, rows)):
        fail(f"{path}: its token ids are not of the tokenizer in {tokenizer.name_or_path}: another run?")
    return rows


def open_reward_model(kind, path, dtype, tokenizer):
    """The model of A2 or A6 on top of a language model: one output, its head at zero, so that all rewards
    start at 0. The GRM (B2) is a language model itself."""
    if kind == "generative":
        return fit(open_model(AutoModelForCausalLM, path, dtype), tokenizer)
    auto_class = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    model = fit(open_model(auto_class, path, dtype, num_labels=1), tokenizer)
    model.config.problem_type = "regression"       # a text-classification pipeline then applies no sigmoid
    model.config.pad_token_id = tokenizer.pad_token_id
    for name, parameter in model.named_parameters():
        if not name.startswith(model.base_model_prefix + "."):
            torch.nn.init.zeros_(parameter)
    return model


def main(args):
    check_args(args)
    run = Path(args.run)
    edits_path = Path(args.edits or run / "edits.jsonl")
    model_path = args.model or run / "policy"
    if not edits_path.exists():
        fail(f"{edits_path} is missing: run 01_edit_data.py first, or name the file with --edits")
    policy_path = edits_path.parent / "policy"     # whose tokens the pairs are made of
    chat = any(isinstance(row.get("rejected"), list) for row in read_jsonl(edits_path, {}))
    tokenizer = open_tokenizer(policy_path if args.model and policy_path.is_dir() else model_path, chat)
    if args.model:
        same_vocabulary(args.model, tokenizer, policy_path)
    rows = open_edits(edits_path, tokenizer)
    metrics_path = run / "reward_metrics.json"
    metrics = read_metrics(metrics_path)
    todo = []
    for kind in ("token", "sequence", "generative") if args.kind == "all" else (args.kind,):
        path = run / f"reward_{kind}"
        needed = {"token": "edit_ops", "sequence": "rejected", "generative": "solution"}[kind]
        usable = [row for row in rows if row.get(needed) and (row.get("edit_ops") or kind == "sequence")]
        if path.exists() and kind in metrics and not args.overwrite:
            say_kept(path, args, "02")
        elif not usable:
            column = "solution" if kind == "generative" else "edited"
            print(f"reward_{kind}: skipped, it needs the column `{column}`, which no row of {edits_path} has")
        elif len({row["split"] == "train" for row in usable}) < 2:
            fail(f"{edits_path}: reward_{kind} needs rows of the split train and rows of another split")
        else:
            todo.append((kind, path, usable))
    if todo:
        start_stage(args, "02")
    for kind, path, usable in todo:
        model = open_reward_model(kind, model_path, args.dtype, tokenizer).to(args.device)
        if args.gradient_checkpointing:
            checkpoint_layers(model)
        start = time.time()
        pad_id = tokenizer.pad_token_id
        if kind == "generative":
            usable = generative_rows(usable, tokenizer, context_of(model), args)
        else:
            usable = fitting_rows(kind, usable, context_of(model))
        training = [row for row in usable if row["split"] == "train"]
        held_out = [row for row in usable if row["split"] != "train"]
        edited = [row for row in held_out if row.get("edit_ops")]
        if not training or not held_out:
            fail(f"reward_{kind}: no row is left to train on, or none to measure with: use a model with a "
                 "longer context, or shorter solutions")
        if kind == "generative":
            batches, lr = generative_batches(training, tokenizer, args), args.grm_lr
            loss_of = lambda rows, batch: generative_loss(model, rows, batch, pad_id)
        else:
            batches = shuffled(training, args.epochs, args.batch, random.Random(args.seed))
            lr = args.lr
            loss_of = lambda rows, batch: pair_loss(kind, model, rows, pad_id, args) * len(rows) / len(batch)
        train(kind, model, batches, loss_of, lr, args.micro_batch)
        metrics[kind] = {
            "pair_accuracy": pair_accuracy(kind, model, edited, "edited", pad_id, args) if edited else None,
            "preference_accuracy": pair_accuracy(kind, model, held_out, "preferred", pad_id, args),
            "pairs": len(edited or held_out),
            "localisation": localisation(kind, model, edited, pad_id, args) if kind != "sequence" else None,
            "scale": reward_scale(kind, model, held_out, pad_id, args),
            **(rewriting(model, edited, tokenizer, args) if kind == "generative" else {}),
            "seconds": round(time.time() - start, 1)}
        if not metrics[kind]["scale"]["std"] > 0:
            fail(f"reward_{kind}: after the last step the rewards are all equal or not finite; lower --lr")
        save_model(model, tokenizer, path)
        part = Path(f"{metrics_path}.part")
        part.write_text(json.dumps(metrics, indent=1) + "\n")
        part.replace(metrics_path)
        if kind != "sequence":
            show_rewards(kind, model, edited[:3], tokenizer, args)
        show_metrics(kind, metrics[kind])


if __name__ == "__main__":
    main(HfArgumentParser(Args).parse_args_into_dataclasses()[0])

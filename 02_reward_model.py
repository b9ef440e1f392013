"""Stage 2: a reward for every token, learnt from minimal edits: a token reward model, the sequence
reward it is compared with, and a generative reward model (GRM) that locates errors and rewrites.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, arXiv 2401.06081).
Equations: A2 to A6, B2.
    symbol         variable                          shape
    x, y*          prompt_ids, solution_ids          prompt and reference solution
    tau^w, tau^l   edited_ids, rejected_ids          a response after and before its minimal edit
    y_w, y_l       chosen_token_ids, rejected_ids    the ordinary preference pair (A6)
    r_t, R(tau)    rewards, response_reward(...)     (B, T), (B,)
    U_0            kept                              pairs (i in rejected, j in edited)
Simplified against the papers:
  1. A3 and A5 are our reading; --response_reward mean wants a larger --alpha than sum.
  2. --zero is ours: it pulls the reward of kept tokens to 0. A5 (--zero 0) only asks that it is
     the same before and after the edit, which leaves a heat map speckled.
  3. The two tasks of the GRM weigh the same; `locate` is the harder one and takes more epochs.
Reads RUN/policy, problems.jsonl, edits.jsonl. Writes RUN/reward_token, reward_sequence,
reward_generative, reward_metrics.json and reward_examples.jsonl.
    python 02_reward_model.py                      three minutes on two CPU cores
    python 02_reward_model.py --pairs 1600         an annotator's budget, for --task qa
"""

import json, os, random, re, shutil, sys, time
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, HfArgumentParser,
                          get_cosine_schedule_with_warmup)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

KINDS = {"token": AutoModelForTokenClassification, "sequence": AutoModelForSequenceClassification,
         "generative": AutoModelForCausalLM}

@dataclass
class Args:
    run: str = HfArg(default="runs/default", help="run folder")
    seed: int = HfArg(default=1, help="seed of the order of the rows")
    overwrite: bool = HfArg(default=False, help="remove what later stages made")
    kind: Literal[("all", *KINDS)] = HfArg(default="all", help="model to train")
    pairs: int = HfArg(default=None, help="A1: preference pairs for A5 and A6; default: all")
    alpha: float = HfArg(default=2.0, help="A5: scale of the preference, alpha")
    beta: float = HfArg(default=1.0, help="A5: weight of equal rewards on kept tokens")
    zero: float = HfArg(default=5.0, help="ours: weight of their squared reward")
    response_reward: Literal["sum", "mean"] = HfArg(default="sum", help="A3: R of a response")
    epochs: int = HfArg(default=6, help="A5: epochs")
    batch: int = HfArg(default=64, help="A5: pairs an optimiser step")
    lr: float = HfArg(default=1.5e-3, help="A5: learning rate; all: cosine, 3 %% warm-up")
    sequence_epochs: int = HfArg(default=8, help="A6: epochs")
    sequence_batch: int = HfArg(default=32, help="A6: pairs an optimiser step")
    sequence_lr: float = HfArg(default=7e-4, help="A6: learning rate")
    rewrite_epochs: int = HfArg(default=1, help="B2: epochs of `rewrite`")
    locate_epochs: int = HfArg(default=4, help="B2: epochs of `locate`")
    grm_batch: int = HfArg(default=32, help="B2: examples an optimiser step")
    grm_lr: float = HfArg(default=2e-3, help="B2: learning rate")
    micro_batch: int = HfArg(default=None, help="rows of a forward pass; default: all")
    bf16: bool = HfArg(default=False, help="autocast to bfloat16; weights stay float32")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="device")

# --- The equations ---

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

def response_reward(rewards, response_mask, how):
    """A3: R(tau) (B,), the mean (or the sum) over the T response tokens of rewards (B, T)."""
    total = (rewards * response_mask).sum(dim=1)
    return total / response_mask.sum(dim=1) if how == "mean" else total

def kept_tokens(edit_ops, rejected_length, edited_length):
    """A4: U_0, pairs (i in rejected, j in edited): what no operation touches, in order."""
    touched_i = {i for op, i, j in edit_ops if op != "insert"}
    touched_j = {j for op, i, j in edit_ops if op != "delete"}
    return list(zip([i for i in range(rejected_length) if i not in touched_i],
                    [j for j in range(edited_length) if j not in touched_j], strict=True))

def fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, N, alpha, beta, zero=0.0,
                      how="sum"):
    """A5 of N pairs, of which these are some: rewards and masks (B, T_w), (B, T_l), kept U_0.
    (1/N) sum over pairs of -log sigmoid(alpha (R(tau^w) - R(tau^l)))
    + beta 1[U_0 not empty] (1/|U_0|) sum over U_0 of (r_j^w - r_i^l)^2, and, ours,
    + zero 1[U_0 not empty] (1/|U_0|) sum over U_0 of ((r_j^w)^2 + (r_i^l)^2) / 2."""
    margin = response_reward(rewards_w, mask_w, how) - response_reward(rewards_l, mask_l, how)
    loss = -F.logsigmoid(alpha * margin).sum()                         # A5, first term
    flat = [(row, i, j, 1 / len(pairs)) for row, pairs in enumerate(kept) for i, j in pairs]
    if flat:                                                           # 1[U_0 not empty]
        row, i, j, share = torch.tensor(flat, device=loss.device).T
        row, i, j = row.long(), i.long(), j.long()
        r_w, r_l = rewards_w[row, j], rewards_l[row, i]
        loss = loss + beta * (share * (r_w - r_l) ** 2).sum()          # A5, second term
        loss = loss + zero * (share * (r_w ** 2 + r_l ** 2) / 2).sum()
    return loss / N

def sequence_loss(reward_w, reward_l, N):
    """A6: -(1/N) sum of log sigmoid(R(x, y_w) - R(x, y_l)) over these of N pairs."""
    return -F.logsigmoid(reward_w - reward_l).sum() / N

def generative_loss(logprobs, tasks, N):
    """B2: minus the mean log-likelihood of the output tokens, of each task, summed over the tasks.
    logprobs (B, T) of these rows; N: task -> output tokens of the whole batch."""
    counts = torch.tensor([N[task] for task in tasks], device=logprobs.device)
    return -(logprobs.sum(dim=1) / counts).sum()

# --- Helpers that stand in several scripts, letter for letter ---

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

STEP = re.compile(r"[^\s;][^\n;]*?(?:;|\n|\.(?=\s)|$)")        # a line, a sentence, or up to a ;

def step_starts(ids, tokenizer):
    """Index of the first token of every step of a response."""
    texts = token_texts([token for token in ids if token != tokenizer.eos_token_id], tokenizer)
    ends = list(accumulate(map(len, texts)))
    return [bisect_right(ends, step.start()) for step in STEP.finditer("".join(texts))]

def paint(text, code):
    """Text in an ANSI colour; plain where the output is no terminal or NO_COLOR is set."""
    colour = code and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{code}m{text}\033[0m" if colour else text

# --- Training ---

def score(kind, model, rows, column, tokenizer):
    """Rewards of a column of responses (rejected, edited, chosen_token): (B, T) and its mask, or
    (B,) and None. generative: p_t - 0.5 after the rewrite prompt, which is B3 before its clip."""
    prompts = [row["rewrite_prompt" if kind == "generative" else "prompt_ids"] for row in rows]
    responses = [row[f"{column}_ids"] for row in rows]
    inputs, mask = pack(prompts, responses, tokenizer.pad_token_id, model.device)
    if kind == "sequence":
        return sequence_reward(model, inputs), None
    if kind == "token":
        return token_rewards(model, inputs, mask), mask
    return (response_logprobs(model, inputs, mask).exp() - 0.5) * mask, mask

def loss_of(kind, model, rows, batch, tokenizer, args):
    """The part of a batch's loss that some of its rows add: A5 on (edited, rejected), A6 on
    (chosen, rejected), B2 on triples (prompt, output, task)."""
    if kind == "generative":
        N = Counter(task for _, output, task in batch for token in output)
        prompts, outputs, tasks = zip(*rows)
        inputs, mask = pack(prompts, outputs, tokenizer.pad_token_id, model.device)
        return generative_loss(response_logprobs(model, inputs, mask), tasks, N)
    better = "chosen_token" if kind == "sequence" else "edited"
    rewards_l, mask_l = score(kind, model, rows, "rejected", tokenizer)
    rewards_w, mask_w = score(kind, model, rows, better, tokenizer)
    if kind == "sequence":
        return sequence_loss(rewards_w, rewards_l, len(batch))
    kept = [kept_tokens(row["edit_ops"], len(row["rejected_ids"]), len(row["edited_ids"]))
            for row in rows]
    return fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, len(batch), args.alpha,
                             args.beta, args.zero, args.response_reward)

def examples_of(rows, tokenizer, args):
    """B2: `rewrite` of wrong responses into their edits and of right ones into themselves, and
    `locate` of the first wrong step."""
    rewrites = [(row["rewrite_prompt"], row["edited_ids"], "rewrite") for row in rows]
    locations = [(row["locate_prompt"], locate_answer(row["first_wrong_step"], tokenizer), "locate")
                 for row in rows if row["first_wrong_step"]]
    return rewrites * args.rewrite_epochs + locations * args.locate_epochs

def train(kind, model, rows, tokenizer, args):
    """Epochs over the rows in a new order each, the last short batch included."""
    epochs, size, lr = {"token": (args.epochs, args.batch, args.lr),
                        "sequence": (args.sequence_epochs, args.sequence_batch, args.sequence_lr),
                        "generative": (1, args.grm_batch, args.grm_lr)}[kind]
    rng = random.Random(args.seed)
    rows = examples_of(rows, tokenizer, args) if kind == "generative" else rows
    orders = [rng.sample(rows, len(rows)) for _ in range(epochs)]
    batches = [order[k:k + size] for order in orders for k in range(0, len(rows), size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(batches)), len(batches))
    for batch in tqdm(batches, desc=f"reward_{kind}"):
        micro = args.micro_batch or size
        for k in range(0, len(batch), micro):
            loss = loss_of(kind, model, batch[k:k + micro], batch, tokenizer, args)
            if not loss.isfinite():
                fail(f"reward_{kind}: the loss is {loss.item()}; lower the learning rate")
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

# --- Metrics on held-out rows ---

def auroc(positive, negative):
    """Area under the ROC curve: the chance that a positive is above a negative, ties one half."""
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(positive + negative, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))

@torch.no_grad()
def score_all(kind, model, rows, column, tokenizer, args):
    """Rewards of all rows: a list of floats a response, or one float (sequence)."""
    size, rewards = args.micro_batch or 256, []
    for k in range(0, len(rows), size):
        some, mask = score(kind, model, rows[k:k + size], column, tokenizer)
        rewards += some.tolist() if mask is None else [r[m].tolist() for r, m in zip(some, mask)]
    return rewards

def in_order(kind, better, worse, how):
    """Share of pairs whose better response has the higher reward (GRM: the higher log-likelihood);
    a tie counts one half."""
    total = np.mean if how == "mean" else np.sum
    if kind == "generative":
        total = lambda r: np.log(np.clip(np.add(r, 0.5), 1e-12, 1)).sum()
    signs = [np.sign(total(w) - total(l)) for w, l in zip(better, worse)]
    return float(np.mean(signs) + 1) / 2 if signs else None

def localisation(kind, rows, rejected, edited):
    """How well low rewards of `rejected` find its errors. auroc: the first wrong token against the
    right ones before it. first_edit: share of rows whose edited token beats the original where
    they part. called_wrong: share of tokens below -0.25 (GRM: p_t < 0.5), of right tokens, first
    wrong ones, replaced and deleted ones, and those that stand where some are missing (insert)."""
    wrong, before, beats, called = [], [], [], defaultdict(list)
    for row, r_l, r_w in zip(rows, rejected, edited):
        first, (_, i, j) = row["first_error"], row["edit_ops"][0]
        if first is not None:                                  # else no token stands for the error
            wrong.append(-r_l[first])
            before += [-r for r in r_l[:first]]
        if i < len(r_l) and j < len(r_w):
            beats.append(r_w[j] > r_l[i])
        names = {i: op for op, i, j in row["edit_ops"][::-1]}
        for t, r in enumerate(r_l):
            for name in [names.get(t, "right")] + ["first"] * (t == first):
                called[name].append(r < (0 if kind == "generative" else -0.25))
    return {"auroc": auroc(wrong, before), "first_edit": float(np.mean(beats or [np.nan])),
            "called_wrong": {name: float(np.mean(hits)) for name, hits in called.items()}}

@torch.no_grad()
def rewriting(model, rows, tokenizer, args):
    """B2 on held-out rows: share of rewrites that are the editor's own, of right responses left as
    they are, of first wrong steps that are located. An answer is given where each of its tokens is
    the likeliest after the ones before it, so that one forward pass tells."""
    size, found = args.micro_batch or 256, {}
    for name, part in (("rewritten", [row for row in rows if row["edit_ops"]]),
                       ("copied", [row for row in rows if not row["edit_ops"]]), ("located", rows)):
        examples = examples_of(part, tokenizer, replace(
            args, rewrite_epochs=name != "located", locate_epochs=name == "located"))
        hits = []
        for k in range(0, len(examples), size):
            prompts, outputs, _ = zip(*examples[k:k + size])
            inputs, mask = pack(prompts, outputs, tokenizer.pad_token_id, model.device)
            T = mask.shape[1]
            likeliest = model(**inputs, logits_to_keep=T + 1).logits[:, :-1].argmax(dim=2)
            hits += ((likeliest == inputs["input_ids"][:, -T:]) | ~mask).all(dim=1).tolist()
        found[name] = float(np.mean(hits)) if hits else None
    return found

def evaluate(kind, model, rows, tokenizer, args):
    """The entry of reward_metrics.json, and place of a row -> rewards of its `rejected`."""
    edited = [row for row in rows if row["edit_ops"]]
    pairs = [row for row in rows if row["chosen"] is not None]
    rewards_of = lambda part, column: score_all(kind, model, part, column, tokenizer, args)
    r_l, r_w = rewards_of(edited, "rejected"), rewards_of(edited, "edited")
    chosen, rejected = rewards_of(pairs, "chosen_token"), rewards_of(pairs, "rejected")
    totals = [np.sum(r) for r in rejected + chosen or r_l + r_w]
    metrics = {"pair_accuracy": in_order(kind, r_w, r_l, args.response_reward),
               "preference_accuracy": in_order(kind, chosen, rejected, args.response_reward),
               "pairs": len(edited), "localisation": None,
               "scale": {"mean": float(np.mean(totals)), "std": float(np.std(totals))}}
    if kind != "sequence":
        metrics["localisation"] = localisation(kind, edited, r_l, r_w)
        print("\nRed: reward below -0.25, green: above 0.25, [first wrong token]:")
        for row, r in zip(edited[:3], r_l):
            texts = [f"[{text}]" if t == row["first_error"] else text
                     for t, text in enumerate(token_texts(row["rejected_ids"], tokenizer))]
            colours = [31 if x < -0.25 else 32 if x > 0.25 else 0 for x in r]
            print("   ", "".join(map(paint, texts, colours)).strip())
    if kind == "generative":
        metrics["rewriting"] = rewriting(model, rows, tokenizer, args)
    return metrics, {row["place"]: r for row, r in zip(edited, r_l)}

# --- The stage ---

def open_reward_model(kind, path, args):
    """A2, A6: the policy with one output and a head of zeros, so that rewards start at 0; B2: the
    policy itself."""
    if kind == "generative":
        return open_model(AutoModelForCausalLM, path, args)
    model = open_model(KINDS[kind], path, args, num_labels=1)
    model.config.problem_type = "regression"                   # a pipeline then shows R itself
    for name, weight in model.named_parameters():
        if not name.startswith(model.base_model_prefix + "."):
            torch.nn.init.zeros_(weight)
    return model

def read_rows(run, kind, model, tokenizer, args):
    """(training, held-out) rows of edits.jsonl. token, sequence: A1's pairs, the first --pairs of
    them; generative: all responses with a known solution, with their prompts."""
    rows = read_jsonl(run / "edits.jsonl", "id", "split", "chosen", "rejected_ids", "edit_ops")
    if kind != "generative":
        rows = [row for row in rows if row["chosen"] is not None
                and (row["edit_ops"] or kind == "sequence")]
    else:
        problems = read_jsonl(run / "problems.jsonl", "id", "prompt_ids")
        problems = {problem["id"]: problem for problem in problems if "solution_ids" in problem}
        known = [row for row in rows if row["id"] in problems]
        for row, task in product(known, ("rewrite", "locate")):
            row[f"{task}_prompt"] = grm_prompt(task, problems[row["id"]], row["rejected_ids"],
                                               tokenizer)
        rows = [row for row in known if len(row["locate_prompt"]) + max(
            len(row["rejected_ids"]), len(row["edited_ids"])) <= context_of(model)]
        print(f"reward_{kind}: {len(known) - len(rows)} of {len(known)} rows exceed its context")
    training = [row for row in rows if row["split"] == "train"]
    return (training if kind == "generative" else training[:args.pairs],
            [row for row in rows if row["split"] != "train"])

def hand_on(run, kind, metrics, rewards, tokenizer):
    """Add a model to reward_metrics.json, and to reward_examples.jsonl, of which stage 4 draws
    held-out responses under all models."""
    path = run / "reward_metrics.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    write_text(path, json.dumps({**known, kind: metrics}, indent=1) + "\n")
    print(f"reward_{kind}: {json.dumps(metrics, indent=1)}")
    rows = [row for row in read_jsonl(run / "edits.jsonl") if row["split"] != "train"
            and row["chosen"] is not None and row["edit_ops"]][:200]
    if not rows:
        return
    path = run / "reward_examples.jsonl"
    examples = read_jsonl(path) if path.exists() else [{}] * len(rows)
    write_text(path, "".join(json.dumps({
        "id": row["id"], "prompt": row["prompt"],
        "tokens": token_texts(row["rejected_ids"], tokenizer),
        "wrong": [i for op, i, j in row["edit_ops"] if op != "insert"],
        **{name: example.get(name) for name in KINDS}, kind: rewards.get(row["place"])}) + "\n"
        for row, example in zip(rows, examples)))

def main(args):
    read_jsonl(Path(args.run) / "edits.jsonl")
    run = start_stage(args, "02", "ppo_* rlmec* responses.jsonl eval.json report.html")
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    for kind in KINDS if args.kind == "all" else [args.kind]:
        start = time.time()
        torch.manual_seed(args.seed)
        model = open_reward_model(kind, run / "policy", args)
        training, held_out = read_rows(run, kind, model, tokenizer, args)
        if not training or not held_out:
            print(f"reward_{kind}: skipped, edits.jsonl has no rows for training, or for testing")
            continue
        train(kind, model, training, tokenizer, args)
        metrics, rewards = evaluate(kind, model, held_out, tokenizer, args)
        metrics["seconds"] = round(time.time() - start, 1)
        save_model(model, tokenizer, run / f"reward_{kind}")
        hand_on(run, kind, metrics, rewards, tokenizer)

if __name__ == "__main__":
    args = HfArgumentParser(Args).parse_args_into_dataclasses()[0]
    # without its cache, autocast never uses the weights of an older step
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.bf16, False):
        main(args)

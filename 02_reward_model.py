"""Stage 2: a reward for every token, learnt from minimal edits; the sequence reward it is compared
with; and a generative reward model (GRM), which locates errors and rewrites.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, 2401.06081): A2 to A6, B2.

    symbol        name                            shape
    x, y*         prompt_ids, solution_ids        (P,)     prompt and reference solution
    tau^l, y_l    rejected_ids                    (T_l,)   a response; y^ in paper B
    tau^w, y_e    edited_ids                      (T_w,)   its minimal edit; y~ in paper B
    y_w           chosen_token_ids                (T_w,)   the preferred sibling
    r_phi         scores                          (B, T)   what a reward model says of each token
    R             response_score, sequence_score  (B,)     of a whole response
    U_0           kept                            list     (i, j): in rejected_ids, edited_ids
    p_t           scores, of the GRM              (B, T)   the probability of each token

A batch has B rows of P + T tokens: prompts are padded on the left to P, responses on the right to
T. So the last T columns are the responses, and response_mask (B, T) marks their tokens. What a
loss is divided by, N, is counted over the whole batch.

A pair of A1 is (better, rejected). The papers compare two models: A5 on edits and A6 on siblings.
These differ in two things, so the other two models of the cross separate them:
                                       better = y_w (sibling)      better = y_e (edit)
    A6, one reward a response          sequence                    sequence_edit
    A5, a reward on every token        token_sibling               token

Simplified against the papers:
  1. A3 and A5 are our reading.
  2. --zero, ours, pulls scores of kept tokens to 0: A5 alone leaves a heat map speckled.
  3. A batch of the GRM has one task; `locate` is the harder one and takes more epochs.
Reads RUN/policy, problems.jsonl, edits.jsonl. Writes RUN/reward_*: models, metrics, examples.
Command: python 02_reward_model.py
"""

import atexit, json, os, random, re, shutil, sys, time
from bisect import bisect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

# torchrun sets these two: which of how many processes this is
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

KINDS = ("token", "sequence", "token_sibling", "sequence_edit", "generative")
GROUPS = {  # what --kind may name beside a kind
    "all": ["token", "sequence", "generative"],
    "cross": ["token_sibling", "sequence_edit"],
}
TOKEN = ("token", "token_sibling")  # A5: a reward on every token; the sequence kinds have one
LEARNS_FROM = {  # A1: the better response of a kind's pairs, and the operations that lead to it
    "token": ("edited_ids", "edit_ops"),
    "sequence": ("chosen_token_ids", "chosen_ops"),
    "token_sibling": ("chosen_token_ids", "chosen_ops"),
    "sequence_edit": ("edited_ids", "edit_ops"),
}
TRAINING = {  # epochs, rows per optimiser step, learning rate
    "token": (8, 64, 1.5e-3),
    "sequence": (12, 32, 1e-3),
    "token_sibling": (8, 64, 1.5e-3),
    "sequence_edit": (12, 32, 1e-3),
    "generative": (1, 16, 1.5e-3),
}
# the same where the policy came from --model
PRETRAINED = {kind: (1, 16, 3e-5) for kind in KINDS} | {"generative": (1, 16, 2e-5)}
LOW = {"token": -0.25, "token_sibling": -0.25, "generative": 0.5}  # scores below it are shown
# gather the weights of all processes, on the CPU
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
arg = lambda default, help: hf.hf_argparser.HfArg(default=default, help=help)


@dataclass
class Args:
    run: str = "runs/default"
    seed: int = arg(1, "of the order of the rows")
    overwrite: bool = arg(False, "remove what later stages made")
    kind: Literal[(*GROUPS, *KINDS)] = arg(
        "all", "model to train; all: token, sequence, generative; cross: the two others")
    pairs: int = arg(7500, "A1: preference pairs for A5 and A6, at most")
    alpha: float = arg(40.0, "A5: scale of the preference, alpha")
    beta: float = arg(1.0, "A5: weight of equal scores on kept tokens")
    zero: float = arg(5.0, "ours: weight of the squared scores of kept tokens")
    epochs: int = arg(
        None, "default: token kinds 8, sequence kinds 12, generative 1; with --model's policy 1")
    locate_epochs: int = arg(5, "B2: epochs of `locate`")
    batch: int = arg(
        None, "rows per optimiser step; default: token kinds 64, sequence kinds 32, generative 16; "
        "with --model's policy 16")
    lr: float = arg(
        None, "cosine, 3 %% warm-up; default: sequence kinds 1e-3, others 1.5e-3; with --model's "
        "policy 3e-5, generative 2e-5")
    weight_decay: float = arg(0.0, "of AdamW")
    micro_batch: int = arg(256, "rows per forward pass")
    bf16: bool = arg(False, "autocast to bfloat16; weights stay float32")
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

def token_scores(model, inputs, response_mask):
    """A2: r_phi(s_t, a_t) (B, T), read at the position of token t itself; 0 outside."""
    T = response_mask.shape[1]
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
    scores = model.score(hidden[:, -T:])  # (B, T, 1)
    return scores[:, :, 0].float() * response_mask


def sequence_score(model, inputs):
    """A6: R_phi(x, y) (B,), read at the last token of the response."""
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
    # the last token has the largest position. (The model's own forward would take the last token
    # that is no padding token, but a response may contain that token.) model.score is the head
    last = inputs["position_ids"].argmax(dim=1)  # (B,)
    return model.score(hidden[range(len(last)), last])[:, 0].float()


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


# --- The equations of paper A ---

def response_score(scores, response_mask):
    """A3: R(tau) (B,), the mean over the T response tokens of scores (B, T)."""
    return (scores * response_mask).sum(dim=1) / response_mask.sum(dim=1)


def kept_tokens(edit_ops, rejected_length, edited_length):
    """A4: U_0, pairs (i in rejected, j in edited): what no operation touches, in order.

    kept_tokens([["replace", 1, 1], ["delete", 2, 2]], 4, 3) -> [(0, 0), (3, 2)]
    """
    replaced_or_deleted = {i for op, i, j in edit_ops if op != "insert"}
    replaced_or_inserted = {j for op, i, j in edit_ops if op != "delete"}
    kept_i = [i for i in range(rejected_length) if i not in replaced_or_deleted]
    kept_j = [j for j in range(edited_length) if j not in replaced_or_inserted]
    return list(zip(kept_i, kept_j, strict=True))


def fine_grained_loss(scores_w, mask_w, scores_l, mask_l, kept, N, alpha, beta, zero):
    """A5 of the given pairs, divided by the N pairs of the whole batch. Scores and masks are
    (B, T_w) and (B, T_l); kept is U_0 of each pair. For one pair:
        -log sigmoid(alpha [R(tau^w) - R(tau^l)])
        + beta / |U_0| * sum over U_0 of (r_j^w - r_i^l)^2               0 where U_0 is empty
        + zero / |U_0| * sum over U_0 of [(r_j^w)^2 + (r_i^l)^2] / 2     ours
    """
    R_w = response_score(scores_w, mask_w)  # A3, (B,)
    R_l = response_score(scores_l, mask_l)
    loss = -F.logsigmoid(alpha * (R_w - R_l)).sum()  # A5, first term

    # A5, second term. As a loop it reads
    #   for b, U_0 in enumerate(kept):
    #       for i, j in U_0:
    #           loss += beta * (scores_w[b, j] - scores_l[b, i]) ** 2 / len(U_0)
    # and is slow; so the kept tokens of all pairs are taken at once, K of them
    indices = [(b, i, j) for b, U_0 in enumerate(kept) for i, j in U_0]
    sizes = [len(U_0) for U_0 in kept for _ in U_0]
    if indices:
        b, i, j = torch.tensor(indices, device=loss.device).unbind(dim=1)  # (K,) each
        share = 1 / torch.tensor(sizes, device=loss.device)  # 1 / |U_0|
        r_w = scores_w[b, j]
        r_l = scores_l[b, i]
        loss = loss + beta * (share * (r_w - r_l) ** 2).sum()
        loss = loss + zero * (share * (r_w ** 2 + r_l ** 2) / 2).sum()  # ours
    return loss / N


def sequence_loss(score_w, score_l, N):
    """A6: -(1/N) sum of log sigmoid(R(x, y_w) - R(x, y_l)) of the given pairs."""
    return -F.logsigmoid(score_w - score_l).sum() / N


# --- The equations of paper B ---

# B2: the fixed words in the generative model's prompts
INSTRUCTIONS = {
    "solution": "\nReference solution:\n",
    "attempt": "\nAttempt:\n",
    "rewrite": "\nCorrected attempt:\n",
    "locate": "\nFirst wrong step:\n",
}


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


def grm_examples(row, problem, tokenizer, ends):
    """B2, the prompt and the output of each task. rewrite: the edit, which for a right response is
    itself. locate: the label of the first wrong step, such as [2], and the end."""
    # a right response has no wrong step; plan_of leaves its `locate` out
    label = ids_of(f"[{row['first_wrong_step']}]", tokenizer)
    return {
        "rewrite": {
            "prompt_ids": grm_prompt("rewrite", problem, row["rejected_ids"], tokenizer, ends),
            "output_ids": row["edited_ids"],
        },
        "locate": {
            "prompt_ids": grm_prompt("locate", problem, row["rejected_ids"], tokenizer, ends),
            "output_ids": label + [int(ends[0])],
        },
    }


def generative_loss(logprobs, N):
    """B2: -(1/N) sum of the log-probs (B, T) of the given outputs; N: all output tokens."""
    return -logprobs.sum() / N


# --- What each model learns from ---

def is_pair(row):
    """A1: a row of edits.jsonl that has a preferred response and an edit that changes something."""
    return row["chosen"] is not None and bool(row["edit_ops"])


def pairs_of(kind, rows):
    """A1: the pairs of A5 and A6, the same for both. Kinds that learn from siblings need no edit,
    and have no pair where the preferred response is the edit itself."""
    pairs = [row for row in rows if is_pair(row)]
    if kind in ("token", "sequence_edit"):
        return pairs
    siblings = [row for row in rows if row["chosen_ops"] is not None]
    return [row for row in siblings if is_pair(row)] or siblings


def plan_batches(rows, epochs, size, rng):
    """The batches of all epochs, each epoch in a new order."""
    plan = []
    for _ in range(epochs):
        plan += batches(rng.sample(rows, len(rows)), size)
    return plan


def settings(kind, args):
    """Epochs, rows per optimiser step, learning rate: the flags, or what fits the policy."""
    made = Path(args.run) / "01_args.json"  # a run folder from elsewhere may not have it
    pretrained = made.exists() and json.load(open(made))["model"]
    defaults = (PRETRAINED if pretrained else TRAINING)[kind]
    flags = (args.epochs, args.batch, args.lr)
    chosen = [default if flag is None else flag for flag, default in zip(flags, defaults)]
    print("reward_{}: epochs {}, rows a step {}, learning rate {}".format(kind, *chosen))
    return chosen


def plan_of(kind, rows, epochs, size, args):
    """The batches of all epochs, in order. Those of the GRM's two tasks are shuffled together."""
    rng = random.Random(args.seed)
    if kind != "generative":
        return plan_batches(rows, epochs, size, rng)
    rewrites = [row["rewrite"] for row in rows]
    locates = [row["locate"] for row in rows if row["edit_ops"]]  # a wrong step is there
    plan = plan_batches(rewrites, epochs, size, rng)
    plan += plan_batches(locates, args.locate_epochs, size, rng)
    rng.shuffle(plan)
    return plan


# --- Training ---

def train(kind, model, plan, lr, args):
    """An optimiser step for each batch of the plan: A5, A6 or B2, whose N is counted over the
    whole batch: pairs, and output tokens for B2."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    schedule = hf.get_scheduler("cosine", optimizer, round(0.03 * len(plan)), len(plan))

    for batch in tqdm(plan, desc=f"reward_{kind}", disable=RANK > 0):
        N = len(batch)
        if kind == "generative":
            N = sum(len(example["output_ids"]) for example in batch)

        # micro-batches are for memory, not mathematics: their gradients add up
        for _, mine, weight in micro_batches(batch, args.micro_batch):
            loss = weight * batch_loss(kind, model, mine, N, args)
            if not loss.isfinite():
                fail(f"reward_{kind}: the loss is {loss.item()}; lower --lr")
            loss.backward()

        optimizer_step(optimizer, args)
        schedule.step()


def batch_loss(kind, model, rows, N, args):
    """The loss of some rows of a batch, divided by the N of the whole batch: B2, A6 or A5."""
    if kind == "generative":
        inputs, mask = pack_examples(rows, model)
        return generative_loss(response_logprobs(model, inputs, mask), N)  # B2

    better, ops = LEARNS_FROM[kind]
    scores_w, mask_w = score_column(kind, model, rows, better)
    scores_l, mask_l = score_column(kind, model, rows, "rejected_ids")
    if kind not in TOKEN:
        return sequence_loss(scores_w, scores_l, N)  # A6

    kept = [kept_tokens(row[ops], len(row["rejected_ids"]), len(row[better]))
            for row in rows]  # A4
    return fine_grained_loss(  # A5
        scores_w, mask_w, scores_l, mask_l, kept, N, args.alpha, args.beta, args.zero)


def pack_examples(examples, model):
    prompts = [example["prompt_ids"] for example in examples]
    outputs = [example["output_ids"] for example in examples]
    return pack(prompts, outputs, model)


def score_column(kind, model, rows, column):
    """What a model says of a column of responses, and their mask: token, r_phi (B, T); sequence,
    R (B, 1); generative, p_t (B, T), where the prompt shows `rejected` whatever the column."""
    if kind == "generative":
        prompts = [row["rewrite"]["prompt_ids"] for row in rows]
    else:
        prompts = [row["prompt_ids"] for row in rows]
    inputs, mask = pack(prompts, [row[column] for row in rows], model)

    if kind == "generative":
        return response_logprobs(model, inputs, mask).exp(), mask  # B3: p_t
    if kind in TOKEN:
        return token_scores(model, inputs, mask), mask
    return sequence_score(model, inputs)[:, None], mask[:, :1]


# --- Metrics on held-out rows ---

@torch.no_grad()
def evaluate(kind, model, rows, args):
    """The entry of reward_metrics.json; and, for reward_examples.jsonl, the scores of the rejected
    responses that have an edit, by their line in edits.jsonl."""
    edited = [row for row in rows if row["edit_ops"]]
    edited_scores = score_all(kind, model, edited, "edited_ids", args)
    rejected_scores = score_all(kind, model, edited, "rejected_ids", args)
    siblings = [row for row in rows if row["chosen_ops"] is not None]
    chosen_scores = score_all(kind, model, siblings, "chosen_token_ids", args)
    worse_scores = score_all(kind, model, siblings, "rejected_ids", args)

    # stage 3 divides by the standard deviation of a response's total, the sum that PPO maximises:
    # of sampled responses, where there are any
    sampled_scores = worse_scores + chosen_scores or rejected_scores + edited_scores
    totals = [np.sum(scores) for scores in sampled_scores]
    std = float(np.std(totals))
    if totals and np.ptp(totals) == 0:
        std = 0.0  # of equal numbers np.std may be 1e-17
        print(f"reward_{kind}: its rewards do not vary; train it longer, or on more pairs")
    metrics = {
        "pair_accuracy": in_order(kind, edited_scores, rejected_scores),
        "preference_accuracy": in_order(kind, chosen_scores, worse_scores),
        "pairs": len(edited),  # held-out rows with an edit
        "preference_pairs": len(siblings),
        "localisation": None,
        "scale": {"mean": mean(totals), "std": std},
    }
    if kind.startswith("sequence"):
        rejected_scores = [scores[0] for scores in rejected_scores]
    else:
        metrics["localisation"] = localisation(edited, rejected_scores, edited_scores)
    if kind == "generative":
        metrics["rewriting"] = {
            "rewritten": exact(model, [row["rewrite"] for row in edited], args),
            "located": exact(model, [row["locate"] for row in edited], args),
        }
    return metrics, {row["line"]: scores for row, scores in zip(edited, rejected_scores)}


def score_all(kind, model, rows, column, args):
    """A list of scores for every row's response."""
    all_scores = []
    for part in batches(rows, args.micro_batch):
        scores, mask = score_column(kind, model, part, column)
        all_scores += [own[m].tolist() for own, m in zip(scores, mask)]
    return all_scores


def mean(values):
    return float(np.mean(values)) if len(values) else None


def in_order(kind, better, worse):
    """The share of pairs whose better response has the higher R (A3, A6; GRM: log-likelihood); a
    tie is one half."""
    if kind == "generative":
        R = lambda p: np.sum(np.log(np.clip(p, 1e-12, 1)))
    else:
        R = np.mean
    gaps = [R(w) - R(l) for w, l in zip(better, worse)]
    return mean(np.heaviside(gaps, 0.5))


def auroc(positive, negative):
    """Area under the ROC curve: the chance that a positive is above a negative, ties one half.
    auroc([3, 1], [2, 0]) -> 0.75"""
    if not negative:
        return None
    return mean([mean(np.heaviside(np.subtract(p, negative), 0.5)) for p in positive])


def localisation(rows, rejected_scores, edited_scores):
    """How well low scores mark the errors of `rejected`. auroc: the first wrong token against the
    right ones before it; first_edit: the share of rows whose edited token scores above the original
    at the first edit."""
    first_wrong = []
    before = []
    beats = []
    for row, r_l, r_w in zip(rows, rejected_scores, edited_scores):
        op, i, j = row["edit_ops"][0]
        if op != "insert":  # else no token stands for the error
            first_wrong.append(r_l[i])
            before += r_l[:i]
        if i < len(r_l) and j < len(r_w):  # else the edit only adds or drops an end
            beats.append(r_w[j] > r_l[i])

    # the chance that a right token scores above the first wrong one
    return {"auroc": auroc(before, first_wrong), "first_edit": mean(beats)}


def exact(model, examples, args):
    """B2: the share of outputs that greedy decoding would write. One forward pass is enough: it
    would write an output whose every token is the likeliest after those before it."""
    hits = []
    for part in batches(examples, args.micro_batch):
        inputs, mask = pack_examples(part, model)
        T = mask.shape[1]
        logits = model(**inputs, logits_to_keep=T + 1, use_cache=False).logits  # (B, T + 1, V)
        greedy = logits.argmax(dim=2)[:, :-1]  # (B, T)
        same = greedy == inputs["input_ids"][:, -T:]
        hits += (same | ~mask).all(dim=1).tolist()
    return mean(hits)


def show(kind, rows, scores, tokenizer):
    """Print responses, the first wrong token in brackets, low scores after their tokens."""
    print(f"reward_{kind}, below {LOW[kind]}, and the [first wrong token]:")
    for row in rows[:3]:
        line = ""
        for t, text in enumerate(token_texts(row["rejected_ids"], tokenizer)):
            r = scores[row["line"]][t]
            line += f"[{text}]" if t == row["first_error"] else text
            if r < LOW[kind]:
                line += f"({r:.1f})"
        print("   ", line.strip())


# --- Plumbing: nothing to learn below this line ---

@cache
def ids_of(text, tokenizer):
    """Token ids of a fixed text: an instruction, or a step's label such as [3]."""
    return tokenizer(text, add_special_tokens=False).input_ids


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


def check_counts(args, *may_be_zero):
    """Whole numbers among the flags are counts, at least 1; the seed is none."""
    for name, value in vars(args).items():
        least = 0 if name in may_be_zero else 1
        if type(value) is int and name != "seed" and value < least:
            fail(f"--{name} {value}: it must be at least {least}")


def batches(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]


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


# --- Files and models ---

def fail(message):
    """Bad input ends a stage with one line and exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path, *columns):
    """The rows of a JSONL file; each has these columns, and gets its `place` for messages. A fault
    is named by file and line."""
    if not Path(path).is_file():
        fail(f"{path}: no such file")
    rows = []
    try:
        for number, line in enumerate(open(path, "rb"), 1):
            if line.strip():
                row = json.loads(line) | {"place": f"{path}, line {number}"}
                for name in columns:
                    row[name]  # a missing column is a KeyError
                rows.append(row)
    except Exception as error:
        fail(f"{path}, line {number}: {type(error).__name__}, {error}; a row is a JSON object with "
             f"{columns}, in UTF-8")

    if not rows:
        fail(f"{path}: has no rows")
    return rows


def write_text(path, text):
    """Written aside, then renamed: nobody reads half a file."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


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


def check_family(path):
    """Token and sequence models need a head `score`: said before anything is trained."""
    config = hf.AutoConfig.from_pretrained(path)
    try:
        with torch.device("meta"):  # without weights
            hf.AutoModelForSequenceClassification.from_config(config).score
    except (AttributeError, ValueError):
        fail(f"{path}: transformers has no AutoModelForSequenceClassification with a head `score` "
             f"for a {config.model_type}; --kind generative needs none")


def open_reward_model(kind, path, tokenizer):
    """A2, A6: the policy with one output and a head of zeros, so that r = 0. B2: the policy."""
    if kind == "generative":
        return open_generative_model(path, tokenizer)
    # regression: a pipeline of transformers shows R itself
    model, info = hf.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, problem_type="regression", output_loading_info=True)
    for name in info["missing_keys"]:  # the head
        torch.nn.init.zeros_(model.get_parameter(name))
    return model


def open_generative_model(path, tokenizer):
    """The policy. Embeddings of B2's words are drawn anew: SFT, which never saw these tokens,
    pushed all of them to one place."""
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    texts = [*INSTRUCTIONS.values(), *(f"[{k}]" for k in range(1, 10))]
    ids = [ids_of(text, tokenizer) for text in texts]
    new = [tokens[0] for tokens in ids if len(tokens) == 1]  # a text of several tokens is not new
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = layer.weight.data
        weight[new] = weight.std() * torch.randn_like(weight[new])
    return model


def grm_rows(rows, model, tokenizer, args):
    """The rows with a known solution, each with its examples, where these fit the context."""
    problems = {row["id"]: row for row in read_jsonl(f"{args.run}/problems.jsonl", "id")}
    known = [row for row in rows if "solution_ids" in problems[row["id"]]]
    ends = np.atleast_1d(model.config.eos_token_id)
    fitting = []
    for row in tqdm(known, desc="prompts", leave=False, disable=RANK > 0):
        row = row | grm_examples(row, problems[row["id"]], tokenizer, ends)
        responses = [row["rejected_ids"], row["edited_ids"], row["chosen_token_ids"] or []]
        longest = max(len(ids) for ids in responses)
        if len(row["locate"]["prompt_ids"]) + longest <= model.config.max_position_embeddings:
            fitting.append(row)

    print(f"reward_generative: {len(known) - len(fitting)} of {len(known)} rows exceed its context")
    return fitting


def save_examples(path, kind, pairs, scores, tokenizer):
    """Held-out rejected responses with the scores of all models, of this run or an earlier one."""
    earlier = [{}] * len(pairs)
    if pairs and path.exists():
        earlier = read_jsonl(path)

    examples = []
    for row, old in zip(pairs, earlier):
        examples.append({
            "id": row["id"],
            "prompt": row["prompt"],
            "tokens": token_texts(row["rejected_ids"], tokenizer),
            "wrong": [i for op, i, j in row["edit_ops"] if op != "insert"],
            **{name: old.get(name) for name in KINDS},
            kind: scores.get(row["line"]),
        })
    write_jsonl(path, examples)


def split_rows(kind, rows, usable, args):
    """Those rows of a kind that it learns from, and those that are held out. If either are missing,
    the kind is left out: said in a line."""
    training = [row for row in usable if row["split"] == "train"]
    held_out = [row for row in usable if row["split"] != "train"]
    if kind != "generative":
        training = training[:args.pairs]  # A1: the annotator's budget

    if not training or not held_out:
        why = "no rows for training, or for testing"
        if kind != "generative" and not usable and any(map(is_pair, rows)):
            why = "`chosen` is the edit itself; the kinds token and sequence_edit learn from edits"
        print(f"reward_{kind} is left out: {why}")
    return training, held_out


def made_from(kinds):
    """What stages 3 and 4 made from these reward models: patterns of file names."""
    names = ["03_state.pt", "responses.*", "eval.*", "report.*"]
    for kind in kinds:
        if kind == "generative":
            names.append("rlmec*")
        else:
            names += [f"ppo_{kind}", f"ppo_{kind}.csv"]
    return names


def main(args):
    check_counts(args, "epochs", "locate_epochs")
    run = Path(args.run)
    rows = read_jsonl(
        run / "edits.jsonl", "id", "split", "chosen", "rejected_ids", "edit_ops", "chosen_ops")
    rows = [row | {"line": line} for line, row in enumerate(rows)]
    kinds = GROUPS.get(args.kind, [args.kind])
    if RANK == 0:
        start_stage(args, "02", made_from(kinds))
    tokenizer = hf.AutoTokenizer.from_pretrained(run / "policy")
    path = run / "reward_metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}

    if kinds != ["generative"]:
        check_family(run / "policy")
    for kind in kinds:
        start = time.time()
        torch.manual_seed(args.seed)
        model = shard(open_reward_model(kind, run / "policy", tokenizer), args)
        if kind == "generative":
            usable = grm_rows(rows, model, tokenizer, args)
        else:
            usable = pairs_of(kind, rows)
        training, held_out = split_rows(kind, rows, usable, args)
        if not training or not held_out:
            continue

        epochs, size, lr = settings(kind, args)
        train(kind, model, plan_of(kind, training, epochs, size, args), lr, args)
        metrics[kind], scores = evaluate(kind, model, held_out, args)
        seconds = round(time.time() - start, 1)
        metrics[kind] |= {"training_rows": len(training), "epochs": epochs, "seconds": seconds}
        if not kind.startswith("sequence"):
            show(kind, [row for row in held_out if row["edit_ops"]], scores, tokenizer)
        print(f"reward_{kind}: {json.dumps(metrics[kind])}")

        state = get_model_state_dict(model, options=WHOLE) if args.fsdp else None
        if RANK == 0:
            save_model(run / f"reward_{kind}", model, tokenizer, state)
            write_text(path, json.dumps(metrics, indent=1) + "\n")
            pairs = [row for row in rows if is_pair(row) and row["split"] != "train"]
            save_examples(run / "reward_examples.jsonl", kind, pairs[:200], scores, tokenizer)


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

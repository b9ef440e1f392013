"""Stage 2: a reward for every token, learnt from minimal edits; the sequence reward it is compared
with; and a generative reward model (GRM), which locates errors and rewrites.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, 2401.06081): A2 to A6, B2.
    x, y*          prompt_ids, solution_ids          prompt and reference solution
    tau^w, tau^l   edited_ids, rejected_ids          a response after and before its minimal edit
    y_w, y_l       chosen_token_ids, rejected_ids    the ordinary preference pair (A6)
Simplified against the papers:
  1. A3 and A5 are our reading: R is a sum; --response_reward mean wants a larger --alpha.
  2. --zero, ours, pulls rewards of kept tokens to 0: A5 alone leaves a heat map speckled.
  3. A batch of the GRM has one task; `locate` is the harder one and takes more epochs.
Reads RUN/policy, problems.jsonl, edits.jsonl. Writes RUN/reward_*: models, metrics, examples.
Command: python 02_reward_model.py
"""

import atexit, json, os, random, re, shutil, sys, time
from bisect import bisect
from collections import defaultdict
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

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
KINDS = {"token": hf.AutoModelForTokenClassification,
         "sequence": hf.AutoModelForSequenceClassification, "generative": hf.AutoModelForCausalLM}
TRAINING = {"token": (8, 64, 1.5e-3), "sequence": (12, 32, 1e-3),  # epochs, batch, learning rate
            "generative": (1, 16, 1.5e-3)}
arg = lambda default, help: hf.hf_argparser.HfArg(default=default, help=help)

@dataclass
class Args:
    run: str = "runs/default"
    seed: int = arg(1, "of the order of the rows")
    overwrite: bool = arg(False, "remove what later stages made")
    kind: Literal[("all", *KINDS)] = arg("all", "model to train")
    pairs: int = arg(7500, "A1: preference pairs for A5 and A6, at most")
    alpha: float = arg(2.0, "A5: scale of the preference, alpha")
    beta: float = arg(1.0, "A5: weight of equal rewards on kept tokens")
    zero: float = arg(5.0, "ours: weight of their squared reward")
    response_reward: Literal["sum", "mean"] = arg("sum", "A3: R of a response")
    epochs: int = arg(None, "of each --kind (B2: `rewrite`); default: TRAINING")
    locate_epochs: int = arg(5, "B2: epochs of `locate`")
    batch: int = arg(None, "rows an optimiser step; default: TRAINING")
    lr: float = arg(None, "cosine, 3 %% warm-up; default: TRAINING")
    weight_decay: float = arg(0.0, "of AdamW")
    micro_batch: int = arg(256, "rows of a forward pass")
    bf16: bool = arg(False, "autocast to bfloat16; weights stay float32")
    fsdp: bool = arg(False, "shard the models over torchrun's processes")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

# --- The equations ---
def token_rewards(model, inputs, response_mask):
    """A2: r_t = r_phi(s_t, a_t) (B, T), read at the position of token t; 0 outside."""
    T = response_mask.shape[1]
    return model(**inputs, use_cache=False).logits[:, -T:, 0].float() * response_mask

def sequence_reward(model, inputs):
    """A6: R_phi(x, y) (B,), read at the response's last token, whatever that is."""
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
    last = inputs["position_ids"].argmax(dim=1)
    return model.score(hidden[range(len(last)), last])[:, 0].float()

def response_reward(rewards, response_mask, how):
    """A3: R(tau) (B,), the sum (or the mean) over the T response tokens of rewards (B, T)."""
    total = (rewards * response_mask).sum(dim=1)
    return total / response_mask.sum(dim=1) if how == "mean" else total

def kept_tokens(edit_ops, rejected_length, edited_length):
    """A4: U_0, pairs (i in rejected, j in edited): what no operation touches, in order."""
    kept_i = {*range(rejected_length)} - {i for op, i, j in edit_ops if op != "insert"}
    kept_j = {*range(edited_length)} - {j for op, i, j in edit_ops if op != "delete"}
    return list(zip(sorted(kept_i), sorted(kept_j), strict=True))

def fine_grained_loss(rewards_w, mask_w, rewards_l, mask_l, kept, N, alpha, beta, zero, how):
    """A5 over these of N pairs, rewards and masks (B, T_w) and (B, T_l), kept U_0: (1/N) sum of
    -log sigmoid(alpha (R(tau^w) - R(tau^l))) + 1[U_0 not empty] (1/|U_0|) sum over U_0 of
    beta (r_j^w - r_i^l)^2 and, ours, zero ((r_j^w)^2 + (r_i^l)^2) / 2."""
    margin = response_reward(rewards_w, mask_w, how) - response_reward(rewards_l, mask_l, how)
    loss = -F.logsigmoid(alpha * margin).sum()  # A5, first term
    flat = [(row, i, j, len(pairs)) for row, pairs in enumerate(kept) for i, j in pairs]
    if flat:  # 1[U_0 not empty]
        row, i, j, size = torch.tensor(flat, device=loss.device).T  # size: |U_0|
        r_w, r_l = rewards_w[row, j], rewards_l[row, i]
        loss = loss + beta * (1 / size * (r_w - r_l) ** 2).sum()  # A5, second term
        loss = loss + zero * (1 / size * (r_w ** 2 + r_l ** 2) / 2).sum()
    return loss / N

def sequence_loss(reward_w, reward_l, N):
    """A6: -(1/N) sum of log sigmoid(R(x, y_w) - R(x, y_l)) over these of N pairs."""
    return -F.logsigmoid(reward_w - reward_l).sum() / N

def generative_loss(logprobs, N):
    """B2: -(1/N) sum of the log-probs (B, T) of these rows' output tokens; N: all the batch's."""
    return -logprobs.sum() / N

# --- Helpers, the same in several scripts ---
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

def fail(message):
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

def read_jsonl(path, *columns):
    """Rows of a JSONL file; a fault is named by file, line and column."""
    rows = []
    try:
        for line in open(path, encoding="utf-8"):
            row = json.loads(line)
            rows.append(row | {name: row[name] for name in columns})
    except Exception as error:
        fail(f"{path}, line {len(rows) + 1}: {error!r}; a row is a JSON object with {columns}")
    return rows or fail(f"{path}: has no rows")

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

STEP = re.compile(r"(?m)[^\s;][^\n;]*?(?:;|\.(?=\s)|$)")  # a line, a sentence, or up to a ;

def token_texts(ids, tokenizer):
    """The text that each token adds to those before it; a character stands at its last token."""
    texts = tokenizer.decode([ids[:k] for k in range(len(ids) + 1)])
    texts = accumulate(texts, lambda whole, text: whole if text.endswith("\ufffd") else text)
    return [longer[len(shorter):] for shorter, longer in pairwise(texts)]

def steps_of(ids, tokenizer):
    """The steps of a response, each a list of ids, without the end token."""
    ids = [token for token in ids if token != tokenizer.eos_token_id]
    *texts, text = tokenizer.decode([ids[:k] for k in range(len(ids) + 1)])
    starts = [bisect(texts, step.start(), key=len) - 1 for step in STEP.finditer(text)]
    return [ids[a:b] for a, b in pairwise([0, *starts[1:], len(ids)])]

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

# --- Training ---
def score(kind, model, rows, column):
    """Rewards (B, T) of a column of responses, and their mask; sequence: T = 1; GRM: p_t - 0.5."""
    prompts = [row["rewrite"][0] if kind == "generative" else row["prompt_ids"] for row in rows]
    inputs, mask = pack(prompts, [row[column] for row in rows], model)
    if kind == "token":
        return token_rewards(model, inputs, mask), mask
    if kind == "sequence":
        return sequence_reward(model, inputs)[:, None], mask[:, :1]
    return (response_logprobs(model, inputs, mask).exp() - 0.5) * mask, mask

def loss_of(kind, model, rows, N, args):
    """Some rows' part of a batch's loss: A5 on edited, rejected; A6 on chosen, rejected; B2."""
    if kind == "generative":
        return generative_loss(response_logprobs(model, *pack(*zip(*rows), model)), N)
    better = "edited_ids" if kind == "token" else "chosen_token_ids"
    w, l = (score(kind, model, rows, column) for column in (better, "rejected_ids"))
    if kind == "sequence":
        return sequence_loss(w[0], l[0], N)
    kept = [kept_tokens(row["edit_ops"], len(row["rejected_ids"]), len(row["edited_ids"]))
            for row in rows]
    how = args.response_reward
    return fine_grained_loss(*w, *l, kept, N, args.alpha, args.beta, args.zero, how)

def examples_of(row, problem, tokenizer):
    """B2, a task's (prompt, output): `rewrite` into the edit, a right response into itself;
    `locate` the first wrong step, whose label, from 1, and the end are the output."""
    label = words(f"[{row['first_wrong_step']}]", tokenizer) + [tokenizer.eos_token_id]
    return {task: (grm_prompt(task, problem, row["rejected_ids"], tokenizer), output)
            for task, output in (("rewrite", row["edited_ids"]), ("locate", label))}

def train(kind, model, rows, args):
    """Each epoch in a new order; for the GRM, batches of its two tasks in any order."""
    settings = zip((args.epochs, args.batch, args.lr), TRAINING[kind])
    count, size, lr = (default if given is None else given for given, default in settings)
    epochs, rng = [rows] * count, random.Random(args.seed)
    if kind == "generative":
        rewrites = [row["rewrite"] for row in rows]
        locates = [row["locate"] for row in rows if row["edit_ops"]]  # a wrong step is there
        epochs = [rewrites] * count + [locates] * args.locate_epochs
    plan = [batch for epoch in epochs for batch in batches(rng.sample(epoch, len(epoch)), size)]
    if kind == "generative":
        rng.shuffle(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), 1e-8, args.weight_decay)
    schedule = hf.get_scheduler("cosine", optimizer, round(0.03 * len(plan)), len(plan))
    for batch in tqdm(plan, desc=f"reward_{kind}", disable=RANK > 0):
        N = sum(len(row[1]) for row in batch) if kind == "generative" else len(batch)
        for part in batches(batch, args.micro_batch * WORLD):
            mine = part[RANK::WORLD] or part[:1]  # without a row, one that adds 0
            loss = loss_of(kind, model, mine, N, args) * (RANK < len(part))
            if not loss.isfinite():
                fail(f"reward_{kind}: the loss is {loss.item()}; lower --lr")
            loss.backward()
        optimizer_step(optimizer, args)
        schedule.step()

# --- Metrics on held-out rows ---
def mean(values):
    return float(np.mean(values)) if len(values) else None

def auroc(positive, negative):
    """Area under the ROC curve: the chance that a positive is above a negative, ties one half."""
    return mean([mean(np.heaviside(np.subtract(p, negative), 0.5))
                 for p in positive if len(negative)])

def score_all(kind, model, rows, column, args):
    """A list of rewards for every row's response."""
    return [rewards[mask].tolist() for part in batches(rows, args.micro_batch)
            for rewards, mask in zip(*score(kind, model, part, column))]

def in_order(kind, better, worse, how):
    """Share of pairs with a higher reward (GRM: log-likelihood) of the better; a tie is half."""
    total = getattr(np, how)
    if kind == "generative":
        total = lambda r: np.log(np.clip(np.add(r, 0.5), 1e-12, 1)).sum()
    return mean([np.heaviside(total(w) - total(l), 0.5) for w, l in zip(better, worse)])

def localisation(kind, rows, rejected, edited):
    """How well low rewards mark errors of `rejected`. called_wrong: share below -0.25 (GRM: p_t <
    0.5), insert: of tokens before which some are missing; auroc: the first wrong token against the
    right ones before it; first_edit: share of rows whose edited token beats the original there."""
    rewards, before, beats = defaultdict(list), [], []
    for row, r_l, r_w in zip(rows, rejected, edited):
        op, i, j = row["edit_ops"][0]
        if op != "insert":  # else no token stands for the error
            rewards["first"].append(r_l[i])
            before += r_l[:i]
        if i < len(r_l) and j < len(r_w):
            beats.append(r_w[j] > r_l[i])
        names = {i: op for op, i, j in row["edit_ops"][::-1]}
        for t, r in enumerate(r_l):
            rewards[names.get(t, "right")].append(r)
    low = 0 if kind == "generative" else -0.25
    return {"called_wrong": {name: mean(np.less(r, low)) for name, r in rewards.items()},
            "auroc": auroc(np.negative(rewards["first"]), np.negative(before)),
            "first_edit": mean(beats)}

def exact(task, model, rows, args):
    """B2: share of outputs that greedy decoding would write, told by one forward pass."""
    hits = []
    for part in batches(rows, args.micro_batch):
        inputs, mask = pack(*zip(*(row[task] for row in part)), model)
        T = mask.shape[1]
        greedy = model(**inputs, logits_to_keep=T + 1, use_cache=False).logits.argmax(2)[:, :-1]
        hits += ((greedy == inputs["input_ids"][:, -T:]) | ~mask).all(dim=1).tolist()
    return mean(hits)

@torch.no_grad()
def evaluate(kind, model, rows, tokenizer, args):
    """The entry of reward_metrics.json; each edited row keeps its rewards of `rejected`."""
    edited = [row for row in rows if row["edit_ops"]]
    pairs = [row for row in rows if row["chosen"] is not None]
    r_l, r_w, l, w = (score_all(kind, model, part, f"{column}_ids", args) for part, column in (
        (edited, "rejected"), (edited, "edited"), (pairs, "rejected"), (pairs, "chosen_token")))
    totals = [np.sum(r) for r in l + w or r_l + r_w]
    metrics = {"pair_accuracy": in_order(kind, r_w, r_l, args.response_reward),
               "preference_accuracy": in_order(kind, w, l, args.response_reward),
               "pairs": len(edited), "localisation": None,
               "scale": {"mean": mean(totals), "std": float(np.std(totals))}}
    for row, rewards in zip(edited, r_l):
        row[kind] = rewards[0] if kind == "sequence" else rewards
    if kind != "sequence":
        metrics["localisation"] = localisation(kind, edited, r_l, r_w)
        print("Rewards below -0.25, and [first wrong token]:")
        for row in edited[:3]:
            texts = token_texts(row["rejected_ids"], tokenizer)
            print("   ", "".join((f"[{text}]" if t == row["first_error"] else text)
                                 + f"({r:.1f})" * (r < -0.25)
                                 for t, (text, r) in enumerate(zip(texts, row[kind]))).strip())
    if kind == "generative":
        metrics["rewriting"] = {"rewritten": exact("rewrite", model, edited, args),
                                "located": exact("locate", model, edited, args)}
    return metrics

def save_examples(path, pairs, tokenizer):
    """Held-out pairs' rejected with the rewards of all models, of this run or an earlier one."""
    earlier = map(json.loads, open(path)) if path.exists() else [{}] * len(pairs)
    save(path, [{
        "id": row["id"], "prompt": row["prompt"],
        "tokens": token_texts(row["rejected_ids"], tokenizer),
        "wrong": [i for op, i, j in row["edit_ops"] if op != "insert"],
        **{kind: row.get(kind, old.get(kind)) for kind in KINDS}}
        for row, old in zip(pairs, earlier)])

# --- The stage ---
def open_reward_model(kind, path, tokenizer):
    """A2, A6: the policy with one output and a head of zeros: r = 0; B2: the policy itself, where
    embeddings of B2's words are drawn anew: SFT, which never saw them, pushed all to one place."""
    if kind != "generative":
        try:  # regression: a pipeline shows R
            model = KINDS[kind].from_pretrained(path, num_labels=1, problem_type="regression")
        except ValueError:
            fail(f"no {KINDS[kind].__name__} for {path}; --kind generative needs none")
        for weight in {*model.parameters()} - {*model.base_model.parameters()}:
            torch.nn.init.zeros_(weight)
        return model
    model = KINDS[kind].from_pretrained(path)
    texts = [*INSTRUCTIONS.values(), *(f"[{k}]" for k in range(1, 10))]
    new = [ids[0] for text in texts if len(ids := words(text, tokenizer)) == 1]
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = layer.weight.data
        weight[new] = weight.std() * torch.randn_like(weight[new])
    return model

def rows_for(kind, rows, model, tokenizer, args):
    """(training, held-out): A1's first --pairs pairs, the same for A5 and A6 if there are edits;
    GRM: all with a solution, and examples."""
    if kind == "generative":
        problems = {row["id"]: row for row in read_jsonl(f"{args.run}/problems.jsonl", "id")}
        known = [row for row in rows if "solution_ids" in problems[row["id"]]]
        for row in tqdm(known, desc="prompts", leave=False, disable=RANK > 0):
            row.update(examples_of(row, problems[row["id"]], tokenizer))
        columns = "rejected_ids", "edited_ids", "chosen_token_ids"
        rows = [row for row in known if len(row["locate"][0]) + max(
            len(row[name] or []) for name in columns) <= model.config.max_position_embeddings]
        print(f"reward_{kind}: {len(known) - len(rows)} of {len(known)} rows exceed its context")
    else:
        rows = [row for row in rows if row["chosen"] is not None]
        rows = [row for row in rows if row["edit_ops"]] or rows * (kind == "sequence")
    training = [row for row in rows if row["split"] == "train"]
    return (training if kind == "generative" else training[:args.pairs],
            [row for row in rows if row["split"] != "train"])

def main(args):
    run = Path(args.run)
    rows = read_jsonl(run / "edits.jsonl", "id", "split", "chosen", "rejected_ids", "edit_ops")
    if RANK == 0:
        start_stage(
            args, "02", "ppo_* rlmec* rejection* dpo* 03_state.pt responses.* eval.* report.*")
    tokenizer = hf.AutoTokenizer.from_pretrained(run / "policy")
    path = run / "reward_metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    for kind in KINDS if args.kind == "all" else [args.kind]:
        start = time.time()
        torch.manual_seed(args.seed)
        model = shard(open_reward_model(kind, run / "policy", tokenizer), args)
        training, held_out = rows_for(kind, rows, model, tokenizer, args)
        if not training or not held_out:
            print(f"reward_{kind}: skipped, no rows for training, or for testing")
            continue
        train(kind, model, training, args)
        metrics[kind] = evaluate(kind, model, held_out, tokenizer, args) | {
            "training_rows": len(training), "seconds": round(time.time() - start, 1)}
        print(f"reward_{kind}: {json.dumps(metrics[kind])}")
        state = get_model_state_dict(model, options=WHOLE) if args.fsdp else None
        if RANK == 0:
            save(run / f"reward_{kind}", model, tokenizer, state_dict=state)
            save(path, json.dumps(metrics, indent=1) + "\n")
            pairs = rows_for("token", rows, model, tokenizer, args)[1][:200]
            save_examples(run / "reward_examples.jsonl", pairs, tokenizer)

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

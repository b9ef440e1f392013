"""Stage 4: which policy is better, by how much, and how sure that is.

Paper A's checks (arXiv 2406.02756): (1) accuracy of the reward models with and without minimal
edits, (2) win rate of fine-grained against ordinary PPO, (3) convergence of both. Paper B's
(arXiv 2401.06081): right responses and wrong steps of RLMEC beside imitation alone, steadiness.
Simplified: the judge is the oracle of the built-in tasks (fewer wrong steps win), the final answer,
--judge llm, or people, where paper A simulates people; the opponent is the SFT policy on the same
prompts, and win rates count as in AlpacaEval.
Reads RUN/policy, ppo_*, rlmec*, *.csv, problems.jsonl, reward_metrics.json, reward_examples.jsonl.
Writes RUN/responses.jsonl, eval.json and report.html.
    python 04_eval.py                              fifteen seconds on two CPU cores
    python 04_eval.py --runs runs/math1 runs/math2 runs/math3 --run runs/math
    python 04_eval.py --human_eval ppo_token       a blind sheet for people, then --verdicts FILE
"""

import csv, html, json, os, random, re, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import List, Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import InferenceClient
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

@dataclass
class Args:
    run: str = HfArg(default="runs/default", help="run folder; with --runs, where to write")
    runs: List[str] = HfArg(default=None, help="only combine evaluated runs, of several seeds")
    seed: int = HfArg(default=1, help="seed of the responses, the same for every policy")
    overwrite: bool = HfArg(default=False, help="replace human_eval.csv")
    temperature: float = HfArg(default=1.0, help="of sampling")
    max_new_tokens: int = HfArg(default=48, help="longest response, in tokens")
    examples: int = HfArg(default=8, help="responses in each part of the report")
    judge: Literal["oracle", "llm"] = HfArg(default="oracle", help="llm: asked in both orders")
    llm_url: str = HfArg(default=None, help="OpenAI-compatible server; key: LLM_API_KEY")
    llm_model: str = HfArg(default=None, help="the server's name of the judge")
    llm_max_tokens: int = HfArg(default=1024, help="longest answer of the judge")
    human_eval: str = HfArg(default=None, help="only write a blind sheet: this policy and sft")
    verdicts: str = HfArg(default=None, help="only the win rate of a sheet, or of AlpacaEval JSON")
    micro_batch: int = HfArg(default=None, help="rows of a forward pass; default: 500")
    bf16: bool = HfArg(default=False, help="bfloat16 weights")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="device")

# --- Statistics: None where nothing was measured ---

def mean(values):
    return float(np.mean(values)) if len(values) else None

def interval(values, seed, draws=10_000):
    """95 % bootstrap interval of the mean of values: resampling n prompts is one multinomial draw
    over the distinct values."""
    n = len(values)
    if not n:
        return None
    distinct, counts = np.unique(values, return_counts=True)
    means = np.random.default_rng(seed).multinomial(n, counts / n, draws) @ distinct / n
    return np.percentile(means, [2.5, 97.5]).tolist()

def win_rate(preferences, seed=1):
    """Win rate as AlpacaEval counts it. Preferences: 1 the opponent, 2 the policy, 1.5 or 0 a tie,
    anything else no verdict. The mean of preference - 1, and its standard error, with n - 1."""
    wins = [(p or 1.5) - 1 for p in preferences
            if type(p) in (int, float) and (p == 0 or 1 <= p <= 2)]
    n = len(wins)
    return {"win_rate": mean(wins), "win_rate_ci95": interval(wins, seed), "n": n,
            "win_rate_se": float(np.std(wins, ddof=n > 1)) / n ** 0.5 if n else None}

def difference(a, b, seed):
    """Paired difference of the win rates of two policies, on prompts with both preferences."""
    gaps = [x - y for x, y in zip(a, b, strict=True) if None not in (x, y)]
    return {"difference": mean(gaps), "n": len(gaps), "ci95": interval(gaps, seed)}

def first_update(log, level):
    """The first update whose validation accuracy reaches a level, None if none does."""
    return next((int(row["update"]) for row in log if row.get("accuracy", -1) >= level), None)

# --- Helpers that stand in several scripts, letter for letter ---

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

def generate(model, prompts, tokenizer, limit, args, temperature=1.0):
    """A response of at most `limit` tokens to each prompt (ids), without a checkpoint's own top-k;
    temperature 0: the likeliest tokens. The end token, where a response has one, is its last."""
    size, rows, end = args.micro_batch or 500, [], tokenizer.eos_token_id
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    for k in trange(0, len(prompts), size, desc="sampling", leave=False):
        part = prompts[k:k + size]
        inputs, _ = pack(part, [[]] * len(part), tokenizer.pad_token_id, args.device)
        P = inputs["input_ids"].shape[1]
        model.generation_config = GenerationConfig(
            max_new_tokens=min(limit, context_of(model) - P), eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id, **how)
        ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        rows += ids[:, P:].tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]

WAITS = [1, 2, 4, 8, 16, 32]            # seconds before a request to a server is tried again

def ask_llm(texts, args, path):
    """Answers of an OpenAI-compatible server, empty where one is cut off. They are paid for: each
    is appended to `path` as it comes, and looked up there before it is asked for."""
    rows = read_jsonl(path, "key", "answer") if path.exists() else []
    saved = {row["key"]: row["answer"] for row in rows}
    # without a key of its own the client would send the machine's Hugging Face token to any server
    client = InferenceClient(base_url=args.llm_url, timeout=120,
                             api_key=os.environ.get("LLM_API_KEY") or "none")

    def ask(key):
        model, limit, text = json.loads(key)
        for wait in [*WAITS, None]:
            try:
                choice = client.chat_completion([{"role": "user", "content": text}], model=model,
                                                max_tokens=limit, temperature=0.0).choices[0]
                break
            except Exception as error:                         # client and transport raise many
                status = getattr(getattr(error, "response", None), "status_code", None)
                if wait is None or status in (400, 401, 402, 403, 404):
                    raise ConnectionError(f"{args.llm_url}: {error}; look at --llm_url, "
                                          "--llm_model and LLM_API_KEY") from None
            time.sleep(wait)
        answer = choice.message.content if choice.finish_reason != "length" else ""
        saved[key] = (answer or "").split("</think>")[-1].strip()
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "answer": saved[key]}) + "\n")

    keys = [json.dumps([args.llm_model, args.llm_max_tokens, text]) for text in texts]
    missing = list({*keys} - {*saved})
    try:
        with ThreadPoolExecutor(8) as pool:                    # map: a failure cancels the rest,
            list(tqdm(pool.map(ask, missing), total=len(missing), desc="LLM"))
    except (ConnectionError, KeyboardInterrupt) as error:      # answers under way still come
        fail(f"{error!r}; {path} keeps {len(saved)} answers for the next call")
    return [saved[key] for key in keys]

# --- Verdicts ---

JUDGE_PROMPT = """\
Below are two responses, A and B, to the same prompt. Which of them is better? Answer with A or B \
alone, or with tie if neither is better.\n
Prompt:\n{prompt}\n
Response A:\n{a}\n
Response B:\n{b}"""

def text_of(prompt):
    """A prompt as text: of a chat its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]

def llm_preferences(problems, texts, opponents, args, path):
    """Preferences of an LLM that sees every pair in both orders: where its two verdicts differ, the
    pair is a tie. Also the share of such pairs, its position bias."""
    requests = [JUDGE_PROMPT.format(prompt=text_of(problem["prompt"]), a=a, b=b)
                for problem, text, other in zip(problems, texts, opponents)
                for a, b in ((other, text), (text, other))]
    found = [{*re.findall(r"\b(A|B|[Tt]ie)\b", answer.split("\n")[-1])}
             for answer in ask_llm(requests, args, path)]
    said = [{"A": 1, "B": 2}.get(*words, 1.5) if len(words) == 1 else None for words in found]
    preferences, biased = [1.5] * len(texts), []
    for k, (first, second) in enumerate(zip(said[::2], said[1::2])):
        if texts[k] != opponents[k] and None in (first, second):
            preferences[k] = None
        elif texts[k] != opponents[k]:
            biased.append(first + second != 3)
            preferences[k] = 1.5 if biased[-1] else first
    return preferences, mean(biased)

def policy_first(row, args):
    """Does the blind sheet show the policy as output_a? The id and the seed alone decide."""
    return random.Random(f"{args.seed} {row['id']}").random() < 0.5

def write_sheet(args):
    """Human evaluation: RUN/human_eval.csv, fifty test prompts, two responses in hidden order."""
    rows = read_jsonl(Path(args.run) / "responses.jsonl", "id", "prompt", "sft", args.human_eval)
    path = start_stage(args, "04_human_eval", "human_eval.csv") / "human_eval.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "output_a", "output_b", "preference"])
        for row in random.Random(args.seed).sample(rows, min(50, len(rows))):
            pair = [row["sft"], row[args.human_eval]][::-1 if policy_first(row, args) else 1]
            writer.writerow([row["id"], text_of(row["prompt"]), *pair, ""])
    print(f"{path}: fill in preference, 1 = output_a, 2 = output_b, 1.5 = tie; then --verdicts")

def read_verdicts(args):
    """Preferences of a filled-in sheet, or of a JSON list of verdicts; equal outputs tie."""
    try:
        if not args.verdicts.endswith(".csv"):
            rows = json.loads(Path(args.verdicts).read_text(encoding="utf-8"))
            return [1.5 if "output_1" in row and row["output_1"] == row["output_2"]
                    else row["preference"] for row in rows]
        rows = list(csv.DictReader(open(args.verdicts, newline="", encoding="utf-8-sig")))
        given = [float(row["preference"] or "nan") for row in rows]
        return [3 - p if p and policy_first(row, args) else p for row, p in zip(rows, given)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{args.verdicts}: no list of verdicts with a number as preference ({error!r})")

# --- Evaluation ---

@torch.no_grad()
def respond(model, reference, problems, tokenizer, args):
    """Responses to all problems, with the same seed for every policy: texts, their wrong steps, and
    KL(policy, reference), the mean over responses of sum_t log pi - log pi_ref."""
    torch.manual_seed(args.seed)
    prompts = [problem["prompt_ids"] for problem in problems]
    ids = generate(model, prompts, tokenizer, args.max_new_tokens, args, args.temperature)
    size, kl = args.micro_batch or 500, 0.0
    for k in range(0, len(ids), size):
        batch = pack(prompts[k:k + size], ids[k:k + size], tokenizer.pad_token_id, args.device)
        logprobs, ref_logprobs = (response_logprobs(each, *batch, args.temperature)
                                  for each in (model, reference))
        kl += (logprobs - ref_logprobs).sum().item() / len(ids)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    wrong = [wrong_steps(text, row[-1] == tokenizer.eos_token_id, problem)
             for text, row, problem in zip(texts, ids, problems)]
    return texts, wrong, kl

def read_log(path):
    """Rows of a CSV of stage 3 as numbers, without its empty cells."""
    rows = csv.DictReader(open(path, newline=""))
    return [{k: float(v) for k, v in row.items() if v} for row in rows]

def measure(wrong, kl, log):
    """The numbers of one policy that need no opponent."""
    curve = [row["accuracy"] for row in log if "accuracy" in row]
    last = log[-1] if log else {"update": 0, "episodes": 0, "seconds": 0}
    wrong = np.array([] if None in wrong else wrong)
    return {"accuracy": mean(wrong == 0), "wrong_steps_per_response": mean(wrong), "kl_to_ref": kl,
            "updates": int(last["update"]), "episodes": int(last["episodes"]),
            "seconds": last["seconds"], "best_accuracy": max(curve, default=None),
            "updates_to_95": first_update(log, 0.95 * curve[-1]) if curve else None,
            "largest_drop": max(curve) - min(curve[np.argmax(curve):]) if curve else None}

# in nats a response, nats a token in one update, and standard deviations of stage 2's rewards
LIMITS = {"kl": 20, "approx_kl": 0.1, "score_std": 10, "advantage_rms": 10}

def failure_signatures(reward_models, policies, logs):
    """Paper A's failure signatures: reward accuracy under 70 %, win rate not above the baseline,
    and unstable PPO: KL, rewards or advantages over LIMITS, or 20 points of accuracy lost."""
    found = []
    for kind, row in reward_models.items():
        share = row["preference_accuracy"] if row["pair_accuracy"] is None else row["pair_accuracy"]
        if share is not None and share < 0.7:
            found.append(f"reward accuracy under 70 %: reward_{kind}, {share:.1%}")
    token, sequence = (policies.get(f"ppo_{x}", {}).get("win_rate") for x in ("token", "sequence"))
    if None not in (token, sequence) and token <= sequence:
        found.append("win rate not above the baseline: ppo_token is not ahead of ppo_sequence")
    for name, log in logs.items():
        log = [*log, {"kl": policies[name]["kl_to_ref"]}]
        for column, limit in LIMITS.items():
            peak = np.max([abs(row.get(column, 0)) for row in log])
            if not peak <= limit:                              # nan as well
                found.append(f"unstable: {name} reached a {column} of {peak:.3g}, over {limit}")
        if (policies[name]["largest_drop"] or 0) > 0.2:
            found.append(f"unstable: {name} lost {policies[name]['largest_drop']:.0%} accuracy")
    return found

def percent(x, sign=""):
    """97.3 %, or a dash for what was not measured."""
    return "–" if x is None else f"{100 * x:{sign}.1f} %"

def checks(judge, reward_models, policies, differences, logs):
    """The papers' checks as sentences."""
    def each(rows, column, show=percent):
        known = {name: row[column] for name, row in rows.items() if row[column] is not None}
        return ", ".join(f"{name} {show(x)}" for name, x in known.items()) or "–"

    yield f"Judge: {judge}."
    shares = each(reward_models, "pair_accuracy")
    yield f"Reward models, held-out (edited, original) pairs in order: {shares}."
    for row in differences:
        pair = {row["a"], row["b"]}
        if row["ci95"] and pair in ({"ppo_token", "ppo_sequence"}, {"rlmec", "rlmec_imitation"}):
            low, high = row["ci95"]
            seen = ", no difference seen" if low <= 0 <= high else ""
            yield (f"Win rate, {row['a']} minus {row['b']}: {percent(row['difference'], '+')} "
                   f"(95 % interval {percent(low, '+')} to {percent(high, '+')}{seen}).")
    yield f"Updates to 95 % of the own final accuracy: {each(policies, 'updates_to_95', str)}."
    best = policies.get("ppo_sequence", {}).get("best_accuracy")
    if best is not None and "ppo_token" in logs:
        yield (f"ppo_token passes the best of ppo_sequence, {percent(best)}, at update "
               f"{first_update(logs['ppo_token'], best)}.")
    yield f"Steadiness, largest drop after the best: {each(policies, 'largest_drop')}."

def flat(value, name=""):
    """The numbers in nested dictionaries, by their path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name} {key}").items()}
    return {name.strip(): value} if isinstance(value, (int, float)) else {}

def combine(args):
    """Mean and standard deviation over runs of every number in their eval.json."""
    runs, combined = [], {}
    for path in [Path(run) / "eval.json" for run in args.runs]:
        result = json.loads(path.read_text()) if path.exists() else fail(f"{path} is missing")
        gaps = {f"{row['a']} - {row['b']}": row["difference"] for row in result["differences"]}
        runs.append(flat({**result, "differences": gaps}))
    for name in sorted(set.intersection(*map(set, runs))):
        values = [run[name] for run in runs]
        sd = float(np.std(values, ddof=len(values) > 1))
        combined[name] = {"mean": mean(values), "sd": sd, "values": values}
        print(f"{name:60s} {mean(values):9.3f} ± {sd:.3f}")
    Path(args.run).mkdir(parents=True, exist_ok=True)
    write_text(Path(args.run) / "combined.json", json.dumps(combined, indent=1) + "\n")

# --- The report: one file of HTML and SVG ---

PAGE_HEAD = """<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width"><title>Token-level reward</title><style>
:root{color-scheme:light dark}body{margin:auto;padding:1rem;max-width:56rem;font:16px/1.5 system-ui}
.card{background:#8882;border-radius:.5rem;padding:.3rem .8rem;margin:.7rem 0}pre{overflow-x:auto}
svg{max-width:40rem;fill:currentColor;font-size:12px}b{display:inline-block;min-width:8rem}
p{margin:.3rem 0;overflow-wrap:anywhere}code{white-space:pre-wrap}.e{outline:1.5px solid}
del{color:#d55e00}ins{color:#0a84d0;font-weight:bold;text-decoration:none}
</style><h1>Token-level reward: who wins</h1>"""
COLOURS = {"ppo_token": "#0072b2", "ppo_sequence": "#d55e00", "rlmec": "#009e73",
           "rlmec_imitation": "#cc79a7"}                       # the policies of stage 3

def learning_curves(logs):
    """Validation accuracy of every policy against the episodes that it has seen, as SVG."""
    top = max([row["episodes"] for log in logs.values() for row in log], default=1)
    drawn = ('<path d="M0 0v200h400" fill="none" stroke="currentColor"/><text x="-45" y="10">100 %'
             f'</text><text x="-45" y="204">0 %</text><text x="370" y="218">{top:,.0f}</text>')
    legend = ""
    for name, log in logs.items():
        curve = [(row["episodes"], row["accuracy"]) for row in log if "accuracy" in row]
        points = " ".join(f"{400 * x / top:.1f},{200 - 200 * y:.1f}" for x, y in curve)
        colour = COLOURS[name]
        drawn += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="3"/>'
        legend += f'<b><span style="color:{colour}">■</span> {html.escape(name)}</b> '
    return (f'<h2>Learning curves</h2><p>{legend}</p><svg viewBox="-45 -10 480 235">{drawn}</svg>'
            "<p>Right responses to validation prompts, against episodes (sampled responses). RLMEC "
            "samples once: all its updates stand at one number of episodes.</p>")

def card(prompt, rows):
    """A prompt, and what is shown of it: name -> HTML."""
    rows = {"prompt": html.escape(text_of(prompt)), **rows}
    lines = [f"<p><b>{html.escape(name)}</b><code>{x}</code></p>" for name, x in rows.items()]
    return f"<div class=card>{''.join(lines)}</div>"

def heat_map(path, most):
    """Held-out responses under every reward model, token by token, wrong tokens framed."""
    out = "<h2>Held-out rewards</h2><p>Orange: punished, blue: praised, framed: wrong tokens.</p>"
    rows = read_jsonl(path) if path.exists() else []
    for row in rows[:: max(1, len(rows) // max(1, most))][:most]:
        if row["sequence"] is not None:                        # A7: all on the last token
            row["sequence"] = [0.0] * (len(row["tokens"]) - 1) + [row["sequence"]]
        if row["generative"]:                                  # B3 of a wrong response
            row["generative"] = [min(0.0, max(-0.1, r)) for r in row["generative"]]
        shown = {}
        for kind in [kind for kind in ("token", "sequence", "generative") if row[kind]]:
            least = 0.1 if kind == "generative" else 0.5
            limit, shown[kind] = max(least, *map(abs, row[kind])), ""
            for t, (text, r) in enumerate(zip(row["tokens"], row[kind])):
                colour = f"rgb({'213 94 0' if r < 0 else '0 114 178'}/{abs(r) / limit:.2f})"
                shown[kind] += (f'<span class="{"e" * (t in row["wrong"])}" title="{r:+.2f}" '
                                f'style="background:{colour}">{html.escape(text)}</span>')
        out += card(row["prompt"], shown)
    return out

def before_after(rows, most):
    """Responses of the SFT policy, and what every policy makes of them, word by word (E1)."""
    out = "<h2>Before and after</h2><p>Against sft: <del>out</del> <ins>in</ins>.</p>"
    for row in rows[:most]:
        shown = {}
        for name in [*row][2:]:                                # behind id and prompt
            old, new = (re.findall(r"\s*(?:\w+|\S)", text) for text in (row["sft"], row[name]))
            words = [html.escape(word) for word in new]
            for op, i, j in edit_ops(old, new)[::-1]:
                if op != "delete":
                    words[j] = f"<ins>{words[j]}</ins>"
                if op != "insert":
                    words.insert(j, f"<del>{html.escape(old[i])}</del>")
            shown[name] = "".join(words)
        out += card(row["prompt"], shown)
    return out

def table(policies):
    """The numbers of eval.json that one compares, as text for the terminal and the report."""
    lines = ["policy          win rate   ± error    right  wrong steps  KL, nats  updates  seconds"]
    for name, row in policies.items():
        win, error, right = map(percent, (row["win_rate"], row["win_rate_se"], row["accuracy"]))
        steps = row["wrong_steps_per_response"]
        steps = "–" if steps is None else f"{steps:.2f}"
        lines.append(f"{name:16.16}{win:>8}{error:>10}{right:>9}{steps:>13}"
                     f"{row['kl_to_ref']:10.2f}{row['updates']:9}{row['seconds']:9.0f}")
    return "\n".join(lines)

# --- The stage ---

def compare(run, args):
    """All of eval.json, rows of responses.jsonl, and the logs of stage 3."""
    problems = read_jsonl(run / "problems.jsonl", "id", "split", "prompt", "prompt_ids")
    problems = [problem for problem in problems if problem["split"] == "test"]
    logs = {name: read_log(run / f"{name}.csv") for name in COLOURS
            if (run / name).is_dir() and (run / f"{name}.csv").exists()}
    if not problems or not logs:
        fail(f"{run}: no policy to evaluate, or no problem to test it on; 03_ppo.py makes policies")
    start_stage(args, "04", "")
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    reference = open_model(AutoModelForCausalLM, run / "policy", args, frozen=True)
    judge = "the oracle: fewer wrong steps win" if problems[0].get("solutions") else "final answer"
    rows = [{"id": problem["id"], "prompt": problem["prompt"]} for problem in problems]
    wrong, policies, preferences, biases = {}, {}, {}, {}
    for name, log in tqdm({"sft": [], **logs}.items(), desc="policies"):
        path = run / ("policy" if name == "sft" else name)
        model = open_model(AutoModelForCausalLM, path, args, frozen=True)
        texts, wrong[name], kl = respond(model, reference, problems, tokenizer, args)
        for row, text in zip(rows, texts):
            row[name] = text
        if args.judge == "llm":
            preferences[name], bias = llm_preferences(
                problems, texts, [row["sft"] for row in rows], args, run / "llm_verdicts.jsonl")
            biases[name] = percent(bias)
            judge = f"{args.llm_model}, in both orders, bias {biases}"
        else:
            preferences[name] = [None if a is None else 1.5 + ((a < b) - (a > b)) / 2
                                 for a, b in zip(wrong[name], wrong["sft"])]
        policies[name] = win_rate(preferences[name], args.seed) | measure(wrong[name], kl, log)
    differences = [{"a": a, "b": b, **difference(preferences[a], preferences[b], args.seed)}
                   for a, b in combinations(logs, 2)]
    path = run / "reward_metrics.json"
    models = json.loads(path.read_text()) if path.exists() else {}
    return {"judge": judge, "policies": policies, "differences": differences,
            "reward_models": models, "warnings": failure_signatures(models, policies, logs),
            "checks": [*checks(judge, models, policies, differences, logs)]}, rows, logs

def main(args):
    if args.human_eval:
        return write_sheet(args)
    if args.runs:
        return combine(args)
    if args.verdicts:
        result = win_rate(read_verdicts(args), args.seed)
        if not result["n"]:
            fail(f"{args.verdicts}: no usable verdict; preference is 1, 2 or 1.5 (a tie)")
        return print(f"win_rate {100 * result['win_rate']:.3f}\nstandard_error "
                     f"{100 * result['win_rate_se']:.3f}\nn {result['n']}")
    if args.judge == "llm" and not (args.llm_url and args.llm_model):
        fail("--judge llm needs --llm_url and --llm_model")
    run = Path(args.run)
    result, rows, logs = compare(run, args)
    write_text(run / "eval.json", json.dumps(result, indent=1) + "\n")
    write_text(run / "responses.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    numbers = table(result["policies"])
    said = result["checks"] + [f"WARNING: {text}" for text in result["warnings"]]
    write_text(run / "report.html", "\n".join([
        PAGE_HEAD, *[f"<p>{html.escape(text)}</p>" for text in said],
        f"<pre>{html.escape(numbers)}</pre>", learning_curves(logs),
        heat_map(run / "reward_examples.jsonl", args.examples), before_after(rows, args.examples)]))
    print(numbers, *said, f"{run}/report.html", sep="\n")

if __name__ == "__main__":
    args = HfArgumentParser(Args).parse_args_into_dataclasses()[0]
    # without its cache, autocast never uses the weights of an older step
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.bf16, False):
        main(args)

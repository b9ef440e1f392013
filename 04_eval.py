"""Stage 4: which policy is better, by how much, and how sure one can be.

Every policy responds to the same test prompts, and the wrong steps of each response are counted
(none: it is right). A policy wins a prompt if it makes fewer of them than the SFT policy, from
which all training starts. Its win rate is the share of prompts that it wins; a tie is half a win.

Checks of paper A (arXiv 2406.02756): accuracy of the reward models, win rate and convergence of
fine-grained against ordinary PPO. These two differ in two things, which the cross separates: what
the reward model learns from (siblings, edits), and how many rewards a response gets (one, one a
token). Checks of paper B (arXiv 2401.06081): right responses, wrong steps, and steadiness of RLMEC
beside imitation alone. The report shows the rewards of A7 and B3.
Simplified against the papers:
  1. The judge is the oracle of the built-in tasks, a list of rules, or the final answer. Paper A
     simulates people; --judge model:NAME asks a language model which of two responses is better,
     and --verdicts reads what others said.
  2. An interval shows how much depends on the choice of prompts, for one seed. How much depends
     on the seed, --runs shows.
Reads RUN/problems.jsonl, reward_metrics.json, reward_examples.jsonl, the policies and their CSVs.
Writes RUN/responses.jsonl, eval.json and report.html; with --judge, judgements.jsonl and
verdicts_POLICY.json.
Command: python 04_eval.py
"""

import csv
import json
import re
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from itertools import chain, combinations, zip_longest
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from tqdm import tqdm

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

# The policies of stage 3, in the order of the table
POLICIES = [
    "ppo_token", "ppo_sequence_edit", "ppo_token_sibling", "ppo_sequence",
    "rlmec", "rlmec_imitation", "rejection", "dpo_edit", "dpo",
]
# The cross: how many rewards a response gets -> PPO on siblings, PPO on minimal edits
CROSS = {
    "one reward a response": ("ppo_sequence", "ppo_sequence_edit"),
    "a reward on every token": ("ppo_token_sibling", "ppo_token"),
}
INTERACTION = "ppo_token + ppo_sequence - ppo_token_sibling - ppo_sequence_edit"
# Beyond these, training is called unstable
LIMITS = {
    "kl": 20,             # nats a response, on training prompts
    "val_kl": 20,         # the same on validation prompts
    "approx_kl": 0.1,     # nats a token, within one update
    "score_std": 10,      # in standard deviations of stage 2's scores
    "advantage_rms": 10,  # the same
}
arg = lambda default, help: hf.hf_argparser.HfArg(default=default, help=help)


@dataclass
class Args:
    run: str = "runs/default"
    runs: list[str] = arg(None, "only print the mean over these run folders, of several seeds")
    seed: int = arg(1, "of the responses, the same for every policy")
    temperature: float = arg(1.0, "of sampling; 0: the likeliest tokens")
    max_new_tokens: int = arg(None, "longest response; default: stage 3's")
    judge: str = arg(None, "model:NAME, an instruct model that says who wins")
    judge_batch: int = arg(16, "responses judged at once")
    verdicts: str = arg(None, "only print the win rate of this file, AlpacaEval's JSON list")
    micro_batch: int = arg(500, "responses sampled at once; fewer need less memory")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


# --- What is measured ---
def compare(run, logs, args, judge=None):
    """Every policy responds to the test prompts and is compared with the SFT policy. Returns
    `policies` and `differences` of eval.json, and the rows of responses.jsonl. logs: policy -> the
    rows of its training log; judge: model and tokenizer, or None."""
    problems = [row for row in json_lines(run / "problems.jsonl") if row["split"] == "test"]
    if not problems:
        fail(f"{run}: no test prompt")

    # by length: the longest prompt of a batch limits the room for its responses
    problems.sort(key=lambda problem: len(problem["prompt_ids"]))
    rows = [{"id": problem["id"], "prompt": problem["prompt"]} for problem in problems]
    tokenizer = hf.AutoTokenizer.from_pretrained(run / "policy")
    # what the log of the SFT policy would be
    untrained = {"update": 0, "episodes": 0, "seconds": 0, "val_kl": 0.0}

    policies = {}
    wins = {}
    for name, log in {"sft": [untrained], **logs}.items():
        path = run / ("policy" if name == "sft" else name)
        texts, errors = respond(path, tokenizer, problems, args)
        for row, text in zip(rows, texts):
            row[name] = text
        if name == "sft":  # comes first: the opponent of all
            sft_errors = errors

        policies[name] = measure(errors, log)
        if judge is None:
            wins[name] = [win(count, sft_count) for count, sft_count in zip(errors, sft_errors)]
        elif name == "sft":
            wins[name] = [0.5] * len(rows)
        else:
            verdicts = judged(name, rows, judge, args)
            wins[name] = [win_of_verdict(verdict) for verdict in verdicts]
            policies[name]["position_bias"] = position_bias(verdicts)
            policies[name]["not_judged"] = wins[name].count(None)
        policies[name] |= win_rate(wins[name])

    differences = {f"{a} - {b}": difference(wins[a], wins[b]) for a, b in combinations(logs, 2)}
    # a policy that is missing has one None, so that no prompt has all four
    cells = [wins.get(name, [None]) for name in chain(*CROSS.values())]
    known = [of_prompt for of_prompt in zip(*cells) if None not in of_prompt]
    if known:
        sequence, sequence_edit, token_sibling, token = np.transpose(known)
        differences[INTERACTION] = difference(token + sequence, token_sibling + sequence_edit)
    return policies, differences, rows


def respond(path, tokenizer, problems, args):
    """A policy's responses to the problems, and how many wrong steps each has."""
    model = hf.AutoModelForCausalLM.from_pretrained(path).to(args.device)
    torch.manual_seed(args.seed)  # the same for every policy
    prompts = [problem["prompt_ids"] for problem in problems]
    sampled = generate(model, tokenizer, prompts, args, args.temperature)

    texts = []
    errors = []
    ends = np.atleast_1d(model.config.eos_token_id)
    for problem, response_ids in zip(problems, sampled):
        body = [token for token in response_ids if token not in ends]
        texts.append(tokenizer.decode(body, skip_special_tokens=True))
        errors.append(wrong_steps(texts[-1], response_ids[-1] in ends, problem))
    return texts, errors


def win(count, sft_count):
    """1 for fewer wrong steps than in sft's response to the same prompt, 0 for more, 0.5 for as
    many; None where nobody knows."""
    if count is None:
        return None
    if count == sft_count:
        return 0.5
    return 1.0 if count < sft_count else 0.0


# --- Statistics: None where nothing was measured ---
def win_rate(wins):
    """The mean of wins and its standard error, as AlpacaEval counts. wins: 0 to 1, or None.

    win_rate([1, 1, 0.5, 0, None]) -> win_rate 0.625, win_rate_se 0.24, n 4, and an interval
    """
    known = [x for x in wins if x is not None]
    n = len(known)
    return {
        "win_rate": mean(known), "win_rate_ci95": interval(known), "n": n,
        "win_rate_se": deviation(known) / n ** 0.5 if n else None,
    }


def mean(values):
    return float(np.mean(values)) if len(values) else None


def deviation(values):
    """Standard deviation of a sample; 0 for a single value."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def interval(values):
    """95 % bootstrap interval of the mean, [low, high]: draw n of the n values with replacement
    and take their mean, 10,000 times; leave out 2.5 % of the means at either end."""
    n = len(values)
    if not n:
        return None

    # How often each distinct value is drawn has a multinomial distribution
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(1).multinomial(n, counts / n, 10_000)  # (10000, distinct values)
    return np.percentile(draws @ distinct / n, [2.5, 97.5]).tolist()


def difference(wins_a, wins_b):
    """Paired difference of two win rates, on prompts where both are known: how hard a prompt is
    cancels out, and the interval becomes narrower."""
    gaps = [a - b for a, b in zip(wins_a, wins_b) if None not in (a, b)]
    return {"difference": mean(gaps), "n": len(gaps), "ci95": interval(gaps)}


def measure(errors, log):
    """The numbers of one policy that need no opponent.

    errors: wrong steps of each response; log: rows of its training, some with an `accuracy`, the
    share of right responses to validation prompts: they make the learning curve.
    """
    if None in errors:  # nobody knows
        errors = []
    curve = [row["accuracy"] for row in log if "accuracy" in row]
    last = log[-1]

    largest_drop = None
    updates_to_95 = None
    if curve:
        largest_drop = max(curve) - min(curve[np.argmax(curve):])
        if curve[-1] > 0:
            updates_to_95 = first_update(log, 0.95 * curve[-1])

    return {
        "accuracy": mean(np.equal(errors, 0)),  # the share of right responses
        "wrong_steps_per_response": mean(errors),
        "kl_to_ref": last.get("val_kl"),
        "updates": int(last["update"]), "episodes": int(last["episodes"]),
        "seconds": last["seconds"],
        "best_accuracy": max(curve, default=None),
        "updates_to_95": updates_to_95,  # of its own final accuracy
        "largest_drop": largest_drop,  # from the best to the lowest after it
    }


def first_update(log, level):
    """The first update whose validation accuracy reaches a level, or None."""
    for row in log:
        if "accuracy" in row and row["accuracy"] >= level:
            return int(row["update"])
    return None


# --- The papers' checks, and signs of failure ---
def checks(reward_models, policies, differences, logs, run):
    """The papers' checks, and what the cross says of this run, as sentences."""
    said = [
        "Reward models, held-out (edited, rejected) in order: "
        f"{listed(reward_models, 'pair_accuracy')}.",
        "Reward models, held-out (chosen, rejected) in order: "
        f"{listed(reward_models, 'preference_accuracy')}.",
        f"Epochs of the reward models: {listed(reward_models, 'epochs', 'd')}; the sequence kinds "
        "gain from more (README, Results).",
    ]

    # A: fine-grained against ordinary PPO; B: RLMEC with its token reward, or without
    for contrast in ("ppo_token - ppo_sequence", "rlmec - rlmec_imitation"):
        row = differences.get(contrast, {"n": 0})
        if row["n"]:
            said.append(f"Win rate, {contrast}: {points(row)} points, {row['n']} prompts.")

    # A: with the token reward it should take fewer updates
    said.append(
        "Updates to 95 % of their own final accuracy: "
        f"{listed(policies, 'updates_to_95', 'd')}."
    )
    best = policies.get("ppo_sequence", {}).get("best_accuracy")
    if best and "ppo_token" in logs:
        update = or_dash(first_update(logs["ppo_token"], best), "d")
        said.append(f"ppo_token reaches {or_dash(best)}, ppo_sequence's best, at update {update}.")

    # B: training should not lose what it has reached
    said.append(f"Steadiness, largest drop after the best: {listed(policies, 'largest_drop')}.")

    # what did it: the edit, or the reward on every token?
    if INTERACTION in differences:
        said += cross_sentences(differences)
    elif "ppo_token - ppo_sequence" in differences and not {*chain(*CROSS.values())} <= {*logs}:
        said += [
            "ppo_token and ppo_sequence differ in two things: what the reward model learns from "
            "(edits, siblings), and how many rewards a response gets. To separate them:",
            f"python 02_reward_model.py --run {run} --kind cross --overwrite",
            f"python 03_ppo.py --run {run} --method cross",
            f"python 04_eval.py --run {run}",
        ]
    return said


def judge_sentences(policies, run):
    """How far a response's place in the request decides; or, where nobody judges, who can."""
    if all(row["win_rate"] is None for row in policies.values()):
        return ["No win rate, since nobody knows which responses are right. To ask a language "
                f"model: python 04_eval.py --run {run} --judge model:NAME"]
    said = []
    for name, row in policies.items():
        if "position_bias" in row:
            said.append(f"Judge, {name}: win rate {or_dash(row['win_rate'])}; its two orders "
                        f"disagree on {or_dash(row['position_bias'])} of the pairs that differ "
                        f"(ties); {row['n']} prompts, {row['not_judged']} more beyond its context.")
    return said


def cross_sentences(differences):
    """What each ingredient brings, alone and beside the other."""
    edit_alone = points(differences["ppo_sequence_edit - ppo_sequence"])
    edit_beside = points(differences["ppo_token - ppo_token_sibling"])
    token_alone = points(differences["ppo_token_sibling - ppo_sequence"])
    token_beside = points(differences["ppo_token - ppo_sequence_edit"])
    both = points(differences["ppo_token - ppo_sequence"])
    beyond = points(differences[INTERACTION])
    return [
        "What each ingredient brings in this run, in points of win rate (95 % interval):",
        f"the minimal edit {edit_alone} alone, {edit_beside} beside the token reward;",
        f"a reward on every token {token_alone} alone, {token_beside} beside the edit;",
        f"both together {both}; less the sum of both alone: {beyond}.",
    ]


def points(row):
    """A difference of win rates and its interval, such as +5.0 (+3.8 to +6.2)."""
    if row["ci95"] is None:  # no prompt where both are known
        return "–"
    low, high = row["ci95"]
    return f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def failure_signatures(reward_models, policies, differences, logs):
    """Paper A's: reward accuracy under 70 %, win rate not above the baseline, and unstable PPO."""
    found = []
    for kind, row in reward_models.items():
        accuracy = row["pair_accuracy"]
        if accuracy is None:  # no edit was held out
            accuracy = row["preference_accuracy"]
        if accuracy is not None and accuracy < 0.7:
            found.append(f"reward accuracy under 70 %: reward_{kind}, {accuracy:.1%}")

    gap = differences.get("ppo_token - ppo_sequence", {}).get("difference")
    if gap is not None and gap <= 0:
        found.append("win rate not above the baseline: ppo_token is not ahead of ppo_sequence")

    for name, log in logs.items():
        for column, limit in LIMITS.items():
            peak = np.max([abs(row.get(column, 0)) for row in log])
            if not peak <= limit:  # true of nan as well, which np.max hands on
                found.append(f"unstable: {column} of {name} reached {peak:.3g}, over {limit}")
        drop = policies[name]["largest_drop"] or 0
        if drop > 0.2:
            found.append(f"unstable: {name} lost {drop:.0%} accuracy")
    return found


def listed(rows, column, form=".1%"):
    """One column, where it was measured: "token 99.9 %, sequence 77.3 %"."""
    texts = [f"{name} {or_dash(row[column], form)}"
             for name, row in rows.items() if row.get(column) is not None]
    return ", ".join(texts) or "–"


def or_dash(x, form=".1%"):
    """0.973 -> "97.3 %"; a dash for what was not measured."""
    return "–" if x is None else f"{x:{form}}".replace("%", " %")


# --- The table ---
def table(policies):
    """The numbers of eval.json that one compares, as text for the terminal and the report."""
    text = "policy             win rate   ± error    right  wrong steps  KL, nats  updates  seconds"
    line = "\n{:18}{:>9}{:>10}{:>9}{:>13}{:>10}{:9}{:9.0f}"
    for name, row in policies.items():
        text += line.format(
            name, or_dash(row["win_rate"]), or_dash(row["win_rate_se"]), or_dash(row["accuracy"]),
            or_dash(row["wrong_steps_per_response"], ".2f"), or_dash(row["kl_to_ref"], ".2f"),
            row["updates"], row["seconds"],
        )
    return text


def cross_table(policies, differences):
    """The cross as text: win rates and right responses of its four cells and of its off-line row,
    and what either ingredient brings, in points of win rate; "" where a cell is missing."""
    if INTERACTION not in differences:
        return ""

    rows = dict(CROSS)
    if "dpo_edit - dpo" in differences:
        rows["no reward model: DPO"] = ("dpo", "dpo_edit")  # the off-line row

    line = "\n{:24}{:>24}{:>24}{:>25}".format
    text = line("win rate, right", "preferred sibling", "minimal edit", "the edit brings")
    for title, names in rows.items():
        cells = [f"{or_dash(policies[name]['win_rate'])}, {or_dash(policies[name]['accuracy'])}"
                 for name in names]
        sibling, edit = names
        text += line(title, *cells, points(differences[f"{edit} - {sibling}"]))
    token_alone = points(differences["ppo_token_sibling - ppo_sequence"])
    token_beside = points(differences["ppo_token - ppo_sequence_edit"])
    return "\n" + text + line("PPO: every token brings", token_alone, token_beside, "")


# --- Plumbing: nothing to learn below this line ---

# --- Helpers, the same in several scripts ---
def fail(message):
    """Bad input ends a stage with one line and exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def json_lines(path):
    if not Path(path).is_file():
        fail(f"{path} is missing; an earlier stage makes it")
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def whole_rows(path):
    """The rows of a JSONL file that grows; without the last, if a killed stage has left half of it,
    which goes from the file, too."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1]]  # the last is empty, or half a row
    write_jsonl(path, rows)
    return rows


def write_text(path, text):
    """Written aside, then renamed: nobody reads half a file."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def prompt_text(prompt):
    """A prompt as one text; a chat of several messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def batches(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]


# A step of a solution: "3+2=5;" in a chain of sums, a sentence, or a line
STEP = re.compile(r"""
    [^\s;]          # begins with any character but a space,
    [^\n;]*?        # goes on within its line,
    (?: ;           # and ends with a semicolon,
      | \.(?=\s)    # with a full stop before a space,
      | $ )         # or with the line
    """, re.VERBOSE | re.MULTILINE)


def differing_steps(text, solution):
    """How many steps of the two differ, position by position; a missing one differs, too."""
    steps = zip_longest(STEP.findall(text), STEP.findall(solution))
    return sum(a != b for a, b in steps)


def wrong_steps(text, ended, problem):
    """The number of errors of a response, 0 if it is right; None where nobody knows. Errors are
    hits of the rules; else steps unlike those of the nearest right solution; else 1 for a wrong
    final answer. A response that has not ended has one more."""
    if problem.get("rules"):
        wrong = sum(len(re.findall(rule, text)) for rule in problem["rules"])
    elif problem.get("solutions"):
        wrong = min(differing_steps(text, solution) for solution in problem["solutions"])
    elif problem.get("right"):
        wrong = int(not re.search(problem["right"], text))
    else:
        return None

    if not ended:
        wrong += 1
    return wrong


def generate(model, tokenizer, prompts, args, temperature=1.0):
    """A response (ids) to each prompt (ids), its end token included; at temperature 0 the likeliest
    tokens. Plain transformers: only stage 3 needs to see how a token is drawn."""
    ends = np.atleast_1d(model.config.eos_token_id)  # one id or several
    responses = []

    for part in tqdm(batches(prompts, args.micro_batch), desc="sampling", leave=False):
        inputs = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
        P = inputs.input_ids.shape[1]
        room = model.config.max_position_embeddings - P
        output = model.generate(  # (B, P + T); it knows what ends a response
            **inputs.to(args.device),
            do_sample=temperature > 0,
            temperature=temperature,
            top_k=0,  # from all tokens
            max_new_tokens=min(args.max_new_tokens, room),
        )
        for row in output[:, P:].tolist():
            stops = [t for t, token in enumerate(row, 1) if token in ends]
            responses.append(row[:min(stops, default=len(row))])  # what follows is padding
    return responses


def training_log(path):
    """The rows of a policy's CSV as numbers; a column that is empty in a row is left out there."""
    log = []
    for row in csv.DictReader(open(path)):
        log.append({name: float(text) for name, text in row.items() if text})
    return log


# --- Several runs: --runs ---
def combine(runs):
    """Mean and standard deviation over runs of every number that all eval.json have."""
    results = []
    for run in runs:
        path = Path(run) / "eval.json"
        if not path.exists():
            fail(f"{path} is missing")
        results.append(json.load(open(path)))
    print_means(results)


def print_means(trees, above=""):
    """A line for every number that stands at the same place in all nested dictionaries."""
    for key in sorted(set(trees[0]).intersection(*trees)):
        place = f"{above} {key}".strip()
        values = [tree[key] for tree in trees]
        types = {type(x) for x in values}
        if types == {dict}:
            print_means(values, place)
        elif types <= {int, float}:
            print(
                f"{place:60s} {mean(values):9.3f} ± {deviation(values):.3f} ",
                *[f"{x:.3f}" for x in values],
            )


# --- Other judges: --judge, --verdicts ---
JUDGE_REQUEST = """\
Which of two responses to the prompt below is better? Answer with the letter A or B alone.

Prompt:
{prompt}

Response A:
{first}

Response B:
{second}"""

# What a verdict is about, and whose it is
CASE = ("instruction", "output_1", "output_2", "annotator")
# A thought that a generation prompt opens, at its end: <think>, [THINK], ...
OPEN_THOUGHT = re.compile(
    r"[<\[◁]\|?(think|thinking|thought|reasoning)\|?[>\]▷]\s*$", re.IGNORECASE)


def open_judge(args):
    """The model of --judge model:NAME and its tokenizer."""
    name = args.judge.removeprefix("model:")
    if name == args.judge:
        fail(f"--judge {name}: write model:NAME, the name or folder of an instruct model")
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(args.device)
        tokenizer = hf.AutoTokenizer.from_pretrained(name)
        letter_ids("", "", "", tokenizer)  # a trial of its template
    except Exception as error:  # transformers and templates raise many kinds
        fail(f"--judge {args.judge} is no causal LM with a chat template: {error!r:.150}")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # any token: padding is masked
    return model, tokenizer


def letter_ids(prompt, first, second, tokenizer):
    """The ids of the judge's request up to its answer, and the next id of the answers A and B."""
    request = JUDGE_REQUEST.format(prompt=prompt, first=first, second=second)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False)
    thought = OPEN_THOUGHT.search(text)
    if thought:  # it ends before it has begun
        opened = thought[0].strip()
        text = f"{text.rstrip()}\n\n{opened[0]}/{opened[1:]}\n\n"

    ids_a, ids_b = tokenizer([text + "A", text + "B"], add_special_tokens=False).input_ids
    # a tokenizer may write the letter apart, or with what stands before it
    n = len(commonprefix([ids_a, ids_b]))
    return ids_a[:n], ids_a[n], ids_b[n]


def prefers_a(jobs, judge, args):
    """Does the judge find A the likelier answer? jobs: what letter_ids returns."""
    model, tokenizer = judge
    inputs = tokenizer.pad(
        {"input_ids": [ids for ids, _, _ in jobs]}, padding_side="left", return_tensors="pt")
    # one forward pass; generate shifts the positions for the padding
    output = model.generate(
        **inputs.to(args.device), max_new_tokens=1, do_sample=False, num_beams=1,
        output_logits=True, return_dict_in_generate=True)
    logits = output.logits[0]  # (B, vocabulary), of the first token of the answer
    return [bool(row[a] > row[b]) for (_, a, b), row in zip(jobs, logits)]


def judged(name, rows, judge, args):
    """AlpacaEval's verdicts on the responses of sft and of a policy, RUN/verdicts_<name>.json."""
    verdicts = []
    for row in rows:
        verdicts.append({
            "instruction": prompt_text(row["prompt"]), "output_1": row["sft"],
            "generator_1": "sft", "output_2": row[name], "generator_2": name,
            "annotator": args.judge.removeprefix("model:"),
        })
    known = preferences([*map(case_of, verdicts)], judge, args)
    verdicts = [row | {"preference": known[case_of(row)]} for row in verdicts]
    path = Path(args.run) / f"verdicts_{name}.json"
    write_text(path, json.dumps(verdicts, indent=1) + "\n")
    return verdicts


def case_of(verdict):
    """The case of a row of verdicts or judgements."""
    return tuple(verdict[key] for key in CASE)


def preferences(cases, judge, args):
    """case -> preference: 1 (the response of sft is better) or 2 (the policy's) where the judge
    says so in both orders, else 1.5, a tie; None for what is longer than its context. They are
    appended to RUN/judgements.jsonl as each batch comes, and what it has is not asked again."""
    model, tokenizer = judge
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    path = Path(args.run) / "judgements.jsonl"
    found = {case_of(row): row["preference"] for row in whole_rows(path)}
    jobs = []  # (case, its request with sft's response first, and second)
    for case in dict.fromkeys(cases):
        prompt, sft, new, _ = case
        if sft == new:  # needs no judge
            found[case] = 1.5
        elif case not in found:
            both = [letter_ids(prompt, *pair, tokenizer) for pair in ((sft, new), (new, sft))]
            if max(len(ids) for ids, _, _ in both) < context:
                jobs.append((case, *both))
            else:
                found[case] = None

    for part in tqdm(batches(jobs, args.judge_batch), desc="judging"):
        a_is_sft = prefers_a([first for _, first, _ in part], judge, args)
        a_is_new = prefers_a([second for _, _, second in part], judge, args)
        with open(path, "a", encoding="utf-8") as file:
            for (case, _, _), sft_wins, new_wins in zip(part, a_is_sft, a_is_new):
                found[case] = 1 if sft_wins else 2
                if sft_wins == new_wins:  # its place decides, not the response
                    found[case] = 1.5
                row = dict(zip(CASE, case)) | {"preference": found[case]}
                file.write(json.dumps(row) + "\n")
    return found


def position_bias(verdicts):
    """The share of ties among the verdicts on two different responses: the two orders disagree."""
    asked = [row["preference"] == 1.5 for row in verdicts
             if row["output_1"] != row["output_2"] and row["preference"] is not None]
    return mean(asked)


def print_verdicts(path):
    """The win rate of a JSON list of verdicts as AlpacaEval writes it."""
    try:
        rows = json.load(open(path, encoding="utf-8"))
        found = win_rate([win_of_verdict(row) for row in rows])
        if found["n"] == 0:
            raise ValueError("no verdict")
        print(f"win_rate {100 * found['win_rate']:.3f}\n"
              f"standard_error {100 * found['win_rate_se']:.3f}\n"
              f"n {found['n']}")
    except Exception as error:
        fail(f"{path}: no list of verdicts with preference 1, 2 or 1.5 ({error!r})")


def win_of_verdict(row):
    """AlpacaEval's preference, 1 (the opponent) to 2 (the policy), as a win of 0 to 1. Its 0 is a
    tie, and so are equal outputs. Anything else is no verdict: None."""
    if "output_1" in row and row["output_1"] == row["output_2"]:
        return 0.5
    preference = row["preference"]
    if type(preference) in (int, float):  # true is no number
        if preference == 0:
            return 0.5
        if 1 <= preference <= 2:
            return preference - 1
    return None


# --- The report: one file of HTML and SVG ---
STYLE = """:root{color-scheme:light dark}pre{overflow-x:auto}code{white-space:pre-wrap}
body{margin:auto;padding:1rem;max-width:60rem;font:16px/1.5 system-ui}del{color:#d55e00}
div{background:#8882;border-radius:.5rem;padding:.3rem .8rem;margin:.7rem 0}
p{margin:.3rem 0;overflow-wrap:anywhere}b{display:inline-block;min-width:10rem}
svg{max-width:40rem;font-size:12px;fill:none}text{fill:currentColor}path{stroke:currentColor}
polyline{stroke-width:3}ins{color:#0a84d0;font-weight:bold;text-decoration:none}"""
COLOURS = {
    "ppo_token": "#0072b2", "ppo_sequence": "#d55e00",
    "ppo_token_sibling": "#7a5cc0", "ppo_sequence_edit": "#a8763e",
    "rlmec": "#009e73", "rlmec_imitation": "#cc79a7", "rejection": "#e69f00",
    "dpo": "#56b4e9", "dpo_edit": "#888888",
}


def page(numbers, sentences, cross, logs, held_out, rows):
    """The report. numbers, sentences: what the terminal shows; cross: HTML; held_out, rows: the
    rows of reward_examples.jsonl and of responses.jsonl."""
    legend = curves = ""
    for name, log in logs.items():
        points = " ".join(  # x,y; in SVG, y = 0 is at the top
            f"{400 * row['update'] / log[-1]['update']:.0f},{200 - 200 * row['accuracy']:.1f}"
            for row in log if "accuracy" in row
        )
        if points:  # somebody knew what is right
            curves += f'<polyline stroke={COLOURS[name]} points="{points}"/>'
            legend += f"<b><span style=color:{COLOURS[name]}>■</span> {name}</b> "
    chart = f"""<h2>Learning curves</h2><p>{legend}</p>
<svg viewBox="-45 -10 480 235"><path d="M0 0v200h400"/><text x=-45 y=10>100 %</text>
<text x=-45 y=204>0 %</text><text x=330 y=218>last update</text>{curves}</svg>
<p>Right responses to validation prompts, over the updates of each run."""

    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width"><title>Token-level reward</title>
<style>{STYLE}</style><h1>Token-level reward: who wins</h1><p>{"<p>".join(sentences)}
<pre>{numbers}</pre>
{chart if curves else ""}
{cross}
<h2>Held-out rewards</h2><p>Orange: punished, blue: praised, framed: wrong tokens.
{cards(held_out, heat_map)}
<h2>Before and after</h2><p>Against sft: <del>out</del> <ins>in</ins>.
{cards(rows, before_after)}"""


def cross_picture(policies):
    """Win rates of the cross, a line for each of its rows; parallel where ingredients add up."""
    height = lambda rate: f"{400 - 400 * rate:.1f}"  # 100 % is at the top, y = 0; 50 % at y = 200
    drawn = ""
    # names stand below the line of one reward, above the line of a reward on every token
    for (sibling, edit), dy in zip(CROSS.values(), (18, -8)):
        colour = COLOURS[sibling]
        line = ""
        for x, name in ((60, sibling), (340, edit)):
            row = policies[name]
            y = height(row["win_rate"])
            low, high = map(height, row["win_rate_ci95"])
            line += f"{x},{y} "
            drawn += f'<path style=stroke:{colour} d="M{x} {low}V{high}"/>'
            drawn += f"<text x={x + 8} y={y} dy={dy}>{name} {or_dash(row['win_rate'])}</text>"
        drawn += f'<polyline stroke={colour} points="{line}"/>'

    return f"""<h2>The cross</h2>
<svg viewBox="-45 -10 560 235"><path d="M0 0v200h400"/><text x=-45 y=10>100 %</text>
<text x=-45 y=204>50 %</text><text x=20 y=218>preferred sibling</text>
<text x=300 y=218>minimal edit</text>{drawn}</svg>
<p>Win rate against sft with its 95 % interval. Upwards to the right: what the edit brings. From
the lower to the upper line: what the reward on every token brings. Parallel: they add up."""


def cards(rows, lines_of):
    """Eight cards, from all over the rows: the prompt, then the lines (name, HTML) that a function
    makes of the row."""
    html = ""
    for row in rows[::max(1, len(rows) // 8)][:8]:
        prompt = row["prompt"]
        if isinstance(prompt, list):  # a chat: its last message
            prompt = prompt[-1]["content"]
        html += f"<div><p><b>prompt</b><code>{escape(prompt)}</code>"
        for name, line in lines_of(row):
            html += f"<p><b>{name}</b><code>{line}</code>"
        html += "</div>"
    return html


def heat_map(row):
    """A held-out response under every reward model, token by token, wrong tokens framed."""
    for kind in ("token", "token_sibling", "sequence", "sequence_edit", "generative"):
        if row.get(kind) is None:  # not trained
            continue

        rewards = rewards_by_token(row, kind)
        # full colour is for the largest reward, but not where all are small
        full = max(0.1 if kind == "generative" else 0.5, *map(abs, rewards))
        html = ""
        for t, (token, r) in enumerate(zip(row["tokens"], rewards)):
            colour = "213 94 0" if r < 0 else "0 114 178"  # orange, blue
            style = f"background:rgb({colour}/{abs(r) / full:.2f})"
            if t in row["wrong"]:
                style += ";outline:1.5px solid"
            html += f'<span title={r:+.2f} style="{style}">{escape(token)}</span>'
        yield kind, html


def rewards_by_token(row, kind):
    """What RL would give to each token of a held-out wrong response: T numbers."""
    if kind.startswith("sequence"):  # A7: all on the last token
        return [0.0] * (len(row["tokens"]) - 1) + [row[kind]]
    if kind == "generative":  # B3 of a wrong response, from p_t
        return np.clip(np.subtract(row["generative"], 0.5), -0.1, 0.0)
    return row[kind]  # A2


def before_after(row):
    """A response of the SFT policy, and what every policy makes of it, word by word."""
    word = r"\s*(?:\w+|\S)"  # or a sign; with the space before it
    old = re.findall(word, row["sft"])
    for name in ["sft", *POLICIES]:
        if name not in row:  # not trained
            continue
        new = re.findall(word, row[name])
        html = ""
        # old[a:b] has become new[c:d]
        for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            before = escape("".join(old[a:b]))
            after = escape("".join(new[c:d]))
            html += after if tag == "equal" else f"<del>{before}</del><ins>{after}</ins>"
        yield name, html


# --- The stage ---
def main(args):
    if args.runs:
        return combine(args.runs)
    if args.verdicts:
        return print_verdicts(args.verdicts)

    # What was trained
    run = Path(args.run)
    logs = {}
    for name in POLICIES:
        path = run / f"{name}.csv"
        if path.exists():
            logs[name] = training_log(path)
    if not logs:
        fail(f"{run}: no policy; 03_ppo.py makes them")
    if not args.max_new_tokens:
        args.max_new_tokens = json.load(open(run / "03_args.json"))["max_new_tokens"]

    # Which policy is better, and is it as the papers say
    judge = open_judge(args) if args.judge else None
    policies, differences, rows = compare(run, logs, args, judge)
    reward_models = {}  # DPO and rejection sampling need none
    held_out = []
    if (run / "reward_metrics.json").exists():
        reward_models = json.load(open(run / "reward_metrics.json"))
        held_out = json_lines(run / "reward_examples.jsonl")
    warnings = failure_signatures(reward_models, policies, differences, logs)
    said = checks(reward_models, policies, differences, logs, run)
    said += judge_sentences(policies, run)
    result = {
        "policies": policies, "differences": differences, "reward_models": reward_models,
        "warnings": warnings, "checks": said,
    }
    write_jsonl(run / "04_args.json", [vars(args)])
    write_text(run / "eval.json", json.dumps(result, indent=1) + "\n")
    write_jsonl(run / "responses.jsonl", rows)

    # The same for people
    numbers = table(policies) + cross_table(policies, differences)
    sentences = said + [f"WARNING: {text}" for text in warnings]
    cross = cross_picture(policies) if INTERACTION in differences else ""
    write_text(run / "report.html", page(numbers, sentences, cross, logs, held_out, rows))
    print(numbers, *sentences, run / "report.html", sep="\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # whatever the console can show
    main(Args(**vars(hf.HfArgumentParser(Args).parse_args())))

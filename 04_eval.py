"""Stage 4: which policy is better, by how much, and how sure that is.

Checks of paper A (arXiv 2406.02756): accuracy of the reward models, win rate and convergence of
fine-grained against ordinary PPO; of paper B (arXiv 2401.06081): right responses, wrong steps and
steadiness of RLMEC beside imitation alone. Simplified: the oracle of the built-in tasks, or the
final answer, judges against the SFT policy where A simulates people; --verdicts reads any judge's.
Reads what stages 1 to 3 wrote. Writes RUN/responses.jsonl, eval.json and report.html.
Command: python 04_eval.py
"""

import csv, json, re, shutil, sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from itertools import combinations, zip_longest
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from tqdm import tqdm

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()
arg = lambda default, help: hf.hf_argparser.HfArg(default=default, help=help)

@dataclass
class Args:
    run: str = "runs/default"
    runs: list[str] = arg(None, "only the mean of evaluated runs, of several seeds")
    seed: int = arg(1, "of the responses, the same for every policy")
    temperature: float = arg(1.0, "of sampling")
    max_new_tokens: int = arg(None, "longest response; default: stage 3's")
    verdicts: str = arg(None, "only the win rate of verdicts as AlpacaEval's JSON")
    micro_batch: int = arg(500, "rows of a forward pass")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

# --- Statistics: None where nothing was measured ---
def mean(values):
    return float(np.mean(values)) if len(values) else None

def interval(values):
    """95 % bootstrap interval of the mean: resampling is a multinomial draw of distinct values."""
    n = len(values)
    if not n:
        return None
    distinct, counts = np.unique(values, return_counts=True)
    means = np.random.default_rng(1).multinomial(n, counts / n, 10_000) @ distinct / n
    return np.percentile(means, [2.5, 97.5]).tolist()

def win_rate(preferences):
    """As AlpacaEval counts: the mean of preference - 1 and its standard error. Preferences: from 1
    (the opponent) to 2 (the policy), 0 a tie, anything else no verdict."""
    wins = [(p or 1.5) - 1 for p in preferences
            if type(p) in (int, float) and (p == 0 or 1 <= p <= 2)]
    n = len(wins)
    return {"win_rate": mean(wins), "win_rate_ci95": interval(wins), "n": n,
            "win_rate_se": float(np.std(wins, ddof=n > 1)) / n ** 0.5 if n else None}

def difference(a, b):
    """Paired difference of two win rates, on prompts with both preferences."""
    gaps = [x - y for x, y in zip(a, b) if None not in (x, y)]
    return {"difference": mean(gaps), "n": len(gaps), "ci95": interval(gaps)}

def first_update(log, level):
    """The first update whose validation accuracy reaches a level, or None."""
    return next((int(row["update"]) for row in log if row.get("accuracy", -1) >= level), None)

def measure(wrong, log):
    """The numbers of one policy that need no opponent."""
    wrong, last = np.array([] if None in wrong else wrong), log[-1]
    curve = [row["accuracy"] for row in log if "accuracy" in row]
    return {"accuracy": mean(wrong == 0), "wrong_steps_per_response": mean(wrong),
            "kl_to_ref": last.get("val_kl"), "updates": int(last["update"]),
            "episodes": int(last["episodes"]), "seconds": last["seconds"],
            "best_accuracy": max(curve, default=None),
            "updates_to_95": first_update(log, 0.95 * curve[-1]) if any(curve[-1:]) else None,
            "largest_drop": max(curve) - min(curve[np.argmax(curve):]) if curve else None}

# --- Helpers, the same in several scripts ---
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

def batches(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]

def generate(model, tokenizer, prompts, args, temperature=1.0):
    """A response to each prompt (ids), with its end token; temperature 0: the likeliest tokens."""
    rows, end = [], tokenizer.eos_token_id
    for part in tqdm(batches(prompts, args.micro_batch), desc="sampling", leave=False):
        inputs = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
        P = inputs.input_ids.shape[1]
        model.generation_config = hf.GenerationConfig(
            do_sample=temperature > 0, temperature=temperature, top_k=0, eos_token_id=end,
            max_new_tokens=min(args.max_new_tokens, model.config.max_position_embeddings - P),
            pad_token_id=tokenizer.pad_token_id)
        rows += model.generate(**inputs.to(args.device))[:, P:].tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]

# --- Evaluation ---
CONTRASTS = "ppo_token - ppo_sequence", "rlmec - rlmec_imitation", "dpo - dpo_edit"
# in nats a response, nats a token in one update, and standard deviations of stage 2's rewards
LIMITS = {"kl": 20, "val_kl": 20, "approx_kl": 0.1, "score_std": 10, "advantage_rms": 10}

def failure_signatures(models, policies, differences, logs):
    """Paper A's: reward accuracy under 70 %, win rate not above the baseline, and unstable PPO."""
    for kind, row in models.items():
        share = row["preference_accuracy"] if row["pair_accuracy"] is None else row["pair_accuracy"]
        if share is not None and share < 0.7:
            yield f"reward accuracy under 70 %: reward_{kind}, {share:.1%}"
    gap = differences.get(CONTRASTS[0], {}).get("difference")
    if gap is not None and gap <= 0:
        yield "win rate not above the baseline: ppo_token is not ahead of ppo_sequence"
    for name, log in logs.items():
        for column, limit in LIMITS.items():
            peak = np.max([abs(row.get(column, 0)) for row in log])
            if not peak <= limit:  # nan as well
                yield f"unstable: {name} reached a {column} of {peak:.3g}, over {limit}"
        if (drop := policies[name]["largest_drop"] or 0) > 0.2:
            yield f"unstable: {name} lost {drop:.0%} accuracy"

def show(x, form=".1%"):
    """97.3 %, or a dash for what was not measured."""
    return "–" if x is None else f"{x:{form}}".replace("%", " %")

def checks(models, policies, differences, logs):
    """The papers' checks as sentences."""
    each = lambda rows, column, form=".1%": ", ".join(
        f"{name} {show(x[column], form)}" for name, x in rows.items()
        if x[column] is not None) or "–"
    for better, column in (("edited", "pair_accuracy"), ("preferred", "preference_accuracy")):
        yield f"Reward models, held-out ({better}, original) in order: {each(models, column)}."
    for pair, row in differences.items():
        if row["ci95"] and pair in CONTRASTS:
            gap, low, high = (show(x, "+.1%") for x in (row["difference"], *row["ci95"]))
            yield f"Win rate, {pair}: {gap} (95 % interval {low} to {high}, {row['n']} prompts)."
    yield f"Updates to 95 % of the own final accuracy: {each(policies, 'updates_to_95', 'd')}."
    best = policies.get("ppo_sequence", {}).get("best_accuracy")
    if best and "ppo_token" in logs:
        update = first_update(logs["ppo_token"], best)
        yield f"ppo_token reaches {show(best)}, ppo_sequence's best, at update {show(update, 'd')}."
    yield f"Steadiness, largest drop after the best: {each(policies, 'largest_drop')}."

def compare(run, logs, args):
    """All of eval.json, and rows of responses.jsonl."""
    problems = map(json.loads, open(run / "problems.jsonl"))
    problems = [row for row in problems if row["split"] == "test"] or fail(f"{run}: no test prompt")
    problems.sort(key=lambda row: len(row["prompt_ids"]))  # a part's longest limits it
    prompts = [row["prompt_ids"] for row in problems]
    tokenizer = hf.AutoTokenizer.from_pretrained(run / "policy")
    start = {"update": 0, "episodes": 0, "seconds": 0, "val_kl": 0.0}
    wrong, preferred, policies = {}, {}, {}
    for name, log in {"sft": [start], **logs}.items():
        path = run / ("policy" if name == "sft" else name)
        model = hf.AutoModelForCausalLM.from_pretrained(path).to(args.device)
        torch.manual_seed(args.seed)  # the same for every policy
        wrong[name] = []
        for row, ids in zip(problems, generate(model, tokenizer, prompts, args, args.temperature)):
            row[name] = tokenizer.decode(ids, skip_special_tokens=True)
            wrong[name].append(wrong_steps(row[name], ids[-1] == tokenizer.eos_token_id, row))
        preferred[name] = [None if a is None else 1.5 + ((a < b) - (a > b)) / 2
                           for a, b in zip(wrong[name], wrong["sft"])]
        policies[name] = win_rate(preferred[name]) | measure(wrong[name], log)
    differences = {f"{a} - {b}": difference(preferred[a], preferred[b])
                   for a, b in combinations(logs, 2)}
    models = json.load(open(run / "reward_metrics.json"))
    rows = [{name: row[name] for name in ("id", "prompt", *policies)} for row in problems]
    found = models, policies, differences, logs
    return {"policies": policies, "differences": differences, "reward_models": models,
            "warnings": [*failure_signatures(*found)], "checks": [*checks(*found)]}, rows

def verdicts(args):
    """The win rate of a JSON list of verdicts as AlpacaEval writes it; equal outputs tie."""
    try:
        rows = json.loads(Path(args.verdicts).read_text("utf-8"))
        found = win_rate([1.5 if "output_1" in row and row["output_1"] == row["output_2"]
                          else row["preference"] for row in rows])
        print(f"win_rate {100 * found['win_rate']:.3f}\nstandard_error "
              f"{100 * found['win_rate_se']:.3f}\nn {found['n']}")
    except Exception as error:
        fail(f"{args.verdicts}: no list of verdicts with preference 1, 2 or 1.5 ({error!r})")

def flat(value, name=""):
    """The numbers in nested dictionaries, by their path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name} {key}").items()}
    return {name.strip(): value} if isinstance(value, (int, float)) else {}

def combine(args):
    """Mean and standard deviation over runs of every number that all eval.json have."""
    paths = [Path(run) / "eval.json" for run in args.runs]
    runs = [flat(json.loads(path.read_text())) if path.exists() else fail(f"{path} is missing")
            for path in paths]
    for name in sorted(set.intersection(*map(set, runs))):
        values = [run[name] for run in runs]
        sd = np.std(values, ddof=len(values) > 1)
        print(f"{name:60s} {mean(values):9.3f} ± {sd:.3f} ", *(f"{x:.3f}" for x in values))

# --- The report: one file of HTML and SVG ---
STYLE = """:root{color-scheme:light dark}pre{overflow-x:auto}code{white-space:pre-wrap}
body{margin:auto;padding:1rem;max-width:56rem;font:16px/1.5 system-ui}del{color:#d55e00}
div{background:#8882;border-radius:.5rem;padding:.3rem .8rem;margin:.7rem 0}
p{margin:.3rem 0;overflow-wrap:anywhere}b{display:inline-block;min-width:10rem}
svg{max-width:40rem;font-size:12px;fill:none}text{fill:currentColor}path{stroke:currentColor}
polyline{stroke-width:3}ins{color:#0a84d0;font-weight:bold;text-decoration:none}"""
COLOURS = {"ppo_token": "#0072b2", "ppo_sequence": "#d55e00", "rlmec": "#009e73",
           "rlmec_imitation": "#cc79a7", "rejection": "#e69f00", "dpo": "#56b4e9",
           "dpo_edit": "#888888"}  # the policies of stage 3

def table(policies):
    """The numbers of eval.json that one compares, as text for the terminal and the report."""
    text = "policy          win rate   ± error    right  wrong steps  KL, nats  updates  seconds"
    for name, row in policies.items():
        win, error, right = (show(row[x]) for x in ("win_rate", "win_rate_se", "accuracy"))
        steps, kl = (show(row[x], ".2f") for x in ("wrong_steps_per_response", "kl_to_ref"))
        text += (f"\n{name:16}{win:>8}{error:>10}{right:>9}{steps:>13}{kl:>10}"
                 f"{row['updates']:9}{row['seconds']:9.0f}")
    return text

def heat_map(row):
    """A held-out response under every reward model, token by token, wrong tokens framed."""
    for kind in [kind for kind in ("token", "sequence", "generative") if row[kind] is not None]:
        rewards, least, text = row[kind], 0.5, ""
        if kind == "sequence":  # A7: all on the last token
            rewards = [0.0] * (len(row["tokens"]) - 1) + [rewards]
        if kind == "generative":  # B3 of a wrong response
            rewards, least = np.clip(rewards, -0.1, 0.0), 0.1
        limit = max(least, *map(abs, rewards))
        for t, (token, r) in enumerate(zip(row["tokens"], rewards)):
            style = f"background:rgb({'213 94 0' if r < 0 else '0 114 178'}/{abs(r) / limit:.2f})"
            style += ";outline:1.5px solid" * (t in row["wrong"])
            text += f'<span title={r:+.2f} style="{style}">{escape(token)}</span>'
        yield kind, text

def before_after(row):
    """A response of the SFT policy, and what every policy makes of it, word by word."""
    for name in [*row][2:]:  # behind id and prompt
        old, new = (re.findall(r"\s*(?:\w+|\S)", row[policy]) for policy in ("sft", name))
        text = ""
        for tag, a, b, c, d in SequenceMatcher(None, old, new, False).get_opcodes():
            before, after = escape("".join(old[a:b])), escape("".join(new[c:d]))
            text += after if tag == "equal" else f"<del>{before}</del><ins>{after}</ins>"
        yield name, text

def cards(rows, lines):
    """A card a row: its prompt, and the lines (name, HTML) that a function makes of the row."""
    text = ""
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        shown = "".join(f"<p><b>{name}</b><code>{line}</code>" for name, line in lines(row))
        text += f"<div><p><b>prompt</b><code>{escape(prompt)}</code>{shown}</div>"
    return text

def page(numbers, said, logs, held_out, rows):
    """The report; `numbers` and `said` are what the terminal shows."""
    legend = curves = ""
    for name, log in logs.items():
        points = " ".join(f"{400 * row['update'] / log[-1]['update']:.0f},"
                          f"{200 - 200 * row['accuracy']:.1f}" for row in log if "accuracy" in row)
        curves += f'<polyline stroke={COLOURS[name]} points="{points}"/>'
        legend += f"<b><span style=color:{COLOURS[name]}>■</span> {name}</b> "
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width"><title>Token-level reward</title>
<style>{STYLE}</style><h1>Token-level reward: who wins</h1><p>{"<p>".join(said)}
<pre>{numbers}</pre><h2>Learning curves</h2><p>{legend}</p>
<svg viewBox="-45 -10 480 235"><path d="M0 0v200h400"/><text x=-45 y=10>100 %</text>
<text x=-45 y=204>0 %</text><text x=330 y=218>last update</text>{curves}</svg>
<p>Right responses to validation prompts, over the updates of each run.
<h2>Held-out rewards</h2><p>Orange: punished, blue: praised, framed: wrong tokens.
{cards(held_out, heat_map)}
<h2>Before and after</h2><p>Against sft: <del>out</del> <ins>in</ins>.
{cards(rows, before_after)}"""

# --- The stage ---
def main(args):
    if args.runs or args.verdicts:
        return combine(args) if args.runs else verdicts(args)
    run = Path(args.run)
    logs = {name: [{k: float(v) for k, v in row.items() if v}
                   for row in csv.DictReader(open(path))]
            for name in COLOURS for path in run.glob(f"{name}.csv")}
    logs = logs or fail(f"{run}: no policy; 03_ppo.py makes them")
    args.max_new_tokens = (args.max_new_tokens or
                           json.load(open(run / "03_args.json"))["max_new_tokens"])
    result, rows = compare(run, logs, args)
    save(run / "04_args.json", [vars(args)])
    save(run / "eval.json", json.dumps(result, indent=1) + "\n")
    save(run / "responses.jsonl", rows)
    held_out = [*map(json.loads, open(run / "reward_examples.jsonl"))]
    held_out = held_out[::max(1, len(held_out) // 8)][:8]
    numbers = table(result["policies"])
    said = result["checks"] + [f"WARNING: {text}" for text in result["warnings"]]
    save(run / "report.html", page(numbers, said, logs, held_out, rows[::len(rows) // 8 or 1][:8]))
    print(numbers, *said, f"{run}/report.html", sep="\n")

if __name__ == "__main__":
    main(hf.HfArgumentParser(Args).parse_args_into_dataclasses()[0])

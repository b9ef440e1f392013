"""Stage 4: which policy is better, by how much, and how fast it got there.

Papers: A, Xu et al., "Aligning Large Language Models via Fine-grained Supervision" (ACL 2024, 2406.02756).
        B, Chen et al., "Improving Large Language Models via Fine-grained Reinforcement Learning with Minimum
        Editing Constraint" (RLMEC, ACL 2024, 2401.06081).
Paper A's three checks: (1) reward-model accuracy with and without minimal edits, (2) win rate of fine-grained
against ordinary PPO at the same data size, (3) convergence of both. Paper B's: (4) right and wrong steps of
RLMEC, what imitation alone reaches, (5) steadiness.

Simplified against the papers:
  1. The judge is the oracle of the built-in tasks (E1 on steps): fewer wrong steps wins, then the right
     answer, a tie counts one half. Paper A asks a simulated human (AlpacaFarm). Without an oracle the final
     answer decides; without answers a reward model of stage 2, and its own accuracy is printed beside it.
  2. The opponent is the SFT policy, answering the same prompts.

Reads:  RUN/policy/  RUN/ppo_*/  RUN/rlmec*/  RUN/*.csv  RUN/problems.jsonl  RUN/reward_metrics.json
Writes: RUN/eval.json  RUN/04_args.json

    python 04_eval.py                     about 5 seconds on two CPU cores (no GPU was at hand to measure)
"""

import csv
import json
import math
import re
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import List, Optional

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.utils import logging


@dataclass
class Args:
    run: str = field(default="runs/default", metadata={"help": "run folder"})
    seed: int = field(default=1, metadata={"help": "seed of the samples, the same for every policy"})
    overwrite: bool = field(default=False, metadata={"help": "evaluate again even if eval.json exists"})
    policy: Optional[str] = field(default=None, metadata={"help": "SFT policy, opponent; default RUN/policy"})
    policies: Optional[List[str]] = field(default=None, metadata={
        "help": "policies to evaluate; default RUN/ppo_token RUN/ppo_sequence RUN/rlmec*"})
    problems: Optional[str] = field(default=None, metadata={"help": "prompts; default RUN/problems.jsonl"})
    split: str = field(default="test", metadata={"help": "prompts", "choices": ["train", "val", "test"]})
    batch: int = field(default=500, metadata={"help": "responses sampled at once"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature"})
    max_new_tokens: int = field(default=48, metadata={"help": "longest response, in tokens"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={
        "help": "torch device"})


# --- Statistics --------------------------------------------------------------------------------------------

def win_rate(scores, baseline_scores):
    """Win rate of a policy over the baseline, prompt by prompt: 1 for the higher score, 1/2 for a tie.

    scores: anything comparable, the higher the better. Standard error: sample deviation (n - 1) over sqrt(n).
    """
    results = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(scores, baseline_scores, strict=True)]
    n = len(results)
    mean = sum(results) / n
    error = math.sqrt(sum((x - mean) ** 2 for x in results) / (n - 1) / n) if n > 1 else 0.0
    return {"win_rate": mean, "win_rate_se": error, "n": n,
            "win_rate_ci95": [mean - 1.96 * error, mean + 1.96 * error]}


def first_update_at(log, accuracy):
    """The first row of a CSV log whose measured validation accuracy reaches a level, or None."""
    return next((row for row in log if row.get("accuracy") is not None and row["accuracy"] >= accuracy), None)


def largest_drop(accuracy):
    """Steadiness: the best of a list of validation accuracies minus the lowest one after it."""
    if not accuracy:
        return None
    return max(accuracy) - min(accuracy[accuracy.index(max(accuracy)):])


def read_log(path):
    """Rows of a stage-3 CSV as numbers; empty cells are None, a policy without a log has no rows."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: float(value) if value else None for name, value in row.items()}
                for row in csv.DictReader(file)]


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


def final_answer(text):
    """The number behind the last `answer is` or `####` of a solution, else its last number; None without."""
    number = r"-?\$?\d[\d,]*(?:\.\d+)?"
    marked = re.findall(rf"(?i)(?:answer is:?|####)\s*({number})", text)
    found = (marked or re.findall(number, text))[-1:]
    return float(re.sub("[$,]", "", found[0])) if found else None


def right(response, problem):
    """Is a solution right? With an oracle (`solutions`): no step is wrong. Else its final answer counts: the
    same number as `answer`, or, where that is no number, a last step that is the answer, word for word."""
    if problem.get("solutions"):
        return judge(response, problem["solutions"])[0] == 0
    answer = final_answer(problem["answer"])
    if answer is None:
        return split_steps(response)[-1:] == split_steps(problem["answer"])[-1:]
    return final_answer(response) == answer


# --- Evaluation --------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(model, reference, prompts, tokenizer, args):
    """Sample one response to each prompt, with the same seed for every policy.

    Returns the responses as lists of ids and KL(policy, reference) in nats a response: the mean over prompts
    of the sum over response tokens of log pi - log pi_ref.
    """
    torch.manual_seed(args.seed)
    responses, kl = [], 0.0
    for start in range(0, len(prompts), args.batch):
        part = prompts[start:start + args.batch]
        responses += sample(model, part, tokenizer, args.max_new_tokens, args.temperature)
        inputs, mask = pack(part, responses[start:], tokenizer.pad_token_id, args.device)
        logprobs = [token_logprobs(response_logits(m, inputs, mask) / args.temperature, inputs, mask)
                    for m in (model, reference)]
        kl += (logprobs[0] - logprobs[1]).sum().item()
    return responses, kl / len(prompts)


def oracle_scores(texts, problems):
    """(- wrong steps, answer right?) of every response: tuples compare as the win rate needs it."""
    judged = [judge(text, problem["solutions"]) for text, problem in zip(texts, problems)]
    return [(-wrong_steps, answer_right) for wrong_steps, answer_right in judged]


@torch.no_grad()
def reward_scores(kind, model, prompts, responses, tokenizer, args):
    """Scores by a reward model of stage 2, where there is no oracle: R of A6, or the sum of A2."""
    scores = []
    for start in range(0, len(prompts), args.batch):
        inputs, mask = pack(prompts[start:start + args.batch], responses[start:start + args.batch],
                            tokenizer.pad_token_id, args.device)
        if kind == "sequence":
            scores += sequence_reward(model, inputs).tolist()
        else:
            scores += token_rewards(model, inputs, mask).sum(dim=1).tolist()
    return scores


def failure_signatures(reward_models, policies, logs):
    """The paper's three failure signatures, one plain sentence for each that is seen."""
    warnings = []
    for kind, metrics in reward_models.items():
        accuracy = metrics["pair_accuracy"]
        if accuracy is None:                                  # no edits: then the pairs of the data
            accuracy = metrics["preference_accuracy"]
        if accuracy < 0.70:
            warnings.append(f"reward accuracy under 70 %: reward_{kind} orders {percent(accuracy)} of the "
                            f"held-out pairs")
    token, sequence = policies.get("ppo_token"), policies.get("ppo_sequence")
    if token and sequence and token["win_rate"] <= sequence["win_rate"]:
        warnings.append("win rate not above the baseline: ppo_token is not ahead of ppo_sequence")
    for name, log in logs.items():
        accuracy = [row["accuracy"] for row in log if row.get("accuracy") is not None]
        if accuracy and accuracy[-1] < max(accuracy) - 0.10:
            drop = percent(max(accuracy) - accuracy[-1])
            warnings.append(f"unstable training: {name} ends {drop} below its best accuracy")
        if not log or "ended" not in log[-1]:                 # what follows stands in the logs of PPO only
            continue
        if max(row["approx_kl"] for row in log) > 0.1:
            warnings.append(f"unstable PPO: {name} moved over 0.1 nats a token in one update; lower --lr")
        if log[-1]["ended"] < 0.9:
            ended = percent(log[-1]["ended"])
            warnings.append(f"unstable PPO: only {ended} of the responses of {name} end by themselves")
    return warnings


def percent(x):
    """97.3 %, or a dash for what was not measured."""
    return "-" if x is None else f"{100 * x:.1f} %"


def checks(reward_models, policies, logs):
    """The papers' checks as sentences, from the numbers that eval.json holds."""
    return [*checks_a(reward_models, policies, logs), *checks_b(reward_models, policies)]


def checks_b(reward_models, policies):
    """Paper B: what RLMEC and its ablation reach, and how steady every method is."""
    sentences = []
    rlmec, imitation = policies.get("rlmec"), policies.get("rlmec_imitation")
    if rlmec and imitation and rlmec["accuracy"] is not None:
        sentences.append(
            f"4. RLMEC: {percent(rlmec['accuracy'])} right, imitation alone "
            f"{percent(imitation['accuracy'])}: the token reward adds "
            f"{100 * (rlmec['accuracy'] - imitation['accuracy']):+.1f} points. Both saw reference solutions "
            "of their problems, PPO did not.")
    drops = {name: row["largest_drop"] for name, row in policies.items() if row["largest_drop"] is not None}
    if drops:
        sentences.append("5. Steadiness, largest drop of validation accuracy after its best: "
                         + ", ".join(f"{name} {100 * drop:.1f}" for name, drop in drops.items()) + " points.")
    return sentences


def checks_a(reward_models, policies, logs):
    """Paper A's three checks."""
    sentences = []
    token_model, sequence_model = reward_models.get("token"), reward_models.get("sequence")
    if token_model and sequence_model:
        sentences.append(
            f"1. Reward accuracy: trained on minimal edits, the token model orders "
            f"{percent(token_model['pair_accuracy'])} of held-out (edited, original) pairs; trained on "
            f"ordinary pairs, the sequence model orders {percent(sequence_model['pair_accuracy'])} of them "
            f"and {percent(sequence_model['preference_accuracy'])} of (chosen, rejected).")
    token, sequence = policies.get("ppo_token"), policies.get("ppo_sequence")
    if not (token and sequence):
        return sentences
    sentences.append(
        f"2. Win rate: after {token['updates']} updates each, ppo_token wins {percent(token['win_rate'])} "
        f"against the SFT policy and ppo_sequence {percent(sequence['win_rate'])}: "
        f"{100 * (token['win_rate'] - sequence['win_rate']):+.1f} points.")
    if sequence["best_accuracy"] is None:
        sentences.append("3. Convergence: not measured, because without an oracle there is no common scale.")
    elif token["episodes_to_best_baseline"] is None:
        sentences.append(f"3. Convergence: ppo_token never reaches the best of ppo_sequence, "
                         f"{percent(sequence['best_accuracy'])} right.")
    else:
        row = first_update_at(logs["ppo_token"], sequence["best_accuracy"])
        sentences.append(
            f"3. Convergence: ppo_token reaches the best of ppo_sequence, "
            f"{percent(sequence['best_accuracy'])} right, at update {row['update']:.0f} of "
            f"{sequence['updates']} ({percent(row['update'] / sequence['updates'])}), after "
            f"{row['episodes']:.0f} episodes and {row['seconds']:.0f} s.")
    return sentences


def show_table(policies):
    """One line a policy, 79 columns."""
    print(f"\n{'policy':15s} {'win rate':>14s} {'right':>8s} {'wrong steps':>12s} {'KL':>6s} {'updates':>8s} "
          f"{'seconds':>8s}")
    for name, row in policies.items():
        wins = f"{percent(row['win_rate'])} ± {100 * row['win_rate_se']:.1f}"
        wrong = "-" if row["wrong_steps_per_response"] is None else f"{row['wrong_steps_per_response']:.2f}"
        print(f"{name:15s} {wins:>14s} {percent(row['accuracy']):>8s} {wrong:>12s} {row['kl_to_ref']:>6.2f} "
              f"{row['updates']:>8d} {row['seconds']:>8.0f}")
    print("KL: nats a response, to the SFT policy\n")


def open_judge(run, problems, reward_models, args):
    """(kind, model, what it is and is worth): the oracle where solutions are known, else a reward model."""
    if all(problem.get("solutions") for problem in problems):
        return "oracle", None, "the oracle: fewer wrong steps wins, then the right answer"
    if all(problem.get("answer") for problem in problems):
        return "answer", None, "the final answer: right wins"
    kind = "sequence" if "sequence" in reward_models else "token"
    if kind not in reward_models:
        fail(f"{run}: no oracle for these problems and no reward model: run 02_reward_model.py first")
    auto_class = AutoModelForSequenceClassification if kind == "sequence" else AutoModelForTokenClassification
    name = "preference_accuracy" if kind == "sequence" else "pair_accuracy"
    worth = (f"reward_{kind}, for want of an oracle. It orders {percent(reward_models[kind][name])} of "
             f"{reward_models[kind]['pairs']} held-out pairs as their annotator did (chance: 50 %), and "
             f"ppo_{kind} was trained on it: read these win rates as reward gained, not as quality")
    return kind, open_model(auto_class, run / f"reward_{kind}").to(args.device), worth


def main(args):
    run = Path(args.run)
    if (run / "eval.json").exists() and not args.overwrite:
        print(f"{run}/eval.json is there already; --overwrite makes it again")
        return
    problems_path = Path(args.problems or run / "problems.jsonl")
    if not problems_path.exists():
        fail(f"{problems_path} is missing: run 01_edit_data.py first, or name the file with --problems")
    problems = read_jsonl(problems_path, {"id": str, "prompt": (str, list), "split": str})
    problems = [problem for problem in problems if problem["split"] == args.split]
    if not problems:
        fail(f"{problems_path}: no problem has the split {args.split}")
    known = ["ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation", "rlmec_reward", "rlmec_uniform",
             "rlmec_noclip"]
    paths = [Path(path) for path in args.policies or [run / name for name in known]]
    paths = [path for path in paths if args.policies or path.exists()]
    if not paths:
        fail(f"{run} has no policy to evaluate: run 03_ppo.py first, or name folders with --policies")
    policy_path = Path(args.policy or run / "policy")
    reference = open_model(AutoModelForCausalLM, args.policy or policy_path).to(args.device)
    tokenizer = open_tokenizer(args.policy or policy_path)
    metrics_path = run / "reward_metrics.json"
    reward_models = read_metrics(metrics_path)
    kind, judge_model, judge_text = open_judge(run, problems, reward_models, args)
    encode_problems(problems_path, problems, tokenizer, reference.config.max_position_embeddings,
                    args.max_new_tokens)
    start_stage(args, "04")

    # responses and scores of every policy, the SFT policy first
    prompts = [problem["prompt_ids"] for problem in problems]
    scores, policies, logs = {}, {}, {}
    for path in tqdm([policy_path, *paths], desc="policies", unit="policy"):
        model = reference if path == policy_path else open_model(AutoModelForCausalLM, path).to(args.device)
        if model.config.vocab_size != reference.config.vocab_size:
            fail(f"{path} and {policy_path} differ in vocabulary: policies of one run share the tokenizer")
        responses, kl = answer(model, reference, prompts, tokenizer, args)
        name = "sft" if path == policy_path else path.name
        if name in policies:
            fail(f"{path}: two policies are called {name}; rename one folder")
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        rights = list(map(right, texts, problems)) if kind in ("oracle", "answer") else None
        if kind == "oracle":
            scores[name] = oracle_scores(texts, problems)
        else:
            scores[name] = rights or reward_scores(kind, judge_model, prompts, responses, tokenizer, args)
        wrong = [-score[0] for score in scores[name]] if kind == "oracle" else None
        logs[name] = read_log(path.parent / f"{path.name}.csv")
        accuracy = [row["accuracy"] for row in logs[name] if row.get("accuracy") is not None]
        policies[name] = {
            **win_rate(scores[name], scores["sft"]),
            "accuracy": sum(rights) / len(rights) if rights else None,
            "wrong_steps_per_response": sum(wrong) / len(wrong) if wrong else None,
            "kl_to_ref": kl,
            "updates": int(logs[name][-1]["update"]) if logs[name] else 0,
            "seconds": logs[name][-1]["seconds"] if logs[name] else 0.0,
            "best_accuracy": max(accuracy, default=None),
            "largest_drop": largest_drop(accuracy)}
    best_baseline = policies.get("ppo_sequence", {}).get("best_accuracy")
    for name in policies:
        row = first_update_at(logs[name], best_baseline) if best_baseline is not None else None
        policies[name]["episodes_to_best_baseline"] = row and int(row["episodes"])

    warnings = failure_signatures(reward_models, policies, logs)
    sentences = checks(reward_models, policies, logs)
    models = {kind: {name: value for name, value in row.items() if name not in ("pairs", "scale", "seconds")}
              for kind, row in reward_models.items()}
    part = run / "eval.json.part"
    result = {"judge": judge_text, "baseline": str(policy_path), "policies": policies,
              "reward_models": models, "checks": sentences, "warnings": warnings}
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(run / "eval.json")
    show_table(policies)
    for sentence in [f"Judge: {judge_text}.", *sentences, *(f"WARNING: {warning}" for warning in warnings)]:
        print(textwrap.fill(sentence, 79, subsequent_indent="   "))
    print(f"\n{run}/eval.json")


if __name__ == "__main__":
    main(HfArgumentParser(Args).parse_args_into_dataclasses()[0])

"""Stage 4: which policy is better, by how much, how sure that is, and where the reward models err.

Papers: A, Xu et al., "Aligning Large Language Models via Fine-grained Supervision" (ACL 2024, 2406.02756).
        B, Chen et al., "Improving Large Language Models via Fine-grained Reinforcement Learning with Minimum
        Editing Constraint" (RLMEC, ACL 2024, 2401.06081).
Paper A's three checks: (1) reward-model accuracy with and without minimal edits, (2) win rate of fine-grained
against ordinary PPO at the same data size, (3) convergence of both. Paper B's: (4) right and wrong steps of
RLMEC, what imitation alone reaches, (5) steadiness. Win rates are counted as AlpacaEval counts them.

Simplified against the papers:
  1. The judge is the oracle of the built-in tasks (E1 on steps): fewer wrong steps wins, then the right
     answer, a tie counts one half. Paper A asks a simulated human (AlpacaFarm). Without an oracle the final
     answer decides; without answers a reward model of stage 2, and its own accuracy is printed beside it.
     --human_eval asks people, --judge llm an LLM on a server, in both orders of a pair.
  2. The opponent is the SFT policy, answering the same prompts, unless --baseline names another.

Reads:  RUN/policy/  RUN/ppo_*/  RUN/rlmec*/  RUN/*.csv  RUN/problems.jsonl  RUN/reward_*/  RUN/edits.jsonl
Writes: RUN/eval.json  RUN/report.html  RUN/04_args.json; with --runs RUN/combined.json  RUN/combined.html;
        with --judge llm RUN/llm_verdicts.jsonl  RUN/verdicts_*.json

    python 04_eval.py                                          about 15 seconds on two CPU cores
    python 04_eval.py --runs runs/math1 runs/math2 runs/math3 --run runs/math          several seeds together
    ... --judge llm --llm_url http://localhost:8000/v1 --llm_model NAME         the key in LLM_API_KEY
    python 04_eval.py --verdicts verdicts.json                 the win rate of a saved list of verdicts
    python 04_eval.py --human_eval 50 --policies runs/default/ppo_token           a blind sheet for people
"""

import csv
import hashlib
import html
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import textwrap
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import combinations, groupby
from pathlib import Path
from threading import Event, Lock
from typing import List, Optional
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import InferenceClient, is_offline_mode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.utils import logging


@dataclass
class Args:
    run: str = field(default="runs/default", metadata={"help": "run folder; with --runs where to write"})
    runs: Optional[List[str]] = field(default=None, metadata={
        "help": "evaluated runs of several seeds: only combine them, into RUN/combined.html"})
    seed: int = field(default=1, metadata={"help": "seed of the samples, the same for every policy"})
    overwrite: bool = field(default=False, metadata={"help": "make again what is already there"})
    policy: Optional[str] = field(default=None, metadata={"help": "SFT policy, opponent; default RUN/policy"})
    policies: Optional[List[str]] = field(default=None, metadata={
        "help": "policies to evaluate; default RUN/ppo_token RUN/ppo_sequence RUN/rlmec*"})
    baseline: Optional[str] = field(default=None, metadata={
        "help": "another opponent: a policy folder, or a JSONL of reference responses (prompt, response)"})
    problems: Optional[str] = field(default=None, metadata={"help": "prompts; default RUN/problems.jsonl"})
    judge: Optional[str] = field(default=None, metadata={
        "help": "llm: an LLM on a server compares every pair in both orders; default: oracle, final answer "
                "or reward model, the first that is there"})
    llm_url: Optional[str] = field(default=None, metadata={
        "help": "OpenAI-compatible server; the key comes from LLM_API_KEY (else HF_TOKEN for huggingface.co, "
                "OPENAI_API_KEY for openai.com), and is never saved"})
    llm_model: Optional[str] = field(default=None, metadata={"help": "the server's name of the judge"})
    llm_workers: int = field(default=8, metadata={"help": "requests at once"})
    llm_prompt: Optional[str] = field(default=None, metadata={
        "help": "file with a prompt of your own: {a}, {b} (the responses) and, where wanted, {prompt}"})
    llm_temperature: float = field(default=0.0, metadata={"help": "temperature of the verdicts; 0 is greedy"})
    llm_max_tokens: int = field(default=1024, metadata={"help": "longest answer of the judge, in tokens"})
    llm_timeout: float = field(default=120.0, metadata={"help": "seconds to wait for one answer"})
    split: str = field(default="test", metadata={"help": "prompts", "choices": ["train", "val", "test"]})
    batch: int = field(default=500, metadata={"help": "responses sampled at once"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature"})
    max_new_tokens: int = field(default=48, metadata={"help": "longest response, in tokens"})
    threshold: float = field(default=0.5, metadata={
        "help": "share of right responses at which episodes_to_threshold is read"})
    examples: int = field(default=8, metadata={"help": "responses shown in each part of report.html"})
    verdicts: Optional[str] = field(default=None, metadata={
        "help": "only print win rate and standard error (%%) of a JSON list of verdicts, as AlpacaEval has "
                "them: instruction, output_1, output_2, preference"})
    human_eval: int = field(default=0, metadata={
        "help": "only write RUN/human_eval.csv: so many prompts, first policy against opponent, blind"})
    human_verdicts: Optional[str] = field(default=None, metadata={
        "help": "only read that sheet back, its column preference filled in; the key lies beside it"})
    dtype: str = field(default="float32", metadata={
        "help": "of the weights; log-probs, losses and optimiser steps are float32 in any case",
        "choices": ["float32", "bfloat16"]})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={
        "help": "torch device"})


# --- Statistics --------------------------------------------------------------------------------------------

def bootstrap(values, seed, draws=10_000):
    """95 % interval of the mean of values: percentiles of the means of `draws` resamples of the prompts.
    Resampling n prompts is one multinomial draw over the distinct values, so any n costs the same."""
    distinct, counts = np.unique(values, return_counts=True)
    n = counts.sum()
    means = np.random.default_rng(seed).multinomial(n, counts / n, draws) @ distinct / n
    return np.percentile(means, [2.5, 97.5]).tolist()


def usable(preference):
    """A verdict as AlpacaEval reads it: 1 baseline, 2 model, between them how sure the judge is, 0 an old
    sign for a tie. None for null, NaN and everything else."""
    if isinstance(preference, bool) or not isinstance(preference, (int, float)):
        return None
    return 1.5 if preference == 0 else preference if 1 <= preference <= 2 else None


def win_rate(preferences, seed=1, interval=True):
    """Win rate as AlpacaEval counts it: the mean of preference - 1 over the n usable verdicts; standard
    error: sample deviation (n - 1) over sqrt(n); 95 % interval: bootstrap over prompts."""
    results = np.array([x - 1 for x in map(usable, preferences) if x is not None])
    n = len(results)
    error = float(results.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return {"win_rate": float(results.mean()), "win_rate_se": error, "n": n,
            "left_out": len(preferences) - n,
            **({"win_rate_ci95": bootstrap(results, seed)} if interval else {})}


def preferences_of(scores, baseline_scores, texts, baseline_texts):
    """Verdicts prompt by prompt: 2 for the higher score, 1 for the lower, 1.5 for a tie. Scores are anything
    comparable; equal responses tie, whatever the judge says."""
    return [1.5 if a == b or text == baseline else 2 if a > b else 1
            for a, b, text, baseline in zip(scores, baseline_scores, texts, baseline_texts, strict=True)]


def difference(a, b, seed):
    """Win rate of one policy minus that of another, paired, on the n prompts where both have a verdict (1
    won, 0 lost, 0.5 a tie, None left out)."""
    gaps = np.array([x - y for x, y in zip(a, b, strict=True) if None not in (x, y)], float)
    if not len(gaps):
        fail("two policies have no prompt with a usable verdict on both, so they cannot be compared")
    interval = bootstrap(gaps, seed)
    return {"difference": float(gaps.mean()), "ci95": interval, "seen": not interval[0] <= 0 <= interval[1],
            "n": len(gaps), "left_out": len(a) - len(gaps)}


def paired_t_test(gaps):
    """Two-sided p of the paired t-test over seeds; gaps: one difference a seed; None for a single seed.
    With t = sqrt(nu) tan(angle), nu = n - 1, the tail is an integral of cos(angle)^(nu - 1)."""
    n = len(gaps)
    if n < 2:
        return None
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(n)
    if error < 1e-12:                                         # the same difference on every seed
        return 0.0 if abs(mean) > 1e-12 else 1.0
    power = lambda low: np.cos(np.linspace(low, math.pi / 2, 20_001)) ** (n - 2) * (math.pi / 2 - low)
    tail = lambda low: (power(low)[1:].mean() + power(low)[:-1].mean()) / 2
    return float(tail(math.atan(abs(mean) / error / math.sqrt(n - 1))) / tail(0.0))


def first_update_at(log, accuracy):
    """The first row of a CSV log whose measured validation accuracy reaches a level, or None."""
    return next((row for row in log if row.get("accuracy") is not None and row["accuracy"] >= accuracy), None)


def accuracy_area(log, start, horizon):
    """Area under the accuracy-against-episodes curve from 0 to horizon, over horizon: the mean accuracy on
    the way. Straight lines between measurements, from the accuracy of the SFT policy; the last one holds."""
    points = [(row["episodes"], row["accuracy"]) for row in log if row.get("accuracy") is not None]
    if not points:
        return None
    points = [(0, points[0][1] if start is None else start), *points, (horizon, points[-1][1])]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:])) / horizon


def largest_drop(accuracy):
    """Steadiness: the best of a list of validation accuracies minus the lowest one after it."""
    if not accuracy:
        return None
    return max(accuracy) - min(accuracy[accuracy.index(max(accuracy)):])


# --- Files -------------------------------------------------------------------------------------------------

def read_log(path):
    """Rows of a stage-3 CSV as numbers; empty cells are None, a policy without a log has no rows."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: float(value) if value else None for name, value in row.items()}
                    for row in csv.DictReader(file)]
        numbers = [row[name] for row in rows for name in ("update", "episodes", "seconds")]
        numbers += [value for row in rows for value in row.values() if value is not None]
        if not rows or not all(map(math.isfinite, numbers)):
            raise ValueError("no rows, or a cell that is no number")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        fail(f"{path}: not a log that 03_ppo.py writes ({type(error).__name__}: {error})")
    return rows


def read_json(path, what):
    """A JSON file, or a readable error that says what it should be."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        fail(f"{path}: not {what} ({error})")


def write_text(path, text):
    """A file is whole or absent."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)


def read_verdicts(path):
    """Preferences of a JSON list of verdicts; two equal outputs tie without a judge."""
    rows = read_json(path, "a JSON list of verdicts")
    if not isinstance(rows, list) or not rows:
        fail(f"{path}: not a JSON list of verdicts")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "preference" not in row:
            fail(f"{path}, verdict {number}: column `preference` is missing")
    return [1.5 if "output_1" in row and row["output_1"] == row.get("output_2") else row["preference"]
            for row in rows]


def show_verdicts(path, preferences):
    """Win rate and standard error in per cent, on lines that a program can read."""
    if not any(usable(preference) is not None for preference in preferences):
        fail(f"{path}: no usable verdict; column `preference` holds 1, 2 or 1.5 (a tie)")
    result = win_rate(preferences, interval=False)
    print(f"win_rate {100 * result['win_rate']:.3f}\nstandard_error {100 * result['win_rate_se']:.3f}")
    print(f"n {result['n']}\nleft_out {result['left_out']}")


def guarded(text):
    """A cell that no spreadsheet takes for a formula."""
    return "'" + text if text.lstrip()[:1] in tuple("=+-@\t") else text


def write_sheet(path, rows, names, seed):
    """A blind A/B sheet and its key. rows: (prompt, output of the model, output of the opponent)."""
    swapped = [random.Random(f"{seed} {k}").random() < 0.5 for k in range(len(rows))]
    cells = [[guarded(text) for text in ((x, b, a) if swap else (x, a, b))]
             for (x, a, b), swap in zip(rows, swapped)]
    key = {"model": names[0], "baseline": names[1], "model_is": ["b" if swap else "a" for swap in swapped],
           "cells": cells}
    with open(path, "w", newline="", encoding="utf-8-sig") as file:      # the mark that spreadsheets look for
        writer = csv.writer(file)
        writer.writerow(["instruction", "output_a", "output_b", "preference"])
        writer.writerows([*row, "1.5" if row[1] == row[2] else ""] for row in cells)
    write_text(path.with_name(f"{path.stem}_key.json"), json.dumps(key, indent=1) + "\n")


def read_sheet(path):
    """Preferences of a filled-in sheet, 1 the opponent and 2 the model; an empty cell is left out."""
    path = Path(path)
    key_path = path.with_name(f"{path.stem}_key.json")
    key = read_json(key_path, "the key that --human_eval writes beside its sheet")
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.split("\n")[0].count)          # some spreadsheets save with ;
        lines = (line + "\n" for line in text.split("\n"))              # splitlines parts at U+2028 too
        rows = list(csv.DictReader(lines, delimiter=delimiter))
        rows = [row for row in rows if any(row.values())]
        cells, sides = key["cells"], key["model_is"]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        fail(f"{path}: not the sheet that --human_eval wrote ({type(error).__name__}: {error})")
    if len(rows) != len(cells):
        fail(f"{path}: has {len(rows)} rows, its key {key_path.name} has {len(cells)}")
    preferences = []
    for number, (row, cell, side) in enumerate(zip(rows, cells, sides), 2):
        for name, text in zip(["instruction", "output_a", "output_b"], cell):
            if "".join((row.get(name) or "").split()) != "".join(text.split()):
                fail(f"{path}, row {number}: column `{name}` was changed, moved or is missing")
        verdict = (row.get("preference") or "").strip().replace(",", ".")
        if verdict not in ("", "0", "1", "1.5", "2", "1.0", "2.0"):
            fail(f"{path}, row {number}: preference {verdict!r} is none of 1 (output_a), 2 (output_b), 1.5")
        preference = usable(float(verdict)) if verdict else None
        preferences.append(3 - preference if preference and side == "a" else preference)
    return preferences


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


def token_texts(ids, tokenizer):
    """The text that each token adds to the ones before it, spaces included."""
    texts = [tokenizer.decode(ids[:k]).rstrip("\ufffd") for k in range(len(ids))]       # half a character
    texts.append(tokenizer.decode(ids))
    return [longer[len(shorter):] for shorter, longer in zip(texts, texts[1:])]


WAITS = [1, 2, 4, 8, 16, 32]            # seconds before each new try of a request that failed


def check_llm(args, flag):
    """Refuse settings of a server that cannot work, before anything is done."""
    if not (args.llm_model and re.match("https?://.", args.llm_url or "")):
        fail(f"{flag} needs --llm_url, which begins with http:// or https://, and --llm_model")
    if not args.llm_timeout:
        fail("--llm_timeout must be above 0")
    if is_offline_mode():
        fail(f"{flag}: HF_HUB_OFFLINE stops every request of the client: unset it")
    api_key(args.llm_url)


def read_template(path, template, places):
    """The prompt for an LLM: of the file --llm_prompt, or the built-in one where path is None."""
    if not path:
        return template
    try:
        template = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error})")
    for place in places:
        if f"{{{place}}}" not in template:
            fail(f"{path}: has no {{{place}}}, which the LLM must see")
    return template


def fill(template, prompt, **parts):
    """A prompt for an LLM: texts in the places {name} of a template, all messages of a chat in {prompt}."""
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message.get('role', 'user')}: {message['content']}" for message in prompt)
    parts["prompt"] = prompt
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), template)


def api_key(url):
    """The key of a server, from the environment alone; a key never goes to another company's server."""
    host = f".{urlparse(url).hostname or ''}"
    names = ["LLM_API_KEY"]
    names += ["HF_TOKEN"] if host.endswith(".huggingface.co") else []
    names += ["OPENAI_API_KEY"] if host.endswith(".openai.com") else []
    key = next((os.environ[name].strip() for name in names if os.environ.get(name, "").strip()), "none")
    if not re.fullmatch("[!-~]+", key):
        fail("the key in the environment has characters that no key has")
    return key


def retry_after(response):
    """Seconds that a server asks to wait, as a number or a date; 0 where it does not say."""
    value = response.headers.get("Retry-After", "") if response is not None else ""
    try:
        return float(value) if re.fullmatch(r"[\d.]+", value) else (
            parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
    except (TypeError, ValueError):
        return 0.0


class LlmClient:
    """An LLM behind an OpenAI-compatible server. Every answer is appended to the file `path` as it comes,
    under a hash of its request, and looked up there first: no answer is paid twice. what: says the bar."""

    def __init__(self, args, path, what):
        self.args, self.name, self.path, self.what = args, args.llm_model, Path(path), what
        # without a key of its own, the client would send the machine's Hugging Face token to any server
        self.client = InferenceClient(base_url=args.llm_url, api_key=api_key(args.llm_url),
                                      timeout=args.llm_timeout)
        self.saved, self.tokens = {}, Counter()
        self.lock, self.stop = Lock(), Event()
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        for line in filter(None, lines):
            try:
                row = json.loads(line)
                self.saved[row["key"]] = row["answer"], row["fault"]
            except (ValueError, KeyError, TypeError):
                print(f"{self.path}: a line is not whole; its answer is asked for again")
        if lines[-1]:                               # killed while it wrote a line
            self.path.write_bytes(b"\n".join(lines) + b"\n")

    def ask_all(self, conversations):
        """(answer, fault) of every conversation, those on disk from there."""
        settings = [self.name, self.args.llm_temperature, self.args.llm_max_tokens]
        requests = [json.dumps([*settings, messages]) for messages in conversations]
        keys = [hashlib.sha256(request.encode()).hexdigest() for request in requests]
        missing = {key: messages for key, messages in zip(keys, conversations) if key not in self.saved}
        with ThreadPoolExecutor(self.args.llm_workers) as pool:
            futures = [pool.submit(self.ask, key, messages) for key, messages in missing.items()]
            try:
                bar = tqdm(as_completed(futures), total=len(futures), desc=self.what, disable=not futures)
                for future in bar:
                    future.result()
            except (OSError, KeyboardInterrupt) as error:
                self.stop.set()
                if isinstance(error, KeyboardInterrupt):
                    tqdm.write("interrupted: waiting for the answers under way", file=sys.stderr)
                pool.shutdown(cancel_futures=True)  # they are paid for
                fail(f"{str(error) or 'interrupted'}; {len(self.saved)} answers are kept in {self.path}, and "
                     "the same command goes on from there")
        return [self.saved[key] for key in keys]

    def ask(self, key, messages):
        """One answer to `saved` and to disk; tries again where that can help, else stops all requests."""
        args = self.args
        for wait in [*WAITS, None]:
            if self.stop.is_set():
                return
            try:
                answer = self.client.chat_completion(
                    messages, model=args.llm_model, max_tokens=args.llm_max_tokens,
                    temperature=args.llm_temperature)
                choice, usage = answer.choices[0], answer.usage
                text = (choice.message.content or "").strip()
                row = {"answer": text.encode("utf-8", "ignore").decode(), "fault": None}  # no half surrogates
                used = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
                break
            except Exception as error:              # the client and its transport raise many kinds
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                malformed = status is None and isinstance(
                    error, (ValueError, LookupError, TypeError, AttributeError))
                problem = f"answers {status}" if status else f"does not answer ({type(error).__name__})"
            if status in (400, 413, 422):           # this request, not the server
                self.saved[key] = "", f"the server refuses the request ({status})"
                return
            if wait is None and malformed:
                self.saved[key] = "", "the answer is not in the format of OpenAI"
                return
            passes = status is None or status in (408, 409, 425, 429) or status >= 500
            if wait is None or not passes:
                self.stop.set()
                advice = "" if passes else f": check the key (LLM_API_KEY) and the model {args.llm_model}"
                raise ConnectionError(f"{args.llm_url} {problem}{advice}")
            self.stop.wait(min(max(wait, retry_after(response)), 3600))
        if choice.finish_reason == "content_filter" or getattr(choice.message, "refusal", None):
            row["fault"] = "it refuses"
        elif choice.finish_reason == "length":
            row["fault"] = "the answer is cut off (--llm_max_tokens)"
        row.update(prompt_tokens=used[0] or 0, answer_tokens=used[1] or 0)
        with self.lock:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "model": self.name, **row}) + "\n")
            self.saved[key] = row["answer"], row["fault"]
            self.tokens += Counter(prompt=row["prompt_tokens"], answer=row["answer_tokens"])


# --- An LLM as the judge -----------------------------------------------------------------------------------

JUDGE_PROMPT = """\
Below are two responses, A and B, to the same prompt. Which of them is better? Answer with A or B alone, or \
with tie if neither is better.

Prompt:
{prompt}

Response A:
{a}

Response B:
{b}"""
LEAD = ("the my final better best preferred answer verdict judgement judgment choice winner preference "
        "response option output assistant is i prefer choose pick it it's").replace(" ", "|")
VERDICT = re.compile(
    rf"(?i:(?:(?:{LEAD})\b[ :]*)*)((?i:(?:a )?(?:tie|draw))|[AB])"
    r"(?i: (?:is|was)(?: clearly| slightly| much)?(?: the)? (?:better|best|winner)(?: one| response)?)?"
    r"(?:[.!]*|(?i:,? (?:because|since|as|than) .*)|[.,:;!] (?!.*\b[AB]\b).*)")


def parse_verdict(answer):
    """A, B, tie or None of a judge's answer. The first line or the last has to say it, plainly and without
    the other one contradicting; markup around it, and a reason behind it, do no harm."""
    text = re.sub(r"[*_`#\"“”()\[\]{}<>]+", " ", answer.split("</think>")[-1].replace("’", "'"))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    lines = [line.strip("' ") for line in lines]
    said = set()
    for line in lines[:1] + lines[-1:]:
        found = VERDICT.fullmatch(line.upper() if len(line) == 1 else line)
        if found:
            said.add(found[1] if found[1] in "AB" else "tie")
    return said.pop() if len(said) == 1 else None


def llm_verdicts(client, template, problems, texts, opponents):
    """Verdicts of the LLM prompt by prompt: 2 for the policy, 1 for the opponent, 1.5 for a tie, None for
    what is left out. Each pair is shown in both orders and the two verdicts have to agree, or the pair is a
    tie; equal responses tie unasked. Also counts: pairs asked, pairs judged (in both orders), disagreements,
    verdicts for the `first` and the `second` shown, pairs with a verdict in one order or in none."""
    asked = [k for k, (text, other) in enumerate(zip(texts, opponents, strict=True)) if text != other]
    requests = []
    for k in asked:
        for a, b in ((opponents[k], texts[k]), (texts[k], opponents[k])):
            content = fill(template, problems[k]["prompt"], a=a, b=b)
            requests.append([{"role": "user", "content": content}])
    answers = client.ask_all(requests)
    said = [None if fault else parse_verdict(answer) for answer, fault in answers]
    verdicts = [1.5] * len(texts)
    counts = Counter(asked=len(asked), first=said.count("A"), second=said.count("B"))
    counts.update(f"fault: {fault}" for _, fault in answers if fault)
    for k, first, second in zip(asked, said[::2], said[1::2]):
        pair = {"A": 1, "B": 2, "tie": 1.5}.get(first), {"A": 2, "B": 1, "tie": 1.5}.get(second)
        if None in pair:
            verdicts[k] = None
            counts["none" if pair == (None, None) else "one"] += 1
            continue
        verdicts[k] = pair[0] if pair[0] == pair[1] else 1.5
        counts.update(judged=1, disagreed=pair[0] != pair[1])
    return verdicts, counts


def faults_in(counts):
    """Why answers of the judge could not be read at all, commonest first, in brackets."""
    faults = [f"{n} times: {key[7:]}" for key, n in counts.most_common() if key.startswith("fault: ")]
    return f" ({', '.join(faults)})" if faults else ""


def ask_judge(client, template, problems, answers, opponent, known, run):
    """Verdicts of the LLM on every policy against the opponent, saved as RUN/verdicts_*.json. Returns by
    policy the verdicts and the counts of llm_verdicts, and a list: do they agree with the known verdicts?"""
    verdicts, counts, agreed = {}, {}, []
    others = answers[opponent].texts
    for name, given in answers.items():
        texts = given.texts
        verdicts[name], counts[name] = llm_verdicts(client, template, problems, texts, others)
        agreed += [x == y for x, y, text, other in zip(verdicts[name], known.get(name, []), texts, others)
                   if x is not None and text != other]
        columns = ("instruction", "output_1", "output_2", "preference")
        rows = [dict(zip(columns, (plain(problem["prompt"]), other, text, x)))
                for problem, other, text, x in zip(problems, others, texts, verdicts[name])]
        write_text(run / f"verdicts_{name}.json", json.dumps(rows, indent=1) + "\n")
        if counts[name]["asked"] == len(others) and not counts[name]["judged"]:
            fail(f"{client.path}: no pair of {name} has verdicts in both orders{faults_in(counts[name])}; "
                 "see --llm_prompt, --llm_max_tokens")
    total = sum(counts.values(), Counter())
    if total["asked"] and not total["judged"]:
        fail(f"{client.path}: no pair has verdicts in both orders{faults_in(total)}; see --llm_prompt, "
             "--llm_max_tokens")
    return verdicts, counts, agreed


def share(part, whole):
    """part of whole, from 0 to 1; None of nothing."""
    return part / whole if whole else None


def judge_report(client, counts, agreed, kind):
    """The numbers of eval.json on an LLM judge, and the sentences that say them. counts: of llm_verdicts, by
    policy; agreed: whether each verdict is that of what is known, the oracle or the final answer (kind)."""
    counts, tokens = sum(counts.values(), Counter()), client.tokens
    print(f"verdicts by {client.name}: {tokens['prompt']} prompt tokens and {tokens['answer']} answer tokens "
          "used")
    numbers = {"model": client.name,
               **{key: counts[key] for key in ("asked", "judged", "disagreed", "one", "none")},
               "position_bias": share(counts["disagreed"], counts["judged"]),
               "first_shown": share(counts["first"], counts["first"] + counts["second"]),
               "agreement": share(sum(agreed), len(agreed)), "tokens": tokens}
    text = (f"the LLM {client.name}, asked in both orders. Position bias: "
            f"{percent(numbers['position_bias'])} of {counts['judged']} pairs hang on the order and count as "
            f"ties; the response shown first was preferred in {percent(numbers['first_shown'])} of the "
            "verdicts")
    if counts["one"] or counts["none"]:
        text += (f". Left out: {counts['one']} pairs with a verdict in one order only, {counts['none']} in "
                 f"none{faults_in(counts)}")
    if kind:
        known = {"oracle": "the oracle", "answer": "the final answer"}[kind]
        text += f". It agrees with {known} on {percent(numbers['agreement'])} of {len(agreed)} pairs"
    return {"llm_judge": numbers}, text


# --- Evaluation --------------------------------------------------------------------------------------------

@dataclass
class Answers:
    """What a policy answers to the prompts: token ids and text of each response, KL(policy, reference) in
    nats a response, and the mean log pi_ref of a response token (None for responses of a file)."""
    ids: list
    texts: list
    kl: Optional[float] = None
    ref_logprob: Optional[float] = None


@torch.no_grad()
def answer(model, reference, prompts, tokenizer, args):
    """Sample one response to each prompt, with the same seed for every policy. KL: the mean over prompts of
    the sum over response tokens of log pi - log pi_ref."""
    torch.manual_seed(args.seed)
    responses, kl, ref_logprob, tokens = [], 0.0, 0.0, 0
    for start in range(0, len(prompts), args.batch):
        part = prompts[start:start + args.batch]
        responses += sample(model, part, tokenizer, args.max_new_tokens, args.temperature)
        inputs, mask = pack(part, responses[start:], tokenizer.pad_token_id, args.device)
        logprobs = [token_logprobs(response_logits(m, inputs, mask) / (args.temperature or 1.0), inputs, mask)
                    for m in (model, reference)]
        kl += (logprobs[0] - logprobs[1]).sum().item()
        ref_logprob += logprobs[1].sum().item()
        tokens += mask.sum().item()
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Answers(responses, texts, kl / len(prompts), ref_logprob / tokens)


def oracle_scores(texts, problems):
    """(- wrong steps, answer right?) of every response: tuples compare as the win rate needs it."""
    judged = [judge(text, problem) for text, problem in zip(texts, problems)]
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


def judged_scores(kind, judge_model, answers, problems, tokenizer, args):
    """What a judge compares, one score a response; None where the LLM alone can judge."""
    if kind == "oracle":
        return oracle_scores(answers.texts, problems)
    if kind == "answer":
        return list(map(right, answers.texts, problems))
    if kind:
        prompts = [problem["prompt_ids"] for problem in problems]
        return reward_scores(kind, judge_model, prompts, answers.ids, tokenizer, args)
    return None


def measure(answers, kind, scores, problems, log):
    """The numbers of one policy that need no opponent, as they stand in eval.json."""
    texts = answers.texts
    rights = list(map(right, texts, problems)) if kind in ("oracle", "answer") else None
    wrong = [-score[0] for score in scores] if kind == "oracle" else None
    words = sum(len(text.split()) for text in texts)
    accuracy = [row["accuracy"] for row in log if row.get("accuracy") is not None]
    return {"accuracy": sum(rights) / len(rights) if rights else None,
            "wrong_steps_per_response": sum(wrong) / len(wrong) if wrong else None,
            "errors_per_100_words": 100 * sum(wrong) / max(words, 1) if wrong else None,
            "kl_to_ref": answers.kl,
            "ref_logprob": answers.ref_logprob,
            "updates": int(log[-1]["update"]) if log else 0,
            "seconds": log[-1]["seconds"] if log else 0.0,
            "best_accuracy": max(accuracy, default=None),
            "largest_drop": largest_drop(accuracy)}


def convergence_of(policies, logs, threshold):
    """How fast each policy got where: area under its curve over the longest run, and the episodes until it is
    as good as ordinary PPO ever was, and until the threshold; None where it never is."""
    best = policies.get("ppo_sequence", {}).get("best_accuracy")
    horizon = max((log[-1]["episodes"] for log in logs.values() if log), default=1)
    found = {}
    for name in policies:
        log = logs.get(name, [])
        reached = [first_update_at(log, level) if level is not None else None for level in (best, threshold)]
        episodes = [int(row["episodes"]) if row else None for row in reached]
        found[name] = {"accuracy_area": accuracy_area(log, policies["sft"]["accuracy"], horizon),
                       "episodes_to_best_baseline": episodes[0], "episodes_to_threshold": episodes[1]}
    return found


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
        before, ended = log[0]["ended"], log[-1]["ended"]     # the first rollout is the SFT policy's
        if before < 0.9:
            warnings.append(f"--max_new_tokens is short: {percent(ended)} of the responses of {name} end "
                            f"within it, {percent(before)} before training")
        elif ended < 0.9:
            warnings.append(f"unstable PPO: only {percent(ended)} of the responses of {name} end by "
                            f"themselves, {percent(before)} before training")
    return warnings


def percent(x):
    """97.3 %, or a dash for what was not measured."""
    return "-" if x is None else f"{100 * x:.1f} %"


def points(x):
    """+3.1, in percentage points."""
    return f"{100 * x:+.1f}"


def both_ways(differences):
    """(a, b) -> their paired difference, and (b, a) -> the same seen from b."""
    gaps = {}
    for row in differences:
        turned = {**row, "difference": -row["difference"]}
        if "ci95" in row:
            turned["ci95"] = [-x for x in row["ci95"][::-1]]
        gaps[row["a"], row["b"]], gaps[row["b"], row["a"]] = row, turned
    return gaps


def verdict_on(row):
    """A paired difference in words, never more sure than its interval (or, over seeds, its test)."""
    how = (f"95 % interval {points(row['ci95'][0])} to {points(row['ci95'][1])}" if "ci95" in row else
           f"± {100 * row['sd']:.1f} over seeds, paired t-test p = {row['p']:.3f}"
           if row["p"] is not None else
           "one run, no test")
    if row.get("left_out"):
        how += f", on the {row['n']} prompts with a verdict on both"
    return f"{points(row['difference'])} points ({how}){'' if row['seen'] else ', no difference seen'}"


def checks(reward_models, policies, logs, differences):
    """The papers' checks as short sentences, from the numbers that eval.json holds."""
    sentences = []
    token_model, sequence_model = reward_models.get("token"), reward_models.get("sequence")
    if token_model and sequence_model:
        sentences.append(f"1. Reward accuracy on held-out (edited, original) pairs: token model "
                         f"{percent(token_model['pair_accuracy'])}, sequence model "
                         f"{percent(sequence_model['pair_accuracy'])}.")
    gaps = both_ways(differences)
    token, sequence = policies.get("ppo_token"), policies.get("ppo_sequence")
    if token and sequence:
        sentences.append(f"2. Win rate: ppo_token {percent(token['win_rate'])}, ppo_sequence "
                         f"{percent(sequence['win_rate'])}: {verdict_on(gaps['ppo_token', 'ppo_sequence'])}.")
        best, row = sequence["best_accuracy"], None
        if best is not None:
            row = first_update_at(logs["ppo_token"], best)
        sentences.append(
            "3. Convergence: not measured, because without an oracle there is no common scale."
            if best is None else
            f"3. Convergence: ppo_token never reaches the best of ppo_sequence, {percent(best)} right."
            if row is None else
            f"3. Convergence: ppo_token reaches the best of ppo_sequence, {percent(best)} right, at update "
            f"{row['update']:.0f} of {sequence['updates']}, {row['episodes']:.0f} episodes, "
            f"{row['seconds']:.0f} s.")
    rlmec, imitation = policies.get("rlmec"), policies.get("rlmec_imitation")
    if rlmec and imitation and rlmec["accuracy"] is not None:
        sentences.append(f"4. RLMEC (it saw reference solutions): {percent(rlmec['accuracy'])} right, "
                         f"imitation alone {percent(imitation['accuracy'])}. Win rate "
                         f"{verdict_on(gaps['rlmec', 'rlmec_imitation'])}.")
    drops = {name: row["largest_drop"] for name, row in policies.items()
             if row["largest_drop"] is not None and name in ("ppo_token", "ppo_sequence", "rlmec")}
    if drops:
        sentences.append("5. Steadiness, largest drop after the best: " + ", ".join(
            f"{name} {100 * drop:.1f}" for name, drop in drops.items()) + " points.")
    return sentences


def rules_kept(policies):
    """Where rules are the oracle: hits, and what shows that the responses still are what they were."""
    said = [f"{name} {row['errors_per_100_words']:.2f}"
            + (f" ({row['ref_logprob']:.2f})" if row["ref_logprob"] is not None else "")
            for name, row in policies.items()]
    return ("6. Hits per 100 words, and mean log-prob of a token under the SFT policy, nats: "
            + ", ".join(said) + ".")


def show_table(policies):
    """One line a policy, 79 columns."""
    print(f"{'policy':15.15s} {'win rate':>14s} {'right':>8s} {'wrong steps':>11s} {'KL, nats':>8s} "
          f"{'updates':>8s} {'seconds':>8s}")
    for name, row in policies.items():
        wins = f"{percent(row['win_rate'])} ± {100 * row['win_rate_se']:.1f}"
        wrong = "-" if row["wrong_steps_per_response"] is None else f"{row['wrong_steps_per_response']:.2f}"
        kl = "-" if row["kl_to_ref"] is None else f"{row['kl_to_ref']:.2f}"
        print(f"{name:15.15s} {wins:>14s} {percent(row['accuracy']):>8s} {wrong:>11s} {kl:>8s} "
              f"{row['updates']:>8d} {row['seconds']:>8.0f}")


def open_judge(run, problems, reward_models, tokenizer, args):
    """(kind, model, what it is and is worth): the oracle where solutions are known, else a reward model."""
    if all(problem.get("rules") for problem in problems):
        return "oracle", None, "the rules: fewer hits wins"
    if all(map(has_oracle, problems)):
        return "oracle", None, "the oracle: fewer wrong steps wins, then the right answer"
    if all(problem.get("answer") for problem in problems):
        return "answer", None, "the final answer: right wins"
    if args.judge:
        return None, None, None
    kind = "sequence" if "sequence" in reward_models else "token"
    if kind not in reward_models:
        fail(f"{run}: no oracle for these problems and no reward model: run 02_reward_model.py first")
    auto_class = AutoModelForSequenceClassification if kind == "sequence" else AutoModelForTokenClassification
    name = "preference_accuracy" if kind == "sequence" else "pair_accuracy"
    worth = (f"reward_{kind}, for want of an oracle. It orders {percent(reward_models[kind][name])} of "
             f"{reward_models[kind]['pairs']} held-out pairs as their annotator did (chance: 50 %), and "
             f"ppo_{kind} was trained on it: read these win rates as reward gained, not as quality")
    model = open_model(auto_class, run / f"reward_{kind}", args.dtype)
    return kind, fit(model, tokenizer).to(args.device), worth


# --- Errors of the reward models ---------------------------------------------------------------------------

def held_out_edits(run, tokenizer, most=2000):
    """Edited pairs that no model was trained on, the first `most`; none where stage 1 wrote none."""
    if not (run / "edits.jsonl").exists():
        return []
    size = vocabulary_size(tokenizer)

    def fault(row):
        for name in ("prompt_ids", "rejected_ids"):
            if not all(type(k) is int and 0 <= k < size for k in row[name]):
                return f"column `{name}` holds no ids of this tokenizer"
        try:
            inside = all(op in ("replace", "delete", "insert") and 0 <= i <= len(row["rejected_ids"])
                         for op, i, j in row.get("edit_ops") or [])
        except (TypeError, ValueError):
            inside = False
        return None if inside else "column `edit_ops` does not fit `rejected_ids`"

    columns = {"split": str, "prompt": (str, list), "prompt_ids": list, "rejected_ids": list}
    rows = read_jsonl(run / "edits.jsonl", columns, fault)
    return [row for row in rows if row["split"] != "train" and row.get("edit_ops")][:most]


@torch.no_grad()
def rewards_of(kind, model, rows, tokenizer, args):
    """Token rewards of `rejected`, a list of floats a row, None where the prompt does not fit the model.

    token: A2. sequence: 1[t = T] R (A7). generative: p_t - 0.5, which is B3 before its clip.
    """
    parts, end = instructions(tokenizer), tokenizer.eos_token_id
    prompts, rewards = {}, [None] * len(rows)
    for k, row in enumerate(rows):
        prompt = row["prompt_ids"]
        if kind == "generative" and row.get("solution"):
            solution_ids = tokenizer(row["solution"], add_special_tokens=False).input_ids
            prompt = rewrite_prompt(parts, prompt, solution_ids, row["rejected_ids"], end)
        fits = len(prompt) + len(row["rejected_ids"]) <= context_of(model)
        if fits and (kind != "generative" or row.get("solution")):
            prompts[k] = prompt
    for start in range(0, len(prompts), args.batch):
        part = list(prompts)[start:start + args.batch]
        inputs, mask = pack([prompts[k] for k in part], [rows[k]["rejected_ids"] for k in part],
                            tokenizer.pad_token_id, args.device)
        if kind == "token":
            values = token_rewards(model, inputs, mask)
        elif kind == "sequence":
            values = torch.zeros(mask.shape, device=mask.device)
            values.scatter_(1, mask.sum(dim=1, keepdim=True) - 1, sequence_reward(model, inputs)[:, None])
        else:
            values = token_logprobs(response_logits(model, inputs, mask), inputs, mask).exp() - 0.5
        for k, value in zip(part, values.tolist()):
            rewards[k] = value[:len(rows[k]["rejected_ids"])]
    return rewards


def all_rewards(run, rows, tokenizer, args):
    """kind -> token rewards of the held-out edits, for every reward model of the run."""
    rewards = {}
    for kind, auto_class in (("token", AutoModelForTokenClassification), ("generative", AutoModelForCausalLM),
                             ("sequence", AutoModelForSequenceClassification)):
        if rows and (run / f"reward_{kind}").is_dir():
            model = fit(open_model(auto_class, run / f"reward_{kind}", args.dtype), tokenizer)
            rewards[kind] = rewards_of(kind, model.to(args.device), rows, tokenizer, args)
    return rewards


def token_kind(text, is_end):
    """number, word, symbol, space, or the end token."""
    text = text.strip()
    return ("end" if is_end else "space" if not text else "number" if text[-1].isdigit() else
            "word" if text[-1].isalpha() else "symbol")


def true_errors(row):
    """index -> operation of every wrong token of `rejected`; a missing piece stands where it should begin."""
    wrong = {i: "insert" for op, i, j in row["edit_ops"] if op == "insert" and i < len(row["rejected_ids"])}
    return {**wrong, **{i: op for op, i, j in row["edit_ops"] if op != "insert"}}


WRONG_BELOW = {"token": -0.25, "generative": 0.0}      # a reward below: the model calls the token wrong


def reward_errors(rows, rewards, tokenizer):
    """Which wrong tokens are missed and which right ones punished, by group, token model and GRM side by
    side. rewards: kind -> a list of token rewards a row. Returns groups, the ten most telling examples of the
    token model (five of each sort, one a row), and the rewards of kept and changed tokens."""
    kinds = [kind for kind in WRONG_BELOW if any(rewards.get(kind) or [])]
    counts, candidates = {}, {"missed": [], "punished": []}
    split = {kind: {"kept": [], "changed": []} for kind in kinds}
    median = statistics.median(len(row["rejected_ids"]) for row in rows) if rows else 0
    for k, row in enumerate(rows):
        wrong, ids = true_errors(row), row["rejected_ids"]
        row["texts"], first = token_texts(ids, tokenizer), min(wrong, default=len(ids))
        for t, text in enumerate(row["texts"]):
            behind = t - first
            distance = ("before it" if behind < 0 else "the first error" if behind == 0 else
                        "1 to 4 behind" if behind < 5 else "5 to 14 behind" if behind < 15 else
                        "15 and more behind")
            groups = [("all", "all tokens"), ("kind", token_kind(text, ids[t] == tokenizer.eos_token_id)),
                      ("position", f"quarter {4 * t // len(ids) + 1} of the response"),
                      ("length", f"{'up to' if len(ids) <= median else 'over'} {median:.0f} tokens"),
                      ("edit", wrong.get(t, "kept")), ("distance", distance)]
            for kind in kinds:
                if rewards[kind][k] is None:
                    continue
                r = rewards[kind][k][t]
                split[kind]["changed" if t in wrong else "kept"].append(r)
                error = (r < WRONG_BELOW[kind]) != (t in wrong)
                for group in groups:
                    cell = counts.setdefault(group, {}).setdefault(kind, {"wrong": 0, "missed": 0, "right": 0,
                                                                          "punished": 0})
                    cell["wrong" if t in wrong else "right"] += 1
                    cell["missed" if t in wrong else "punished"] += error
                if error and kind == kinds[0]:
                    candidates["missed" if t in wrong else "punished"].append((-r if t in wrong else r, k, t))
    examples = []
    for sort, found in candidates.items():
        chosen = {}
        for r, k, t in sorted(found):
            chosen.setdefault(k, t)
        for k, t in list(chosen.items())[:5]:
            values = {kind: rewards[kind][k][t] for kind in kinds if rewards[kind][k] is not None}
            examples.append({"error": sort, "row": k, "prompt": plain(rows[k]["prompt"]), "index": t,
                             "response": "".join(rows[k]["texts"]), "token": rows[k]["texts"][t], **values})
    order = ["all", "kind", "position", "length", "edit", "distance"]
    groups = [{"by": by, "group": group, **kinds_of} for (by, group), kinds_of in
              sorted(counts.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))]
    return {"wrong_below": {kind: WRONG_BELOW[kind] for kind in kinds}, "groups": groups,
            "examples": examples}, split


# --- The report: one file of HTML and SVG ------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--line:#8886;--panel:#8881;--orange:#c04a00;--blue:#00659c}
@media(prefers-color-scheme:dark){:root{--orange:#ff9a5c;--blue:#6cc3f5}}
body{margin:0 auto;padding:1rem;max-width:56rem;font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem}p{margin:.4rem 0}.soft,figcaption{opacity:.75;font-size:.9rem}
.answer{font-size:1.1rem}.answer,.card{background:var(--panel);border-radius:.5rem;padding:.5rem .8rem;
margin:.7rem 0;break-inside:avoid}.warn{border-left:.3rem solid #d55e00;padding-left:.7rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--line)}td{white-space:nowrap}
td:first-child,th:first-child{text-align:left}figure{margin:.5rem 0}
svg{width:100%;max-width:46rem;height:auto;font:12px system-ui,sans-serif;fill:currentColor}
.card p{display:grid;grid-template-columns:8rem 1fr;gap:.6rem}.card b{font-size:.85rem}
.r,del,ins,mark,pre{white-space:pre-wrap;font:.9rem ui-monospace,monospace}
.t,.bar{print-color-adjust:exact;-webkit-print-color-adjust:exact}.e{outline:1.5px solid;outline-offset:-1px}
.t:focus::after{content:" " attr(title);font-size:.75rem}
.bar{display:inline-block;width:7rem;height:.7rem;
background:linear-gradient(90deg,rgb(213 94 0/.75),transparent,rgb(0 114 178/.75))}
del{color:var(--orange);background:rgb(213 94 0/.14)}mark{background:rgb(240 228 66/.6);color:inherit}
ins{color:var(--blue);background:rgb(0 114 178/.14);font-weight:600;text-decoration:none}
@media(max-width:34rem){.card p{grid-template-columns:1fr;gap:0}}@media print{body{max-width:none}}
"""
COLOURS = {"ppo_token": "#0072B2", "ppo_sequence": "#D55E00", "rlmec": "#009E73",
           "rlmec_imitation": "#CC79A7", "rlmec_reward": "#E69F00", "rlmec_uniform": "#56B4E9",
           "rlmec_noclip": "#888888"}    # the policies of stage 3, in colours of Okabe and Ito


def plain(prompt):
    """A prompt as text: of a chat its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def safe(text):
    """Text from data, harmless in HTML: escaped, what is invisible or turns the line made visible, and
    isolated from the direction of its neighbours."""
    text = "".join(f"‹U+{ord(c):04X}›" if unicodedata.category(c)[0] == "C" and c != "\n"
                   or c in "\u2028\u2029" else c for c in str(text))
    return f"<bdi>{html.escape(text)}</bdi>"


def table(header, rows):
    """An HTML table; cells are HTML already."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return (f"<div class=scroll><table><tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>"
            + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>")


def axes(x_top, y_low, y_high, x_label, y_label, form):
    """Grid, ticks and labels of a chart of 520 x 290, and the functions from values to pixels."""
    x_of = lambda x: 50 + 340 * x / (x_top or 1)
    y_of = lambda y: 240 - 215 * (y - y_low) / ((y_high - y_low) or 1)
    parts = []
    for k in range(5):
        x, y = x_top * k / 4, y_low + (y_high - y_low) * k / 4
        parts.append(f'<path d="M50 {y_of(y):.1f}h340" stroke="currentColor" opacity=".15"/>'
                     f'<text x="44" y="{y_of(y) + 4:.1f}" text-anchor="end">{form(y)}</text>'
                     f'<text x="{x_of(x):.1f}" y="256" text-anchor="middle">{x:,.0f}</text>')
    return x_of, y_of, "".join(parts) + (f'<text x="220" y="278" text-anchor="middle">{x_label}</text>'
                                         f'<text x="4" y="13">{y_label}</text>')


def learning_curves(runs):
    """All methods on one axis, a band of one standard deviation where there are several runs.
    runs: name -> logs of the method, one a seed."""
    measured = any(row.get("accuracy") is not None for logs in runs.values() for log in logs for row in log)
    column = "accuracy" if measured else "reward"
    curves = {}
    for name, logs in runs.items():
        columns = [[(row["episodes"], row[column]) for row in log if row.get(column) is not None]
                   for log in logs]
        steps = [step for step in zip(*columns)]              # seeds that stopped early end the curve
        if steps:
            curves[name] = [(statistics.mean(x for x, y in step), statistics.mean(y for x, y in step),
                             statistics.stdev(y for x, y in step) if len(step) > 1 else 0.0)
                            for step in steps]
    if not curves:
        return "<p>No run has a log with a measured curve.</p>"
    y_all = [y + sign * sd for curve in curves.values() for x, y, sd in curve for sign in (-1, 1)]
    y_low, y_high = (0.0, 1.0) if measured else (min(y_all), max(y_all))
    top = max(x for curve in curves.values() for x, y, sd in curve)
    label = "right responses, % of the validation prompts" if measured else "reward of a response, own scale"
    x_of, y_of, drawn = axes(top, y_low, y_high, "episodes (sampled responses)", label,
                             (lambda y: f"{100 * y:.0f}") if measured else (lambda y: f"{y:.2f}"))
    height = None
    for name, curve in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
        colour = COLOURS.get(name, "#888888")
        limit = lambda y: y_of(min(max(y, y_low), y_high))
        place = lambda x, y: f"{x_of(x):.1f},{limit(y):.1f}"
        if len(next(iter(runs.values()))) > 1:
            edge = [place(x, y + sd) for x, y, sd in curve] + [place(x, y - sd) for x, y, sd in curve[::-1]]
            drawn += f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity=".2"/>'
        x_end, y_end, sd = curve[-1]
        height = max(limit(y_end), 18 if height is None else height + 15)       # labels never overlap
        shown = html.escape(name if len(name) < 17 else name[:15] + "…")
        drawn += (f'<polyline points="{" ".join(place(x, y) for x, y, sd in curve)}" fill="none" '
                  f'stroke="{colour}" stroke-width="2"><title>{html.escape(name)}</title></polyline>'
                  + "".join(f'<circle cx="{x_of(x):.1f}" cy="{limit(y):.1f}" r="2.5" fill="{colour}"/>'
                            for x, y, sd in curve)
                  + f'<path d="M{x_of(x_end):.1f} {limit(y_end):.1f}H392L402 {height:.1f}" fill="none" '
                    f'stroke="{colour}" stroke-dasharray="2 3"/><path d="M403 {height:.1f}h10" '
                    f'stroke="{colour}" stroke-width="3"/><text x="416" y="{height + 4:.1f}">{shown}</text>')
    band = " Bands: ± one standard deviation over the runs." if len(next(iter(runs.values()))) > 1 else ""
    note = ("Dotted: the last value, held. RLMEC samples once a round, so all its updates stand at one "
            "number of episodes." if measured else "No accuracy was measured: the rewards of two methods "
            "have no common scale, only the shape of a curve counts.")
    return (f'<figure><svg viewBox="0 0 520 290" role="img" aria-label="learning curves">{drawn}</svg>'
            f"<figcaption>{note}{band}</figcaption></figure>")


def histogram(kind, split):
    """Rewards of kept and changed tokens of held-out responses, each as shares of its own number."""
    low, high = np.percentile(split["kept"] + split["changed"], [0.5, 99.5]) + np.array([-1e-3, 1e-3])
    parts = ""
    for place, (name, colour) in enumerate((("kept", "#0072B2"), ("changed", "#D55E00"))):
        counts = np.histogram(np.clip(split[name], low, high), 40, (low, high))[0] / max(len(split[name]), 1)
        heights = 110 * np.sqrt(counts)                       # a root scale keeps the small bars visible
        parts += "".join(f'<rect x="{30 + 11.5 * k:.1f}" y="{130 - h:.1f}" width="11" height="{h:.1f}" '
                         f'fill="{colour}" opacity=".6"/>' for k, h in enumerate(heights) if h)
        parts += (f'<text x="{330 + 90 * place}" y="12" fill="{colour}">■ {name} '
                  f'{len(split[name]):,}</text>')
    parts += "".join(f'<text x="{30 + 115 * k}" y="146" text-anchor="middle">{low + (high - low) * k / 4:.2f}'
                     '</text>' for k in range(5))
    title = "token model, reward of a token" if kind == "token" else "GRM, p − 0.5 of a token"
    return (f'<figure><svg viewBox="0 0 520 165" role="img" aria-label="rewards, {kind}">{parts}'
            '<path d="M30 130h460" stroke="currentColor"/><text x="30" y="12">share of tokens, root scale'
            f'</text><text x="260" y="162" text-anchor="middle">{title}</text></svg></figure>')


def heat_map(rows, rewards, most):
    """The same responses under every reward model, token by token; the true errors are framed."""
    names = {"token": "token model", "sequence": "sequence model", "generative": "GRM"}
    rewards = {kind: values for kind, values in rewards.items() if any(values)}
    if not rows or not rewards:
        return "<p>No held-out edits, so there is nothing to show.</p>"
    limits, out = {}, []
    for kind, values in rewards.items():
        shown = [abs(r) for row in values if row for r in row if r]
        limits[kind] = 0.1 if kind == "generative" else float(np.percentile(shown, 95)) if shown else 1.0
        out.append(f'<span>{names[kind]} −{limits[kind]:.2f} <i class=bar></i> +{limits[kind]:.2f}</span>')
    out = [f"<p class=soft>Colour scales: {' &emsp; '.join(out)}. Framed: wrong tokens, as the editor "
           "corrected them. Hover or tap for the value.</p>"]
    usable_rows = [k for k in range(len(rows)) if all(values[k] is not None for values in rewards.values())]
    step = max(1, len(usable_rows) // max(most, 1))
    for k in usable_rows[::step][:most]:
        row, wrong = rows[k], true_errors(rows[k])
        lines = [f"<b>prompt</b><span class=r>{safe(plain(row['prompt']))}</span>"]
        for kind, values in rewards.items():
            tokens = []
            for t, (text, r) in enumerate(zip(row["texts"], values[k])):
                if kind == "generative":                      # B3 of a wrong response
                    r = min(max(r, -0.1), 0.0)
                strength = 0.75 * min(abs(r) / limits[kind], 1.0)
                colour = f"rgb({'213 94 0' if r < 0 else '0 114 178'}/{strength:.2f})"
                style = f' style="background:{colour}"' if strength > 0.02 else ""
                tokens.append(f'<span class="t{" e" if t in wrong else ""}" tabindex=-1 '
                              f'title="{r:+.2f}"{style}>'
                              f"{safe(text)}</span>")
            lines.append(f"<b>{names[kind]}</b><span class=r>{''.join(tokens)}</span>")
        out.append(f"<div class=card>{''.join(f'<p>{line}</p>' for line in lines)}</div>")
    return "".join(out)


def edit_marked(before, after, tokenizer):
    """The minimal edit (E1) that leads from one response to another, ids, as HTML."""
    old, new = token_texts(before, tokenizer), token_texts(after, tokenizer)
    shown = []
    for kept, steps in groupby(align(before, after), lambda step: step[0] == "keep"):
        steps = list(steps)
        deleted = safe("".join(old[i] for op, i, j in steps if op != "insert"))
        inserted = safe("".join(new[j] for op, i, j in steps if op != "delete"))
        ops = {op for op, i, j in steps}
        shown.append(inserted if kept else (f"<del>{deleted}</del>" if ops != {"insert"} else "")
                     + (f"<ins>{inserted}</ins>" if ops != {"delete"} else ""))
    return "".join(shown)


def before_after(problems, answers, results, opponent, tokenizer, most):
    """Responses of the opponent and what every policy makes of them, on the prompts that differ most."""
    responses = {name: given.ids for name, given in answers.items()}
    names = [name for name in ("ppo_sequence", "ppo_token", "rlmec") if name in responses]
    names = names or [name for name in responses if name not in ("sft", "baseline")][:3]
    order = sorted(range(len(problems)), key=lambda k: (
        responses[names[-1]][k] == responses[opponent][k], results[names[-1]][k] in (None, 0.5), k))
    out = ["<p class=soft>The minimal edit from the opponent's response to the policy's: <del>out</del> "
           "<ins>in</ins>.</p>"]
    for k in sorted(order[:most]):
        lines = [f"<b>prompt</b><span class=r>{safe(plain(problems[k]['prompt']))}</span>",
                 f"<b>{opponent}</b><span class=r>"
                 f"{safe(''.join(token_texts(responses[opponent][k], tokenizer)))}</span>"]
        for name in names:
            won = {1.0: " wins", 0.0: " loses", None: ": no verdict"}.get(results[name][k], " ties")
            marked = edit_marked(responses[opponent][k], responses[name][k], tokenizer)
            lines.append(f"<b>{html.escape(name)}{won}</b><span class=r>{marked}</span>")
        out.append(f"<div class=card>{''.join(f'<p>{line}</p>' for line in lines)}</div>")
    return "".join(out)


def error_section(errors, rows):
    """Missed wrong tokens and punished right ones, and the most telling examples."""
    kinds, names = list(errors["wrong_below"]), {"token": "token model", "generative": "GRM"}
    if not kinds or not errors["groups"]:
        return "<p>No held-out edits or no token rewards, so there is nothing to analyse.</p>"
    share = lambda cell, part, whole: percent(cell[part] / cell[whole]) if cell and cell[whole] else "–"
    body = []
    for row in errors["groups"]:
        cells = [row.get(kind) for kind in kinds]
        most = max((cell for cell in cells if cell), key=lambda cell: cell["wrong"] + cell["right"])
        body.append([html.escape(f"{row['by']}: {row['group']}" if row["by"] != "all" else row["group"]),
                     f"{most['wrong']:,}", *(share(cell, "missed", "wrong") for cell in cells),
                     f"{most['right']:,}", *(share(cell, "punished", "right") for cell in cells)])
    header = ["tokens", "wrong", *(f"missed by {names[kind]}" for kind in kinds), "right",
              *(f"punished by {names[kind]}" for kind in kinds)]
    below = ", ".join(f"{names[kind]} {value:g}" for kind, value in errors["wrong_below"].items())
    out = [f"<p class=soft>A token counts as called wrong below a reward of: {below} (GRM: p − 0.5). "
           f"Distance is measured in tokens from the first error;"
           f" an insertion stands at the token before which "
           f"something is missing.</p>", table(header, body), "<h3>The most telling errors</h3>"]
    for example in errors["examples"]:
        texts, t = rows[example["row"]]["texts"], example["index"]
        values = ", ".join(f"{names[kind]} {example[kind]:+.2f}" for kind in kinds if kind in example)
        out.append(f"<div class=card><p><b>{example['error']}: {values}"
                   f"</b><span class=r>{safe(example['prompt'])}\n{safe(''.join(texts[:t]))}"
                   f"<mark>{safe(texts[t])}</mark>{safe(''.join(texts[t + 1:]))}</span></p></div>")
    return "".join(out) if errors["examples"] else "".join(out[:2]) + "<p>Not one error.</p>"


def interval_plot(row):
    """The win rate and its 95 % interval on a line from 0 to 100 %."""
    low, high = row["win_rate_ci95"]
    return (f'<svg viewBox="0 0 120 14" style="width:120px"><path d="M0 7h120M60 1v12" stroke="currentColor" '
            f'opacity=".25"/><path d="M{120 * low:.1f} 7H{120 * high:.1f}" stroke="#0072B2" '
            f'stroke-width="4"/>'
            f'<circle cx="{120 * row["win_rate"]:.1f}" cy="7" r="4" fill="#0072B2"/></svg>')


def page(title, answers, warnings, sections):
    """The whole file. answers: sentences; sections: heading -> HTML."""
    body = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in answers)
    body = f"<div class=answer>{body}</div>" + "".join(
        f"<p class=warn>Warning: {html.escape(warning)}</p>" for warning in warnings)
    body += "".join(f"<section><h2>{heading}</h2>{content}</section>"
                    for heading, content in sections.items())
    return (f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='
            f'"width=device-width,initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style>'
            f"</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n")


def headline(policies, differences, opponent):
    """Which policy wins, by how much, how sure: the answer, in sentences."""
    names = [name for name in ("ppo_token", "ppo_sequence", "rlmec") if name in policies]
    names = names or [name for name in policies if name not in ("sft", "baseline")]
    names = sorted(names, key=lambda name: -policies[name]["win_rate"])
    gaps, sentences = both_ways(differences), []
    for name in names:
        row = policies[name]
        how = f"± {100 * row['sd']:.1f} over seeds" if "sd" in row else (
            "95 % interval {:.1f} to {:.1f}".format(*(100 * x for x in row["win_rate_ci95"])))
        sentences.append(f"{name} wins {percent(row['win_rate'])} against {opponent} ({how}).")
    sentences += [f"{names[0]} against {name}: {verdict_on(gaps[names[0], name])}." for name in names[1:]]
    return sentences


def settings_of(runs):
    """All arguments of all stages and the versions, as HTML, so that the run can be repeated."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "transformers": transformers.__version__, "machine": platform.platform()}
    out = [f"<pre>{safe(json.dumps(versions))}</pre>"]
    for run in runs:
        for path in sorted(run.glob("0?_args.json")):
            text = path.read_text(encoding="utf-8", errors="replace")
            out.append(f"<h3>{safe(path)}</h3><pre>{safe(' '.join(text.split()))}</pre>")
    return "".join(out)


def policy_table(policies, sentences):
    """The numbers of eval.json, one row a policy, and below them the judge and the checks in sentences."""
    number = lambda x, form: "–" if x is None else format(x, form)
    rows = [[html.escape(name), percent(row["win_rate"]), interval_plot(row), percent(row["accuracy"]),
             number(row["wrong_steps_per_response"], ".2f"), number(row["kl_to_ref"], ".2f"),
             percent(row["accuracy_area"]), number(row["episodes_to_threshold"], ",")]
            for name, row in policies.items()]
    header = ["policy", "win rate", "95 % interval", "right", "wrong steps", "KL, nats", "area under curve",
              "episodes to threshold"]
    return table(header, rows) + "".join(f"<p class=soft>{html.escape(text)}</p>" for text in sentences)


# --- Several seeds -----------------------------------------------------------------------------------------

def combine(args):
    """Mean, standard deviation and the paired test over runs of one task, from their eval.json and CSVs."""
    out, runs = Path(args.run), [Path(run) for run in args.runs]
    if (out / "combined.json").exists() and not args.overwrite:
        print(f"{out}/combined.json is there already; --overwrite makes it again")
        return
    if len({run.resolve() for run in runs}) < len(runs):
        fail(f"{runs[0]}: --runs names a run twice, which is no second seed")
    results, tasks, paired = [], [], []
    for run in runs:
        if not (run / "eval.json").exists():
            fail(f"{run}/eval.json is missing: run 04_eval.py --run {run} first")
        result = read_json(run / "eval.json", "what 04_eval.py writes")
        try:
            rates = [row["win_rate"] + (row["accuracy"] or 0.0) for row in result["policies"].values()]
            if not all(map(math.isfinite, rates)):
                raise ValueError
            first = read_json(run / "01_args.json", "arguments") if (run / "01_args.json").exists() else {}
            paired.append({pair: row["difference"] for pair, row in both_ways(result["differences"]).items()})
            opponent = "baseline" if "baseline" in result["policies"] else "sft"
            tasks.append((first.get("task"), first.get("data"), result["judge"].split(". ")[0], opponent))
        except (KeyError, TypeError, ValueError, AttributeError):
            fail(f"{run}/eval.json: not what 04_eval.py writes; make it again with --overwrite")
        results.append(result["policies"])
        if tasks[-1] != tasks[0]:
            fail(f"{run}: task, judge and opponent {tasks[-1]} are not those of {runs[0]}, {tasks[0]}")
    names = [name for name in results[0] if all(name in policies for policies in results)]
    logs = {name: [read_log(run / f"{name}.csv") for run in runs] for name in names}
    horizon = max((log[-1]["episodes"] for several in logs.values() for log in several if log), default=1)
    summary, differences = {}, []
    spread = lambda values: {"mean": statistics.mean(values), "values": values,
                             "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
    for name in names:
        rows = [policies[name] for policies in results]
        starts = [policies.get("sft", {}).get("accuracy") for policies in results]
        reached = [first_update_at(log, args.threshold) for log in logs[name]]
        values = {"win_rate": [row["win_rate"] for row in rows],
                  "accuracy": [row["accuracy"] for row in rows],
                  "accuracy_area": [accuracy_area(log, start, horizon)
                                    for log, start in zip(logs[name], starts)],
                  "episodes_to_threshold": [row and row["episodes"] for row in reached]}
        summary[name] = {key: None if None in several else spread(several) for key, several in values.items()}
    for a, b in combinations([name for name in names if name not in ("sft", "baseline")], 2):
        gaps = [differences_of[a, b] for differences_of in paired]
        p = paired_t_test(gaps)
        whole = spread(gaps)
        differences.append({"a": a, "b": b, "difference": whole["mean"], "sd": whole["sd"], "p": p,
                            "seen": p is not None and p < 0.05})
    form = lambda row, scale, digits: "–" if row is None else (
        f"{scale * row['mean']:,.{digits}f} ± {scale * row['sd']:,.{digits}f}")
    cells = [[name, form(row["win_rate"], 100, 1), form(row["accuracy"], 100, 1),
              form(row["accuracy_area"], 100, 1), form(row["episodes_to_threshold"], 1, 0)]
             for name, row in summary.items()]
    header = ["policy", "win rate, %", "right, %", "area, %", "episodes"]
    flat = {name: {"win_rate": row["win_rate"]["mean"], "sd": row["win_rate"]["sd"]} for name, row in
            summary.items()}
    answers = headline(flat, differences, "the SFT policy" if tasks[0][3] == "sft" else "the baseline")
    pairs = [[f"{row['a']} − {row['b']}", verdict_on(row)] for row in differences]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "combined.json", json.dumps({
        "runs": [str(run) for run in runs], "judge": tasks[0][2], "threshold": args.threshold,
        "policies": summary, "differences": differences}, indent=1) + "\n")
    write_text(out / "combined.html", page(f"Token-level reward, {len(runs)} runs", answers, [], {
        "All methods": table(header, [[html.escape(cell) for cell in row] for row in cells])
        + f"<p class=soft>Mean ± standard deviation over {len(runs)} runs. Area: mean accuracy on the way "
        f"over {horizon:,.0f} episodes. Episodes: until {percent(args.threshold)} right.</p>",
        "Learning curves": learning_curves({name: several for name, several in logs.items() if any(several)}),
        "Paired differences of win rates": table(["pair", "difference"], [[html.escape(x) for x in pair]
                                                                         for pair in pairs]),
        "Settings": settings_of(runs)}))
    print(f"{'policy':16.16s} {header[1]:>14s} {header[2]:>14s} {header[3]:>14s} {header[4]:>16s}")
    for row in cells:
        print(f"{row[0]:16.16s} {row[1]:>14s} {row[2]:>14s} {row[3]:>14s} {row[4]:>16s}")
    print(f"area: mean accuracy over {horizon:.0f} episodes; episodes: until {percent(args.threshold)} right")
    for sentence in answers:
        print(textwrap.fill(sentence, 79, subsequent_indent="   "))
    print(f"{out}/combined.html")


def read_baseline(path, problems, tokenizer):
    """Reference responses of a JSONL file, one to each problem, matched by prompt, as Answers."""
    rows = read_jsonl(path, {"prompt": (str, list), "response": str})
    key = lambda row: json.dumps(row["prompt"], sort_keys=True)
    known = {key(row): row["response"] for row in rows}
    if len(known) < len(rows):
        print(f"{path}: {len(rows) - len(known)} rows have the prompt of a later one, which counts")
    for problem in problems:
        if key(problem) not in known:
            fail(f"{path}: has no response to the prompt of {problem['id']}")
    texts = [known[key(problem)] for problem in problems]
    end = [tokenizer.eos_token_id]
    return Answers([tokenizer(text, add_special_tokens=False).input_ids + end for text in texts], texts)


def find_problems(run, args):
    """The file with the problems, and those of --split."""
    path = Path(args.problems or run / "problems.jsonl")
    if not path.exists():
        fail(f"{path} is missing: run 01_edit_data.py first, or name the file with --problems")
    problems = read_jsonl(path, {"id": str, "prompt": (str, list), "split": str}, fault_of_problem)
    problems = [problem for problem in problems if problem["split"] == args.split]
    if not problems:
        fail(f"{path}: no problem has the split {args.split}")
    return path, problems


def find_policies(run, args):
    """The folders of --policies, or those that stage 3 wrote; for a sheet only the first."""
    paths = [Path(path) for path in args.policies or [run / name for name in COLOURS]]
    paths = [path for path in paths if args.policies or path.exists()]
    if not paths:
        fail(f"{run} has no policy to evaluate: run 03_ppo.py first, or name folders with --policies")
    names = Counter(["sft", "baseline", *(path.name for path in paths)])
    for path in paths:
        if names[path.name] > 1:
            fail(f"{path}: two policies are called {path.name}; rename one folder")
    return paths[:1] if args.human_eval else paths


def main(args):
    check_args(args)
    if args.judge not in (None, "llm"):
        fail(f"--judge {args.judge}: llm is the only one to name")
    if args.judge:
        check_llm(args, "--judge llm")
    template = read_template(args.llm_prompt, JUDGE_PROMPT, ["a", "b"])
    if args.verdicts or args.human_verdicts:
        path = args.verdicts or args.human_verdicts
        show_verdicts(path, read_verdicts(path) if args.verdicts else read_sheet(path))
        return
    if args.runs:
        combine(args)
        return
    run = Path(args.run)
    target = run / ("human_eval.csv" if args.human_eval else "eval.json")
    if target.exists() and not args.overwrite:
        print(f"{target} is there already; --overwrite makes it again")
        return

    # problems, policies and judge, all checked before the first response is sampled
    problems_path, problems = find_problems(run, args)
    paths = find_policies(run, args)
    policy_path = Path(args.policy or run / "policy")
    opponent = "baseline" if args.baseline else "sft"
    chat = any(isinstance(problem["prompt"], list) for problem in problems)
    tokenizer = open_tokenizer(args.policy or policy_path, chat)
    reference = open_model(AutoModelForCausalLM, args.policy or policy_path, args.dtype)
    reference = fit(reference, tokenizer).to(args.device)
    encode_problems(problems_path, problems, tokenizer, context_of(reference), args.max_new_tokens)
    references = None
    if args.baseline and not Path(args.baseline).is_dir():
        references = read_baseline(args.baseline, problems, tokenizer)
    reward_models = read_metrics(run / "reward_metrics.json")
    kind, judge_model, judge_text = open_judge(run, problems, reward_models, tokenizer, args)
    longest = max(len(problem["prompt_ids"]) for problem in problems) + args.max_new_tokens
    if judge_model:
        responses = references.ids if references else []
        judged = [len(problem["prompt_ids"]) + len(ids) for problem, ids in zip(problems, responses)]
        check_context(judge_model, f"{run}/reward_{kind}", max([longest, *judged]))
    entries = [("baseline", Path(args.baseline))] if args.baseline and not references else []
    entries += [(path.name, path) for path in paths]
    trained = [run / f"reward_{name}" for name in ("token", "sequence", "generative")]
    for path in [path for _, path in entries] + [path for path in trained if path.is_dir()]:
        same_vocabulary(path, tokenizer, policy_path)
    logs = {path.name: read_log(path.parent / f"{path.name}.csv") for path in paths}
    if not args.human_eval:
        start_stage(args, "04")

    # every policy answers every prompt, the SFT policy and the opponent first
    prompts = [problem["prompt_ids"] for problem in problems]
    answers = {"baseline": references} if references else {}
    for name, path in tqdm([("sft", policy_path), *entries], desc="policies", unit="policy"):
        model = reference
        if name != "sft":
            model = fit(open_model(AutoModelForCausalLM, path, args.dtype), tokenizer).to(args.device)
            check_context(model, path, longest)
        answers[name] = answer(model, reference, prompts, tokenizer, args)
    if args.human_eval:
        name = paths[0].name
        chosen = random.Random(args.seed).sample(range(len(problems)), min(args.human_eval, len(problems)))
        rows = [(plain(problems[k]["prompt"]), answers[name].texts[k], answers[opponent].texts[k])
                for k in sorted(chosen)]
        write_sheet(target, rows, (name, opponent), args.seed)
        print(f"{target}: fill in `preference` (1 = output_a, 2 = output_b, 1.5 = tie), then "
              f"--human_verdicts {target}")
        return

    # who wins: verdicts prompt by prompt against the opponent
    scores = {name: judged_scores(kind, judge_model, given, problems, tokenizer, args)
              for name, given in answers.items()}
    policies = {name: measure(given, kind, scores[name], problems, logs.get(name, []))
                for name, given in answers.items()}
    verdicts = {}
    if kind:
        verdicts = {name: preferences_of(scores[name], scores[opponent], given.texts, answers[opponent].texts)
                    for name, given in answers.items()}
    llm_judge = {}
    if args.judge:
        client = LlmClient(args, run / "llm_verdicts.jsonl", "LLM verdicts")
        verdicts, counts, agreed = ask_judge(client, template, problems, answers, opponent, verdicts, run)
        llm_judge, judge_text = judge_report(client, counts, agreed, kind)
        for name, count in counts.items():
            policies[name]["position_bias"] = share(count["disagreed"], count["judged"])
    results = {name: [None if x is None else x - 1 for x in given] for name, given in verdicts.items()}
    convergence = convergence_of(policies, logs, args.threshold)
    policies = {name: {**win_rate(verdicts[name], args.seed), **row, **convergence[name]}
                for name, row in policies.items()}
    differences = [{"a": a, "b": b, **difference(results[a], results[b], args.seed)}
                   for a, b in combinations([path.name for path in paths], 2)]

    # the reward models on held-out edits
    rows = held_out_edits(run, tokenizer)
    rewards = all_rewards(run, rows, tokenizer, args)
    errors, split = reward_errors(rows, rewards, tokenizer)

    warnings = failure_signatures(reward_models, policies, logs)
    sentences = checks(reward_models, policies, logs, differences)
    if judge_text.startswith("the rules"):
        sentences.append(rules_kept(policies))
    models = {kind: {name: value for name, value in row.items() if name not in ("pairs", "scale", "seconds")}
              for kind, row in reward_models.items()}
    sentences = [f"Judge: {judge_text}.", *sentences]
    headlines = headline(policies, differences, "the SFT policy" if opponent == "sft" else args.baseline)
    histograms = "".join(histogram(kind, several) for kind, several in split.items() if several["kept"])
    write_text(run / "report.html", page("Token-level reward: who wins", headlines, warnings, {
        "All policies": policy_table(policies, sentences),
        "Learning curves": learning_curves({name: [log] for name, log in logs.items() if log}),
        "Reward heat map": heat_map(rows, rewards, args.examples),
        "Before and after": before_after(problems, answers, results, opponent, tokenizer, args.examples),
        "Rewards of kept and changed tokens": histograms or "<p>No token rewards to show.</p>",
        "Where the reward models err": error_section(errors, rows),
        "Settings": settings_of([run])}))
    write_text(run / "eval.json", json.dumps({
        "judge": judge_text, **llm_judge, "baseline": args.baseline or str(policy_path), "policies": policies,
        "differences": differences, "threshold": args.threshold, "reward_models": models, "errors": errors,
        "checks": sentences[1:], "warnings": warnings}, indent=1) + "\n")
    show_table(policies)
    for sentence in sentences + [f"WARNING: {warning}" for warning in warnings]:
        print(textwrap.fill(sentence, 79, subsequent_indent="   "))
    print(run / "report.html")


if __name__ == "__main__":
    main(HfArgumentParser(Args).parse_args_into_dataclasses()[0])

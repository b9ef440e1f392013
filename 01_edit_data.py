"""Stage 1: a policy, its problems, and pairs of responses that differ by a minimal edit.

Papers: A, Xu et al., "Aligning Large Language Models via Fine-grained Supervision" (ACL 2024, 2406.02756).
        B, Chen et al., "Improving Large Language Models via Fine-grained Reinforcement Learning with Minimum
        Editing Constraint" (RLMEC, ACL 2024, 2401.06081).
Equations: E1 (edit distance and alignment), A1 (data), B1 (editing task).

Simplified against the papers:
  1. By default the editor is an oracle that knows every right solution of a built-in task, the nearest right
     solution at hand, or a human whose edits stand in a file. Both papers ask an LLM: --editor llm does.
  2. The policy is a Llama of 0.2 million parameters, fine-tuned for a minute on demonstrations with errors
     (SFT). The papers start from 7B models; --model takes any causal language model.
  3. Preferences of the built-in tasks are exact: fewer wrong steps. Paper A simulates human preferences.
  4. A solution of a built-in task is right when no step is wrong. Paper B looks at the final answer alone,
     and so does --data with the columns prompt, solution, answer.

Reads:  nothing, or --data FILE (JSONL) and --model NAME_OR_PATH
Writes: RUN/policy/  RUN/problems.jsonl  RUN/edits.jsonl  RUN/01_args.json  RUN/llm_edits.jsonl

    python 01_edit_data.py                about 1 minute on two CPU cores (no GPU was at hand to measure)
    python 01_edit_data.py --task qa      about 1.5 minutes
    python 01_edit_data.py --data FILE --model Qwen/Qwen2.5-0.5B
    ... --editor llm --llm_url http://localhost:8000/v1 --llm_model NAME       the key in LLM_API_KEY
    ... --editor model:FOLDER   or   --editor rules:FILE
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from threading import Event, Lock
from typing import Optional
from urllib.parse import urlparse

import torch
from huggingface_hub import InferenceClient, is_offline_mode
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging


@dataclass
class Args:
    run: str = field(default="runs/default", metadata={"help": "run folder"})
    seed: int = field(default=1, metadata={"help": "seed of the task, the policy and the samples"})
    overwrite: bool = field(default=False, metadata={
        "help": "do the stage again; what later stages made of the old one goes"})
    task: str = field(default="math", metadata={"help": "built-in task", "choices": ["math", "qa"]})
    data: Optional[str] = field(default=None, metadata={"help": "JSONL of your own, no built-in task"})
    model: Optional[str] = field(default=None, metadata={"help": "causal LM (name or path) as the policy"})
    editor: Optional[str] = field(default=None, metadata={
        "help": "oracle (built-in tasks), nearest (B1: nearest right solution of samples and reference) "
                "or human (column `edited` of --data); default: the one that fits. llm (a server), "
                "model:PATH (a local causal LM), rules:FILE (pattern, tab, replacement a line; each "
                "hit is an error)"})
    llm_url: Optional[str] = field(default=None, metadata={
        "help": "OpenAI-compatible server; the key comes from LLM_API_KEY (else HF_TOKEN for huggingface.co, "
                "OPENAI_API_KEY for openai.com), and is never saved"})
    llm_model: Optional[str] = field(default=None, metadata={"help": "the server's name of the model"})
    llm_workers: int = field(default=8, metadata={"help": "requests at once; model:PATH: prompts a batch"})
    llm_retries: int = field(default=2, metadata={
        "help": "K: times the editor is told why a gate drops its edit, and asked again"})
    llm_prompt: Optional[str] = field(default=None, metadata={
        "help": "file with a prompt of your own: {response}, and where wanted {prompt}, {reference}, {goal}"})
    llm_temperature: float = field(default=0.0, metadata={"help": "temperature of the edits; 0 is greedy"})
    llm_max_tokens: int = field(default=1024, metadata={"help": "longest answer of the editor, in tokens"})
    llm_timeout: float = field(default=120.0, metadata={"help": "seconds to wait for one answer"})
    max_edit_share: float = field(default=0.8, metadata={
        "help": "gate: largest edit distance as a share of the longer response, in tokens"})
    worse_edits: float = field(default=0.0, metadata={
        "help": "share of the training pairs whose edit is made worse: an error missed or a needless change"})
    train_prompts: int = field(default=16000, metadata={"help": "built-in tasks: training prompts"})
    pair_prompts: Optional[int] = field(default=None, metadata={
        "help": "of the training prompts, those to make pairs for: the data size; default math 10000, "
                "qa 5200, --data all"})
    val_prompts: int = field(default=500, metadata={"help": "validation prompts; of --data at most 10 %%"})
    test_prompts: int = field(default=1000, metadata={"help": "test prompts; of --data at most 10 %%"})
    sft_steps: Optional[int] = field(default=None, metadata={
        "help": "SFT optimiser steps; default 600, with --data 0"})
    sft_batch: int = field(default=128, metadata={"help": "SFT demonstrations a step"})
    sft_lr: float = field(default=3e-3, metadata={"help": "SFT learning rate (AdamW, cosine)"})
    hidden_size: int = field(default=64, metadata={"help": "width of the small policy"})
    layers: int = field(default=4, metadata={"help": "layers of the small policy"})
    samples: int = field(default=2, metadata={
        "help": "solutions sampled a prompt; every worse one makes a pair with the best"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the samples"})
    max_new_tokens: int = field(default=48, metadata={"help": "longest sampled response, in tokens"})
    sample_batch: int = field(default=1000, metadata={"help": "responses sampled at once"})
    dtype: str = field(default="float32", metadata={
        "help": "of the weights; log-probs, losses and optimiser steps are float32 in any case",
        "choices": ["float32", "bfloat16"]})
    gradient_checkpointing: bool = field(default=False, metadata={
        "help": "less memory, a third more time: activations are computed again in the backward pass"})
    micro_batch: Optional[int] = field(default=None, metadata={
        "help": "SFT: rows a forward pass; their gradients add up to those of the whole batch; default: all"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={
        "help": "torch device"})


# --- E1: minimum edit --------------------------------------------------------------------------------------

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


# --- The oracle of the built-in tasks ----------------------------------------------------------------------

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


def nearest(response_ids, solutions_ids):
    """B1: the right solution at the smallest edit distance (E1) from the response, of those at hand."""
    return min(solutions_ids, key=lambda ids: edit_distance(response_ids, ids))


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


# --- Built-in tasks: a problem has a prompt, its right solutions (the first is the reference) and an answer 

STEP_ERROR = 0.25       # math: share of wrong steps in the demonstrations
ENTITY_ERROR = 0.13     # qa: share of wrong entities,
MISSING_STEP = 0.08     # of responses that leave a step out,
RUDE_PHRASE = 0.1       # and of responses with a rude or irrelevant phrase
RUDE = [", you fool", ", as even a child knows", ", but my feet hurt"]
PEOPLE = ("Ada Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Kit Lena Mia Ned Olga Paul Rita Sam Tess Uma Vera "
          "Walt Yara Zoe Abe Bea Cal Dora Ed Flo").split()
GOODS = ("bread soap rope glass paper honey shoes lamps tea salt cloth nails wine cheese brooms drums maps "
         "clocks candles baskets bricks jam ink flutes hats kites boats chairs knives bells").split()
TOWNS = ("Oslo Rome Bern Lima Cairo Paris Delhi Quito Tunis Sofia Malmo Turin Kyoto Derry Ghent Accra Lyon "
         "Graz Minsk Dakar Hanoi Perth Cork Basel Porto Genoa Riga Seoul Lagos Tokyo").split()


def calculate(value, operations, rng=None):
    """The tape of a calculation, `3+2=5;-1=4;+4=8`: every result is written once, and the next step reads it
    where it stands. With rng, each step goes wrong with probability STEP_ERROR, and the steps behind it go on
    from the wrong value; all values stay single digits."""
    steps = []
    for k, (operator, operand) in enumerate(operations):
        result = value + operand if operator == "+" else value - operand
        if rng and rng.random() < STEP_ERROR:
            wrong = [x for x in range(10) if x != result and stays_digit(x, operations[k + 1:])]
            result = rng.choice(wrong or [result])
        steps.append(f"{'' if steps else value}{operator}{operand}={result}")
        value = result
    return ";".join(steps)


def stays_digit(value, operations):
    """Is every value of the calculation one of the digits 0 to 9?"""
    for operator, operand in operations:
        value += operand if operator == "+" else -operand
        if not 0 <= value <= 9:
            return False
    return True


class Math:
    """Chains of four operations whose values stay single digits: `3+2-1+4-6=` -> `3+2=5;-1=4;+4=8;-6=2`."""

    def __init__(self, seed):
        self.texts = ["0123456789+-=;"]

    def problem(self, rng):
        operations = [("+", 9), ("+", 9)]
        while not stays_digit(first := rng.randint(0, 9), operations):
            operations = [(rng.choice("+-"), rng.randint(1, 9)) for _ in range(4)]
        prompt = str(first) + "".join(f"{operator}{operand}" for operator, operand in operations) + "="
        solution = calculate(first, operations)
        return {"prompt": prompt, "solution": solution, "answer": solution[-1], "solutions": [solution]}

    def demonstration(self, problem, rng):
        first, *rest = problem["prompt"][:-1]
        operations = [(operator, int(operand)) for operator, operand in zip(rest[::2], rest[1::2])]
        return calculate(int(first), operations, rng)


class Qa:
    """Who sends what where, in a made-up world of facts that the seed decides. Two voices for the reasoning
    and two for the answer make four right solutions of every question."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.makes = dict(zip(PEOPLE, rng.sample(GOODS, len(PEOPLE))))
        self.home = dict(zip(PEOPLE, rng.sample(TOWNS, len(PEOPLE))))
        example = self.problem(rng)
        self.texts = [example["prompt"], *example["solutions"], *RUDE]
        self.texts += [" " + name for names in (PEOPLE, GOODS, TOWNS) for name in names]
        self.texts += ["123456789"]                                  # the generative model numbers steps (B2)

    def problem(self, rng):
        a, b, c = rng.sample(PEOPLE, 3)
        x, y, town = self.makes[a], self.makes[b], self.home[c]
        voices = [f"One makes {x}. The other makes {y}. The friend lives in {town}.",
                  f"The first gift is {x}. The second gift is {y}. The home is {town}."]
        answers = [f"They send {x} and {y} to {town}.", f"So {x} and {y} go to {town}."]
        solutions = [f" {voice} {answer}" for voice in voices for answer in answers]
        prompt = f"Q: What do {a} and {b} send to their friend {c}, and where?\nA:"
        return {"prompt": prompt, "solution": solutions[0], "answer": answers[0], "solutions": solutions}

    def demonstration(self, problem, rng):
        sentences = list(split_steps(rng.choice(problem["solutions"])))
        for kind in (GOODS, TOWNS):
            names = re.compile(r"\b(" + "|".join(kind) + r")\b")
            swap = lambda match: rng.choice(kind) if rng.random() < ENTITY_ERROR else match[0]
            sentences = [names.sub(swap, sentence) for sentence in sentences]
        if rng.random() < MISSING_STEP:
            del sentences[rng.randrange(3)]
        if rng.random() < RUDE_PHRASE:
            k = rng.randrange(len(sentences))
            sentences[k] = sentences[k][:-1] + rng.choice(RUDE) + "."
        return " " + " ".join(sentences)


def make_problems(task, args, rng):
    """Distinct problems with id and split: train, validation and test prompts are disjoint."""
    problems = {}
    wanted = args.train_prompts + args.val_prompts + args.test_prompts
    tries = 0
    while len(problems) < wanted and tries < 20 * wanted:
        problem = task.problem(rng)
        problems.setdefault(problem["prompt"], problem)
        tries += 1
    if len(problems) < wanted:
        fail(f"--task {args.task} has too few different prompts for {wanted}: lower --train_prompts")
    splits = ["train"] * args.train_prompts + ["val"] * args.val_prompts + ["test"] * args.test_prompts
    return [{"id": f"{args.task}-{k}", "split": split, **problem}
            for k, (split, problem) in enumerate(zip(splits, problems.values()))]


# --- Files, models and batches. These helpers stand in several scripts, letter for letter. -----------------

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


# --- The policy --------------------------------------------------------------------------------------------

def small_policy(texts, args):
    """A small Llama and a tokenizer for the texts: words with their leading space, the rest by character."""
    pattern = " ?[A-Za-z]+|[^A-Za-z]"
    tokens = sorted({token for text in texts for token in re.findall(pattern, text)})
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<unk>", "</s>", *tokens])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>",
                                        eos_token="</s>", clean_up_tokenization_spaces=False)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=args.hidden_size, intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.layers, num_attention_heads=4, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.08,  # the usual 0.02 learns far slower at this size,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},    # and texts this short need no 1e4
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlamaForCausalLM(config).eval(), tokenizer


def fine_tune(model, tokenizer, demonstrations, args, steps):
    """SFT: cross-entropy of the response tokens of demonstrations, a list of (prompt_ids, response_ids)."""
    optimizer = Optimizer((model, args.sft_lr))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    rng = random.Random(args.seed)
    bar = trange(steps, desc="SFT", unit="step", mininterval=1.0)
    for step in bar:
        rows = rng.sample(demonstrations, min(args.sft_batch, len(demonstrations)))
        tokens = sum(len(response) for prompt, response in rows)
        size = args.micro_batch or len(rows)
        total = 0.0
        for start in range(0, len(rows), size):
            prompts, responses = map(list, zip(*rows[start:start + size]))
            inputs, mask = pack(prompts, responses, tokenizer.pad_token_id, model.device)
            T = mask.shape[1]
            keep = T + 1 if args.data else 0        # 0, all: where prompts are short, it costs nothing
            labels = inputs["input_ids"][:, -keep:].clone()
            labels[:, :-T] = -100
            labels[:, -T:][~mask] = -100
            loss = model(**inputs, labels=labels, logits_to_keep=keep, use_cache=False).loss
            loss = loss * (mask.sum() / tokens)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            fail(f"SFT, step {step}: the loss is {total}; lower --sft_lr")
        optimizer.clip_and_step()
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)


# --- Pairs and edits (A1, B1) ------------------------------------------------------------------------------

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


PROBLEM = ("id", "prompt", "split", "solution", "answer", "solutions", "rules")    # columns of problems.jsonl


def encode_response(tokenizer, text):
    """Token ids of a response, the end token included."""
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def last_text(text):
    """The text of a column that is a plain string or a list of chat messages, whose last one counts; None
    where it has none."""
    if text and isinstance(text, list):
        text = text[-1].get("content") if isinstance(text[-1], dict) else None
    return text if isinstance(text, str) and text.strip() else None


def check_text(name, value):
    """A text is a string, a list of chat messages, or absent; else a ValueError says what is wrong."""
    if not isinstance(value, (str, list, type(None))):
        raise ValueError(f"column `{name}` has the wrong type, {type(value).__name__}")
    messages = value if isinstance(value, list) else []
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str)
               and isinstance(message.get("content"), str) for message in messages):
        raise ValueError(f"column `{name}` is no list of chat messages with `role` and `content`")
    if isinstance(value, list) and name != "edited" and not last_text(value):
        raise ValueError(f"column `{name}` is empty")


def part_prompt(row):
    """(prompt, chosen, rejected) of a row of TRL's preference formats, where `chosen` and `rejected` may both
    begin with the prompt, implicit or repeated. Conversations part where their messages do, strings at the
    last word they share, or behind the last "Assistant:" of hh-rlhf. ValueError: why that cannot be."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        n = 0
        while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
            n += 1
        repeated = [None, chosen[:n]] + [message["content"] for message in chosen[:n]]
        if prompt not in repeated and n:
            raise ValueError("`chosen` and `rejected` begin with messages that are not those of `prompt`")
        if [message["role"] for message in chosen[n:] + rejected[n:]] != ["assistant"] * 2:
            raise ValueError("`chosen` and `rejected` are not one message of the role assistant each, behind "
                             "the same prompt")
        prompt, chosen, rejected = chosen[:n] or prompt, chosen[n:], rejected[n:]
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        start = os.path.commonprefix([chosen, rejected])
        found = re.match(r".*\n\nAssistant:|.*\s", start, re.S)
        prompt = found[0].removesuffix(" ") if found else ""
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        raise ValueError("no column `prompt`, and `chosen` and `rejected` do not begin with the same one")
    return prompt, chosen, rejected


def columns_of(path, kind):
    """(shape, columns with their types) of --data. Shapes: `prompts` (prompt[, response], for rules),
    `solutions` (prompt, solution, answer[, response]), `pairs` (prompt, chosen, rejected[, edited], or
    prompt, response, edited; an editor that writes does without `edited`)."""
    present = {name for row in read_jsonl(path, {}) for name in row}
    text = (str, list)
    if kind == "rules":
        return "prompts", {"prompt": text}
    solved = present & {"solution", "answer"}
    if len(solved) == 2 or solved and not present & {"chosen", "edited"}:
        shape, columns = "solutions", {"prompt": text, "solution": str, "answer": (str, int, float)}
    elif "chosen" in present or not present & {"response", "edited"}:
        shape, columns = "pairs", {"prompt": text, "chosen": text, "rejected": text}
        if "prompt" not in present and "edited" not in present:
            del columns["prompt"]                   # TRL's implicit format: both texts begin with it
    else:
        shape, columns = "pairs", {"prompt": text, "response": text}
        if kind not in WRITERS:
            columns["edited"] = (*text, type(None))
    if kind in ("nearest", "human") and (shape == "solutions") != (kind == "nearest"):
        fail(f"{path} does not fit --editor {kind}: nearest needs the columns `solution` and `answer`, human "
             "needs `edited`, or `chosen` and `rejected`")
    return shape, columns


def read_data(path, kind, drop, rules=()):
    """(shape, rows) of --data. A row has id and prompt, the response as `rejected`, and what its shape has:
    solution and answer, the patterns of the rules as its oracle, or `chosen` and `edited` (without `chosen`
    the edit is the preferred response). Rows without use are dropped and counted."""
    shape, columns = columns_of(path, kind)
    answers = {}

    def plain(row):
        """The row with plain texts; ValueError where it has none."""
        for name in ("prompt", "chosen", "rejected") if "chosen" in columns else ("prompt", "response"):
            check_text(name, row.get(name))
        if shape == "pairs":
            check_text("edited", row.get("edited"))
            three = row.get("prompt"), row.get("edited"), row.get("response")
            prompt, chosen, rejected = part_prompt(row) if "chosen" in columns else three
            return {"prompt": prompt, "chosen": last_text(chosen), "rejected": last_text(rejected),
                    "edited": last_text(row.get("edited"))}
        new = {"prompt": row["prompt"], "rejected": last_text(row.get("response")) or row.get("response")}
        if shape == "prompts":
            return {**new, "rules": [rule.pattern for rule, _ in rules]}
        answer = str(row["answer"])
        first = answers.setdefault(json.dumps(row["prompt"], sort_keys=True), answer)
        if answer != first and not right(answer, {"answer": first}):
            raise ValueError(f"column `answer` is {answer}, and an earlier row has {first}")
        return {**new, "solution": row["solution"], "answer": answer}

    def fault(row):
        try:
            plain(row)
        except ValueError as error:
            return str(error)

    rows = []
    for k, row in enumerate(read_jsonl(path, columns, fault)):
        new = {"id": f"row-{k}" if row.get("id") is None else str(row["id"]), **plain(row)}
        if shape == "solutions" and not right(new["solution"], new):
            drop["row's solution does not end in its answer"] += 1
        elif shape == "pairs" and new["rejected"] is None:
            drop["row has an empty response"] += 1
        elif shape == "pairs" and new["chosen"] is None and kind not in WRITERS:
            drop["row has no edit and no preferred response"] += 1
        elif shape == "pairs" and new["chosen"] == new["rejected"] and new["edited"] is None:
            drop["row has the same response twice"] += 1
        else:
            rows.append(new)
    return shape, rows


def check_texts(rows, tokenizer, path):
    """Refuse a tokenizer that gives back no text of the data as it was, as one that makes all letters small:
    token ids would stand for other texts. Where it only changes some, they are counted."""
    names = ("solution", "rejected", "edited", "chosen")
    texts = [text for row in rows for text in dict.fromkeys(row.get(name) for name in names) if text]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    unknown = tokenizer.unk_token_id
    known = [(text, tokenizer.decode(k, skip_special_tokens=True)) for text, k in zip(texts, ids)
             if unknown is None or unknown not in k]
    changed = [(text, back) for text, back in known if text.strip() != back.strip()]
    if known and len(changed) == len(known):
        fail(f"{path}: the tokenizer of {tokenizer.name_or_path} gives back no text as it was (it makes "
             f"{changed[0][1][:40]!r} of {changed[0][0][:40]!r}): choose another --model")
    if changed:
        print(f"the tokenizer changes {len(changed)} of {len(texts)} texts, as {changed[0][0][:40]!r}")
    if len(known) < len(texts):
        print(f"{len(texts) - len(known)} of {len(texts)} texts have words that the tokenizer does not know")


def encode_rows(rows, tokenizer, context, args, drop):
    """Add token ids to the rows of --data; what does not fit the context is dropped and counted. A row
    without a response needs room for a sample."""
    fitting = []
    for row in rows:
        row["prompt_ids"] = encode_prompt(tokenizer, row["prompt"], f"{args.data}, {row['id']}")
        longest = args.max_new_tokens if row["rejected"] is None else 1
        for name in ("solution", "chosen", "rejected", "edited"):
            if row.get(name) is not None:
                column = "preferred_ids" if name == "chosen" else f"{name}_ids"
                row[column] = encode_response(tokenizer, row[name])
                longest = max(longest, len(row[column]))
        if len(row["prompt_ids"]) + longest > context:
            drop[f"row is longer than the model's context of {context} tokens"] += 1
        else:
            fitting.append(row)
    return fitting


def split_by_prompt(rows, args):
    """One problem a prompt, with its `rows`; a split for all of them. At most 10 % for val and test each."""
    problems = {}
    for row in rows:
        problem = {name: row[name] for name in PROBLEM if name in row}
        key = json.dumps(row["prompt"], sort_keys=True)
        problems.setdefault(key, {**problem, "rows": []})["rows"].append(row)
    keys = random.Random(args.seed).sample(sorted(problems), len(problems))
    n_val = min(args.val_prompts, len(keys) // 10)
    n_test = min(args.test_prompts, len(keys) // 10)
    splits = ["val"] * n_val + ["test"] * n_test + ["train"] * (len(keys) - n_val - n_test)
    for key, split in zip(keys, splits):
        for part in (problems[key], *problems[key]["rows"]):
            part["split"] = split
    return list(problems.values())


def sample_solutions(problems, model, tokenizer, args):
    """A1, B1: add `samples` to the problems, args.samples solutions each, as the ids that were sampled."""
    size = max(1, args.sample_batch // args.samples)
    for start in trange(0, len(problems), size, desc="sampling", unit="batch"):
        batch = problems[start:start + size]
        prompts = [problem["prompt_ids"] for problem in batch for _ in range(args.samples)]
        ids = sample(model, prompts, tokenizer, args.max_new_tokens, args.temperature)
        for k, problem in enumerate(batch):
            problem["samples"] = ids[args.samples * k:args.samples * (k + 1)]


def pairs_of(problem, editor, tokenizer, drop):
    """A1: every sample that is worse than the best one, beside a best one (`chosen`) and its minimal edit.

    oracle: worse means more wrong steps, and the edit leads to the nearest of all right solutions.
    nearest (B1): worse means wrong, and the edit leads to the nearest right one of samples and reference; the
    reference is `chosen` where no sample is right.
    """
    samples = problem["samples"]
    texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
    oracle = has_oracle(problem) and editor != "nearest"
    wrong = [judge(text, problem)[0] if has_oracle(problem) else not right(text, problem) for text in texts]
    solutions = problem["solutions"] if oracle else [problem["solution"]]
    candidates = [encode_response(tokenizer, solution) for solution in solutions]
    best = [ids for ids, w in zip(samples, wrong) if w == min(wrong)]
    if not oracle and min(wrong) > 0:
        best = candidates
    elif not oracle:
        candidates += [ids for ids in best if ids[-1] == tokenizer.eos_token_id]
    worse = [n for n in range(len(samples)) if wrong[n] > min(wrong) or best is candidates]
    if not worse:
        drop["prompt: its samples are equally good, so nothing is worth an edit"] += 1
    pairs = []
    for k, n in enumerate(worse):
        preferred_ids, edited_ids = best[k % len(best)], nearest(samples[n], candidates)
        chosen, edited = tokenizer.batch_decode([preferred_ids, edited_ids], skip_special_tokens=True)
        pairs.append({**problem, "chosen": chosen, "rejected": texts[n], "edited": edited,
                      "preferred_ids": preferred_ids, "rejected_ids": samples[n], "edited_ids": edited_ids})
    return pairs


def spoil(pair, tokens, tokenizer, rng):
    """The edit of a careless editor: half of the time it misses an error (one operation is not done), else it
    changes one kept token without need, into another token of the data. Where the only operation is missed,
    nothing is edited, and a gate drops the pair."""
    rejected, edited = pair["rejected_ids"], list(pair["edited_ids"])
    path = align(rejected, edited)
    kept = [step for step in path if step[0] == "keep" and edited[step[2]] != tokenizer.eos_token_id]
    changed = [step for step in path if step[0] != "keep"]
    op, i, j = rng.choice(kept if kept and (not changed or rng.random() < 0.5) else changed)
    if op == "keep":
        edited[j] = rng.choice(tokens)
    elif op == "replace":
        edited[j] = rejected[i]
    elif op == "insert":
        del edited[j]
    else:
        edited.insert(j, rejected[i])
    text = tokenizer.decode(edited, skip_special_tokens=True)
    return {**pair, "edited_ids": edited, "edited": text, "editor": "careless"}


def gate(pair, editor, max_edit_share):
    """The quality gates. Why an edit is dropped and what to tell its editor, or (None, None)."""
    longest = max(len(pair["rejected_ids"]), len(pair["edited_ids"]))
    distance = edit_distance(pair["rejected_ids"], pair["edited_ids"])
    judged = editor != "careless"                                                 # it has no judge beside it
    if not distance:
        return "the edit changes nothing", "You changed nothing."
    if distance > max_edit_share * longest:
        return (f"the edit changes more than {max_edit_share:.0%} (--max_edit_share)",
                f"You changed {distance / longest:.0%} of the text; change at most {max_edit_share:.0%}.")
    if judged and has_oracle(pair) and judge(pair["edited"], pair)[0] >= judge(pair["rejected"], pair)[0]:
        return "the judge does not find the edit better", "Your text has no fewer errors than before."
    written = judged and "editor" in pair           # a solution at hand (nearest) is right already
    if written and not has_oracle(pair) and "answer" in pair and not right(pair["edited"], pair):
        return "the answer of the edit is wrong", "The final answer of your text is wrong."
    return None, None


def edit_row(pair, editor, max_edit_share, tokenizer, drop):
    """One row of edits.jsonl: E1 on (rejected, edited), the quality gates. None if a gate drops the pair.
    Where the prompt is a conversation, the responses are messages too, as other trainers want them."""
    columns = ("id", "split", "prompt", "solution", "answer", "solutions", "chosen", "rejected", "edited",
               "prompt_ids", "preferred_ids", "rejected_ids", "edited_ids")
    row = {**{name: pair[name] for name in columns if name in pair}, "editor": editor}
    for name in ("chosen", "rejected", "edited"):
        if isinstance(pair["prompt"], list) and row[name] is not None:
            row[name] = [{"role": "assistant", "content": row[name]}]
    if pair["edited"] is None:                      # a preference pair without an edit: for the baseline only
        return {**row, **dict.fromkeys(("editor", "edited_ids", "edit_ops", "edit_distance", "first_error"))}
    reason, _ = gate(pair, editor, max_edit_share)
    if reason:
        drop[f"gate: {reason}"] += 1
        return None
    ops = [step for step in align(pair["rejected_ids"], pair["edited_ids"]) if step[0] != "keep"]
    first_error = next((i for op, i, j in ops if op != "insert"), None)
    row.update(edit_ops=ops, edit_distance=len(ops), first_error=first_error)
    if "solution" in row:                           # B2: the step in which the first operation stands, from 1
        starts = step_starts(row["rejected_ids"], tokenizer)
        row["first_wrong_step"] = max(1, bisect_right(starts, ops[0][1])) if starts else None
    return row


# --- Editors that write text: an LLM on a server, a local model, a list of rules ---------------------------

LLM_PROMPT = """\
Make the response below {goal} with the smallest change that does it: replace, delete or insert only the \
words that must change and keep all others as they are. Return the text of the edited response alone.

Prompt:
{prompt}

{reference}Response:
{response}"""
SURE = r"(?:sure|certainly|of course|okay)[,.!]*\s*"
CHATTER = re.compile(rf"(?is)(?:{SURE}\n|(?:{SURE})?(?:here(?:’s|'s| is)[^\n:]{{0,60}}|"
                     r"(?:the )?(?:edited|corrected|revised|improved)(?: \w+){0,2}):\s*)(.*)")
REFUSAL = re.compile(r"(?i)(i['’]m|i am) (very )?sorry|sorry, |i (cannot|can['’]t|am unable)|as an ai")
FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.S)
QUOTES = re.compile(r"\"([^\"]*)\"|“([^“”]*)”|'(.*)'", re.S)
WRITERS = ("llm", "model")
UNKNOWN = "a word is not in the policy's vocabulary"
WAITS = [1, 2, 4, 8, 16, 32]            # seconds before each new try of a request that failed


def clean_answer(answer, original):
    """The edited text of an answer, without reasoning and chatter before it, code fences and quotes around
    it, unless the original has them too; white space at both ends as in the original."""
    if "</think>" not in original:
        answer = answer.split("</think>")[-1]
    text, bare = answer.strip(), original.strip()
    for around in (CHATTER, FENCE, QUOTES):
        found = around.fullmatch(text)
        if found and not around.fullmatch(bare):
            text = found[found.lastindex].strip()
    return original.replace(bare, text, 1) if text else ""


def check_editor(args):
    """(kind, file or folder, prompt) of --editor and its flags; what does not fit is said before any work."""
    if not re.fullmatch("(oracle|nearest|human|llm)?|(model|rules):.+", args.editor or ""):
        fail(f"--editor {args.editor}: choose oracle, nearest, human or llm, without a colon, or "
             "model:FOLDER or rules:FILE")
    kind, _, path = (args.editor or "").partition(":")
    if args.data and not args.model:
        fail("--data needs --model: the small policy knows only the words of the built-in tasks")
    if kind in (["oracle"] if args.data else ["human", "rules"]):
        fail(f"--editor {args.editor} does not fit: oracle knows the built-in tasks, human and rules need "
             "--data")
    if not args.data and kind != "nearest" and (args.samples == 1 or args.temperature == 0):
        fail("the oracle needs --samples of 2 or more and a --temperature above 0: it edits the worse of two")
    if args.hidden_size % 8:
        fail(f"--hidden_size {args.hidden_size}: it must be a multiple of 8, for four heads of even width")
    if kind == "llm":
        check_llm(args, "--editor llm")
    if kind == "model":
        open_tokenizer(path)
    return kind, path, read_template(args.llm_prompt, LLM_PROMPT, ["response"])


def with_edit(pair, edited, name, tokenizer, whole):
    """The pair with an edit that came as text. Both sides are encoded alike, or other ids for the same text
    would pass for edits. A response that was cut off has no end token; its edit has one if it is `whole`.
    None if the policy's vocabulary lacks a word of it."""
    ended = pair["rejected_ids"][-1:] == [tokenizer.eos_token_id]
    rejected_ids, edited_ids = (encode_response(tokenizer, text) for text in (pair["rejected"], edited))
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in rejected_ids + edited_ids and unknown not in pair["rejected_ids"]:
        return None
    new = {**pair, "editor": name, "edited": edited,
           "rejected_ids": rejected_ids if ended else rejected_ids[:-1],
           "edited_ids": edited_ids if ended or whole else edited_ids[:-1]}
    if new.get("chosen") is None:
        new.update(chosen=edited, preferred_ids=new["edited_ids"])
    return new


def read_answer(answer, pair, name, tokenizer, context):
    """(the pair with the edit that an editor's answer holds, None), or (None, why it holds none)."""
    text = clean_answer(answer, pair["rejected"])
    if REFUSAL.match(text.strip()) and not REFUSAL.match(pair["rejected"].strip()):
        return None, "it refuses"
    if not text:
        return None, "the answer is empty"
    new = with_edit(pair, text, name, tokenizer, whole=True)
    if new is None:
        return None, UNKNOWN
    if len(new["prompt_ids"]) + len(new["edited_ids"]) > context:
        return None, f"the edit is longer than the model's context of {context} tokens"
    return new, None


def write_edits(pairs, editor, template, tokenizer, context, args, drop):
    """A1: ask the editor for the edit of each pair, and up to K times again, with the reason, where a gate
    says no. What has no usable answer is dropped and counted here, what no retry could save in edit_row."""
    edited, jobs = {}, []
    for k, pair in enumerate(pairs):
        solution = pair.get("solution")
        reference = f"A right solution, for reference:\n{solution}\n\n" if solution else ""
        request = fill(template, pair["prompt"], response=pair["rejected"], reference=reference,
                       goal="right" if solution else "better")
        jobs.append((k, [{"role": "user", "content": request}]))
    for retries_left in range(args.llm_retries, -1, -1):
        answers = editor.ask_all([messages for _, messages in jobs])
        again = []
        for (k, messages), (answer, fault) in zip(jobs, answers):
            if not fault:
                new, fault = read_answer(answer, pairs[k], editor.name, tokenizer, context)
            if fault:
                if k not in edited:                 # else a gate counts the edit that it had
                    drop[f"editor: {fault}"] += 1
                continue
            edited[k] = new
            _, feedback = gate(new, editor.name, args.max_edit_share)
            if feedback and retries_left:
                feedback += " Try again, and return the text of the edited response alone."
                again.append((k, messages + [{"role": "assistant", "content": answer},
                                             {"role": "user", "content": feedback}]))
        jobs = again
    print(f"edits by {editor.name}: {editor.tokens['prompt']} prompt tokens and {editor.tokens['answer']} "
          "answer tokens used")
    return [edited[k] for k in sorted(edited)]


# what follows, up to LlmClient, stands in 04_eval.py too

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


class ModelEditor:
    """A local causal language model, through its chat template if it has one."""

    def __init__(self, args, path):
        self.args, self.name, self.tokens = args, path, Counter()
        self.tokenizer = open_tokenizer(path, chat=True)
        self.model = fit(open_model(AutoModelForCausalLM, path, args.dtype), self.tokenizer).to(args.device)

    def ask_all(self, conversations):
        """(answer, fault) of every conversation, args.llm_workers at once."""
        limit, tokenizer = self.args.llm_max_tokens, self.tokenizer
        context = context_of(self.model)
        if tokenizer.chat_template is None:
            conversations = ["\n\n".join([message["content"] for message in messages]) + "\n\nEdited:\n"
                             for messages in conversations]
        prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
        answers = [("", f"prompt and answer exceed its context of {context} tokens")] * len(prompts)
        fitting = [k for k, ids in enumerate(prompts) if len(ids) + limit <= context]
        for start in trange(0, len(fitting), self.args.llm_workers, desc="model edits", unit="batch"):
            batch = fitting[start:start + self.args.llm_workers]
            rows = sample(self.model, [prompts[k] for k in batch], tokenizer, limit,
                          self.args.llm_temperature)
            for k, ids in zip(batch, rows):
                cut = ids[-1] != tokenizer.eos_token_id
                answers[k] = (tokenizer.decode(ids, skip_special_tokens=True),
                              "the answer is cut off (--llm_max_tokens)" if cut else None)
                self.tokens += Counter(prompt=len(prompts[k]), answer=len(ids))
        return answers


def read_rules(path):
    """Rules of a file: a regular expression, a tab and its replacement a line; # begins a comment."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error})")
    rules = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, tab, replacement = line.rstrip("\r").partition("\t")
        if not tab:
            fail(f"{path}, line {number}: no tab between pattern and replacement")
        try:
            rule = re.compile(pattern)
            rule.sub(replacement, "")               # a replacement may name a group that is not there
        except (re.error, IndexError) as error:
            fail(f"{path}, line {number}: no regular expression with its replacement ({error})")
        if rule.search(""):
            fail(f"{path}, line {number}: the pattern matches the empty text")
        rules.append((rule, replacement))
    return rules or fail(f"{path}: has no rules")


def rule_pairs(problem, rules, name, tokenizer, drop):
    """A1: every sample with a hit, beside the sample with the fewest (`chosen`; the edit where none has
    fewer), and its minimal edit, in which each hit is replaced."""
    samples = problem["samples"]
    texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
    hits = [judge(text, problem)[0] for text in texts]
    best = hits.index(min(hits))
    pairs = []
    for ids, text, n in zip(samples, texts, hits):
        pair = {**problem, "rejected": text, "rejected_ids": ids}
        if n > hits[best]:
            pair.update(chosen=texts[best], preferred_ids=samples[best])
        for rule, replacement in rules:
            text = rule.sub(replacement, text)
        pair = with_edit(pair, text, name, tokenizer, whole=False)
        if n and pair:
            pairs.append(pair)
        elif n:
            drop[f"editor: {UNKNOWN}"] += 1
    if not any(hits):
        drop["prompt: no rule hits its samples"] += 1
    return pairs


# --- What one sees -----------------------------------------------------------------------------------------

def paint(text, code):
    """Text in an ANSI colour; plain where the output is no terminal or NO_COLOR is set."""
    colour = code and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{code}m{text}\033[0m" if colour else text


def token_texts(ids, tokenizer):
    """The text that each token adds to the ones before it, spaces included."""
    texts = [tokenizer.decode(ids[:k]).rstrip("\ufffd") for k in range(len(ids))]       # half a character
    texts.append(tokenizer.decode(ids))
    return [longer[len(shorter):] for shorter, longer in zip(texts, texts[1:])]


def diff(row, tokenizer):
    """The rejected response with its edit, [-deleted-] in red and {+inserted+} in green."""
    old, new = token_texts(row["rejected_ids"], tokenizer), token_texts(row["edited_ids"], tokenizer)
    shown = []
    for kept, steps in groupby(align(row["rejected_ids"], row["edited_ids"]), lambda step: step[0] == "keep"):
        steps = list(steps)
        deleted = "".join(old[i] for op, i, j in steps if op != "insert")
        inserted = "".join(new[j] for op, i, j in steps if op != "delete")
        if kept:
            shown.append(deleted)
            continue
        shown.append(paint(f"[-{deleted}-]", 31) if deleted else "")
        shown.append(paint(f"{{+{inserted}+}}", 32) if inserted else "")
    return "".join(shown)


def report(rows, drop, tokenizer):
    """Three coloured diffs, what was dropped and why, and the statistics of the edits."""
    edits = [row for row in rows if row["edit_ops"]]
    if edits:
        print("\nThree minimal edits, [-deleted-] and {+inserted+}:")
    for row in edits[:3]:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        print(f"  {' '.join(prompt.split())}\n    {diff(row, tokenizer).strip()}")
    print()
    for reason, count in drop.items():
        print(f"dropped {count:6d}  {reason}")
    splits = Counter(row["split"] for row in rows)
    print(f"kept    {len(rows):6d}  pairs: " + ", ".join(f"{n} {split}" for split, n in splits.items()))
    careless = sum(row["editor"] == "careless" for row in rows)
    if careless:
        print(f"        {careless:6d}  of them with a worse edit (--worse_edits)")
    if edits:
        ops = Counter(op for row in edits for op, i, j in row["edit_ops"])
        tokens = sum(len(row["rejected_ids"]) for row in edits)
        median = sorted(row["edit_distance"] for row in edits)[len(edits) // 2]
        print(f"edits: median distance {median} tokens, "
              f"{1 - (ops['replace'] + ops['delete']) / tokens:.1%} of the tokens kept; "
              + ", ".join(f"{n} {op}" for op, n in ops.most_common()))


# --- The stage ---------------------------------------------------------------------------------------------

def write_jsonl(path, rows):
    """Rows as JSONL, whole or absent."""
    part = Path(f"{path}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def check_run_folder(args):
    """Refuse a run folder that holds something else; True if the stage is done already."""
    if Path(args.run).exists() and not Path(args.run).is_dir():
        fail(f"{args.run}: no folder; name another --run")
    saved = Path(args.run) / "01_args.json"
    if args.overwrite or not saved.exists():
        return False
    try:
        old = json.loads(saved.read_text())
        for name in ("task", "data", "model", "seed"):
            if old[name] != getattr(args, name):
                fail(f"{args.run} was made with --{name} {old[name]}: name another --run, or add --overwrite")
    except (ValueError, KeyError, TypeError):
        fail(f"{saved}: not the arguments of a run: name another --run, or add --overwrite")
    return (Path(args.run) / "edits.jsonl").exists()


def make_pairs(shape, problems, editor, rules, model, tokenizer, args, drop):
    """A1, B1: the pairs of the data, or those that samples of the policy (or of the data) make with their
    edits; of the training problems only the first args.pair_prompts."""
    n = args.pair_prompts or (len(problems) if args.data else {"math": 10000, "qa": 5200}[args.task])
    train = [k for k, problem in enumerate(problems) if problem["split"] == "train"]
    spare = set(train[n:])
    used = [problem for k, problem in enumerate(problems) if k not in spare]
    if shape == "pairs":
        return [row for problem in used for row in problem["rows"]]
    for problem in used:
        problem["samples"] = [row["rejected_ids"] for row in problem.get("rows", []) if "rejected_ids" in row]
    sample_solutions([problem for problem in used if not problem["samples"]], model, tokenizer, args)
    if shape == "prompts":
        return [pair for problem in used for pair in rule_pairs(problem, rules, editor, tokenizer, drop)]
    is_right = [right(tokenizer.decode(ids, skip_special_tokens=True), problem)
                for problem in used for ids in problem["samples"]]
    print(f"{sum(is_right) / len(is_right):.1%} of {len(is_right)} solutions are right")
    return [pair for problem in used for pair in pairs_of(problem, editor, tokenizer, drop)]


def main(args):
    check_args(args)
    kind, editor_path, template = check_editor(args)
    if check_run_folder(args):
        print(f"{args.run}/edits.jsonl is there already; --overwrite makes it again")
        return

    # problems: from the built-in task, or the rows of the data
    rng = random.Random(args.seed)
    drop = Counter()
    rules = read_rules(editor_path) if kind == "rules" else []
    if args.data:
        shape, rows = read_data(args.data, kind, drop, rules)
    else:
        shape, rows = "task", []
        task = {"math": Math, "qa": Qa}[args.task](args.seed)
        problems = make_problems(task, args, rng)
    editor = args.editor or {"task": "oracle", "solutions": "nearest", "pairs": "human"}[shape]

    # policy: fine-tuned on imperfect demonstrations, so that it errs as a real policy does
    path = Path(args.run) / "policy"
    continued = path.exists() and not args.overwrite
    source = path if continued else args.model
    if continued:
        print(f"{path} is there already and is kept as it was made; --overwrite makes it again")
    if source:
        tokenizer = open_tokenizer(source, any(isinstance(row["prompt"], list) for row in rows))
        model = fit(open_model(AutoModelForCausalLM, source, args.dtype), tokenizer)
    if args.data:
        check_texts(rows, tokenizer, args.data)
        problems = split_by_prompt(encode_rows(rows, tokenizer, context_of(model), args, drop), args)
    train = [problem for problem in problems if problem["split"] == "train"]
    if shape == "task":
        shown = [(problem, task.demonstration(problem, rng)) for problem in train]
    elif shape == "solutions":
        shown = [(problem, problem["solution"]) for problem in train]
    else:
        shown = [(problem, row["rejected"]) for problem in train for row in problem["rows"]]
        shown = [(problem, text) for problem, text in shown if text]
    steps = args.sft_steps if args.sft_steps is not None else (0 if args.data else 600)
    if not train or steps and not shown:
        fail(f"{args.data}: no row is left to train on: {dict(drop)}; --sft_steps needs responses")
    run = start_stage(args, "01")
    if args.overwrite:                              # what is old would pass for new, even if this call fails
        for name in ("policy", "problems.jsonl", "edits.jsonl", "reward_*", "ppo_*", "value_*", "rlmec*",
                     "eval.json", "report.html", "verdicts_*.json"):
            for old in run.glob(name):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    if not source:
        model, tokenizer = small_policy(task.texts, args)
    model.to(args.device, getattr(torch, args.dtype))
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    for problem in problems:
        problem["prompt_ids"] = encode_prompt(tokenizer, problem["prompt"])
    if not continued:
        if steps:
            demonstrations = [(problem["prompt_ids"], encode_response(tokenizer, text))
                              for problem, text in shown]
            fine_tune(model, tokenizer, demonstrations, args, steps)
        save_model(model, tokenizer, path)
    write_jsonl(run / "problems.jsonl", [{name: problem[name] for name in PROBLEM if name in problem}
                                         for problem in problems])

    # pairs and their minimal edits
    if kind in WRITERS:
        torch.manual_seed(args.seed)                # a second call samples the responses of the first again
    pairs = make_pairs(shape, problems, editor, rules, model, tokenizer, args, drop)
    if kind in WRITERS:
        writer = (LlmClient(args, run / "llm_edits.jsonl", "LLM edits") if kind == "llm"
                  else ModelEditor(args, editor_path))
        pairs = write_edits(pairs, writer, template, tokenizer, context_of(model), args, drop)
    if args.worse_edits:
        tokens = sorted({token for pair in pairs for token in pair["rejected_ids"][:-1]})
        for k, pair in enumerate(pairs):
            edited = pair["edited"] and pair["edited_ids"] != pair["rejected_ids"]
            if pair["split"] == "train" and edited and rng.random() < args.worse_edits:
                pairs[k] = spoil(pair, tokens, tokenizer, rng)
    rows = [edit_row(pair, pair.get("editor", editor), args.max_edit_share, tokenizer, drop)
            for pair in tqdm(pairs, desc="edits", unit="pair")]
    rows = [row for row in rows if row]
    if not rows:
        fail(f"no pair is left: {dict(drop)}")
    write_jsonl(run / "edits.jsonl", rows)
    report(rows, drop, tokenizer)
    print(f"\n{run}/policy  {run}/problems.jsonl  {run}/edits.jsonl")


if __name__ == "__main__":
    main(HfArgumentParser(Args).parse_args_into_dataclasses()[0])

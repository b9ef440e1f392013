"""Stage 1: a policy, its problems, and its wrong responses, each with its minimal edit.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, 2401.06081): E1 (minimum
edit), A1 (preference pairs), B1 (editing task) and the data of B2. A row of edits.jsonl has:
    x          prompt     6+2-6+4-3=
    y_l, y^    rejected   6+2=8;-6=2;+4=6;-3=0    a response of the policy; its last step is wrong
    y_e, y~    edited     6+2=8;-6=2;+4=6;-3=3    its minimal edit
               edit_ops   [["replace", 19, 19]]   token 19 of rejected becomes 19 of edited
    y_w        chosen     a better response to the same prompt; null where there is none
Simplified against the papers:
  1. The editor is an oracle that knows all right solutions. --data may hold the edits of people;
     --editor model:NAME asks a language model, which also writes RUN/annotations.jsonl.
  2. The policy is a small Llama, fine-tuned on demonstrations with errors; or --model.
  3. Fewer wrong steps are preferred; paper B, and --data with `answer`, see the answer alone.
  4. Two samples a problem at temperature 1; RLMEC's code draws five at 0.7, without duplicates.
Reads --data FILE, or nothing. Writes RUN/policy, problems.jsonl and edits.jsonl.
Command: python 01_edit_data.py
"""

import json
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from os.path import commonprefix
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm, trange

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()
arg = lambda default, help: hf.hf_argparser.HfArg(default=default, help=help)


@dataclass
class Args:
    run: str = "runs/default"
    seed: int = arg(1, "of the task, the policy and its samples")
    overwrite: bool = arg(False, "remove what later stages made")
    task: Literal["math", "qa"] = arg("math", "built-in task")
    data: str = arg(None, "JSONL file of your own, in place of a task")
    model: str = arg(None, "causal LM (name or path) in place of the small policy")
    editor: str = arg(
        None, "oracle, nearest, human, rules:FILE or model:NAME; default: what fits the data")
    editor_request: str = arg(None, "file with the request to model:NAME, in place of ours")
    editor_tokens: int = arg(512, "longest answer of model:NAME, its thoughts included")
    max_edit_share: float = arg(0.8, "gate: edit distance over length, at most")
    train_prompts: int = arg(16000, "training prompts of a task")
    edit_prompts: int = arg(11000, "training prompts whose responses are edited, at most")
    test_prompts: int = arg(1000, "test prompts; a quarter as many for validation")
    sft_steps: int = arg(None, "SFT: optimiser steps; default: 500, or 0 with --data")
    sft_batch: int = arg(128, "SFT: rows per optimiser step")
    sft_lr: float = arg(None, "SFT: of AdamW, cosine; default: 3e-3, with --model 1e-5")
    hidden_size: int = arg(64, "width of the small policy: 16, 32, ...")
    samples: int = arg(2, "B1: responses sampled for a prompt")
    max_new_tokens: int = arg(48, "longest response sampled")
    micro_batch: int = arg(500, "rows of a forward pass: memory, not mathematics")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


# --- The built-in tasks ---
# Both are so easy that a small model can check a single step: only then can a reward be learnt.
PEOPLE = ("Ada Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Kit Lena Mia Ned Olga Paul Rita Sam Tess "
          "Uma Vera Walt Yara Zoe Abe Bea Cal Dora Ed Flo").split()
GOODS = ("bread soap rope glass paper honey shoes lamps tea salt cloth nails wine cheese drums "
         "jam").split()
TOWNS = ("Oslo Rome Bern Lima Cairo Paris Delhi Quito Tunis Sofia Malmo Turin Kyoto Derry Ghent "
         "Graz").split()
RUDE = [", you fool.", ", as even a child knows.", ", but my feet hurt."]


def stays_digit(terms):
    """Do all sums on the way stay single digits? [3, 2, -1] -> True, since 3, 5, 4 do."""
    return all(0 <= value <= 9 for value in accumulate(terms))


def math_problem(rng):
    """Four operations on single digits, and a demonstration with errors: `3+2-1+4-6=` has the
    solution `3+2=5;-1=4;+4=8;-6=2` and perhaps the demonstration `3+2=5;-1=5;+4=9;-6=3`."""
    terms = [-1]  # draw until every value on the way is a digit
    while not stays_digit(terms):
        terms = [rng.randint(0, 9)]
        for _ in range(4):
            terms.append(rng.choice((-1, 1)) * rng.randint(1, 9))

    right = said = terms[0]  # the value so far, and what the demonstration takes it for
    solution = demonstration = str(right)
    for k, x in enumerate(terms[1:], 1):
        right += x
        said += x
        if rng.random() < 0.25:  # an error, after which the rest still stays in single digits
            others = [y for y in range(10) if y != said and stays_digit([y, *terms[k + 1:]])]
            said = rng.choice(others or [said])
        solution += f"{x:+d}={right};"
        demonstration += f"{x:+d}={said};"

    return {
        "prompt": "".join(f"{x:+d}" for x in terms)[1:] + "=",  # the first term has no plus
        "answer": str(right),
        "solutions": [solution[:-1]],
        "demonstration": demonstration[:-1],
    }


def qa_problem(rng, makes, home):
    """Who sends what where: makes and home say what each person makes and where each lives. The
    solution " One makes tea. The other makes jam. The friend lives in Rome. So tea and jam go to
    Rome." is one of four right ones; the demonstration is one of them with errors."""
    a, b, c = rng.sample(PEOPLE, 3)
    x = makes[a]
    y = makes[b]
    town = home[c]

    voices = [
        f" One makes {x}. The other makes {y}. The friend lives in {town}.",
        f" The first gift is {x}. The second gift is {y}. The home is {town}.",
    ]
    answers = [f"They send {x} and {y} to {town}.", f"So {x} and {y} go to {town}."]
    solutions = []
    for voice in voices:
        solutions += [f"{voice} {answer}" for answer in answers]

    text = rng.choice(solutions)
    for names in (GOODS, TOWNS):  # 13 % of the names give way to a random one
        swap = lambda match: rng.choice(names) if rng.random() < 0.13 else match[0]
        text = re.sub("|".join(names), swap, text)

    steps = STEP.findall(text)  # its sentences
    if rng.random() < 0.08:  # a step is missing, not the answer
        del steps[rng.randrange(3)]
    if rng.random() < 0.1:  # one is rude or strays
        k = rng.randrange(len(steps))
        steps[k] = steps[k][:-1] + rng.choice(RUDE)

    return {
        "prompt": f"Q: What do {a} and {b} send to their friend {c}, and where?\nA:",
        "solutions": solutions,
        "answer": answers[0],
        "demonstration": " " + " ".join(steps),
    }


def make_problems(args):
    """The problems of a task. No prompt comes twice: the splits are disjoint."""
    rng = random.Random(args.seed)
    splits = ["train"] * args.train_prompts + ["test"] * args.test_prompts
    splits += ["val"] * (args.test_prompts // 4)
    makes = {person: rng.choice(GOODS) for person in PEOPLE}
    home = {person: rng.choice(TOWNS) for person in PEOPLE}

    problems = {}  # by prompt
    for _ in range(20 * len(splits)):  # some are drawn twice, and a task may not have enough
        problem = math_problem(rng) if args.task == "math" else qa_problem(rng, makes, home)
        if problem["prompt"] in problems:
            continue
        number = len(problems)
        problems[problem["prompt"]] = {
            "id": f"{args.task}-{number}",
            "split": splits[number],
            "solution": problem["solutions"][0],
            "responses": [],  # the policy will write them
            **problem,
        }
        if len(problems) == len(splits):
            return [*problems.values()]

    fail(f"--task {args.task} has only {len(problems)} different prompts: lower --train_prompts "
         "or --test_prompts")


# --- Right and wrong ---
# A step of a solution: "3+2=5;" in a chain of sums, a sentence, or a line
STEP = re.compile(r"""
    [^\s;]          # begins with any character but a space,
    [^\n;]*?        # goes on within its line,
    (?: ;           # and ends with a semicolon,
      | \.(?=\s)    # with a full stop before a space,
      | $ )         # or with the line
    """, re.VERBOSE | re.MULTILINE)

# A final answer is MARKER OPENING answer CLOSING UNITS CLOSING END: for example
#   "The answer is", " **x = $", "1,200.00", "**", " dollars a year", nothing, "." and a new line
# UNITS refuses every word that makes another number of it
MARKER = r"(?i:answer[\s*_]*(?:is|was|would be|[:=])|####|\\boxed\{)"
OPENING = r"[\s:*_`\"'(\[{$€£=+\\]*(?:[a-zA-Z] ?= ?|text\{)?"
CLOSING = r"[*_`\"')\]}$\\ ]{0,9}"
UNITS = (  # "18 dollars", but not "18 million" or "18 plus"
    r"(?: (?!(?i:or|and|to|out|over|times|plus|minus|divided|squared|cubed|per ?cent|point|versus|"
    r"vs|pi|[b-z]|bn|lakhs?|crores?|dozens?|pairs?|hal(?:f|ves)|thirds?|quarters?|(?:less|more|"
    r"fewer) than|hundreds?|thousands?|[mbtr]+illions?|one|two|three|four|five|six|seven|eight|"
    r"nine|ten|eleven|twelve|\w+teen|\w+ty|below|negative|pct|basis|mil|mio|mn|grand|gross|kilo|"
    r"factorial|doubled|twice|less|at|"
    r"\w*(?:four|fif|six|seven|eigh|nin|ten|elf|teen|tie|dred|sand)ths?)\b)[A-Za-z]+)*"
)
END = (  # of the text, line or sentence; or an aside
    r"(?=\.?[*_`\"')\]}$]{0,9}(?:\s*$|(?<=\.)\s+(?!(?i:or)\b)[^\W\d]"
    r"|\n(?!\s*(?:[-+*/^=×÷%,;]|(?i:or|and|[mb]illion|thousand|hundred)\b)))"
    r"| \((?!\s*(?:[-+%\d]|(?i:or|mod|no|in|hundreds?|thousands?|[mb]illions?|squared)\b))"
    r"|(?:, not|,? (?:for|since|because))\b(?![^.\n]*(?:\band|\bor|,) ?[-+]?\d))"
)


def answer_pattern(answer):
    """A regular expression that re.search finds in a right response: behind its last marker,
    `answer is`, `answer:`, `####` or `\\boxed{`, stands a number of the same value, or the very
    words of the answer. "1200" is found in "It is so. The answer is $1,200.00 a year." but not in
    "The answer is 1200 or 1300": no operator, fraction, ratio, power, number or "or" follows."""
    answer = answer.strip()
    number = re.fullmatch(  # its sign, its whole part, its decimals
        r"[$€£]?([-−]?)[$€£]?(\d+|\d{1,3}(?:,\d{3})+|(?=\.\d))(?:\.(\d*))?", answer)
    if number:
        sign, whole, fraction = number.groups(default="")
        whole = whole.replace(",", "").lstrip("0")
        fraction = fraction.rstrip("0")
        gold = r"[-−–] ?[$€£]?" if sign else ""
        gold += re.sub(r"\B(?=(\d{3})+$)", ",?", whole) or "0?"  # 1,?000,?000
        gold += rf"\.{fraction}0*" if fraction else r"(?<=\d)(?:\.0+)?"  # 5.0
    else:
        gold = r"\s*".join(re.escape(word) for word in answer.split()) or "(?!)"  # never
        if len(answer) > 1:  # a letter, A, is not the word a
            gold = f"(?i:{gold})"

    words = ""
    if number:
        words = UNITS
    elif len(answer) == 1:  # "(B) Paris"
        words = rf"(?:(?<=\)){UNITS})?"
    return rf"(?s){MARKER}(?!.*{MARKER}){OPENING}{gold}{CLOSING}{words}{CLOSING}{END}"


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


# --- E1: the minimum edit ---
def edit_ops(a, b):
    """E1: the operations of one optimal path from a to b, each [op, i, j] with op in replace,
    delete, insert, i an index in a, j in b; their number is the edit distance ED(a, b).

    edit_ops("kitten", "sitting") -> [["replace", 0, 0], ["replace", 4, 4], ["insert", 6, 6]]
    """
    # the common beginning is kept; the rest is aligned
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    a = np.array([*a[start:]])
    b = np.array([*b[start:]])
    differ = a[:, None] != b  # (len(a), len(b))

    # D[i, j], the distance of a[:i] and b[:j], is the least of
    #   D[i-1, j] + 1 (delete), D[i-1, j-1] + [a_i != b_j] (replace or keep), D[i, j-1] + 1 (insert)
    offsets = np.arange(len(b) + 1)  # 0, 1, 2, ...: the cost of insertions alone
    D = np.arange(len(a) + 1)[:, None] + offsets
    for i in range(1, len(a) + 1):
        delete = D[i - 1, 1:] + 1
        replace = D[i - 1, :-1] + differ[i - 1]
        D[i, 1:] = np.minimum(delete, replace)
        # insertions run along the row: D[i, j] = min over k <= j of D[i, k] + (j - k)
        D[i] = np.minimum.accumulate(D[i] - offsets) + offsets

    # from the last cell back to the first
    ops = []
    i = len(a)
    j = len(b)
    while i > 0 or j > 0:
        if i > 0 and j > 0 and not differ[i - 1, j - 1]:  # equal: kept
            i -= 1
            j -= 1
        elif i > 0 and D[i, j] == D[i - 1, j] + 1:
            i -= 1
            ops.append(["delete", start + i, start + j])
        elif D[i, j] == D[i, j - 1] + 1:
            j -= 1
            ops.append(["insert", start + i, start + j])
        else:
            i -= 1
            j -= 1
            ops.append(["replace", start + i, start + j])
    return ops[::-1]


# --- B1: responses of the policy ---
def sample_responses(problems, model, encoder, args):
    """B1: the problems, each with `responses`: those of --data, else --samples of the policy."""
    # by length: the longest prompt of a batch limits the room for its responses
    jobs = []
    for problem in sorted(problems, key=lambda problem: len(problem["prompt_ids"])):
        if not problem["responses"]:  # --data has none
            jobs += [problem] * args.samples
    samples = generate(model, encoder.tokenizer, [problem["prompt_ids"] for problem in jobs], args)

    sampled = defaultdict(list)  # id of a problem -> its responses
    for problem, drawn in zip(jobs, samples):
        ended = drawn[-1] in encoder.ends
        text, ids, verbatim = encoder.encode_sample(problem, drawn, ended)
        sampled[problem["id"]].append({
            "from_data": False,
            "ended": ended,
            "verbatim": verbatim,
            "rejected": text,  # right or wrong: the name of its column
            "rejected_ids": ids,
            "wrong_steps": wrong_steps(text, ended, problem),
            "chosen": None,
            "chosen_token_ids": None,
            "edited": None,
        })
    return [{**p, "responses": p["responses"] or sampled[p["id"]]} for p in problems]


# --- A1, B1: the edit and its row ---
# `row` is a response on its way to edits.jsonl: the columns of its problem and its own, then those
# of its edit, then those of the better response. These are written:
EDIT_COLUMNS = (
    "id split prompt prompt_ids chosen rejected edited editor rejected_ids edited_ids edit_ops "
    "chosen_token_ids chosen_ops first_error first_wrong_step"
).split()


def edit_responses(problems, editor, rules, args, encoder):
    """The rows of edits.jsonl, and a count of the responses without a row, by reason. B1: a row for
    every wrong response with a usable edit. B2: rows of right ones, which it leaves alone."""
    rows = []
    right_rows = []
    reasons = Counter()
    for problem in tqdm(problems, desc="edits"):
        for response in problem["responses"]:
            row = problem | response
            ended = editor != "rules" or row["ended"]  # rules change words, they end nothing
            row |= nearest_edit(row["rejected_ids"], accepted(editor, row, rules, encoder))  # B1
            row |= preferred(row, editor)  # A1

            reason = gate(row, ended, args)
            if reason is not None:
                reasons[reason] += 1
            elif row["wrong_steps"] == 0:
                right_rows.append(edit_row(row, editor, encoder.tokenizer))
            else:
                rows.append(edit_row(row, editor, encoder.tokenizer))

    # B2: right responses in the proportion of usable edits; none where rules judge, since breaking
    # no rule does not make a response right
    usable = len(rows) / max(1, len(rows) + reasons.total())
    rng = random.Random(args.seed)
    kept = [row for row in right_rows if editor != "rules" and rng.random() < usable]
    reasons["response: right"] = len(right_rows) - len(kept)
    return rows + kept, reasons


def accepted(editor, row, rules, encoder):
    """The (text, ids) that an editor accepts in place of a response; none where it has no edit."""
    if row["wrong_steps"] == 0:  # B2: a right response is its own edit
        return [(row["rejected"], row["rejected_ids"])]
    if editor == "oracle":  # knows every right solution
        return [(text, encoder.encode_response(row, text)) for text in row["solutions"]]
    if editor == "nearest":  # knows one, and which responses are right
        right = [(sibling["rejected"], sibling["rejected_ids"])
                 for sibling in row["responses"] if sibling["wrong_steps"] == 0]
        return [(row["solution"], row["solution_ids"]), *right]
    if editor == "human":  # a person, or a language model, has edited some responses
        return [(row["edited"], row["edited_ids"])] if row["edited"] else []

    text = row["rejected"]  # rules replace what they match
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    ids = encoder.encode_response(row, text, False, row["verbatim"])
    if row["ended"]:
        ids = ids + row["rejected_ids"][-1:]
    return [(text, ids)]


def nearest_edit(rejected_ids, texts):
    """B1: y~ = argmin ED(y^, y) over the (text, ids) of an editor: its text, ids, operations."""
    edits = []
    for text, ids in texts:
        ops = edit_ops(rejected_ids, ids)  # E1: ED is their number
        edits.append({"edited": text, "edited_ids": ids, "edit_ops": ops})

    no_edit = {"edited": None, "edited_ids": None, "edit_ops": None}
    return min(edits, key=lambda edit: len(edit["edit_ops"]), default=no_edit)  # B1


def preferred(row, editor):
    """A1: y_w, the better response of the pair: `chosen` and `chosen_token_ids` where they are not
    what --data prefers; and `chosen_ops` (E1), null where nothing but the edit is preferred."""
    errors = row["wrong_steps"]
    if errors:  # known, and not right: is a sibling, a response to the same prompt, better?
        best = min(row["responses"], key=lambda sibling: sibling["wrong_steps"])
        if best["wrong_steps"] < errors:
            return {
                "chosen": best["rejected"],
                "chosen_token_ids": best["rejected_ids"],
                "chosen_ops": edit_ops(row["rejected_ids"], best["rejected_ids"]),
            }

    # nothing is preferred, but a person, a language model or a rule has edited: the edit makes the
    # pair of a response of --data, and of a sample whose siblings nobody can judge
    alone = row["from_data"] or errors is None
    if alone and editor in ("human", "rules") and row["edit_ops"] and row["chosen"] is None:
        return {
            "chosen": row["edited"],
            "chosen_token_ids": row["edited_ids"],
            "chosen_ops": None,
        }

    if row["chosen"] is None or row["chosen_token_ids"] == row["edited_ids"]:
        return {"chosen_ops": None}
    return {"chosen_ops": edit_ops(row["rejected_ids"], row["chosen_token_ids"])}


def gate(row, ended, args):
    """B1: why a response and its edit make no row of edits.jsonl; None if they make one. ended:
    does the edited response end?"""
    ops = row["edit_ops"]
    errors = row["wrong_steps"]  # None where nobody knows

    if row["chosen_token_ids"] == row["rejected_ids"]:
        return "pair: chosen and rejected are the same"
    if ops is None:  # a preferred response still makes a pair, for A6
        return "editor: no edit" if row["chosen"] is None else None
    if not row["edited_ids"]:
        return "gate: the edit leaves nothing"
    if ops == [] and errors != 0:
        return "gate: the edit changes nothing"
    if len(ops) > args.max_edit_share * max(len(row["rejected_ids"]), len(row["edited_ids"])):
        return f"gate: the edit changes more than {args.max_edit_share:.0%}"
    if errors and wrong_steps(row["edited"], ended, row) >= errors:  # a row has its problem
        return "gate: the edit is not better"
    return None


def edit_row(row, editor, tokenizer):
    """The row of edits.jsonl; the header shows one."""
    new = {**row, "editor": editor, "first_error": None, "first_wrong_step": None}
    if editor == "human" and row.get("editor"):
        new["editor"] = row["editor"]  # the annotator's name

    if row["edit_ops"]:  # the first operation stands at the first error
        op, i, _ = row["edit_ops"][0]
        if op != "insert":  # a missing token stands nowhere
            new["first_error"] = i
        # the text as far as the first error, whose character may have up to four tokens
        for stop in range(i + 1, i + 5):
            before = tokenizer.decode(row["rejected_ids"][:stop], skip_special_tokens=True)
            if not before.endswith("\ufffd"):  # half a character: does not show its step yet
                break
        new["first_wrong_step"] = max(1, len(STEP.findall(before)))

    if isinstance(row["prompt"], list):  # a chat: its responses are messages, too
        for name in ("chosen", "rejected", "edited"):
            if row[name] is not None:
                new[name] = [{"role": "assistant", "content": row[name]}]

    return {name: new[name] for name in EDIT_COLUMNS}


# --- Plumbing: nothing to learn below this line ---
# --- The policy ---
# B2: the fixed words in the generative model's prompts
INSTRUCTIONS = {
    "solution": "\nReference solution:\n",
    "attempt": "\nAttempt:\n",
    "rewrite": "\nCorrected attempt:\n",
    "locate": "\nFirst wrong step:\n",
}


def small_policy(problems, args):
    """A small Llama; its tokens are words, characters, and B2's instructions and step labels."""
    pattern = " ?[A-Za-z]+|[^A-Za-z]"
    tokens = set()
    for problem in problems:
        for text in [problem["prompt"], problem["demonstration"], *problem["solutions"]]:
            tokens.update(re.findall(pattern, text))

    vocabulary = ["<pad>", "<unk>", "</s>", *sorted(tokens)]
    numbers = {token: k for k, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    labels = [f"[{k}]" for k in range(1, 10)]
    tokenizer.add_tokens([*INSTRUCTIONS.values(), *labels])

    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=3,
        intermediate_size=2 * args.hidden_size,
        num_attention_heads=args.hidden_size // 16,
        tie_word_embeddings=True,
        initializer_range=0.08,  # with the usual 0.02 a model this small learns slower
        rope_theta=100.0,  # and with the usual 10,000
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return hf.LlamaForCausalLM(config), tokenizer


def open_policy(args):
    """--model, in float32, since it is trained."""
    return open_language_model("--model ", args.model, torch.float32)


def open_language_model(option, name, dtype):
    """A model and its tokenizer, made fit for all stages: its pad token ends nothing, every
    embedding has a token (one without could be drawn), and its config names its context and what
    ends a turn. option: where the user has named it."""
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = hf.AutoTokenizer.from_pretrained(name)
        # a token as stage 3 draws it: with positions, and a cache from which rows are taken
        ids = torch.zeros(2, 1, dtype=torch.long)
        output = model(ids, attention_mask=ids + 1, position_ids=ids, use_cache=True,
                       logits_to_keep=torch.tensor([-1]))
        output.past_key_values.reorder_cache(torch.tensor([1]))
    except Exception as error:  # transformers raises many kinds
        fail(f"{option}{name} is no causal LM that can be opened, and sampled from with "
             f"positions and a cache of keys and values: {error!r:.150}")

    ends = turn_ends(model, tokenizer)
    if not ends:
        fail(f"{option}{name}: its tokenizer has no end token, so no response can end")
    if tokenizer.pad_token_id in (None, *ends):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)

    config = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    config.update({
        "max_position_embeddings": context or 10**9,  # some models name no limit
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    })
    # others' `generate` stops there, too
    model.generation_config = hf.GenerationConfig.from_model_config(config)
    return model, tokenizer


def turn_ends(model, tokenizer):
    """The ids that end a response: that of a turn, then those of the tokenizer and the model."""
    own = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    ends = [template_end(tokenizer), tokenizer.eos_token_id, *own]
    return [end for end in dict.fromkeys(ends) if end is not None]


def template_end(tokenizer):
    """The id that ends an assistant's turn: the special or added token that the chat template puts
    behind it; None without such a token. A line break ends nothing."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes-Yes"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # no template, or one that refuses such a chat: then it refuses the rows, too
        return None

    _, _, behind = text.partition("Yes-Yes")  # nothing, if the template does not show it
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    marks.discard(tokenizer.unk_token_id)
    for token in tokenizer(behind, add_special_tokens=False).input_ids:
        if token in marks and tokenizer.decode([token]).strip():
            return token
    return None


def fine_tune(model, tokenizer, problems, args):
    """The SFT policy: maximum likelihood of the demonstrations, or of the solutions of --data."""
    steps = args.sft_steps
    if steps is None:
        steps = 0 if args.data else 500

    examples = [(p["prompt_ids"], p.get("demonstration_ids", p["solution_ids"]))
                for p in problems if "solution" in p]

    rng = random.Random(args.seed)
    collate = hf.DataCollatorForSeq2Seq(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), args.sft_lr, (0.9, 0.95), weight_decay=0.0)
    schedule = hf.get_scheduler("cosine", optimizer, round(0.03 * steps), steps)

    for _ in trange(steps, desc=f"SFT, learning rate {args.sft_lr}"):
        batch = rng.sample(examples, min(args.sft_batch, len(examples)))
        N = sum(len(y) for x, y in batch)  # target tokens of the whole batch
        for part in batches(batch, args.micro_batch):
            # -100: no loss on the prompt
            rows = [{"input_ids": x + y, "labels": [-100] * len(x) + y} for x, y in part]
            inputs = collate(rows).to(args.device)
            loss = model(**inputs, num_items_in_batch=N, use_cache=False).loss  # divided by N
            loss.backward()

        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


# --- What a user wrote ---
class Dropped(Exception):
    """Why a row of --data is left out."""


def chat_of(row, name):
    """A column of --data that is a list of chat messages; None where it is a string or missing."""
    turns = row.get(name)
    if turns is None or isinstance(turns, str):
        return None
    if not (turns and isinstance(turns, list) and all(map(is_turn, turns))):
        fail(f"{row['place']}: column `{name}` is no text: write a string, or a list of chat "
             "messages, each with `role` and `content`")
    if not all(isinstance(turn.get("content"), str) for turn in turns):
        raise Dropped("chat: a turn is not text alone (a tool call, parts, an image)")
    return turns


def is_turn(turn):
    return isinstance(turn, dict) and "role" in turn


def response_of(row, name):
    """The text of a response column, and the turns before it. A chat's response is its last turn;
    a string has no turns: None."""
    turns = chat_of(row, name)
    if turns is None:
        return row.get(name), None
    *before, last = turns
    more = any(map(last.get, ("tool_calls", "reasoning_content", "thinking")))
    if last["role"] != "assistant" or not last["content"] or more:
        raise Dropped("chat: it does not end with words of the assistant")
    return last["content"], before


def prompt_of(row, histories):
    """The prompt of a row: a string; or a chat, if it is one or its responses end one. histories:
    the turns before the response, of each column that is a chat; they belong to the prompt."""
    if not row["prompt"]:
        fail(f"{row['place']}: column `prompt` is empty")
    prompt = chat_of(row, "prompt")
    if prompt is None:
        prompt = [{"role": "user", "content": row["prompt"]}]
        if not histories:
            return row["prompt"]

    turns = histories[0] if histories else []
    if any(history != turns for history in histories):
        raise Dropped("chat: its columns differ before the last turn")
    if not turns or turns[0]["role"] == "assistant":  # they go on from the prompt
        turns = prompt + turns
    elif any(turn not in turns for turn in prompt):
        raise Dropped("chat: its columns do not repeat its prompt")
    if turns[-1]["role"] == "assistant":
        raise Dropped("chat: its prompt ends with words of the assistant")
    return turns


def needed_columns(row, rules, editor):
    """The columns that every row of --data needs beside `prompt`: the first row shows its shape."""
    if rules:  # prompt[, response]: rules edit the responses, or else the policy's
        return []
    if "chosen" in row:  # prompt, chosen, rejected[, edited]: preference pairs
        return ["chosen", "rejected"]
    if "answer" in row:  # prompt, solution, answer[, response[, edited]]: problems
        return ["solution", "answer"]
    if is_model(editor):  # prompt[, response]: it edits them, or else the policy's
        return []
    return ["response"]  # prompt, response[, edited]: edits


def data_problem(row, columns, rules, number):
    """The problem of a row of --data, with its response, if it has one."""
    for name in columns:
        if name not in row:
            fail(f"{row['place']}: the column {name!r} is missing; by the columns of the first "
                 f"row, every row needs {columns}")

    texts = {}
    histories = []
    for name in ("response", "rejected", "chosen", "edited", "solution"):
        texts[name], history = response_of(row, name)
        if history is not None:
            histories.append(history)
    problem = {
        "id": f"row-{number}",
        "prompt": prompt_of(row, histories),
        "rules": [*rules],
        "responses": [],
    }
    if "answer" in columns:
        if not texts["solution"]:
            fail(f"{row['place']}: column `solution` is no text: write a string")
        problem |= {"solution": texts["solution"], "answer": str(row["answer"])}
        problem["right"] = answer_pattern(problem["answer"])
        if not re.search(problem["right"], problem["solution"]):
            raise Dropped("row: its solution does not end in its answer")

    rejected = texts["response"] if texts["rejected"] is None else texts["rejected"]
    if rejected is None and columns and "answer" not in columns:
        raise Dropped("row: its response is null")
    if rejected is not None:
        problem["responses"].append({
            "from_data": True,
            "ended": True,
            "verbatim": False,
            "rejected": rejected,
            "wrong_steps": wrong_steps(rejected, True, problem),
            "chosen": texts["chosen"] or None,
            "chosen_token_ids": None,  # until encode_problem
            "edited": texts["edited"],
            "editor": row.get("editor") if texts["edited"] else None,
        })
    return problem


def read_data(args, rules):
    """The problems of --data, one a prompt, each with its responses; and a count of the rows that
    were left out, by reason."""
    if not args.model:
        fail("--data needs --model: the small policy knows the words of the built-in tasks alone")
    rows = read_jsonl(args.data, "prompt")
    columns = needed_columns(rows[0], rules, args.editor)
    if args.sft_steps and "solution" not in columns:
        fail(f"--sft_steps: {args.data} has no column `solution` from which the policy can learn")

    few = len({str(row["prompt"]) for row in rows}) < 20
    dropped = Counter()
    problems = {}  # by prompt; where these are few, each row is a problem of its own
    for k, row in enumerate(rows):
        try:
            problem = data_problem(row, columns, rules, k)
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        key = k if few else str(problem["prompt"])
        first = problems.setdefault(key, problem)
        if first is not problem:
            first["responses"] += problem["responses"]

    if not problems:
        fail(f"{args.data}: no row is left; dropped: {dict(dropped)}. A solution must end in its "
             "answer, as in `The answer is ...`; a chat in a turn of the assistant")
    problems = with_splits([*problems.values()], args)
    if few:
        places = {(str(problem["prompt"]), problem["split"]) for problem in problems}
        prompts = {prompt for prompt, split in places}
        print(f"{args.data} has fewer than 20 prompts, so its rows are split one by one: "
              f"{len(places) - len(prompts)} duplicates of prompts over the splits")
    return problems, dropped


def with_splits(problems, args):
    """The problems of --data in random order, a tenth each for test and validation."""
    tenth = max(1, len(problems) // 10)
    splits = ["test"] * min(tenth, args.test_prompts)
    splits += ["val"] * min(tenth, args.test_prompts // 4)
    splits += ["train"] * len(problems)
    problems = random.Random(args.seed).sample(problems, len(problems))
    return [{**problem, "split": split} for problem, split in zip(problems, splits)]


def read_rules(editor):
    """The rules of rules:FILE, regular expression -> replacement; other editors have none."""
    if not editor.startswith("rules:"):
        return {}

    path = editor.removeprefix("rules:")
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
        rules = dict(line.split("\t") for line in lines if line)
        for pattern, replacement in rules.items():
            re.sub(pattern, replacement, "")  # an error in either shows here
    except Exception as error:
        fail(f"{path}: each line needs a regular expression, a tab and its replacement ({error})")

    if not rules:
        fail(f"{path}: has no rules")
    return rules


def choose_editor(args, problems, rules):
    """The name of --editor, or of the first editor that fits the problems."""
    if rules:
        usable = ["rules"]
    elif not args.data:
        usable = ["oracle", "nearest"]
    elif "answer" not in problems[0]:
        usable = ["human"]
    elif any(map(has_edit, problems)):
        usable = ["human", "nearest"]
    else:
        usable = ["nearest"]
    if args.data and not rules:
        usable.append("model")

    editor = (args.editor or usable[0]).partition(":")[0]
    if editor not in usable:
        fail(f"--editor {editor}: it does not fit these problems; what fits is {usable}")
    return editor


def has_edit(problem):
    return any(response["edited"] for response in problem["responses"])


def is_model(editor):
    return editor is not None and editor.startswith("model:")


# --- A language model that edits: --editor model:NAME ---
# A paragraph with {solution} is left out where there is no reference solution
REQUEST = """\
Correct the response to the prompt below. Change as few words as possible and keep all others as \
they are. Answer with the corrected response alone.

Prompt:
{prompt}

A right solution:
{solution}

Response:
{response}"""
# What an answer may have beside the edit: thoughts, or what stands around the whole
THOUGHTS = re.compile(r"""
    \A .* [<\[◁]\|? / (?:think|thinking|thought|reasoning) \|?[>\]▷]    # as far as the last ends,
  | \A\s* [<\[◁]\|? (?:think|thinking|thought|reasoning) \|?[>\]▷] .*  # or one without end
    """, re.VERBOSE | re.IGNORECASE | re.DOTALL)
WRAPPINGS = [
    re.compile(r"```[^\n`]*\n((?:(?!```).)*?)\s*```", re.DOTALL),
    re.compile("\"([^\"]*)\""),
    re.compile("“([^“”]*)”"),
    re.compile(r"'((?:[^']|(?<=\w)'(?=\w))*)'"),  # an apostrophe ends nothing
]


def open_annotator(args):
    """The model of --editor model:NAME, its tokenizer, and the request, ours or a file's."""
    name = args.editor.removeprefix("model:")
    model, tokenizer = open_language_model("--editor model:", name, "auto")
    try:
        request_ids("Hello", tokenizer)
    except Exception as error:  # templates raise many kinds
        fail(f"--editor {args.editor}: it has no chat template that takes a request; name an "
             f"instruct model ({error!r:.80})")

    request = REQUEST
    if args.editor_request:
        try:
            request = Path(args.editor_request).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            fail(f"--editor_request {args.editor_request}: {error}")
        if "{response}" not in without_solution(request):
            fail(f"--editor_request {args.editor_request}: it needs {{response}}, in another "
                 "paragraph than {solution}; {prompt} is replaced, too")
    return model, tokenizer, request


def without_solution(request):
    """The request without its paragraphs that have a {solution}."""
    return "\n\n".join(part for part in request.split("\n\n") if "{solution}" not in part)


def fill_request(request, problem, response):
    """The request for the edit of one response."""
    values = {
        "prompt": prompt_text(problem["prompt"]),
        "solution": problem.get("solution", ""),
        "response": response["rejected"],
    }
    if not values["solution"]:
        request = without_solution(request)
    return re.sub(r"\{(prompt|solution|response)\}", lambda match: values[match[1]], request)


def request_ids(request, tokenizer):
    """The ids of a request as a chat, and the thought that its template opens at the end, or ""."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False)
    thought = OPEN_THOUGHT.search(text)
    return tokenizer(text, add_special_tokens=False).input_ids, thought[0] if thought else ""


def ask(requests, model, tokenizer, args):
    """request -> the annotator's answer, its likeliest tokens; None for one that did not end. A
    request that is longer than its context is left out. Answers are appended to
    RUN/annotations.jsonl as each batch comes, and what it has is not asked again."""
    path = Path(args.run) / "annotations.jsonl"
    name = args.editor.removeprefix("model:")
    answers = {}
    for row in whole_rows(path):
        # an answer that did not end is asked for again with more room
        more_room = row["answer"] is None and row["editor_tokens"] < args.editor_tokens
        if row["editor"] == name and not more_room:
            answers[row["request"]] = row["answer"]

    context = model.config.max_position_embeddings
    jobs = []  # (ids, request, the thought that is open behind the ids)
    for request in dict.fromkeys(requests):
        ids, thought = request_ids(request, tokenizer)
        if request not in answers and len(ids) < context:
            jobs.append((ids, request, thought))
    jobs.sort(key=lambda job: len(job[0]))
    # a batch has the room that its longest request leaves: those that leave less go one by one
    short = [job for job in jobs if len(job[0]) + args.editor_tokens <= context]
    parts = batches(short, args.micro_batch) + batches(jobs[len(short):], 1)

    model = model.to(args.device)
    limits = replace(args, max_new_tokens=args.editor_tokens)
    ends = np.atleast_1d(model.config.eos_token_id)
    for part in tqdm(parts, desc=args.editor):
        outputs = generate(model, tokenizer, [ids for ids, _, _ in part], limits, temperature=0)
        rows = []
        for (_, request, thought), output in zip(part, outputs):
            answer = None
            if output[-1] in ends:
                answer = thought + tokenizer.decode(output[:-1])
            answers[request] = answer
            rows.append({"editor": name, "editor_tokens": args.editor_tokens,
                         "request": request, "answer": answer})
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return answers


def edited_text(answer, response):
    """The edit in an answer, with the spaces around the response; "" where nothing is left.

    edited_text('<think>So 5.</think> "It is 5."', " It is 4.") -> " It is 5."
    """
    text = answer if THOUGHTS.search(response) else THOUGHTS.sub("", answer)
    text = text.strip()
    for wrapping in WRAPPINGS:
        whole = wrapping.fullmatch(text)
        if whole and not wrapping.fullmatch(response.strip()):
            text = whole[1].strip()
    if not text:
        return ""
    before = re.match(r"\s*", response)[0]
    behind = re.search(r"\s*\Z", response[len(before):])[0]
    return before + text + behind


def annotate(problems, annotator, encoder, context, args):
    """B1: the problems, where each response that has no edit, and is not known to be right, has the
    annotator's: `edited`, `edited_ids`, `editor`. Prints how many have none, by reason. context:
    the policy's."""
    model, tokenizer, request = annotator
    name = args.editor.removeprefix("model:")
    annotated = []
    jobs = []  # (request, problem, response)
    for problem in problems:
        problem = {**problem, "responses": [{**row} for row in problem["responses"]]}
        annotated.append(problem)
        for response in problem["responses"]:
            if response["edited"]:  # by a person
                continue
            response["editor"] = name
            if response["wrong_steps"] != 0:
                jobs.append((fill_request(request, problem, response), problem, response))
    answers = ask([filled for filled, _, _ in jobs], model, tokenizer, args)

    reasons = Counter()
    for filled, problem, response in jobs:
        if filled not in answers:
            reasons["the request is longer than its context"] += 1
            continue
        if answers[filled] is None:
            reasons["the answer did not end within --editor_tokens"] += 1
            continue
        text = edited_text(answers[filled], response["rejected"])
        if text in ("", response["rejected"]):
            reasons["the answer changes nothing" if text else "the answer is empty"] += 1
            continue
        ids = encoder.encode_response(problem, text, True, response["verbatim"])
        if response["ended"]:  # of several end tokens, the response's own
            ids = ids[:-1] + response["rejected_ids"][-1:]
        if len(problem["prompt_ids"] + ids) > context:
            reasons["the edit is longer than the policy's context"] += 1
            continue
        response |= {"edited": text, "edited_ids": ids}
    print(f"--editor {args.editor}: {len(jobs)} responses; without an edit: {dict(reasons)}")
    return annotated


# --- Token ids ---
ID_COLUMNS = {  # a text -> its token ids
    "solution": "solution_ids",
    "demonstration": "demonstration_ids",
    "rejected": "rejected_ids",
    "chosen": "chosen_token_ids",
    "edited": "edited_ids",
}
# A thought that a generation prompt opens, at its end: <think>, [THINK], ...
OPEN_THOUGHT = re.compile(
    r"[<\[◁]\|?(think|thinking|thought|reasoning)\|?[>\]▷]\s*$", re.IGNORECASE)


class Encoder:
    """Texts to token ids: a response is what the tokenizer, or its chat template, makes of it
    behind its prompt. ends: all ids that end a response."""

    def __init__(self, tokenizer, ends):
        self.tokenizer = tokenizer
        self.ends = ends
        # what ends a turn of a chat (None: nothing does), and what ends any other text
        self.turn_end = template_end(tokenizer)
        self.text_end = ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.notes = Counter()  # how many responses were out of the ordinary, by what it was
        # the tokens with which every text begins
        self.begin = commonprefix([tokenizer("a").input_ids, tokenizer("").input_ids])

    def plain_ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text_ids(self, text, is_chat):
        """The ids of a whole text with one begin token: a chat has what its template writes, and a
        string that already begins with it gets no second."""
        ids = self.plain_ids(text)
        if is_chat or ids[:len(self.begin)] == self.begin:
            return ids
        return self.begin + ids

    def encode_prompt(self, prompt):
        """The text up to where the response begins, and its ids."""
        is_chat = isinstance(prompt, list)
        if is_chat:
            if self.tokenizer.chat_template is None:
                fail("--data has chat messages, but --model no chat template: write strings")
            text = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True)
            if prompt[-1]["content"].strip() not in text:
                raise ValueError("its text is not shown")
        else:
            text = prompt
        return {"prompt_text": text, "prompt_ids": self.text_ids(text, is_chat)}

    def encode_response(self, problem, text, ended=True, verbatim=False):
        """The ids of a response, with its end if it ended. verbatim: without the chat template."""
        ids, notes = self.behind_prompt(problem, text, ended, verbatim)
        self.notes.update(notes)
        return ids

    def behind_prompt(self, problem, text, ended, verbatim):
        """The ids that `encode_response` returns, and what is out of the ordinary: counted only if
        these ids are used."""
        notes = []
        prompt = problem["prompt_text"]
        is_chat = isinstance(problem["prompt"], list)
        thought = OPEN_THOUGHT.search(prompt)
        behind = text
        # the prompt has opened the thought, so the response does not open it again
        if thought and text.lstrip().startswith(thought[0].strip()):
            behind = text.lstrip().removeprefix(thought[0]).removeprefix(thought[0].strip())

        whole = prompt + behind
        if is_chat and not verbatim:
            turn = {"role": "assistant", "content": text}
            turns = [*problem["prompt"], turn]
            rendered = self.tokenizer.apply_chat_template(turns, tokenize=False)
            if rendered.startswith(prompt):
                whole = rendered
            else:
                notes.append("behind the generation prompt, where the template does not show it")
        if thought and f"/{thought[1]}" not in whole[len(prompt):]:
            notes.append("leaves the thought open that its prompt opens")

        ids = self.text_ids(whole, is_chat)
        P = len(problem["prompt_ids"])
        if ids[:P] == problem["prompt_ids"]:
            ids = ids[P:]
        else:
            notes.append("encoded apart from its prompt, since a token would straddle the border")
            ids = self.encode_apart(whole[len(prompt):], problem["prompt_ids"])

        end = self.text_end
        if self.turn_end is not None:
            if is_chat or self.tokenizer.decode([self.turn_end]) in prompt:  # it is rendered
                end = self.turn_end
            # what stands behind the end of a turn belongs to no turn
            while is_chat and end in ids and ids[-1] != end:
                ids = ids[:-1]
        if not ids or ids[-1] not in self.ends:
            ids = ids + [end]
        return ids if ended else ids[:-1], notes

    def encode_apart(self, text, prompt_ids):
        """The ids of a text that goes on behind a prompt, encoded without it. Some tokenizers put a
        space before a text, so it is encoded behind an anchor, whose ids are cut off: behind the
        first one with which prompt and text are decoded exactly, else behind the first."""
        decode = self.tokenizer.decode
        ways = []
        for anchor in ("\n", decode([self.text_end])):
            ways.append(self.plain_ids(anchor + text)[len(self.plain_ids(anchor)):])
        exact = [ids for ids in ways if decode(prompt_ids + ids) == decode(prompt_ids) + text]
        return (exact + ways)[0]

    def encode_sample(self, problem, drawn, ended):
        """The text and the ids of a response that the policy drew; and whether it is verbatim, that
        is, the text as it is behind the prompt, where the template would write it otherwise. The
        ids stay as drawn, unless the tokenizer splits the text otherwise, which an edit would
        show: then it is encoded anew."""
        prompt_ids = problem["prompt_ids"]
        body = drawn[:-1] if ended else drawn
        no_text = [self.tokenizer.pad_token_id, self.tokenizer.unk_token_id]
        decoded = self.tokenizer.decode(prompt_ids + [t for t in body if t not in no_text])
        text = decoded[len(self.tokenizer.decode(prompt_ids)):]
        near = text.removeprefix(" ")  # decode may write a space behind a special token
        if isinstance(problem["prompt"], str):
            ways = [(text, False), (near, False)]
        else:  # some templates write a space before the response
            ways = [(text.strip(), False), (near, False), (text, True), (near, True)]

        tries = []  # the best is as drawn, the next best decodes to the same text
        for said, verbatim in ways:
            ids, notes = self.behind_prompt(problem, said, False, verbatim)
            unlike = [ids != body, self.tokenizer.decode(prompt_ids + ids) != decoded]
            tries.append((unlike, said, verbatim, ids, notes))
            if ids == body:
                break
        _, said, verbatim, ids, notes = min(tries, key=lambda attempt: attempt[0])

        self.notes.update(notes)
        if ids != body:
            self.notes["sample: encoded anew, its tokens are not the tokenizer's own"] += 1
        return said, ids + drawn[len(body):], verbatim

    def encode_problem(self, problem, args):
        """The problem with `prompt_ids`, the ids of its texts and of its responses, and `tokens`:
        the length of its prompt and its longest response."""
        problem = problem | self.encode_prompt(problem["prompt"])
        problem["responses"] = [{**response} for response in problem["responses"]]
        longest = args.max_new_tokens
        for row in [problem, *problem["responses"]]:
            for name, id_name in ID_COLUMNS.items():
                if row.get(name) is not None:
                    row[id_name] = self.encode_response(problem, row[name])
                    longest = max(longest, len(row[id_name]))
        return problem | {"tokens": len(problem["prompt_ids"]) + longest}


# --- Helpers, the same in several scripts ---
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


def check_counts(args, *may_be_zero):
    """Whole numbers among the flags are counts, at least 1; the seed is none."""
    for name, value in vars(args).items():
        least = 0 if name in may_be_zero else 1
        if type(value) is int and name != "seed" and value < least:
            fail(f"--{name} {value}: it must be at least {least}")


def prompt_text(prompt):
    """A prompt as one text; a chat of several messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def batches(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]


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


# --- The stage ---
LATER = "reward_* ppo_* rlmec* rejection* dpo* 03_state.pt responses.* eval.* report.*".split()


def marked(row, tokenizer):
    """The edit of a row in one text: `6+2=8;-6=2;+4=6;-3=[-0-]{+3+}`."""
    old = token_texts(row["rejected_ids"], tokenizer)
    new = token_texts(row["edited_ids"], tokenizer)
    for op, i, j in reversed(row["edit_ops"]):  # from the end: an insertion moves what follows
        if op == "insert":
            old.insert(i, f"{{+{new[j]}+}}")
        elif op == "delete":
            old[i] = f"[-{old[i]}-]"
        else:
            old[i] = f"[-{old[i]}-]{{+{new[j]}+}}"
    return "".join(old).strip()


def report(rows, dropped, encoder):
    """Print three edits, how many rows there are, and what was dropped."""
    edited = [row for row in rows if row["edit_ops"]]
    for row in edited[:3]:
        prompt = row["prompt"]
        if isinstance(prompt, list):  # a chat: its last message
            prompt = prompt[-1]["content"]
        print(" ".join(prompt.split()))
        print("    " + marked(row, encoder.tokenizer))

    pairs = sum(row["chosen"] is not None for row in rows)
    print(f"{len(rows)} rows: {len(edited)} edits, {pairs} with a preferred response; "
          f"dropped: {dict(dropped)}")
    if encoder.notes:
        print(f"responses: {dict(encoder.notes)}")


def fitting(problems, encoder, context, dropped, args):
    """The problems with their token ids, where they fit the model's context; the others are counted
    in `dropped`."""
    fit = []
    for problem in problems:
        try:
            problem = encoder.encode_problem(problem, args)
        except Exception as error:  # a role that the template refuses, or a broken character
            reason = f"problem: the tokenizer or its chat template refuses it ({error!s:.80})"
            dropped[reason] += 1
            continue
        if problem["tokens"] <= context:
            fit.append(problem)
        else:
            dropped["problem: longer than the model's context"] += 1
    if not fit:
        fail(f"no problem is left; dropped: {dict(dropped)}. The model's context has {context} "
             "tokens, for a prompt and its longest response or --max_new_tokens")
    return fit


def problem_row(problem):
    """A row of problems.jsonl: the columns that the problem has."""
    columns = "id split prompt prompt_ids solution solution_ids answer solutions rules right"
    return {name: problem[name] for name in columns.split() if problem.get(name)}


def main(args):
    check_counts(args, "sft_steps", "edit_prompts", "test_prompts")
    if args.sft_lr is None:
        args.sft_lr = 1e-5 if args.model else 3e-3
    torch.manual_seed(args.seed)
    run = Path(args.run)

    # the problems, of --data or of a task, and who edits
    rules = read_rules(args.editor or "")
    problems, dropped = read_data(args, rules) if args.data else (make_problems(args), Counter())
    editor = choose_editor(args, problems, rules)
    annotator = open_annotator(args) if editor == "model" else None  # its faults show before SFT

    # the policy, and with its tokenizer the ids of every text
    model, tokenizer = open_policy(args) if args.model else small_policy(problems, args)
    model = model.to(args.device)
    context = model.config.max_position_embeddings
    encoder = Encoder(tokenizer, np.atleast_1d(model.config.eos_token_id).tolist())
    fit = fitting(problems, encoder, context, dropped, args)
    training = [problem for problem in fit if problem["split"] == "train"]
    held_out = [problem for problem in fit if problem["split"] != "train"]

    # SFT
    start_stage(args, "01", LATER)
    (run / "edits.jsonl").unlink(missing_ok=True)  # the edits of another policy
    fine_tune(model, tokenizer, training, args)
    save_model(run / "policy", model, tokenizer)
    write_jsonl(run / "problems.jsonl", [problem_row(problem) for problem in fit])

    # B1: responses; A1, B1: the edits of the wrong ones
    used = sample_responses(training[:args.edit_prompts] + held_out, model, encoder, args)
    if annotator:
        used = annotate(used, annotator, encoder, context, args)
        editor = "human"  # from here on, its edits are like those of a person
    rows, reasons = edit_responses(used, editor, rules, args, encoder)
    dropped["problem: beyond --edit_prompts"] = len(fit) - len(used)
    dropped = dropped + reasons  # a sum of Counters has no zeros
    if not rows:
        fail(f"no response has a usable edit: {dict(dropped)}")
    write_jsonl(run / "edits.jsonl", rows)
    report(rows, dropped, encoder)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # whatever the console can show
    main(Args(**vars(hf.HfArgumentParser(Args).parse_args())))

"""Stage 1: a policy, its problems, and its wrong responses, each with its minimal edit.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, 2401.06081): E1 (minimum
edit), A1 (preference pairs), B1 (editing task) and the data of B2. A row of edits.jsonl has:
    x          prompt     6+2-6+4-3=
    y_l, y^    rejected   6+2=8;-6=2;+4=6;-3=0    a response of the policy; its last step is wrong
    y_e, y~    edited     6+2=8;-6=2;+4=6;-3=3    its minimal edit
               edit_ops   [["replace", 19, 19]]   token 19 of rejected becomes 19 of edited
    y_w        chosen     a better response to the same prompt; null where there is none
Simplified against the papers:
  1. The editor is an oracle that knows all right solutions; --data has those of people or LLMs.
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
from dataclasses import dataclass
from itertools import accumulate, zip_longest
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
    editor: str = arg(None, "oracle, nearest, human or rules:FILE; default: what fits the data")
    max_edit_share: float = arg(0.8, "gate: edit distance over length, at most")
    train_prompts: int = arg(16000, "training prompts of a task")
    edit_prompts: int = arg(11000, "training prompts whose responses are edited, at most")
    test_prompts: int = arg(1000, "test prompts; a quarter as many for validation")
    sft_steps: int = arg(None, "SFT: steps of 128 rows; default: 500, or 0 with --data")
    sft_lr: float = arg(3e-3, "SFT: learning rate of AdamW, cosine")
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

NUMBER = re.compile(r"""
    (?<![\w:/.])        # not the end of a word, a time 12:30, a fraction 1/2 or a decimal
    (?<!}{)             # nor the denominator of \frac{1}{2}
    -?\$?\d[\d,]*       # -$1,250
    (?:\.\d+)?          # .50
    (?![\w:/]|[.,]\d)   # not the beginning of one of these
    (?!}{)              # nor the numerator
    """, re.VERBOSE)


def final_answer(text):
    """The first number (or line) after the last `answer is` or `####`; without such a mark the
    last number (or line) of the text. "It costs $1,200.00." -> "1200"."""
    *marked, tail = re.split(r"(?i)answer is:?|####", text)
    candidates = NUMBER.findall(tail) or tail.strip().split("\n")
    answer = candidates[0] if marked else candidates[-1]
    answer = re.sub(r"(\.\d*?)0*$", r"\1", answer.strip())  # 3.140 is 3.14
    return re.sub(r"[$,]", "", answer).rstrip(".")


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
    elif problem.get("answer"):
        wrong = int(final_answer(text) != final_answer(problem["answer"]))
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
def sample_responses(problems, model, tokenizer, args):
    """B1: the problems, each with `responses`: those of --data, else --samples of the policy."""
    # by length: the longest prompt of a batch limits the room for its responses
    jobs = []
    for problem in sorted(problems, key=lambda problem: len(problem["prompt_ids"])):
        if not problem["responses"]:  # --data has none
            jobs += [problem] * args.samples
    samples = generate(model, tokenizer, [problem["prompt_ids"] for problem in jobs], args)

    sampled = defaultdict(list)  # id of a problem -> its responses
    for problem, ids in zip(jobs, samples):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ended = ids[-1] == tokenizer.eos_token_id
        sampled[problem["id"]].append({
            "from_data": False,
            "ended": ended,
            "rejected": text,  # right or wrong: the name of its column
            "rejected_ids": encode(text, ended, tokenizer),  # anew, like an edit
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
    "chosen_token_ids first_error first_wrong_step"
).split()


def edit_responses(problems, editor, rules, args, tokenizer):
    """The rows of edits.jsonl, and a count of the responses without a row, by reason. B1: a row for
    every wrong response with a usable edit. B2: rows of right ones, which it leaves alone."""
    rows = []
    right_rows = []
    reasons = Counter()
    for problem in tqdm(problems, desc="edits"):
        for response in problem["responses"]:
            row = problem | response
            ended = editor != "rules" or row["ended"]  # rules change words, they end nothing
            texts = editor_texts(editor, row, rules)
            row |= nearest_edit(row["rejected_ids"], texts, ended, tokenizer)  # B1
            row |= preferred(row, editor)  # A1

            reason = gate(row, ended, args)
            if reason is not None:
                reasons[reason] += 1
            elif row["wrong_steps"] == 0:
                right_rows.append(edit_row(row, editor, tokenizer))
            else:
                rows.append(edit_row(row, editor, tokenizer))

    # B2: right responses in the proportion of usable edits; none where rules judge, since breaking
    # no rule does not make a response right
    usable = len(rows) / max(1, len(rows) + reasons.total())
    rng = random.Random(args.seed)
    kept = [row for row in right_rows if editor != "rules" and rng.random() < usable]
    reasons["response: right"] = len(right_rows) - len(kept)
    return rows + kept, reasons


def editor_texts(editor, row, rules):
    """The texts that an editor accepts in place of a response; none where it has no edit."""
    if row["wrong_steps"] == 0:  # B2: a right response is its own edit
        return [row["rejected"]]
    if editor == "oracle":  # knows every right solution
        return row["solutions"]
    if editor == "nearest":  # knows one, and which responses are right
        right = [sibling["rejected"] for sibling in row["responses"] if sibling["wrong_steps"] == 0]
        return [row["solution"], *right]
    if editor == "human":  # a person, or an LLM, has edited some responses of --data
        return [row["edited"]] if row["edited"] else []

    text = row["rejected"]  # rules replace what they match
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return [text]


def nearest_edit(rejected_ids, texts, ended, tokenizer):
    """B1: y~ = argmin ED(y^, y) over the texts y of an editor: its text, ids and operations."""
    edits = []
    for text in texts:
        edited_ids = encode(text, ended, tokenizer)
        ops = edit_ops(rejected_ids, edited_ids)  # E1: ED is their number
        edits.append({"edited": text, "edited_ids": edited_ids, "edit_ops": ops})

    no_edit = {"edited": None, "edited_ids": None, "edit_ops": None}
    return min(edits, key=lambda edit: len(edit["edit_ops"]), default=no_edit)  # B1


def preferred(row, editor):
    """A1: y_w, the better response of the pair: the new `chosen` and `chosen_token_ids`; {} where
    they stay what they are, what --data prefers or null."""
    errors = row["wrong_steps"]
    if errors:  # known, and not right: is a sibling, sampled from the same prompt, better?
        best = min(row["responses"], key=lambda sibling: sibling["wrong_steps"])
        if best["wrong_steps"] < errors:
            return {"chosen": best["rejected"], "chosen_token_ids": best["rejected_ids"]}

    # a response of --data that a person or a rule has edited, with nothing preferred to it: its
    # edit makes the pair
    edited_by_user = row["from_data"] and editor in ("human", "rules")
    if edited_by_user and row["edit_ops"] and row["chosen"] is None:
        return {"chosen": row["edited"], "chosen_token_ids": row["edited_ids"]}

    return {}


def gate(row, ended, args):
    """B1: why a response and its edit make no row of edits.jsonl; None if they make one. ended:
    does the edited response end?"""
    ops = row["edit_ops"]
    errors = row["wrong_steps"]  # None where nobody knows

    if ops is None:  # a preferred response still makes a pair, for A6
        return "editor: no edit" if row["chosen"] is None else None
    if ops == [] and errors != 0:
        return "gate: the edit changes nothing"
    if len(ops) > args.max_edit_share * max(len(row["rejected_ids"]), len(row["edited_ids"])):
        return f"gate: the edit changes more than {args.max_edit_share:.0%}"
    if errors and wrong_steps(row["edited"], ended, row) >= errors:  # a row has all of its problem
        return "gate: the edit is not better"
    return None


def edit_row(row, editor, tokenizer):
    """The row of edits.jsonl; the header shows one."""
    new = {**row, "editor": editor, "first_error": None, "first_wrong_step": None}
    if editor == "human" and row.get("editor"):
        new["editor"] = row["editor"]  # --data names its annotator

    if row["edit_ops"]:  # the first operation stands at the first error
        op, i, _ = row["edit_ops"][0]
        if op != "insert":  # a missing token stands nowhere
            new["first_error"] = i
        before = tokenizer.decode(row["rejected_ids"][:i + 1], skip_special_tokens=True)
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
    """--model, made fit for all stages: with a pad token that is not the end token, no embedding
    without a token (it would be sampled), and its end and its context in the config."""
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
    except Exception as error:  # transformers raises many kinds
        fail(f"--model {args.model} is no causal LM that can be opened: {error!r:.150}")

    end = tokenizer.eos_token
    if end is None:
        fail(f"--model {args.model}: its tokenizer has no end token, so no response can end")
    if tokenizer.pad_token in (None, end):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)

    config = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    config.update({
        "max_position_embeddings": context or 10**9,  # some models name no limit
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    })
    return model, tokenizer


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

    for _ in trange(steps, desc="SFT"):
        batch = rng.sample(examples, min(128, len(examples)))
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
def text_of(row, name):
    """The text of a column: a string, or the content of the last of a list of chat messages."""
    text = row.get(name)
    if isinstance(text, list) and text and isinstance(text[-1], dict):
        text = text[-1].get("content", text)
    needed = name in ("prompt", "solution")
    if not isinstance(text, str | None) or (needed and not text):
        fail(f"{row['place']}: column `{name}` is no text: write a string, or a list of chat "
             "messages of which the last has a `content`")
    return text


def needed_columns(row, rules):
    """The columns that every row of --data needs beside `prompt`: the first row shows its shape."""
    if rules:  # prompt[, response]: rules edit the responses, or else the policy's
        return []
    if "chosen" in row:  # prompt, chosen, rejected[, edited]: preference pairs
        return ["chosen", "rejected"]
    if "answer" in row:  # prompt, solution, answer[, response[, edited]]: problems
        return ["solution", "answer"]
    return ["response"]  # prompt, response[, edited]: edits


def data_responses(row, problem):
    """The response of a row of --data, in a list, which is empty if it has none."""
    rejected = text_of(row, "response" if row.get("rejected") is None else "rejected")
    edited = text_of(row, "edited")
    if rejected is None:
        return []
    return [{
        "from_data": True,
        "ended": True,
        "rejected": rejected,
        "wrong_steps": wrong_steps(rejected, True, problem),
        "chosen": text_of(row, "chosen") or None,
        "chosen_token_ids": None,  # until encode_problem
        "edited": edited,
        "editor": row.get("editor") if edited else None,
    }]


def read_data(args, rules):
    """The problems of --data, one a prompt, each with its responses; and how many rows were left
    out, since their solution does not end in their answer."""
    if not args.model:
        fail("--data needs --model: the small policy knows the words of the built-in tasks alone")
    rows = read_jsonl(args.data, "prompt")
    columns = needed_columns(rows[0], rules)
    if args.sft_steps and "solution" not in columns:
        fail(f"--sft_steps: {args.data} has no column `solution` from which the policy can learn")

    few = len({str(row["prompt"]) for row in rows}) < 20
    problems = {}  # by prompt; where these are few, each row is a problem of its own
    bad_rows = 0
    for k, row in enumerate(rows):
        row["place"] = f"{args.data}, line {k + 1}"
        for name in columns:
            if name not in row:
                fail(f"{row['place']}: the column {name!r} is missing; by the columns of the first "
                     f"row, every row needs {columns}")
        if isinstance(row["prompt"], str) and isinstance(row.get("rejected"), list):
            # a chat whose prompt is only its text: the template needs messages
            row["prompt"] = row["rejected"][:-1] or [{"role": "user", "content": row["prompt"]}]

        problem = {"id": f"row-{k}", "prompt": row["prompt"], "rules": [*rules], "responses": []}
        problem["place"] = row["place"]  # for messages
        if "answer" in columns:
            problem["solution"] = text_of(row, "solution")
            problem["answer"] = str(row["answer"])
            if wrong_steps(problem["solution"], True, problem) != 0:
                bad_rows += 1
                continue
        problem = problems.setdefault(k if few else str(row["prompt"]), problem)
        problem["responses"] += data_responses(row, problem)

    if not problems:
        fail(f"{args.data}: no row is left, since no solution ends in its answer: end each with "
             "`The answer is ...`")
    return with_splits([*problems.values()], args), bad_rows


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
        fitting = ["rules"]
    elif not args.data:
        fitting = ["oracle", "nearest"]
    elif "answer" not in problems[0]:
        fitting = ["human"]
    elif any(map(has_edit, problems)):
        fitting = ["human", "nearest"]
    else:
        fitting = ["nearest"]

    editor = (args.editor or fitting[0]).partition(":")[0]
    if editor not in fitting:
        fail(f"--editor {editor}: it does not fit these problems; what fits is {fitting}")
    return editor


def has_edit(problem):
    return any(response["edited"] for response in problem["responses"])


# --- Token ids ---
ID_COLUMNS = {  # a text -> its token ids
    "solution": "solution_ids",
    "demonstration": "demonstration_ids",
    "rejected": "rejected_ids",
    "chosen": "chosen_token_ids",
    "edited": "edited_ids",
}


def encode(text, ended, tokenizer):
    """Token ids of a response; the end token is one of them, once, where it ended."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    end = [tokenizer.eos_token_id]
    if ended and ids[-1:] != end:
        ids = ids + end
    return ids


def encode_prompt(problem, tokenizer):
    """Token ids of a prompt: of a text, or of a chat by the chat template."""
    prompt = problem["prompt"]
    if prompt == text_of(problem, "prompt"):
        ids = tokenizer(prompt).input_ids
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)

    # some tokenizers end every text with the end token, but behind a prompt comes the response
    end = [tokenizer.eos_token_id]
    if ids[-1:] == end == tokenizer("").input_ids[-1:]:
        ids = ids[:-1]
    return ids


def encode_problem(problem, tokenizer, args):
    """The problem with `prompt_ids`, the ids of its texts and of its responses, and `tokens`: the
    length of its prompt and its longest response."""
    rows = []
    longest = args.max_new_tokens
    try:
        prompt_ids = encode_prompt(problem, tokenizer)
        for row in [problem, *problem["responses"]]:
            row = {**row}
            for name, id_name in ID_COLUMNS.items():
                if row.get(name) is not None:
                    row[id_name] = encode(row[name], True, tokenizer)
                    longest = max(longest, len(row[id_name]))
            rows.append(row)
    except Exception as error:  # no template, or a broken character
        fail(f"{problem['place']}: the tokenizer or its chat template refuses the row: {error}")

    problem, *responses = rows
    tokens = len(prompt_ids) + longest
    return {**problem, "prompt_ids": prompt_ids, "responses": responses, "tokens": tokens}


# --- Helpers, the same in several scripts ---
def fail(message):
    """Bad input ends a stage with one line and exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path, *columns):
    """The rows of a JSONL file; each has these columns. A fault is named by file and line."""
    rows = []
    try:
        for line in open(path, encoding="utf-8"):
            row = json.loads(line)
            for name in columns:
                row[name]  # a missing column is a KeyError
            rows.append(row)
    except Exception as error:
        fail(f"{path}, line {len(rows) + 1}: {error!r}; a row is a JSON object with {columns}")

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


def batches(rows, size):
    return [rows[k:k + size] for k in range(0, len(rows), size)]


def generate(model, tokenizer, prompts, args, temperature=1.0):
    """A response (ids) to each prompt (ids), its end token included; at temperature 0 the likeliest
    tokens. Plain transformers: only stage 3 needs to see how a token is drawn."""
    end = tokenizer.eos_token_id
    responses = []

    for part in tqdm(batches(prompts, args.micro_batch), desc="sampling", leave=False):
        inputs = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
        P = inputs.input_ids.shape[1]
        room = model.config.max_position_embeddings - P
        model.generation_config = hf.GenerationConfig(
            do_sample=temperature > 0,
            temperature=temperature,
            top_k=0,  # from all tokens
            max_new_tokens=min(args.max_new_tokens, room),
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        output = model.generate(**inputs.to(args.device))  # (B, P + T)
        responses += output[:, P:].tolist()

    # what follows the end token is padding
    return [row[:row.index(end) + 1] if end in row else row for row in responses]


def token_texts(ids, tokenizer):
    """The text that each token adds: joined, they are the decoded text. A character of several
    tokens stands at the last of them."""
    prefixes = tokenizer.decode([ids[:k + 1] for k in range(len(ids))])
    texts = []
    shown = ""
    for prefix in prefixes:
        if prefix.endswith("\ufffd"):  # half a character: wait for the rest
            prefix = shown
        texts.append(prefix[len(shown):])
        shown = prefix
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


def report(rows, dropped, tokenizer):
    """Print three edits, how many rows there are, and what was dropped."""
    edited = [row for row in rows if row["edit_ops"]]
    for row in edited[:3]:
        print(" ".join(text_of(row, "prompt").split()))
        print("    " + marked(row, tokenizer))

    pairs = sum(row["chosen"] is not None for row in rows)
    print(f"{len(rows)} rows: {len(edited)} edits, {pairs} with a preferred response; "
          f"dropped: {dict(dropped)}")


def problem_row(problem):
    """A row of problems.jsonl: the columns that the problem has."""
    columns = "id split prompt prompt_ids solution solution_ids answer solutions rules".split()
    return {name: problem[name] for name in columns if problem.get(name)}


def main(args):
    torch.manual_seed(args.seed)
    run = Path(args.run)

    # the problems, of --data or of a task, and who edits
    rules = read_rules(args.editor or "")
    bad_rows = 0
    if args.data:
        problems, bad_rows = read_data(args, rules)
    else:
        problems = make_problems(args)
    editor = choose_editor(args, problems, rules)

    # the policy, and with its tokenizer the ids of every text
    model, tokenizer = open_policy(args) if args.model else small_policy(problems, args)
    model = model.to(args.device)
    context = model.config.max_position_embeddings
    problems = [encode_problem(problem, tokenizer, args) for problem in problems]
    fit = [problem for problem in problems if problem["tokens"] <= context]
    if not fit:
        fail(f"no problem fits the model's context of {context} tokens together with its longest "
             "response: shorten the texts, or lower --max_new_tokens")
    training = [problem for problem in fit if problem["split"] == "train"]
    held_out = [problem for problem in fit if problem["split"] != "train"]

    # SFT
    start_stage(args, "01", LATER)
    (run / "edits.jsonl").unlink(missing_ok=True)  # the edits of another policy
    fine_tune(model, tokenizer, training, args)
    save_model(run / "policy", model, tokenizer)
    write_jsonl(run / "problems.jsonl", [problem_row(problem) for problem in fit])

    # B1: responses; A1, B1: the edits of the wrong ones
    used = sample_responses(training[:args.edit_prompts] + held_out, model, tokenizer, args)
    rows, reasons = edit_responses(used, editor, rules, args, tokenizer)
    dropped = Counter({
        "row: its solution does not end in its answer": bad_rows,
        "problem: longer than the model's context": len(problems) - len(fit),
        "problem: beyond --edit_prompts": len(fit) - len(used),
    }) + reasons  # without zeros
    if not rows:
        fail(f"no response has a usable edit: {dict(dropped)}")
    write_jsonl(run / "edits.jsonl", rows)
    report(rows, dropped, tokenizer)


if __name__ == "__main__":
    main(hf.HfArgumentParser(Args).parse_args_into_dataclasses()[0])

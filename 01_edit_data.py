"""Stage 1: a policy, its problems, and its wrong responses with their minimal edits.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, 2401.06081): E1 (minimum
edit), A1 (data), B1 (editing task). Simplified against the papers:
  1. An oracle edits, which knows all right solutions; --data has edits of people or an LLM.
  2. The policy is a small Llama, fine-tuned on demonstrations with errors; or --model.
  3. Fewer wrong steps are preferred; paper B, and --data with `answer`, see the answer alone.
  4. Two samples a problem at temperature 1; RLMEC's code draws five at 0.7, without duplicates.
Reads --data FILE, or nothing. Writes RUN/policy, problems.jsonl and edits.jsonl.
Command: python 01_edit_data.py
"""

import json, random, re, shutil, sys
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest
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
    seed: int = arg(1, "of task, policy and samples")
    overwrite: bool = arg(False, "remove what later stages made")
    task: Literal["math", "qa"] = arg("math", "built-in task")
    data: str = arg(None, "JSONL of your own, in place of a task")
    model: str = arg(None, "causal LM (name or path)")
    editor: str = arg(None, "oracle, nearest, human or rules:FILE")
    max_edit_share: float = arg(0.8, "gate: edit distance over length")
    train_prompts: int = arg(16000, "of a task")
    edit_prompts: int = arg(11000, "those whose responses are edited")
    test_prompts: int = arg(1000, "and a fourth as many to validate")
    sft_steps: int = arg(None, "of 128 rows; default 500, --data 0")
    sft_lr: float = arg(3e-3, "AdamW, cosine")
    hidden_size: int = arg(64, "of the small policy: 16, 32, ...")
    samples: int = arg(2, "responses a prompt")
    max_new_tokens: int = arg(48, "longest sample")
    micro_batch: int = arg(500, "rows of a forward pass")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

# --- E1: the minimum edit ---
def edit_ops(a, b):
    """E1: the operations of one optimal path from a to b, [op, i, j] with op in replace, delete,
    insert, i in a, j in b; their number is ED(a, b). The first stands where a and b part."""
    n = min(len(a), len(b))
    start = next((k for k in range(n) if a[k] != b[k]), n)  # the common beginning is kept
    a, b = np.array([*a[start:]]), np.array([*b[start:]])
    column, differ = np.arange(len(b) + 1), a[:, None] != b
    D = np.arange(len(a) + 1)[:, None] + column
    # D[i, j] = min(D[i-1, j] + 1, D[i-1, j-1] + [a_i != b_j], D[i, j-1] + 1)
    for i in range(1, len(a) + 1):
        D[i, 1:] = np.minimum(D[i - 1, 1:] + 1, D[i - 1, :-1] + differ[i - 1])
        # insertions run along the row: D[i, j] = min over k <= j of D[i, k] + j - k
        D[i] = np.minimum.accumulate(D[i] - column) + column
    i, j, ops = len(a), len(b), []
    while i or j:  # back from the last cell
        op = ("keep" if i and j and not differ[i - 1, j - 1] else
              "delete" if i and D[i, j] == D[i - 1, j] + 1 else
              "insert" if D[i, j] == D[i, j - 1] + 1 else "replace")
        i -= op != "insert"
        j -= op != "delete"
        if op != "keep":
            ops.append([op, start + i, start + j])
    return ops[::-1]

# --- Right and wrong ---
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

# --- The built-in tasks ---
RUDE = [", you fool.", ", as even a child knows.", ", but my feet hurt."]
PEOPLE, GOODS, TOWNS = (names.split() for names in (
    "Ada Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Kit Lena Mia Ned Olga Paul Rita Sam Tess Uma "
    "Vera Walt Yara Zoe Abe Bea Cal Dora Ed Flo",
    "bread soap rope glass paper honey shoes lamps tea salt cloth nails wine cheese drums jam",
    "Oslo Rome Bern Lima Cairo Paris Delhi Quito Tunis Sofia Malmo Turin Kyoto Derry Ghent Graz"))

def math_problem(rng):
    """Four operations on single digits: `3+2-1+4-6=` -> `3+2=5;-1=4;+4=8;-6=2`."""
    digits = lambda *terms: all(0 <= value <= 9 for value in accumulate(terms))
    terms = [-1]
    while not digits(*terms):
        terms = [rng.randint(0, 9), *(rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(4))]
    right = said = terms[0]
    solution = demonstration = str(right)
    for k, x in enumerate(terms[1:], 2):
        right, said = right + x, said + x
        if rng.random() < 0.25:  # an error with which later digits fit
            others = [y for y in range(10) if y != said and digits(y, *terms[k:])]
            said = rng.choice(others or [said])
        solution += f"{x:+d}={right};"
        demonstration += f"{x:+d}={said};"
    return {"prompt": "".join(f"{x:+d}" for x in terms)[1:] + "=", "answer": str(right),
            "solutions": [solution[:-1]], "demonstration": demonstration[:-1]}

def qa_problem(rng, makes, home):
    """Who sends what where, in a made-up world; every question has four right solutions."""
    a, b, c = rng.sample(PEOPLE, 3)
    x, y, town = makes[a], makes[b], home[c]
    voices = [f" One makes {x}. The other makes {y}. The friend lives in {town}.",
              f" The first gift is {x}. The second gift is {y}. The home is {town}."]
    answers = [f"They send {x} and {y} to {town}.", f"So {x} and {y} go to {town}."]
    solutions = [f"{voice} {answer}" for voice in voices for answer in answers]
    text = rng.choice(solutions)
    for names in (GOODS, TOWNS):
        swap = lambda name: rng.choice(names) if rng.random() < 0.13 else name[0]
        text = re.sub("|".join(names), swap, text)
    steps = STEP.findall(text)
    if rng.random() < 0.08:  # a step is missing
        del steps[rng.randrange(3)]
    if rng.random() < 0.1:  # one is rude or strays
        k = rng.randrange(len(steps))
        steps[k] = steps[k][:-1] + rng.choice(RUDE)
    return {"prompt": f"Q: What do {a} and {b} send to their friend {c}, and where?\nA:",
            "solutions": solutions, "answer": answers[0], "demonstration": " " + " ".join(steps)}

def make_problems(args):
    """Distinct problems with a demonstration, each in one split."""
    rng, problems = random.Random(args.seed), {}
    splits = ["train"] * args.train_prompts + ["test"] * args.test_prompts
    splits += ["val"] * (args.test_prompts // 4)
    world = [{person: rng.choice(names) for person in PEOPLE} for names in (GOODS, TOWNS)]
    for _ in range(20 * len(splits)):
        problem = math_problem(rng) if args.task == "math" else qa_problem(rng, *world)
        problems.setdefault(problem["prompt"], {
            "id": f"{args.task}-{len(problems)}", "split": splits[len(problems)],
            "solution": problem["solutions"][0], "responses": [], **problem})
        if len(problems) == len(splits):
            return [*problems.values()]
    fail(f"--task {args.task} has only {len(problems)} prompts: lower --train_prompts")

# --- Helpers, the same in several scripts ---
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

def token_texts(ids, tokenizer):
    """The text that each token adds to those before it; a character stands at its last token."""
    texts = tokenizer.decode([ids[:k] for k in range(len(ids) + 1)])
    texts = accumulate(texts, lambda whole, text: whole if text.endswith("\ufffd") else text)
    return [longer[len(shorter):] for shorter, longer in pairwise(texts)]

# B2: fixed words in the generative model's prompts
INSTRUCTIONS = {"solution": "\nReference solution:\n", "attempt": "\nAttempt:\n",
                "rewrite": "\nCorrected attempt:\n", "locate": "\nFirst wrong step:\n"}

# --- The policy ---
def small_policy(problems, args):
    """A small Llama; its tokens are words, characters, and B2's instructions and step labels."""
    pattern = " ?[A-Za-z]+|[^A-Za-z]"
    text = "".join(x for p in problems for x in (p["prompt"], p["demonstration"], *p["solutions"]))
    tokens = sorted({*re.findall(pattern, text)})
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<unk>", "</s>", *tokens])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>",
                                           unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens([*INSTRUCTIONS.values(), *(f"[{k}]" for k in range(1, 10))])
    # the usual initializer_range of 0.02 and theta of 1e4 learn slower in models this small
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_hidden_layers=3,
        intermediate_size=2 * args.hidden_size, num_attention_heads=args.hidden_size // 16,
        tie_word_embeddings=True, initializer_range=0.08, rope_theta=100.0,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    return hf.LlamaForCausalLM(config), tokenizer

def open_policy(args):
    """--model, made fit for all stages: with a pad token that is not the end token, no embedding
    without a token (it would be sampled), and its end and its context in the config."""
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
    except Exception as error:  # transformers raises many kinds
        fail(f"{args.model}: no causal LM to open ({error!r:.150})")
    end, config = tokenizer.eos_token, model.config
    if end is None:
        fail(f"{args.model}: the tokenizer has no end token")
    if tokenizer.pad_token in (None, end):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    config.update({"max_position_embeddings": context or 10**9,
                   "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    return model, tokenizer

def fine_tune(model, tokenizer, problems, args):
    """The SFT policy: maximum likelihood of demonstrations."""
    pairs = [(p["prompt_ids"], p.get("demonstration_ids", p["solution_ids"]))
             for p in problems if "solution" in p]
    steps = args.sft_steps if args.sft_steps is not None else 0 if args.data else 500
    optimizer = torch.optim.AdamW(model.parameters(), args.sft_lr, (0.9, 0.95), weight_decay=0.0)
    schedule = hf.get_scheduler("cosine", optimizer, round(0.03 * steps), steps)
    rng, collate = random.Random(args.seed), hf.DataCollatorForSeq2Seq(tokenizer)
    for _ in trange(steps, desc="SFT"):
        batch = rng.sample(pairs, min(128, len(pairs)))
        N = sum(len(y) for x, y in batch)
        for part in batches(batch, args.micro_batch):
            inputs = collate([{"input_ids": x + y, "labels": [-100] * len(x) + y} for x, y in part])
            model(**inputs.to(args.device), num_items_in_batch=N, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

# --- What a user wrote: behind this section there are ids ---
def plain(row, name):
    """The text of a column: a string, or the last of a list of chat messages."""
    text = row.get(name)
    if isinstance(text, list) and text and isinstance(text[-1], dict):
        text = text[-1].get("content", text)
    if not isinstance(text, str | None) or name in ("prompt", "solution") and not text:
        fail(f"{row['place']}: column `{name}` is no text and no chat messages with content")
    return text

def read_data(args, rules, drop):
    """Problems of --data, one a prompt, with `responses`. Columns: prompt, chosen, rejected[,
    edited]; prompt, response, edited; prompt, solution, answer[, response]; prompt, for rules."""
    first = read_jsonl(args.data, "prompt")[0]
    columns = ([] if rules else ["chosen", "rejected"] if "chosen" in first else
               ["solution", "answer"] if "answer" in first else ["response"])
    rows, problems = read_jsonl(args.data, "prompt", *columns), {}
    alone = len({str(row["prompt"]) for row in rows}) < 20  # then each row is a problem
    for k, row in enumerate(rows):
        place = row["place"] = f"{args.data}, line {k + 1}"
        if isinstance(row["prompt"], str) and isinstance(row.get("rejected"), list):
            # a chat whose prompt is a string: it needs the template too
            row["prompt"] = row["rejected"][:-1] or [{"role": "user", "content": row["prompt"]}]
        problem = {"id": f"row-{k}", "prompt": row["prompt"], "place": place, "rules": [*rules],
                   "responses": []}
        if "answer" in columns:
            problem.update(solution=plain(row, "solution"), answer=str(row["answer"]))
            if wrong_steps(problem["solution"], True, problem) != 0:
                drop["row: its solution does not end in its answer"] += 1
                continue
        problem = problems.setdefault(k if alone else str(row["prompt"]), problem)
        rejected = plain(row, "response" if row.get("rejected") is None else "rejected")
        edited = plain(row, "edited")
        if rejected is not None:
            problem["responses"].append({
                "rejected": rejected, "wrong": wrong_steps(rejected, True, problem),
                "chosen": plain(row, "chosen") or None, "edited": edited,
                "editor": row.get("editor") if edited else None})
    problems = random.Random(args.seed).sample([*problems.values()], len(problems))
    tenth = max(1, len(problems) // 10)
    test, val = min(tenth, args.test_prompts), min(tenth, args.test_prompts // 4)
    for k, problem in enumerate(problems):
        problem["split"] = "test" if k < test else "val" if k < test + val else "train"
    return problems or fail(f"{args.data}: no row is left, {dict(drop)}")

def encode(text, ended, tokenizer):
    """Token ids of a response; the end token is one of them, once, where it ended."""
    ids, end = tokenizer(text, add_special_tokens=False).input_ids, [tokenizer.eos_token_id]
    return ids + end * (ended and ids[-1:] != end)

def encode_problem(problem, tokenizer, longest):
    """Add the ids of its texts, the chat template applied; returns the longest length."""
    prompt, end = problem["prompt"], [tokenizer.eos_token_id]
    try:
        ids = tokenizer(prompt).input_ids if prompt == plain(problem, "prompt") else (
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        # a tokenizer adds an end token: off; a template's stays
        problem["prompt_ids"] = ids[:-1] if ids[-1:] == end == tokenizer("").input_ids[-1:] else ids
        for row in [problem, *problem["responses"]]:
            for name in ("solution", "demonstration", "rejected", "chosen", "edited"):
                if row.get(name) is not None:
                    text_ids = row[f"{name}_ids"] = encode(row[name], True, tokenizer)
                    longest = max(longest, len(text_ids))
    except Exception as error:  # no template, or a broken character
        fail(f"{problem['place']}: the tokenizer or chat template does not take it ({error})")
    return len(ids) + longest

# --- A1, B1: responses, editors, gates ---
def add_responses(problems, model, tokenizer, args):
    """B1: samples, each with its wrong steps, where the data has no response."""
    jobs = [p for p in problems if not p["responses"] for _ in range(args.samples)]
    jobs.sort(key=lambda problem: len(problem["prompt_ids"]))  # a part's longest limits it
    samples = generate(model, tokenizer, [problem["prompt_ids"] for problem in jobs], args)
    for problem, ids in zip(jobs, samples):
        text, ended = tokenizer.decode(ids, True), ids[-1] == tokenizer.eos_token_id
        problem["responses"].append({
            "rejected": text, "rejected_ids": encode(text, ended, tokenizer),
            "wrong": wrong_steps(text, ended, problem)})

def editor(kind, problem, response, rules):
    """The texts that an editor accepts; none: no edit."""
    if kind == "oracle":
        return problem["solutions"]
    if kind == "nearest":
        return [problem["solution"],
                *(r["rejected"] for r in problem["responses"] if r["wrong"] == 0)]
    if kind == "human":
        return [response["edited"]] if response.get("edited") else []
    text = response["rejected"]
    for rule in rules.items():
        text = re.sub(*rule, text)
    return [text]

def edit_row(problem, response, texts, kind, args, tokenizer):
    """A row of edits.jsonl with the nearest of the texts (B1's argmin), or why there is none."""
    ids, wrong = response["rejected_ids"], response["wrong"]
    chosen, chosen_ids = response.get("chosen"), response.get("chosen_ids")
    best = min(problem["responses"], key=lambda r: r["wrong"] or 0)
    if wrong and best["wrong"] < wrong:  # A1
        chosen, chosen_ids = best["rejected"], best["rejected_ids"]
    ended = kind != "rules" or ids[-1:] == [tokenizer.eos_token_id]  # a rule ends no response
    edits = ((edit_ops(ids, b), text, b)
             for text in texts for b in [encode(text, ended, tokenizer)])
    ops, edited, edited_ids = min(edits, key=lambda edit: len(edit[0]), default=[None] * 3)
    if ops is None and chosen is None:  # with chosen: a pair for A6 alone
        return "editor: no edit"
    if ops == [] and wrong != 0:
        return "gate: the edit changes nothing"
    if ops and len(ops) > args.max_edit_share * max(len(ids), len(edited_ids)):
        return f"gate: the edit changes more than {args.max_edit_share:.0%}"
    if ops and wrong and wrong_steps(edited, ended, problem) >= wrong:
        return "gate: the edit is not better"
    if ops and chosen is None and kind in ("human", "rules") and "edited" in response:
        # a response of --data has no better sibling: its edit makes the pair
        chosen, chosen_ids = edited, edited_ids
    chat = isinstance(problem["prompt"], list)
    message = lambda x: [{"role": "assistant", "content": x}] if chat and x is not None else x
    op, first, _ = ops[0] if ops else ["insert", 0, 0]
    before = tokenizer.decode(ids[:first + 1], skip_special_tokens=True)
    return {**{column: problem[column] for column in ("id", "split", "prompt", "prompt_ids")},
            "chosen": message(chosen), "rejected": message(response["rejected"]),
            "edited": message(edited), "editor": kind == "human" and response.get("editor") or kind,
            "rejected_ids": ids, "edited_ids": edited_ids, "edit_ops": ops,
            "edit_distance": None if ops is None else len(ops), "chosen_token_ids": chosen_ids,
            "first_error": None if op == "insert" else first,  # what is missing stands nowhere
            "first_wrong_step": max(1, len(STEP.findall(before))) if ops else None}

def edit_responses(problems, kind, rules, args, tokenizer, drop):
    """B1: a row for every wrong response; B2: and for a right one, which is its own edit, with the
    probability with which a wrong one got a usable edit."""
    jobs = [(p, r) for p in problems for r in p["responses"]]
    wrong = [job for job in jobs if job[1]["wrong"] != 0]
    rows, rng = [], random.Random(args.seed)
    for job in tqdm(wrong, desc="edits"):
        row = edit_row(*job, editor(kind, *job, rules), kind, args, tokenizer)
        rows.append(row) if isinstance(row, dict) else drop.update([row])
    usable = len(rows) / max(1, len(wrong))
    right = [edit_row(p, r, [r["rejected"]], kind, args, tokenizer) for p, r in jobs
             if r["wrong"] == 0 and "solution" in p and rng.random() < usable]
    drop["response: right"] = len(jobs) - len(wrong) - len(right)
    return rows + right

# --- The stage ---
def report(rows, drop, tokenizer):
    """Three edits with [-deleted-] and {+inserted+} tokens, and what was dropped."""
    edited = [row for row in rows if row["edit_ops"]]
    for row in edited[:3]:
        old, new = (token_texts(row[name], tokenizer) for name in ("rejected_ids", "edited_ids"))
        for op, i, j in reversed(row["edit_ops"]):
            a, b = i + (op != "insert"), j + (op != "delete")
            old[i:a] = [f"[-{x}-]" for x in old[i:a]] + [f"{{+{x}+}}" for x in new[j:b]]
        print(f"{' '.join(plain(row, 'prompt').split())}\n    {''.join(old).strip()}")
    pairs = sum(row["chosen"] is not None for row in rows)
    print(f"{len(rows)} rows: {len(edited)} edits, {pairs} with a preferred response; "
          f"dropped: {dict(+drop)}")

def read_rules(path):
    """Regular expression -> replacement, of the lines of a file, parted by a tab."""
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
        rules = dict(line.split("\t") for line in lines if line)
        [re.sub(*rule, "") for rule in rules.items()]
    except Exception as error:
        fail(f"{path}: lines of a regular expression, a tab and its replacement ({error})")
    return rules or fail(f"{path}: has no rules")

def main(args):
    torch.manual_seed(args.seed)
    run, drop = Path(args.run), Counter()
    kind, _, path = (args.editor or "").partition(":")
    rules = read_rules(path) if kind == "rules" else {}
    if args.data and not args.model:
        fail("--data needs --model: the small policy knows only the built-in tasks")
    problems = read_data(args, rules, drop) if args.data else make_problems(args)
    edited = any(r.get("edited") for problem in problems for r in problem["responses"])
    kinds = (["rules"] if rules else ["oracle", "nearest"] if not args.data else
             ["human"] * edited + ["nearest"] if "answer" in problems[0] else ["human"])
    kind = kind or kinds[0]
    if kind not in kinds:
        fail(f"--editor {kind}: what fits is {kinds}")
    model, tokenizer = open_policy(args) if args.model else small_policy(problems, args)
    model, context = model.to(args.device), model.config.max_position_embeddings
    fit = ([problem for problem in problems
            if encode_problem(problem, tokenizer, args.max_new_tokens) <= context]
           or fail(f"no problem, with --max_new_tokens, fits the context of {context} tokens"))
    drop["problem: longer than the model's context"] = len(problems) - len(fit)
    if args.sft_steps and not any("solution" in problem for problem in fit):
        fail("--sft_steps: the data has no column `solution`")
    start_stage(
        args, "01", "reward_* ppo_* rlmec* rejection* dpo* 03_state.pt responses.* eval.* report.*")
    (run / "edits.jsonl").unlink(True)  # of another policy
    train = [problem for problem in fit if problem["split"] == "train"]
    fine_tune(model, tokenizer, train, args)
    save(run / "policy", model, tokenizer)
    columns = "id split prompt prompt_ids solution solution_ids answer solutions rules".split()
    save(run / "problems.jsonl", [{name: p[name] for name in columns if p.get(name)} for p in fit])
    used = train[:args.edit_prompts] + [p for p in fit if p["split"] != "train"]
    drop["problem: beyond --edit_prompts"] = len(fit) - len(used)
    add_responses(used, model, tokenizer, args)
    rows = (edit_responses(used, kind, rules, args, tokenizer, drop)
            or fail(f"no response has a usable edit: {dict(+drop)}"))
    save(run / "edits.jsonl", rows)
    report(rows, drop, tokenizer)

if __name__ == "__main__":
    main(hf.HfArgumentParser(Args).parse_args_into_dataclasses()[0])

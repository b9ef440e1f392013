"""Stage 1: a policy, its problems, and its wrong responses with their minimal edits.

Papers A (Fine-grained Supervision, arXiv 2406.02756) and B (RLMEC, arXiv 2401.06081).
Equations: E1 (minimum edit), A1 (data), B1 (editing task). Simplified against the papers:
  1. The editor knows all right solutions of a task; --editor llm asks an LLM, as both papers do.
  2. The policy is a small Llama, fine-tuned on demonstrations with errors; --model takes another.
  3. Fewer wrong steps are preferred. Right is: ended, and no step is wrong; paper B looks at the
     final answer alone, as --data with the column `answer` does.
  4. Two samples a problem, at temperature 1; RLMEC's code draws five at 0.7, without duplicates.
Reads nothing, or --data FILE (JSONL). Writes RUN/policy, problems.jsonl and edits.jsonl.
    python 01_edit_data.py                         one minute on two CPU cores
"""

import json, os, random, re, shutil, sys, time
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from huggingface_hub import InferenceClient
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm, trange
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          get_cosine_schedule_with_warmup)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

@dataclass
class Args:
    run: str = HfArg(default="runs/default", help="run folder")
    seed: int = HfArg(default=1, help="of task, policy and samples")
    overwrite: bool = HfArg(default=False, help="remove what later stages made")
    task: Literal["math", "qa"] = HfArg(default="math", help="built-in task")
    data: str = HfArg(default=None, help="JSONL of your own, in place of a task")
    model: str = HfArg(default=None, help="causal LM (name or path)")
    editor: str = HfArg(default=None, help="oracle, nearest, human, llm or rules:FILE")
    llm_url: str = HfArg(default=None, help="OpenAI-compatible; key: LLM_API_KEY")
    llm_model: str = HfArg(default=None, help="the server's name of it")
    llm_max_tokens: int = HfArg(default=1024, help="longest answer")
    max_edit_share: float = HfArg(default=0.8, help="gate: edit distance over length")
    train_prompts: int = HfArg(default=16000, help="of a task")
    edit_prompts: int = HfArg(default=6500, help="those whose responses are edited")
    test_prompts: int = HfArg(default=1000, help="and a fourth as many to validate")
    sft_steps: int = HfArg(default=None, help="of 128 rows; default 500, --data 0")
    sft_lr: float = HfArg(default=3e-3, help="AdamW, cosine")
    hidden_size: int = HfArg(default=64, help="of the small policy, 8 n")
    samples: int = HfArg(default=2, help="responses a prompt")
    max_new_tokens: int = HfArg(default=48, help="longest sample")
    micro_batch: int = HfArg(default=None, help="rows of a forward pass; default: all")
    bf16: bool = HfArg(default=False, help="autocast; weights stay float32")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

# --- E1: the minimum edit ---

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

# --- Right and wrong ---

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

# --- The built-in tasks ---

STEP_ERROR = 0.25       # math: share of wrong steps in the demonstrations
ENTITY_ERROR = 0.13     # qa: share of wrong entities,
MISSING_STEP = 0.08     # of demonstrations that leave a step out,
RUDE_PHRASE = 0.1       # and of those with a rude or irrelevant phrase
RUDE = [", you fool", ", as even a child knows", ", but my feet hurt"]
PEOPLE, GOODS, TOWNS = (names.split() for names in (
    "Ada Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Kit Lena Mia Ned Olga Paul Rita Sam Tess Uma "
    "Vera Walt Yara Zoe Abe Bea Cal Dora Ed Flo",
    "bread soap rope glass paper honey shoes lamps tea salt cloth nails wine cheese drums jam",
    "Oslo Rome Bern Lima Cairo Paris Delhi Quito Tunis Sofia Malmo Turin Kyoto Derry Ghent Graz"))

class Math:
    """Four operations on single digits: `3+2-1+4-6=` -> `3+2=5;-1=4;+4=8;-6=2`. Each result is
    written once, and the next step reads it where it stands."""

    def __init__(self, seed):
        self.texts = ["0123456789+-=;"]

    def tape(self, value, operations, rng=None):
        """The solution; None if a result is no digit. With rng, steps go wrong and are built on."""
        text = str(value)
        for k, x in enumerate(operations, 1):
            value += x
            if not 0 <= value <= 9:
                return None
            if rng and rng.random() < STEP_ERROR:
                others = {y for y in range(10) if self.tape(y, operations[k:]) is not None}
                value = rng.choice(sorted(others - {value}) or [value])
            text += f"{x:+d}={value};"
        return text[:-1]

    def problem(self, rng):
        solution = None
        while solution is None:
            prompt = str(rng.randint(0, 9)) + "".join(
                rng.choice("-+") + str(rng.randint(1, 9)) for _ in range(4)) + "="
            solution = self.demonstration({"prompt": prompt})
        return {"prompt": prompt, "solutions": [solution], "answer": solution[-1]}

    def demonstration(self, problem, rng=None):
        first, *operations = map(int, re.findall(r"[+-]?\d", problem["prompt"]))
        return self.tape(first, operations, rng)

class Qa:
    """Who sends what where, in a made-up world that the seed decides. Two voices for the reasoning
    and two for the answer make four right solutions of every question."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.makes = {person: rng.choice(GOODS) for person in PEOPLE}
        self.home = {person: rng.choice(TOWNS) for person in PEOPLE}
        example = self.problem(rng)
        names = [f" {name}" for name in PEOPLE + GOODS + TOWNS]
        self.texts = [example["prompt"], *example["solutions"], *RUDE, *names]

    def problem(self, rng):
        a, b, c = rng.sample(PEOPLE, 3)
        x, y, town = self.makes[a], self.makes[b], self.home[c]
        voices = [f" One makes {x}. The other makes {y}. The friend lives in {town}.",
                  f" The first gift is {x}. The second gift is {y}. The home is {town}."]
        answers = [f"They send {x} and {y} to {town}.", f"So {x} and {y} go to {town}."]
        return {"prompt": f"Q: What do {a} and {b} send to their friend {c}, and where?\nA:",
                "solutions": [f"{voice} {answer}" for voice in voices for answer in answers],
                "answer": answers[0]}

    def demonstration(self, problem, rng):
        text = rng.choice(problem["solutions"])
        for names in (GOODS, TOWNS):
            swap = lambda name: rng.choice(names) if rng.random() < ENTITY_ERROR else name[0]
            text = re.sub(rf"\b({'|'.join(names)})\b", swap, text)
        steps = STEP.findall(text)
        if rng.random() < MISSING_STEP:
            del steps[rng.randrange(3)]
        if rng.random() < RUDE_PHRASE:
            k = rng.randrange(len(steps))
            steps[k] = steps[k][:-1] + rng.choice(RUDE) + "."
        return " " + " ".join(steps)

def make_problems(task, args):
    """Distinct problems with a demonstration; the prompts of the splits are disjoint."""
    splits = ["train"] * args.train_prompts + ["test"] * args.test_prompts
    splits += ["val"] * (args.test_prompts // 4)
    rng, problems = random.Random(args.seed), {}
    for _ in range(20 * len(splits)):
        problem = task.problem(rng)
        problems[problem["prompt"]] = problem
        if len(problems) == len(splits):
            return [{"id": f"{args.task}-{k}", "split": split, "solution": p["solutions"][0],
                     "responses": [], "demonstrations": [task.demonstration(p, rng)], **p}
                    for k, (split, p) in enumerate(zip(splits, problems.values()))]
    fail(f"--task {args.task} has only {len(problems)} prompts: lower --train_prompts")

# --- Helpers that stand in several scripts, letter for letter ---

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

def save_model(model, tokenizer, path):
    """A model folder, written aside and renamed."""
    part = Path(f"{path}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)

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

def token_texts(ids, tokenizer):
    """The text that each token adds to the ones before it, spaces included."""
    texts = tokenizer.batch_decode([ids[:k] for k in range(len(ids) + 1)])
    return [longer[len(shorter):] for shorter, longer in zip(texts, texts[1:])]

def step_starts(ids, tokenizer):
    """Index of the first token of every step of a response."""
    texts = token_texts([token for token in ids if token != tokenizer.eos_token_id], tokenizer)
    ends = list(accumulate(map(len, texts)))
    return [bisect_right(ends, step.start()) for step in STEP.finditer("".join(texts))]

def paint(text, code):
    """Text in an ANSI colour; plain where the output is no terminal or NO_COLOR is set."""
    colour = code and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{code}m{text}\033[0m" if colour else text

# B2: the fixed words in the prompts of the generative model; a small policy has a token for each
INSTRUCTIONS = {"solution": "\nReference solution:\n", "attempt": "\nAttempt:\n",
                "rewrite": "\nCorrected attempt:\n", "locate": "\nFirst wrong step:\n"}
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

# --- The policy ---

def small_policy(texts, args):
    """A small Llama and a tokenizer for the texts: words with their leading space, the rest by
    character, the instructions and step labels of B2 whole."""
    pattern = " ?[A-Za-z]+|[^A-Za-z]"
    tokens = sorted({token for text in texts for token in re.findall(pattern, text)})
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<unk>", "</s>", *tokens])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>",
                                        unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens([*INSTRUCTIONS.values(), *(f"[{k}]" for k in range(1, 10))])
    # the usual initializer_range of 0.02 and theta of 1e4 learn slower in models this small
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_hidden_layers=4,
        intermediate_size=2 * args.hidden_size, num_attention_heads=4, tie_word_embeddings=True,
        initializer_range=0.08, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    return LlamaForCausalLM(config).to(args.device).eval(), tokenizer

def renew_words(model):
    """SFT never sees the words of B2 and pushes their embeddings, all the same way, out of the
    policy's reach. There they stay as outputs; as inputs of the GRM they are drawn anew."""
    weight = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(weight.detach().clone())
    model.config.tie_word_embeddings = False
    weight.data[-len(INSTRUCTIONS) - 9:].normal_(std=weight.std().item())

def open_policy(args):
    """--model, made fit once for all stages: a pad token that is not the end token, and as many
    embeddings as tokens, because rows without a token would be sampled."""
    model = open_model(AutoModelForCausalLM, args.model, args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.eos_token is None:
        fail(f"{args.model}: the tokenizer has no end token, so no response could end")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer

def fine_tune(model, tokenizer, problems, args):
    """SFT: cross-entropy of the response tokens of demonstrations, or else of the responses at
    hand. They are imperfect, so that the policy errs as a real one does."""
    shown = [(p["prompt_ids"], encode_response(text, True, tokenizer)) for p in problems
             for text in p.get("demonstrations") or [r["rejected"] for r in p["responses"]]]
    steps = (0 if args.data else 500) if args.sft_steps is None else args.sft_steps
    optimizer = torch.optim.AdamW(model.parameters(), args.sft_lr, (0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    rng = random.Random(args.seed)
    for _ in trange(steps, desc="SFT", disable=not steps):
        batch = rng.sample(shown, min(128, len(shown)))
        N = sum(len(response) for _, response in batch)
        size = args.micro_batch or len(batch)
        for k in range(0, len(batch), size):
            inputs, mask = pack(*zip(*batch[k:k + size]), tokenizer.pad_token_id, args.device)
            labels, T = torch.full_like(inputs["input_ids"], -100), mask.shape[1]
            labels[:, -T:][mask] = inputs["input_ids"][:, -T:][mask]
            model(**inputs, labels=labels, num_items_in_batch=N, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

# --- What a user wrote: behind this section there are ids ---

def plain(row, name):
    """The text of a column that is a string or a list of chat messages, whose last one counts."""
    text = row.get(name)
    if isinstance(text, list):
        text = text[-1].get("content", 0) if text and isinstance(text[-1], dict) else 0
    if not isinstance(text, (str, type(None))) or name in ("prompt", "solution") and not text:
        fail(f"{row['place']}: column `{name}` is no text and no chat messages with content")
    return text

def read_data(args, rules, drop):
    """Problems of --data, one a prompt, with `responses`: dictionaries of texts. Columns: prompt,
    chosen, rejected[, edited]; prompt, response, edited; prompt, solution, answer[, response]; or
    prompt alone, for rules."""
    first = read_jsonl(args.data, "prompt")[0]
    columns = ([] if rules else ["chosen", "rejected"] if "chosen" in first else
               ["solution", "answer"] if "answer" in first else ["response"])
    rows, problems = read_jsonl(args.data, "prompt", *columns), {}
    alone = len({str(row["prompt"]) for row in rows}) < 20     # then each row is a problem
    for k, row in enumerate(rows):
        problem = {"id": f"row-{k}", "prompt": row["prompt"], "place": row["place"],
                   "rules": list(rules), "responses": []}
        if "answer" in columns:
            solution = plain(row, "solution")
            problem.update(solution=solution, answer=str(row["answer"]), demonstrations=[solution])
            if wrong_steps(solution, True, problem):
                drop["row: its solution does not end in its answer"] += 1
                continue
        problem = problems.setdefault(k if alone else str(row["prompt"]), problem)
        rejected, edited = plain(row, "rejected") or plain(row, "response"), plain(row, "edited")
        if rejected:
            problem["responses"].append({
                "rejected": rejected, "ended": True, "edited": edited,
                "chosen": plain(row, "chosen") or edited or None, "chosen_ended": True})
    problems = random.Random(args.seed).sample(list(problems.values()), len(problems))
    tenth = max(1, len(problems) // 10)
    test, val = min(tenth, args.test_prompts), min(tenth, args.test_prompts // 4)
    for k, problem in enumerate(problems):
        problem["split"] = "test" if k < test else "val" if k < test + val else "train"
    return problems or fail(f"{args.data}: no row is left, {dict(drop)}")

def encode_response(text, ended, tokenizer):
    """Token ids of a response; the end token is one of them where it ended."""
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ended

def encode_problem(problem, tokenizer):
    """Add prompt_ids, the chat template applied, and solution_ids; returns the longest sequence."""
    prompt, chat = plain(problem, "prompt"), isinstance(problem["prompt"], list)
    try:
        if chat:
            prompt = tokenizer.apply_chat_template(problem["prompt"], tokenize=False,
                                                   add_generation_prompt=True)
    except Exception as error:                                 # there may be none, or it refuses
        fail(f"{problem['place']}: the model's chat template does not take the prompt ({error})")
    ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
    problem["prompt_ids"] = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    if "solution" in problem:
        problem["solution_ids"] = encode_response(problem["solution"], True, tokenizer)
    texts = [r[name] for r in problem["responses"] for name in ("rejected", "chosen")]
    return len(ids) + max(len(encode_response(text or "", True, tokenizer))
                          for text in [*texts, problem.get("solution")])

# --- A1, B1: responses, editors, gates ---

def add_responses(problems, model, tokenizer, args):
    """A1, B1: sample where the data has no response; beside every response the best one of its
    problem, if that has fewer wrong steps."""
    jobs = [p for p in problems if not p["responses"] for _ in range(args.samples)]
    ids = generate(model, [p["prompt_ids"] for p in jobs], tokenizer, args.max_new_tokens, args)
    for problem, row in zip(jobs, ids):
        text, end = tokenizer.decode(row, skip_special_tokens=True), tokenizer.eos_token_id
        problem["responses"].append({"rejected": text, "ended": row[-1] == end, "chosen": None})
    for problem in problems:
        for r in problem["responses"]:
            r["wrong"] = wrong_steps(r["rejected"], r["ended"], problem)
        best = min(problem["responses"], key=lambda r: r["wrong"] or 0)
        for r in problem["responses"]:
            if r["wrong"] and best["wrong"] < r["wrong"]:
                r.update(chosen=best["rejected"], chosen_ended=best["ended"])

LLM_PROMPT = """\
Make the response below {goal} with the smallest change that does it: replace, delete or insert \
only the words that must change and keep all others as they are. Return the text of the edited \
response alone.

Prompt:
{prompt}

{reference}Response:
{response}"""

def editor(kind, problem, response, rules):
    """(problem, response) -> texts that this editor accepts, of which E1 takes the nearest (B1's
    argmin); none if it has no edit. llm: the request, whose answer is the edit."""
    text, solution = response["rejected"], problem.get("solution")
    if kind == "oracle":
        return problem["solutions"]
    if kind == "nearest":
        return [solution] + [r["rejected"] for r in problem["responses"] if r["wrong"] == 0]
    if kind == "human":
        return [response["edited"]] if response.get("edited") else []
    if kind == "llm":
        reference = f"A right solution, for reference:\n{solution}\n\n" if solution else ""
        return LLM_PROMPT.format(goal="right" if solution else "better", reference=reference,
                                 prompt=plain(problem, "prompt"), response=text)
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return [text]

def edit_row(problem, response, texts, name, args, tokenizer):
    """A row of edits.jsonl, or the reason why there is none. All sides are encoded from text, so
    that one text is spelt in one way: other ids for the same text would pass for edits."""
    rejected, chosen, ended = response["rejected"], response["chosen"], response["ended"]
    rejected_ids = encode_response(rejected, ended, tokenizer)
    ops = edited = edited_ids = None
    if texts:
        whole = ended or name != "rules"                       # who sees it all also ends it
        ids = [encode_response(text, whole, tokenizer) for text in texts]
        candidates = zip([edit_ops(rejected_ids, k) for k in ids], ids, texts)
        ops, edited_ids, edited = min(candidates, key=lambda candidate: len(candidate[0]))
        if not ops and response["wrong"] != 0:
            return "gate: the edit changes nothing"
        if len(ops) > args.max_edit_share * max(len(rejected_ids), len(edited_ids)):
            return f"gate: the edit changes more than {args.max_edit_share:.0%}"
        if response["wrong"] and wrong_steps(edited, whole, problem) >= response["wrong"]:
            return "gate: the edit is not better"
    elif name != "human" or chosen is None:                    # without an edit: the baseline's
        return "editor: no edit"
    chat = isinstance(problem["prompt"], list)
    message = lambda text: [{"role": "assistant", "content": text}] if chat and text else text
    op, first, _ = ops[0] if ops else ["insert", None, None]
    starts = step_starts(rejected_ids, tokenizer) if ops else []
    return {**{column: problem[column] for column in ("id", "split", "prompt", "prompt_ids")},
            "chosen": message(chosen), "rejected": message(rejected), "edited": message(edited),
            "editor": name, "rejected_ids": rejected_ids, "edited_ids": edited_ids,
            "chosen_token_ids": None if chosen is None else encode_response(
                chosen, response["chosen_ended"], tokenizer),
            "edit_ops": ops, "edit_distance": None if ops is None else len(ops),
            "first_error": None if op == "insert" else first,  # what is missing stands nowhere
            "first_wrong_step": max(1, bisect_right(starts, first)) if starts else None}

def edit_responses(problems, kind, rules, args, tokenizer, drop):
    """A1, B1: a row for every wrong response; and for a right one, which is its own edit (B2),
    with the probability with which a wrong one got a usable edit."""
    jobs = [(problem, response) for problem in problems for response in problem["responses"]]
    wrong = [job for job in jobs if job[1]["wrong"] != 0]
    name, texts = kind, [editor(kind, *job, rules) for job in wrong]
    if kind == "llm":                                          # it strips a leading space
        name, answers = args.llm_model, ask_llm(texts, args, Path(args.run) / "llm_edits.jsonl")
        spaces = [re.match(r"\s*", response["rejected"])[0] for _, response in wrong]
        texts = [[space + re.sub(r"^```\w*\n|\n?```$", "", answer)] if answer else []
                 for space, answer in zip(spaces, answers)]
    results = [edit_row(*job, text, name, args, tokenizer)
               for job, text in zip(tqdm(wrong, desc="edits"), texts)]
    drop.update(reason for reason in results if isinstance(reason, str))
    rows = [row for row in results if isinstance(row, dict)]
    rng, usable = random.Random(args.seed), len(rows) / max(1, len(wrong))
    return rows + [edit_row(problem, response, [response["rejected"]], name, args, tokenizer)
                   for problem, response in jobs if response["wrong"] == 0
                   and "solution" in problem and rng.random() < usable]

# --- The stage ---

def report(rows, drop, tokenizer):
    """Three edits, [-deleted-] in red and {+inserted+} in green, what was dropped, statistics."""
    edited = [row for row in rows if row["edit_ops"]]
    for row in edited[:3]:
        old, new = (token_texts(row[name], tokenizer) for name in ("rejected_ids", "edited_ids"))
        for op, i, j in row["edit_ops"][::-1]:
            if op != "insert":
                old[i] = paint(f"[-{old[i]}-]", 31)
            if op != "delete":
                old.insert(i + (op == "replace"), paint(f"{{+{new[j]}+}}", 32))
        print(f"  {' '.join(plain(row, 'prompt').split())}\n    {''.join(old).strip()}")
    print("\n".join(f"dropped {count}: {reason}" for reason, count in drop.items() if count))
    ops = Counter(op for row in edited for op, i, j in row["edit_ops"])
    pairs = sum(row["chosen"] is not None for row in rows)
    print(f"{len(rows)} rows: {len(edited)} edits {dict(ops)}, {pairs} with a preferred response")

def prepare(args, drop):
    """All that can be wrong with flags and data is said here, before the run folder is touched:
    problems, editor, rules, model, tokenizer."""
    (kind, _, path), rules = (args.editor or "").partition(":"), {}
    try:
        lines = open(path, encoding="utf-8-sig").read().splitlines() if kind == "rules" else []
        rules = dict(line.split("\t") for line in lines if line.strip() and line[0] != "#")
        [re.sub(*rule, "") for rule in rules.items()]
    except (OSError, ValueError, IndexError, re.error) as error:
        fail(f"{path}: lines of a regular expression, a tab and its replacement ({error})")
    if args.data:
        if not args.model:
            fail("--data needs --model: the small policy knows only words of the built-in tasks")
        problems = read_data(args, rules, drop)
        kinds = "rules" if rules else "nearest llm" if "answer" in problems[0] else "human llm"
    else:
        task, kinds = {"math": Math, "qa": Qa}[args.task](args.seed), "oracle nearest llm"
        problems = make_problems(task, args)
    kind = kind or kinds.split()[0]
    if kind not in kinds.split() or kind == "llm" and not (args.llm_url and args.llm_model):
        fail(f"--editor {kind}: what fits is {kinds}; llm needs --llm_url and --llm_model")
    model, tokenizer = open_policy(args) if args.model else small_policy(task.texts, args)
    short = [p for p in problems if encode_problem(p, tokenizer) <= context_of(model)]
    drop["problem: longer than the model's context"] = len(problems) - len(short)
    if not short:
        fail(f"{args.data}: no problem fits the model's context: {dict(drop)}")
    return short, kind, rules, model, tokenizer

def main(args):
    torch.manual_seed(args.seed)
    drop = Counter()
    problems, kind, rules, model, tokenizer = prepare(args, drop)
    run = start_stage(args, "01", "reward_* ppo_* rlmec* responses.jsonl eval.json report.html")
    train = [p for p in problems if p["split"] == "train"]
    fine_tune(model, tokenizer, train, args)
    if not args.model:
        renew_words(model)
    save_model(model, tokenizer, run / "policy")
    columns = "id split prompt prompt_ids solution solution_ids answer solutions rules".split()
    rows = [{name: p[name] for name in columns if p.get(name)} for p in problems]
    write_text(run / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    used = train[:args.edit_prompts] + [p for p in problems if p["split"] != "train"]
    add_responses(used, model, tokenizer, args)
    rows = (edit_responses(used, kind, rules, args, tokenizer, drop)
            or fail(f"no response has a usable edit: {dict(drop)}"))
    write_text(run / "edits.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report(rows, drop, tokenizer)

if __name__ == "__main__":
    args = HfArgumentParser(Args).parse_args_into_dataclasses()[0]
    # without its cache, autocast never uses the weights of an older step
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.bf16, False):
        main(args)

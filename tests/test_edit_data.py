"""Stage 1. E1, with A4 and B6; A1, B1: tasks, the rule of right, editors, gates, data, input."""

import json, random, re, shutil, timeit
from collections import Counter, defaultdict
from itertools import cycle, product
from os.path import commonprefix
from pathlib import Path
import pytest
from conftest import one, rows_of, three, two

@pytest.fixture
def stage(tiny_run, tmp_path, monkeypatch, capsys):
    """Run stage 1 on rows of data, or on a task of 13 prompts without SFT; edits.jsonl, printed.
    The policy may say the given (text, ended)."""
    monkeypatch.chdir(tmp_path)
    def call(rows=None, rules="", says=None, **flags):
        if says:
            monkeypatch.setattr(one, "generate", lambda model, tokenizer, prompts, args: [
                one.encode(*said, tokenizer) for said, _ in zip(cycle(says), prompts)])
        args = {"train_prompts": 8, "test_prompts": 4, "sft_steps": 0, "hidden_size": 16}
        if rows is not None:
            args = {"data": "data", "model": str(tiny_run / "policy")}
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            Path("data").write_text("".join(line + "\n" for line in lines))
        Path("rules").write_text(rules)
        args = {"run": "new", "max_edit_share": 1.0, **args, **flags}
        one.main(one.Args(**args))
        return rows_of(Path(args["run"]) / "edits.jsonl"), capsys.readouterr().out
    return call

def apply(ops, a, b):
    """The operations make this out of a; tokens that they bring in come from b."""
    a = list(a)
    for op, i, j in reversed(ops):
        a[i:i + (op != "insert")] = b[j:j + (op != "delete")]
    return a

def plain_distance(a, b):
    """The textbook table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]

@pytest.mark.parametrize("a, b, ops, kept", [
    ("kitten", "sitting", [["replace", 0, 0], ["replace", 4, 4], ["insert", 6, 6]],
     [(1, 1), (2, 2), (3, 3), (5, 5)]), ("ab", "ab", [], [(0, 0), (1, 1)]),
    ("abc", "XYabc", [["insert", 0, 0], ["insert", 0, 1]], [(0, 2), (1, 3), (2, 4)]),
    ("aXb", "ab", [["delete", 1, 1]], [(0, 0), (2, 1)]), ("a", "b", [["replace", 0, 0]], []),
    ("ab", "", [["delete", 0, 0], ["delete", 1, 0]], []), ("", "a", [["insert", 0, 0]], [])])
def test_ops_kept_tokens_and_imitation_weights_by_hand(a, b, ops, kept):
    assert one.edit_ops(a, b) == ops and two.kept_tokens(ops, len(a), len(b)) == kept  # A4
    weights = [0.5 if j in dict(kept).values() else 1.0 for j in range(len(b))]        # B6
    assert three.imitation_weights([*a], [*b]).tolist() == weights

def test_ops_are_a_shortest_path():
    rng = random.Random(0)
    words = [rng.choices("abc", k=rng.randint(0, 10) if k < 20 else 150) for k in range(23)]
    for a, b in product(words, repeat=2):
        ops = one.edit_ops(a, b)
        assert apply(ops, a, b) == b and len(ops) == plain_distance(a, b)
        assert all(a[i] == b[j] for i, j in two.kept_tokens(ops, len(a), len(b)))
        start = len(commonprefix([a, b]))
        assert ops == [] if a == b else ops[0][1:] == [start, start]   # where the two part

def test_ten_times_faster_than_the_plain_programme():
    rng = random.Random(0)
    a = rng.choices(range(1000), k=512)
    b = [rng.randrange(1000) if rng.random() < 0.1 else token for token in a]
    seconds = [[timeit.timeit(lambda: function(a, b), number=1)        # in turn, under one load
                for function in (plain_distance, one.edit_ops)] for _ in range(7)]
    plain, ours = map(min, zip(*seconds))
    assert plain > 10 * ours

def test_ops_agree_with_the_errors_that_humans_marked(shared):
    """All 487 edits by words. The minimum edits that agree best have only 0.865 and 0.923."""
    total = Counter()
    for row in [row for row in rows_of(shared / "data/qa_feedback.jsonl") if row["edited"]]:
        words = list(re.finditer(r"\S+", row["response"]))
        ops = one.edit_ops([word[0] for word in words], row["edited"].split())
        ours = {i for op, i, j in ops if op != "insert"}
        human = {k for k, word in enumerate(words) if any(
            word.start() < s["end"] and word.end() > s["start"] for s in row["error_spans"])}
        total.update(hits=len(ours & human), called=len(ours), marked=len(human))
    assert total["hits"] > 0.85 * total["called"] and total["hits"] > 0.91 * total["marked"]

@pytest.mark.parametrize("text, answer", [
    ("12 + 3 = 15", "15"), ("It costs $1,200.00.", "1200"), ("\\frac{1}{2}",) * 2, ("x = 3-5", "5"),
    ("The answer is -5. Or 6?", "-5"), ("The answer is 3. No, the answer is: 4, not 5", "4"),
    ("The answer is 1/2.", "1/2"), ("The answer is 12:30", "12:30"), ("3.140", "3.14"), ("", ""),
    ("2 men.\nThe answer is Paris.\nYes", "Paris"), ("100%", "100"), ("#### $1,250.5g", "1250.5g")])
def test_final_answer(text, answer):
    assert one.final_answer(text) == answer

TAPE = ["3+2=5;-1=4;+4=8;-6=2"]
MATH = {"solutions": TAPE, "answer": "2"}
QA = {"solutions": [" A makes tea. B is in Rome.", " A makes tea. So B lives in Rome."]}
RULES = {"rules": [r"\bsad\b", "(a|b)c"], "answer": "5"}             # rules go before the answer
@pytest.mark.parametrize("text, problem, wrong", [
    ("3+2=5;-1=4;+4=8;-6=2", MATH, 0), ("3+2=6;-1=5;+4=9;-6=3", MATH, 4), ("", MATH, 4),
    ("3+2=5;-1=4;-6=2", MATH, 2), ("3+2=5;-1=4;+4=8;-6=2;-6=2", MATH, 2), (" A makes soap.", QA, 2),
    (" A makes tea. B is in Rome.", QA, 0), (" A makes tea. So B lives in Rome.", QA, 0),
    (" A is. So B lives in Rome.", QA, 1), ("sad, sadly sad: ac", RULES, 3), ("glad 6", RULES, 0),
    ("9 is right. The answer is 5", {"answer": "$5.00"}, 0), ("5 or 6", {"answer": "5"}, 1),
    ("The answer is 30", {"answer": "12:30"}, 1), ("The answer is 1", {"answer": "1/2"}, 1)])
def test_wrong_steps_by_hand(text, problem, wrong):
    assert one.wrong_steps(text, True, problem) == wrong
    assert one.wrong_steps(text, False, problem) == wrong + 1          # not ended is never right
    assert one.wrong_steps(text, True, {"rules": []}) is None          # nobody knows

def test_right_is_what_the_labels_of_gsm8k_say(shared):
    rows = rows_of(shared / "data" / "gsm8k_model_solutions.jsonl")
    right = [one.wrong_steps(row["response"], True, row) == 0 for row in rows]
    assert len(rows) == 5276 and right == [row["is_correct"] for row in rows]
    assert not any(one.wrong_steps(row["solution"], True, row) for row in rows)

@pytest.mark.parametrize("task, solutions, kinds", [("math", 1, 1), ("qa", 4, 3)])
def test_tasks(task, solutions, kinds):
    right, ops, first = 0, Counter(), set()
    problems = one.make_problems(one.Args(task=task, train_prompts=260, test_prompts=32))
    for problem in problems:
        said, *texts = problem["demonstration"], *problem["solutions"]
        assert [one.wrong_steps(text, True, problem) for text in texts] == [0] * solutions
        right += not one.wrong_steps(said, True, problem)
        words, *others = (re.findall(r"\w+|\S", text) for text in (said, *texts))
        ops.update(op for op, i, j in min((one.edit_ops(words, w) for w in others), key=len))
        first.add(commonprefix([said + ";", texts[0] + ";"]).count(";"))
        assert not re.search(r"\d\d", problem["prompt"] + said)        # digits stay single
        assert task == "qa" or re.fullmatch(r"\d([+-]\d=\d;?){4}", said)
    assert 80 < right < 220 and len(ops) == kinds and min(ops.values()) > 20
    assert task == "qa" or first == {0, 1, 2, 3, 4}                    # every step can go wrong
    assert len({problem["prompt"] for problem in problems}) == 300

# --- A1, B1: rows, editors, gates ---
def check_row(row, tokenizer):
    """What contract.md says of every row with an edit."""
    ops, old, new = row["edit_ops"], row["rejected_ids"], row["edited_ids"]
    for name, ids in {"rejected": old, "edited": new, "chosen": row["chosen_token_ids"]}.items():
        text, ended = one.plain(row, name), bool(ids) and ids[-1] == tokenizer.eos_token_id
        assert ids == (None if text is None else one.encode(text, ended, tokenizer))
    assert apply(ops, old, new) == new and not {"margin", "chosen_ids"} & set(row)
    assert row["edit_distance"] == len(ops) == plain_distance(old, new)
    assert row["first_error"] == (ops[0][1] if ops and ops[0][0] != "insert" else None)

def test_rows_of_the_tiny_run(tiny_run, tokenizer):
    problems = {p["id"]: p for p in rows_of(tiny_run / "problems.jsonl")}
    samples = defaultdict(list)
    assert Counter(p["split"] for p in problems.values()) == {"train": 60, "test": 40, "val": 10}
    assert len({p["prompt"] for p in problems.values()}) == 110        # the splits are disjoint
    assert one.encode("3</s>", True, tokenizer) == one.encode("3", True, tokenizer)
    for row in rows_of(tiny_run / "edits.jsonl"):
        check_row(row, tokenizer)
        problem, ended = problems[row["id"]], row["rejected_ids"][-1] == tokenizer.eos_token_id
        assert all(row[name] == problem[name] for name in ("split", "prompt", "prompt_ids"))
        assert row["edited"] in problem["solutions"] and row["editor"] == "oracle"
        samples[row["id"]].append((one.wrong_steps(row["rejected"], ended, problem), row))
    assert samples.keys() == problems.keys()
    for (wrong, row), (other_wrong, other) in samples.values():        # every sample has its row
        better, worse = (row, other) if wrong < other_wrong else (other, row)
        assert better["chosen"] is None and (wrong == 0) == (row["edit_ops"] == [])
        names = ["rejected", "rejected_ids"] if wrong != other_wrong else ["chosen", "chosen"]
        assert [worse["chosen"], worse["chosen_token_ids"]] == [better[name] for name in names]
    assert any(row["chosen"] for pair in samples.values() for _, row in pair)

@pytest.mark.parametrize("text, texts, name, result", [
    ("3+2=6;-1=4;+4=8;-6=2", TAPE, "oracle", ("replace", 4, 1)), (*TAPE, TAPE, "m", (None,) * 3),
    ("3+2=5;-1=4;+4=8;-6=3", TAPE, "m", ("replace", 19, 4)),
    ("3+2=5;-1=4;-6=2", TAPE, "m", ("insert", None, 3)),               # a gap stands nowhere
    ("3+2=5;-1=4;+4=8;-6=2-", TAPE, "m", ("delete", 20, 4)), ("3+2", [], "m", "editor: no edit"),
    ("3+2", ["3+2"], "m", "gate: the edit changes nothing"), ("3", [], "human", "editor: no edit"),
    ("3+2=5;-1=4;+4=8;-6=3", ["3+2=5;-1=4;+4=8;-6=4"], "m", "gate: the edit is not better")])
def test_first_error_step_and_gates(text, texts, name, result):
    tokenizer = one.small_policy(one.make_problems(one.Args(train_prompts=99)), one.Args())[1]
    problem = {**MATH, "id": "a", "split": "train", "prompt": "3+2-1+4-6=", "prompt_ids": [3]}
    wrong = one.wrong_steps(text, True, problem)
    response = {"rejected": text, "wrong": wrong, "rejected_ids": one.encode(text, True, tokenizer)}
    row = one.edit_row(problem | {"responses": [response]}, response, texts, name, one.Args(),
                       tokenizer)
    if isinstance(row, dict):
        check_row(row, tokenizer)
        op, *_ = [*row["edit_ops"], [None]][0]
        row = op, row["first_error"], row["first_wrong_step"]
    assert row == result

@pytest.mark.parametrize("editor", ["oracle", "nearest"])
def test_right_samples_are_rows_in_proportion(stage, editor):
    problems = one.make_problems(one.Args(train_prompts=175, test_prompts=20))
    texts = [text for k, p in enumerate(problems) for right in p["solutions"]
             for text in (right, ";;;;" if k % 2 else right[:-1] + str((int(right[-1]) + 1) % 10))]
    rows, shown = stage(says=[(text, True) for text in texts], editor=editor, train_prompts=175,
                        test_prompts=20, max_edit_share=0.8)
    right, edits = ([row for row in rows if bool(row["edit_ops"]) == b] for b in (False, True))
    assert len(edits) == 100 and "'gate: the edit changes more than 80%': 100" in shown
    assert 70 < len(right) < 130                     # 200, and half of the edits could be used
    assert all(row["edited"] == row["rejected"] and row["chosen"] is None for row in right)
    assert all(row["edit_ops"] == [["replace", 19, 19]] for row in edits)
    assert all(row["chosen"] == row["edited"] and row["editor"] == editor for row in edits)

def test_rules_edit_samples_of_prompts_alone(stage):
    says = [(" tea and soap", False), (" soap", True), (" tea", True)]
    data, rules = [{"prompt": f"Ada {x}"} for x in one.PEOPLE], "\ufeffsoap\tsalt\n\nwine\tcheese\n"
    rows, _ = stage(data, rules, says, editor="rules:rules", samples=3)
    assert Counter((row["rejected"], row["edited"], 2 in row["edited_ids"]) for row in rows) == {
        (" tea and soap", " tea and salt", False): 30, (" soap", " salt", True): 30}   # one ended
    assert {(row["chosen"], row["editor"]) for row in rows} == {(" tea", "rules")}
    assert all(p["rules"] == ["soap", "wine"] for p in rows_of("new/problems.jsonl"))

@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("columns, editor, chosen, edited", [
    ({"chosen": " tea", "rejected": " soap", "edited": " salt"}, "human", " tea", " salt"),
    ({"chosen": " tea", "rejected": " soap"}, "human", " tea", None),
    ({"chosen": " tea", "rejected": " soap", "answer": "5"}, "human", " tea", None),
    ({"response": " soap", "edited": " salt"}, "human", " salt", " salt"),
    ({"response": " soap", "edited": " salt", "editor": "some LLM"}, "some LLM", " salt", " salt"),
    ({"solution": " tea", "answer": "tea", "response": " soap"}, "nearest", None, " tea"),
    ({"solution": " soap\ntea", "answer": "tea", "response": " soap", "edited": " tea",
      "editor": "some LLM"}, "some LLM", " tea", " tea")])
def test_shapes_of_data(stage, tiny_run, tokenizer, chat, columns, editor, chosen, edited):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}A:</s>{% endfor %}"
    tokenizer.save_pretrained(shutil.copytree(tiny_run / "policy", "model"))
    wrap = lambda text: [{"role": "assistant", "content": text}] if chat and text else text
    columns = {name: text if name in ("answer", "editor") else wrap(text)
               for name, text in columns.items()}
    prompt = [{"role": "user", "content": "What"}] if chat else "What"
    said = prompt if "response" in columns else "What"          # messages around a prompt's text
    rows, _ = stage([{"prompt": said, **columns}] * 3, model="model")
    assert sorted(row["split"] for row in rows) == ["test", "train", "val"]     # split by row
    for row in rows:
        assert [row[name] for name in ("prompt", "chosen", "edited", "editor")] == [
            prompt, wrap(chosen), wrap(edited), editor]
        assert row["prompt_ids"] == tokenizer("WhatA:</s>" if chat else "What").input_ids
        if edited:
            check_row(row, tokenizer)
        assert edited or row["edit_ops"] is row["edited_ids"] is row["edit_distance"] is None

def test_nearest_on_gsm8k(stage, shared):
    data = [row for row in rows_of(shared / "data/gsm8k_model_solutions.jsonl")
            if len(row["prompt"] + max(row["solution"], row["response"], key=len)) < 300][:80]
    model = str(shared / "models" / "stories260K")
    rows, shown = stage([*data, {**data[0], "answer": "no such"}], model=model)
    assert "'row: its solution does not end in its answer': 1" in shown
    right = {row["prompt"]: [row["solution"]] for row in data}
    for row in data:
        right[row["prompt"]] += [row["response"]] * row["is_correct"]
    tokenizer = one.hf.AutoTokenizer.from_pretrained(model)
    assert "".join(one.token_texts(tokenizer("a 世é").input_ids, tokenizer)).endswith("a 世é")
    for row in rows:
        check_row(row, tokenizer)
        texts = right[row["prompt"]]
        assert row["prompt_ids"] == tokenizer(row["prompt"]).input_ids     # begins with <s>
        assert row["edited"] in texts and row["editor"] == "nearest"
        assert len(row["edit_ops"]) == min(plain_distance(
            row["rejected_ids"], one.encode(text, True, tokenizer)) for text in texts)
        assert row["chosen"] in (texts[1:] if row["edit_ops"] and texts[1:] else [None])
    assert sum(row["edit_ops"] != [] for row in rows) == sum(not row["is_correct"] for row in data)
    assert 20 <= len(right) == len({(row["prompt"], row["split"]) for row in rows})   # by prompt

# --- Bad input: exit status 2 and one line ---
GOOD = {"prompt": "Ada", "response": " soap", "edited": " tea"}
PAIR, SOLVED = GOOD | {"chosen": " tea", "rejected": " a"}, GOOD | {"solution": " 5", "answer": "6"}
TSV = {"editor": "rules:rules"}
@pytest.mark.parametrize("data, flags, message", [
    ([GOOD, "{oops"], {}, "line 2: "), ([GOOD, [1]], {}, "line 2: "), ([], {}, "no rows"),
    ([{"edited": "a"}], {}, "line 1: .*'prompt'"), ([], {"data": "none"}, "No such file"),
    ([GOOD, {"prompt": "a"}], {}, "2: .*'response'"), ([SOLVED], {}, "no row is left.* solution"),
    ([PAIR, {"prompt": "a", "chosen": "b"}], {}, "line 2: .*'rejected'"),
    ([SOLVED, {"prompt": "a", "answer": "5"}], {}, "line 2: .*'solution'"),
    ([GOOD | {"prompt": 5}], {}, "`prompt` is no text"), ([GOOD | {"edited": 5}], {}, "`edited`"),
    ([GOOD, GOOD | {"prompt": ""}], {}, "2: .*`prompt`"), ([GOOD], {"model": "/none"}, "/none"),
    ([GOOD, GOOD | {"prompt": [{"role": "user"}]}], {}, "line 2: .*`prompt`"),
    ([GOOD | {"prompt": [{"role": "user", "content": "a"}]}], {}, "line 1: .*chat template"),
    ([GOOD], {"model": None}, "needs --model"), ([GOOD], {"editor": "oracle"}, "oracle: .*human"),
    ([PAIR], {"editor": "nearest"}, "fits is .'human'"), (None, {"editor": "human"}, "oracle"),
    ([GOOD], {"editor": "magic"}, "magic"), ([GOOD], {"sft_steps": 1}, "no column `solution`"),
    ([GOOD | {"edited": "\ud800"}], {}, "line 1: "), ([GOOD], {"max_new_tokens": 256}, "_tokens"),
    *(([GOOD], TSV | {"rules": text}, "a tab and") for text in ("a b", "(a\tb", "a\t\\1"))])
def test_bad_input(stage, fails, data, flags, message):
    fails(message, stage, data, **flags)
    assert not Path("new").exists()

def test_stale_outputs_stop_the_stage_or_are_removed(stage, fails, run):
    for other in (two, three):
        fails("--overwrite\n$", other.main, other.Args(run=str(run)))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    fails("^error: .*reward_.*--overwrite\n$", stage, run=str(run))
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    (run / "report_of_mine").touch()
    stage(run=str(run), overwrite=True)
    pytest.raises(SystemExit, stage, run=str(run), max_edit_share=0.0)     # no row is left
    assert {path.name for path in run.iterdir() if "args" not in path.name} == {
        "policy", "problems.jsonl", "report_of_mine"}      # no edits of another policy

"""A1: the built-in tasks and their oracle, sampled pairs, gates, files; data of one's own."""

import json
import random
import shutil
from collections import Counter

import pytest


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("response, wrong_steps, answer_right", [
    ("3+2=5;-1=4;+4=8;-6=2", 0, True),
    ("3+2=6;-1=5;+4=9;-6=3", 4, False),         # an error is carried through
    ("3+2=5;-1=4;+4=8;-6=3", 1, False),
    ("3+2=5;-1=4;-6=2", 1, True),               # a step left out
    ("3+2=5;-1=4;+4=8;-6=2;-6=2", 1, True),     # a step too many
    ("", 4, False),
    ("no calculation at all", 4, False),        # what does not parse is wrong, never an error
])
def test_oracle_of_math(edit_data, response, wrong_steps, answer_right):
    assert edit_data.judge(response, {"solutions": ["3+2=5;-1=4;+4=8;-6=2"]}) == (wrong_steps, answer_right)


def test_judge_by_rules(edit_data):
    problem = {"rules": [r"\bsad\b", "(a|b)c"], "solution": "x"}
    assert edit_data.judge("sad, sadly sad: ac", problem) == (3, False)
    assert edit_data.judge("glad", problem) == (0, True) and edit_data.right("glad", problem)
    assert not edit_data.right("sad x", problem)                     # the rules decide, not the final answer


@pytest.mark.parametrize("task_name", ["math", "qa"])
def test_task_knows_solutions_errors_and_corrections(edit_data, task_name):
    task = {"math": edit_data.Math, "qa": edit_data.Qa}[task_name](1)
    rng = random.Random(0)
    operations = Counter()
    right = 0
    for _ in range(300):
        problem = task.problem(rng)
        assert problem["solution"] == problem["solutions"][0] and problem["answer"] in problem["solution"]
        assert all(edit_data.judge(solution, problem) == (0, True) for solution in problem["solutions"])
        demonstration = task.demonstration(problem, rng)
        correction = edit_data.nearest(demonstration, problem["solutions"])
        distance = edit_data.edit_distance(demonstration, correction)
        assert distance == min(edit_data.edit_distance(demonstration, s) for s in problem["solutions"])
        assert (distance == 0) == (edit_data.judge(demonstration, problem)[0] == 0)
        right += distance == 0
        words = [text.replace(".", " .").split() for text in (demonstration, correction)]
        runs = [op for op, i, j in edit_data.align(*words) if op != "keep"]
        operations.update(runs)
    assert 0.3 < right / 300 < 0.6                                    # demonstrations err as a real policy does
    if task_name == "qa":
        assert all(operations[op] > 20 for op in ("replace", "delete", "insert"))


def test_math_values_stay_single_digits_and_errors_carry_on(edit_data):
    rng = random.Random(0)
    for _ in range(200):
        problem = edit_data.Math(1).problem(rng)
        for text in (problem["solution"], edit_data.Math(1).demonstration(problem, rng)):
            value = text[0]
            for step in text.split(";"):
                operation = step.lstrip("0123456789")[:2] if step[0].isdigit() else step[:2]
                assert len(step.split("=")[1]) == 1
                assert operation in problem["prompt"]
            assert value == problem["prompt"][0]
    # 5-2=4 is the error; the next step goes on from 4
    assert edit_data.calculate(4, [("+", 3)]) == "4+3=7"


def test_splits_are_disjoint_and_without_duplicates(tiny_run):
    problems = rows_of(tiny_run / "problems.jsonl")
    assert len({problem["prompt"] for problem in problems}) == len(problems) == 90
    assert Counter(problem["split"] for problem in problems) == {"train": 60, "val": 10, "test": 20}
    split = {problem["prompt"]: problem["split"] for problem in problems}
    assert all(split[row["prompt"]] == row["split"] for row in rows_of(tiny_run / "edits.jsonl"))


def test_rows_of_edits_follow_the_contract(edit_data, tiny_run):
    tokenizer = edit_data.open_tokenizer(tiny_run / "policy")
    rows = rows_of(tiny_run / "edits.jsonl")
    assert rows
    for row in rows:
        assert {"id", "split", "prompt", "chosen", "rejected", "edited", "editor", "rejected_ids", "edited_ids",
                "edit_ops", "edit_distance", "first_error"} <= set(row) and "margin" not in row
        assert tokenizer.decode(row["rejected_ids"], skip_special_tokens=True) == row["rejected"]
        assert row["edited_ids"][-1] == tokenizer.eos_token_id        # the end token is a response token
        assert row["edit_distance"] == len(row["edit_ops"]) > 0
        result = list(row["rejected_ids"])
        for op, i, j in reversed(row["edit_ops"]):                    # the operations make edited from rejected
            if op == "insert":
                result.insert(i, row["edited_ids"][j])
            elif op == "delete":
                del result[i]
            else:
                result[i] = row["edited_ids"][j]
        assert result == row["edited_ids"]
        wrong = [i for op, i, j in row["edit_ops"] if op != "insert"]
        assert row["first_error"] == (wrong[0] if wrong else None)


def test_gates_drop_and_count(edit_data):
    pair = {"id": "a", "split": "train", "prompt": "p", "chosen": "c", "rejected": "1;2;3", "edited": "1;2;4",
            "prompt_ids": [1], "preferred_ids": [2], "rejected_ids": [5, 6, 7, 2], "edited_ids": [5, 6, 8, 2],
            "solutions": ["1;2;4"]}
    drop = Counter()
    row = edit_data.edit_row(pair, "oracle", 0.5, None, drop)
    assert row["edit_ops"] == [["replace", 2, 2]] and row["first_error"] == 2 and not drop
    assert edit_data.edit_row(pair, "oracle", 0.2, None, drop) is None                             # too large a share
    assert edit_data.edit_row({**pair, "edited_ids": [5, 6, 7, 2]}, "oracle", 0.5, None, drop) is None     # no change
    assert edit_data.edit_row({**pair, "edited": "9;2;3"}, "oracle", 0.5, None, drop) is None      # not better
    assert sum(drop.values()) == 3 and all(reason.startswith("gate") for reason in drop)
    without = edit_data.edit_row({**pair, "edited": None, "edited_ids": None}, "human", 0.5, None, drop)
    assert without["edit_ops"] is None and without["preferred_ids"] == [2]


def test_a_careless_editor_misses_an_error_or_changes_a_token(edit_data):
    _, tokenizer = edit_data.small_policy(["0123456789+-=;"], edit_data.Args(hidden_size=8, layers=1))
    encode = lambda text: edit_data.encode_response(tokenizer, text)
    pair = {"rejected_ids": encode("1+1=3;+1=4"), "edited_ids": encode("1+1=2;+1=3"), "prompt": "1+1+1="}
    rng = random.Random(0)
    seen = Counter()
    for _ in range(400):
        worse = edit_data.spoil(pair, [3, 4, 5, 6], tokenizer, rng)
        assert worse["editor"] == "careless" and worse["edited_ids"][-1] == tokenizer.eos_token_id
        distance = edit_data.edit_distance(pair["edited_ids"], worse["edited_ids"])
        missed = edit_data.edit_distance(pair["rejected_ids"], worse["edited_ids"]) == 1
        assert distance <= 1                                          # one change at the most, maybe into itself
        seen["missed" if missed else "needless"] += 1
    assert 150 < seen["missed"] < 250 and pair["edited_ids"] == encode("1+1=2;+1=3")
    for rejected, edited in (("1;2;3", "1;3"), ("1;3", "1;2;3")):     # a deletion and an insertion, both missed
        pair = {"rejected_ids": encode(rejected), "edited_ids": encode(edited), "prompt": "p"}
        results = [edit_data.spoil(pair, [3], tokenizer, rng)["edited_ids"] for _ in range(50)]
        assert all(len(edit_data.align(pair["edited_ids"], ids)) >= len(ids) for ids in results)
        assert max(edit_data.edit_distance(pair["edited_ids"], ids) for ids in results) == 1


def test_worse_edits_reach_training_pairs_only(edit_data, tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "policy", tmp_path / "run" / "policy")
    args = json.loads((tiny_run / "01_args.json").read_text())
    edit_data.main(edit_data.Args(**{**args, "run": str(tmp_path / "run"), "worse_edits": 0.5}))
    rows = rows_of(tmp_path / "run" / "edits.jsonl")
    careless = [row for row in rows if row["editor"] == "careless"]
    assert {row["split"] for row in careless} == {"train"} and 5 < len(careless) < len(rows) - 5
    assert f"{len(careless)}  of them with a worse edit" in capsys.readouterr().out


def test_no_edit_gets_no_worse_edit(edit_data, tiny_run, tmp_path):
    """The data size must not hang on --worse_edits."""
    rows = [{"prompt": f"Q: What do Ada and {name} send?\nA:", "response": " Bob makes tea.",
             "edited": " Bob makes tea." if k % 2 else " Bob makes soap."} for k, name in enumerate(edit_data.PEOPLE[:20])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit_data.main(edit_data.Args(run=str(tmp_path / "run"), data=str(tmp_path / "data.jsonl"), worse_edits=1.0,
                                  model=str(tiny_run / "policy"), max_edit_share=1.0))
    assert all(row["prompt"] in {row["prompt"] for row in rows[::2]} for row in rows_of(tmp_path / "run" / "edits.jsonl"))


def test_the_same_prompt_and_the_same_answer_in_other_clothes(edit_data, tmp_path):
    """Keys in another order are the same message, 72 and "72" the same answer, and no id is no name."""
    turned = [{"content": "Ada", "role": "user"}]
    rows = [{"prompt": [{"role": "user", "content": "Ada"}], "solution": "It is 72", "answer": 72, "id": None},
            {"prompt": turned, "solution": "It is 72", "answer": "72.0"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape, rows = edit_data.read_data(tmp_path / "data.jsonl", "", Counter())
    assert [row["id"] for row in rows] == ["row-0", "row-1"]
    assert len(edit_data.split_by_prompt(rows, edit_data.Args())) == 1


@pytest.mark.parametrize("row, chosen, edited", [
    ({"prompt": "p", "chosen": "good", "rejected": "bad"}, "good", None),
    ({"prompt": "p", "chosen": "good", "rejected": "bad", "answer": "5"}, "good", None),
    ({"prompt": "p", "response": "bad", "edited": "better", "solution": None}, "better", "better"),
    ({"prompt": "p", "chosen": "good", "rejected": "bad", "edited": "better"}, "good", "better"),
    ({"prompt": "p", "response": "bad", "edited": "better"}, "better", "better"),
    ({"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "good"}],
      "rejected": [{"role": "assistant", "content": "bad"}]}, "good", None),
])
def test_shapes_of_data(edit_data, tmp_path, row, chosen, edited):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    shape, (pair,) = edit_data.read_data(path, "", Counter())
    assert (pair["chosen"], pair["rejected"], pair["edited"]) == (chosen, "bad", edited)


SKY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What colour is the sky?"}]
BLUE, GREEN = [{"role": "assistant", "content": "It is blue."}], [{"role": "assistant", "content": "It is green."}]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What colour is the sky?\n\nAssistant:"


@pytest.mark.parametrize("row, prompt, chosen, rejected", [
    ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "score_chosen": 9.0, "margin": 1.0},
     "The sky is", " blue.", " green."),
    ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is", " blue.", " black."),
    ({"chosen": "Sky?\nblue", "rejected": "Sky?\nblue, I think"}, "Sky?\n", "blue", "blue, I think"),
    ({"chosen": HH + " It is blue.", "rejected": HH + " It is green."}, HH, " It is blue.", " It is green."),
    ({"prompt": SKY, "chosen": BLUE, "rejected": GREEN}, SKY, "It is blue.", "It is green."),
    ({"chosen": SKY + BLUE, "rejected": SKY + GREEN, "score_chosen": 9.0, "score_rejected": 2.0},
     SKY, "It is blue.", "It is green."),                                      # trl-lib/ultrafeedback_binarized
    ({"prompt": SKY[1]["content"], "prompt_id": "f0", "chosen": SKY[1:] + BLUE, "rejected": SKY[1:] + GREEN,
      "messages": SKY[1:] + BLUE}, SKY[1:], "It is blue.", "It is green."),    # HuggingFaceH4's: prompt repeated
    ({"prompt": SKY, "chosen": SKY + BLUE, "rejected": SKY + GREEN}, SKY, "It is blue.", "It is green."),
    ({"chosen": SKY[1:] + BLUE + SKY[1:] + BLUE, "rejected": SKY[1:] + BLUE + SKY[1:] + GREEN},
     SKY[1:] + BLUE + SKY[1:], "It is blue.", "It is green."),
])
def test_preference_formats_of_trl(edit_data, tmp_path, row, prompt, chosen, rejected):
    """Standard and conversational, explicit and implicit prompt; other columns do not matter."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for kind in ("", "llm"):
        shape, (pair,) = edit_data.read_data(path, kind, Counter())
        assert [pair[name] for name in ("prompt", "chosen", "rejected", "edited")] == [prompt, chosen, rejected, None]


@pytest.mark.parametrize("row, message", [
    ({"chosen": "blue", "rejected": "green"}, "do not begin with the same"),
    ({"chosen": " blue", "rejected": " green"}, "do not begin with the same"),
    ({"chosen": BLUE, "rejected": GREEN}, "do not begin with the same"),
    ({"chosen": SKY + BLUE, "rejected": SKY[1:] + GREEN}, "behind the same prompt"),
    ({"chosen": SKY, "rejected": SKY[:1] + GREEN}, "one message of the role assistant"),
    ({"chosen": SKY + BLUE + SKY[1:] + BLUE, "rejected": SKY + GREEN + SKY[1:] + BLUE}, "behind the same prompt"),
    ({"prompt": "Another question", "chosen": SKY + BLUE, "rejected": SKY + GREEN}, "not those of `prompt`"),
    ({"chosen": [{"content": "Hi"}] + BLUE, "rejected": [{"content": "Hi"}] + GREEN}, "`role`"),
    ({"prompt": [{"content": "Hi"}], "chosen": "a", "rejected": "b"}, "`role`"),
    ({"chosen": SKY + BLUE, "rejected": "It is green."}, "do not begin with the same"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green.", "edited": "The sky is red."}, "`prompt` is missing"),
])
def test_a_preference_row_without_a_clear_prompt_is_refused(edit_data, tmp_path, capsys, row, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stop:
        edit_data.read_data(path, "", Counter())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "line 1: " in error and message in error


def test_rows_with_one_response_or_the_same_twice_are_dropped_and_counted(edit_data, tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"chosen": HH + " Blue.", "rejected": HH + rest} for rest in (" Green.", "", " Blue.")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drop = Counter()
    shape, pairs = edit_data.read_data(path, "", drop)
    assert [pair["rejected"] for pair in pairs] == [" Green."]
    assert drop == {"row has an empty response": 1, "row has the same response twice": 1}


def test_the_stage_reads_a_file_without_the_column_prompt(edit_data, tiny_run, tmp_path):
    people = "Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Kit".split()
    rows = [{"chosen": f"Q: What do Ada and {name} send?\nA: tea.", "margin": 1.0,
             "rejected": f"Q: What do Ada and {name} send?\nA: soap."} for name in people]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit_data.main(edit_data.Args(run=str(tmp_path / "run"), data=str(tmp_path / "data.jsonl"),
                                  model=str(tiny_run / "policy")))
    edits = rows_of(tmp_path / "run" / "edits.jsonl")
    assert [row["prompt"] for row in edits] == [f"Q: What do Ada and {name} send?\nA:" for name in people]
    assert {row["chosen"] for row in edits} == {" tea."} and {row["rejected"] for row in edits} == {" soap."}
    assert {row["split"] for row in edits} == {"train", "val", "test"} and not any("margin" in row for row in edits)


def test_one_prompt_never_stands_in_two_splits(edit_data):
    pairs = [{"id": str(k), "prompt": f"prompt {k % 40}"} for k in range(100)]
    problems = edit_data.split_by_prompt(pairs, edit_data.Args())
    assert len(problems) == 40
    assert Counter(problem["split"] for problem in problems) == {"train": 32, "val": 4, "test": 4}
    assert len({(pair["prompt"], pair["split"]) for pair in pairs}) == 40


def test_a_second_call_changes_nothing(edit_data, tiny_run):
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    args = json.loads((tiny_run / "01_args.json").read_text())
    edit_data.main(edit_data.Args(**args))
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before


def test_real_human_edits_on_a_real_checkpoint(edit_data, shared, tmp_path, capsys):
    lines = (shared / "data" / "qa_feedback.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    edit_data.main(edit_data.Args(run=str(tmp_path / "run"), data=str(tmp_path / "data.jsonl"),
                                  model=str(shared / "models" / "stories260K")))
    rows = rows_of(tmp_path / "run" / "edits.jsonl")
    shown = capsys.readouterr().out
    dropped = sum(int(line.split()[1]) for line in shown.splitlines() if line.startswith("dropped"))
    assert len(rows) + dropped == 60 and len(rows) > 30               # nothing is dropped silently
    assert all(row["editor"] == "human" for row in rows)


def test_overwriting_stage_1_removes_what_later_stages_made(edit_data, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    args = json.loads((run / "01_args.json").read_text())
    edit_data.main(edit_data.Args(**{**args, "run": str(run), "overwrite": True, "sft_steps": 1}))
    left = {path.name for path in run.iterdir()}
    assert "edits.jsonl" in left and not any(name.startswith(("reward_", "ppo_", "value_", "eval")) for name in left)

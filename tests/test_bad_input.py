"""Bad input and real errors: one clear line on standard error, exit status 2, nothing half-written."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"prompt": "Q: What do Ada and Bob send to Cleo, and where?\nA:", "response": " Ada makes tea.",
        "edited": " Bob makes tea."}
CHAT = [{"role": "user", "content": "Ada"}]
SMALL = {"01_edit_data": {}, "02_reward_model": {"epochs": 1}, "04_eval": {"max_new_tokens": 20},
         "03_ppo": {"updates": 1, "rollout_batch": 8, "minibatch": 8, "ppo_epochs": 1, "max_new_tokens": 20}}


@pytest.fixture
def stages(edit_data, reward_model, ppo, evaluation):
    return {1: edit_data, 2: reward_model, 3: ppo, 4: evaluation}


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished tiny run, to be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def files_of(folder):
    """Path -> bytes of all files; the stages' arguments are a record, no output."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not re.fullmatch(r"0\d_args.json", path.name)}


def stops(capsys, module, folder, *needles, **args):
    """The stage ends with status 2 and one line that holds the needles; no file in the folder has changed."""
    before = files_of(folder)
    args = {**SMALL[module.__name__], **args}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(module.Args(**{name: str(x) if isinstance(x, Path) else x for name, x in args.items()}))
    assert stop.value.code == 2
    shown = re.split(r"[\r\n]+", capsys.readouterr().err.replace("\033[A", ""))
    lines = [line for line in shown if line.strip() and not re.search(r"\d+%\|.*\]\s*$", line)]   # no bar
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for needle in needles:
        assert str(needle) in lines[0]
    assert files_of(folder) == before
    return lines[0]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def change_rows(path, line=None, **columns):
    """Set columns in one line of a JSONL file, or in all; ... removes a column."""
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    for row in rows if line is None else [rows[line - 1]]:
        row.update(columns)
        for name in [name for name, value in columns.items() if value is ...]:
            del row[name]
    write_rows(path, rows)


# --- Stage 1: data of one's own ----------------------------------------------------------------------------

@pytest.mark.parametrize("line, message", [
    (b"{oops", "not a line of JSON"),
    (b'{"prompt": "\xff"}', "not a line of JSON in UTF-8"),
    (b"[1, 2]", "not a JSON object"),
    (b"null", "not a JSON object"),
    ({"prompt": ...}, "`prompt` is missing"),
    ({"response": ...}, "`response` is missing"),
    ({"edited": ...}, "`edited` is missing"),
    ({"prompt": 5}, "`prompt` has the wrong type"),
    ({"response": None}, "`response` has the wrong type"),
    ({"edited": {}}, "`edited` has the wrong type"),
    ({"prompt": " \n"}, "`prompt` is empty"),
    ({"prompt": []}, "`prompt` is empty"),
    ({"response": ""}, "`response` is empty"),
    ({"response": "\t "}, "`response` is empty"),
    ({"prompt": "\ud800"}, ""),
    ({"prompt": ["Ada"]}, "`prompt`"),
    ({"prompt": [{"role": "user"}]}, "`prompt`"),
    ({"response": ["Ada"]}, "`response`"),
    ({"response": [{"role": "assistant"}]}, "`response`"),
    ({"response": [{"role": "assistant", "content": ""}]}, "`response`"),
    ({"edited": [{"role": "assistant", "content": 3}]}, "`edited`"),
])
def test_a_bad_line_of_data(stages, tiny_run, tmp_path, capsys, line, message):
    data = tmp_path / "data.jsonl"
    if isinstance(line, bytes):
        data.write_bytes(b"\n".join([json.dumps(GOOD).encode()] * 2 + [line, b""]))
    else:
        change_rows(write_rows(data, [GOOD] * 3), 3, **line)
    stops(capsys, stages[1], tmp_path, data, "line 3", message, run=tmp_path / "new", data=data,
          model=tiny_run / "policy")
    assert not (tmp_path / "new").exists()


def test_a_column_that_only_later_lines_have_is_checked_too(stages, tiny_run, tmp_path, capsys):
    pair = {"prompt": "Ada", "chosen": "tea", "rejected": "soap"}
    data = write_rows(tmp_path / "data.jsonl", [pair, {**pair, "edited": 5}])
    stops(capsys, stages[1], tmp_path, data, "line ", "`edited`", run=tmp_path / "new", data=data,
          model=tiny_run / "policy")


@pytest.mark.parametrize("empty", ["", " \n", None, [], [{"role": "assistant", "content": " "}]])
def test_an_empty_edit_is_dropped_and_counted(stages, tiny_run, tmp_path, capsys, empty):
    """As the real data have it: 13 of its 500 rows came back from the annotator without an edit."""
    rows = [{**GOOD, "prompt": f"{' Ada' * k} makes"} for k in range(1, 13)]
    data = write_rows(tmp_path / "data.jsonl", rows + [{**GOOD, "edited": empty}])
    args = {"run": str(tmp_path / "new"), "data": str(data), "model": str(tiny_run / "policy")}
    stages[1].main(stages[1].Args(**args))
    assert re.search(r"dropped +1 ", capsys.readouterr().out)
    assert len((tmp_path / "new" / "edits.jsonl").read_text().splitlines()) == 12
    write_rows(data, [{**GOOD, "edited": empty}] * 3)
    stops(capsys, stages[1], tmp_path, data, "no edit", **{**args, "run": tmp_path / "all"})
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("content, message", [
    (None, "cannot be read"), ("", "no rows"), ("\n \n", "no rows"), ("folder", "cannot be read"),
    ({"prompt": "Ada " * 300}, "context"), ({"response": "Ada " * 300}, "context"),
    ({"prompt": CHAT}, "chat template")])
def test_a_bad_file_of_data(stages, tiny_run, tmp_path, capsys, content, message):
    data = tmp_path / "data.jsonl"
    if content == "folder":
        data.mkdir()
    elif isinstance(content, str):
        data.write_text(content)
    elif content:
        write_rows(data, [{**GOOD, **content}] * 3)
    named = tiny_run / "policy" if message == "chat template" else data
    stops(capsys, stages[1], tmp_path, named, message, run=tmp_path / "new", data=data,
          model=tiny_run / "policy")
    assert not (tmp_path / "new").exists()


def test_dropped_prompts_do_not_reach_stage_3(stages, tiny_run, tmp_path, capsys):
    """A prompt too long for the context is dropped and counted, in edits.jsonl and in problems.jsonl."""
    rows = [{**GOOD, "prompt": f"{' Ada' * k} makes"} for k in range(1, 13)]
    data = write_rows(tmp_path / "data.jsonl", rows + [{**GOOD, "prompt": "Ada " * 300}])
    stages[1].main(stages[1].Args(run=str(tmp_path / "new"), data=str(data), model=str(tiny_run / "policy")))
    assert re.search(r"dropped +1 ", capsys.readouterr().out)
    assert len((tmp_path / "new" / "problems.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("args, message", [
    ({"data": "data.jsonl"}, "--model"),
    ({"data": "data.jsonl", "model": "m", "editor": "oracle"}, "--editor oracle"),
    ({"editor": "human"}, "--editor human"), ({"editor": "rules:r.tsv"}, "--editor rules"),
    ({"samples": 1}, "--samples"), ({"temperature": 0.0}, "--temperature"), ({"temperature": -1.0}, "--temperature"),
    ({"train_prompts": 25_000, "task": "qa"}, "--train_prompts")])
def test_flags_that_do_not_fit(stages, tmp_path, capsys, args, message):
    stops(capsys, stages[1], tmp_path, message, run=tmp_path / "new", **args)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("args", [{"task": "math"}, {"task": "qa", "seed": 2}, {"data": "d", "model": "m"}])
def test_a_run_folder_of_another_task(stages, run, capsys, args):
    stops(capsys, stages[1], run, run, "--run", run=run, **args)


def test_a_run_folder_that_is_none(stages, run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    stops(capsys, stages[1], tmp_path, tmp_path / "file", run=tmp_path / "file", task="qa")
    (run / "01_args.json").write_text("{")
    stops(capsys, stages[1], run, run / "01_args.json", run=run, task="qa")


# --- Stages 2 to 4: what the stage before left --------------------------------------------------------------

@pytest.mark.parametrize("stage, missing, message", [
    (2, "edits.jsonl", "01_edit_data.py"), (2, "policy", ""),
    (3, "problems.jsonl", "01_edit_data.py"), (3, "policy", ""),
    (3, "reward_metrics.json", "02_reward_model.py"), (3, "reward_token", "02_reward_model.py"),
    (4, "problems.jsonl", "01_edit_data.py"), (4, "policy", ""), (4, "[pr][pl][om]*", "03_ppo.py")])
def test_a_stage_before_its_predecessor(stages, run, capsys, stage, missing, message):
    for path in run.glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    name = "no policy" if "*" in missing else run / missing
    stops(capsys, stages[stage], run, name, message, run=run, overwrite=True)


def test_a_missing_folder_is_not_looked_up_on_the_net(stages, run, capsys, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("the net was asked"))
    monkeypatch.chdir(run.parent)
    shutil.rmtree(run / "policy")                              # run/policy also looks like a name on the hub
    stops(capsys, stages[2], run, "run/policy", run="run", overwrite=True)


@pytest.mark.parametrize("stage, name, damage", [
    (stage, name, damage)
    for stage, name in [(1, "policy"), (2, "policy"), (3, "policy"), (3, "reward_token"), (4, "policy"),
                        (4, "ppo_token")]
    for damage in ["missing", "file", "empty", "config", "sizes", "weights", "tokenizer"]
    if damage != "tokenizer" or name == "policy"])
def test_a_model_folder_that_is_none(stages, run, tmp_path, capsys, stage, name, damage):
    path = run / name
    if damage == "tokenizer":
        (path / "tokenizer.json").write_text("{")
    elif damage == "weights":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:len(data) // 2])
    elif damage == "config":
        (path / "config.json").write_text("{")
    elif damage == "sizes":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    else:
        shutil.rmtree(path)
        if damage == "file":
            path.write_text("no folder")
        elif damage == "empty":
            path.mkdir()
    args = {"run": run, "overwrite": True}
    if stage == 1:
        data = write_rows(tmp_path / "data.jsonl", [GOOD])
        args = {"run": tmp_path / "new", "data": data, "model": path}
    if name == "ppo_token":
        args["policies"] = [str(path)]
    stops(capsys, stages[stage], tmp_path, path, **args)


@pytest.mark.parametrize("columns, message", [
    ({"rejected_ids": ...}, "`rejected_ids` is missing"), ({"split": 1}, "`split`"),
    ({"preferred_ids": []}, "`preferred_ids` is empty"), ({"rejected": ...}, "`rejected`"),
    ({"rejected_ids": ["a"]}, "`rejected_ids`"), ({"rejected_ids": [1.5]}, "`rejected_ids`"),
    ({"prompt_ids": [-1]}, "`prompt_ids`"), ({"prompt_ids": [10**6]}, "`prompt_ids`"),
    ({"preferred_ids": [10**6]}, "`preferred_ids`"), ({"edited_ids": [10**6]}, "`edited_ids`"),
    ({"edited_ids": None}, "`edited_ids`"), ({"edited_ids": ...}, "`edited_ids`"),
    ({"edit_ops": "none"}, "`edit_ops`"), ({"edit_ops": [[1, 2]]}, "`edit_ops`"),
    ({"edit_ops": [["replace", 999, 0]]}, "`edit_ops`"), ({"edit_ops": [["swap", 0, 0]]}, "`edit_ops`"),
    ({"first_error": 999}, "`first_error`"), ({"solution": 5}, "`solution`"), ({"answer": ...}, "`answer`"),
    ({"first_wrong_step": 0}, "`first_wrong_step`"), ({"first_wrong_step": "2"}, "`first_wrong_step`"),
    ({"first_wrong_step": 1.0}, "`first_wrong_step`"), ({"prompt": 5}, "`prompt`")])
def test_a_bad_line_of_edits(stages, run, capsys, columns, message):
    change_rows(run / "edits.jsonl", 2, **columns)
    stops(capsys, stages[2], run, run / "edits.jsonl", "line 2", message, run=run, overwrite=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_edits_without_training_or_held_out_rows(stages, run, capsys, split):
    change_rows(run / "edits.jsonl", split=split)
    stops(capsys, stages[2], run, run / "edits.jsonl", run=run, overwrite=True)


def test_edits_of_another_tokenizer(stages, run, capsys):
    size = json.loads((run / "policy" / "config.json").read_text())["vocab_size"]
    rows = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    turned = [{**row, "rejected_ids": [size - 1 - k for k in row["rejected_ids"]]} for row in rows]
    write_rows(run / "edits.jsonl", turned)
    stops(capsys, stages[2], run, run / "edits.jsonl", "tokenizer", run=run, overwrite=True)


@pytest.mark.parametrize("stage", [3, 4])
def test_problems_and_models_of_another_run(edit_data, stages, run, capsys, stage):
    config = LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_labels=1)
    auto_class = LlamaForTokenClassification if stage == 3 else LlamaForCausalLM
    auto_class(config).save_pretrained(run / "other")
    edit_data.small_policy(["xyz"], edit_data.Args())[1].save_pretrained(run / "other")
    other = {3: {"method": "ppo_token", "reward_model": run / "other"}, 4: {"policies": [str(run / "other")]}}
    stops(capsys, stages[stage], run, run / "other", "vocabulary", run=run, overwrite=True, **other[stage])
    change_rows(run / "problems.jsonl", prompt="1+1+1+1+1=")           # no word that the policy knows
    stops(capsys, stages[stage], run, run / "problems.jsonl", run=run, overwrite=True)


def test_a_policy_is_no_reward_model(stages, run, capsys):
    """Without a trained head on board, transformers would make one up."""
    stops(capsys, stages[3], run, run / "policy", run=run, overwrite=True, method="ppo_token",
          reward_model=run / "policy")


@pytest.mark.parametrize("stage, args", [
    (3, {"method": "ppo_sequence", "reward_model": "reward_token"}),
    (3, {"method": "ppo_token", "reward_model": "reward_sequence"}),
    (3, {"method": "rlmec", "reward_model": "reward_token"}), (3, {"policy": "reward_token"}),
    (2, {"model": "reward_sequence", "kind": "generative"}), (4, {"policies": ["reward_token"]})])
def test_a_model_of_another_kind(stages, run, capsys, stage, args):
    """Its head would be thrown away, or read as another one, without a word."""
    named = {name: [str(run / x) for x in value] if isinstance(value, list) else run / value
             for name, value in args.items() if name not in ("method", "kind")}
    stops(capsys, stages[stage], run, "reward_", "no AutoModel", run=run, overwrite=True, **{**args, **named})


def test_a_reward_model_for_all_methods(stages, run, capsys):
    stops(capsys, stages[3], run, "--method", run=run, overwrite=True, reward_model=run / "reward_token")


def shorten(folder, context):
    """The model of a folder with a shorter context."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))


@pytest.mark.parametrize("stage, folder", [(3, "reward_token"), (4, "ppo_token")])
def test_a_model_with_a_shorter_context(stages, run, capsys, stage, folder):
    shorten(run / folder, 20)
    args = {"method": "ppo_token"} if stage == 3 else {}
    stops(capsys, stages[stage], run, run / folder, "context of 20", run=run, overwrite=True, **args)


def test_a_reference_response_longer_than_the_context_of_the_judge(stages, run, capsys):
    change_rows(run / "problems.jsonl", solutions=..., answer=...)
    rows = [json.loads(line) for line in (run / "problems.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["prompt"], "response": " Ada makes tea." * 80} for row in rows]
    stops(capsys, stages[4], run, run / "reward_sequence", "context of 256", run=run, overwrite=True,
          baseline=write_rows(run / "references.jsonl", rows))


def test_pairs_longer_than_the_context_are_counted(stages, run, capsys):
    lengths = [len(row["prompt_ids"]) + max(len(row[f"{name}_ids"]) for name in ("preferred", "rejected", "edited"))
               for row in map(json.loads, (run / "edits.jsonl").read_text().splitlines())]
    context = max(lengths) - 1
    shorten(run / "policy", context)
    stages[2].main(stages[2].Args(run=str(run), overwrite=True, epochs=1, kind="token"))
    dropped = sum(length > context for length in lengths)
    assert f"reward_token: dropped {dropped} of {len(lengths)} rows" in capsys.readouterr().out


def test_optional_columns_of_edits_may_be_absent(stages, run):
    change_rows(run / "edits.jsonl", first_error=..., edit_distance=...)
    stages[2].main(stages[2].Args(run=str(run), overwrite=True, epochs=1, rewrite_epochs=1, locate_epochs=1))
    metrics = json.loads((run / "reward_metrics.json").read_text())
    assert metrics["token"]["localisation"]["auroc"] is None and metrics["generative"]["editor_edit_distance"] > 0


@pytest.mark.parametrize("stage", [3, 4])
@pytest.mark.parametrize("line, columns, message", [
    (2, {"prompt": 5}, "line 2"), (2, {"split": ...}, "line 2"), (2, {"answer": 5}, "line 2: column `answer`"),
    (2, {"solutions": [5]}, "line 2: column `solutions`"), (2, {"rules": ["("]}, "line 2: column `rules`"), (None, {"split": "elsewhere"}, "split"),
    (None, {"prompt": CHAT}, "chat template"), (None, {"prompt": "Ada " * 300}, "context")])
def test_bad_problems(stages, run, capsys, stage, line, columns, message):
    change_rows(run / "problems.jsonl", line, **columns)
    named = run / "policy" if message == "chat template" else run / "problems.jsonl"
    stops(capsys, stages[stage], run, named, message, run=run, overwrite=True)


@pytest.mark.parametrize("stage, content", [(2, "{"), (2, "[]"), (3, "{"), (3, "[]"), (3, '{"token": 1}'),
                                            (4, "{"), (4, "[]"), (4, '{"token": 1}'),
                                            (3, '{"token": {"scale": {}}}'),
                                            (3, '{"token": {"scale": {"mean": 0, "std": 0}}}')])
def test_corrupt_reward_metrics(stages, run, capsys, stage, content):
    (run / "reward_metrics.json").write_text(content)
    stops(capsys, stages[stage], run, run / "reward_metrics.json", run=run, overwrite=stage != 2)


# --- RLMEC -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("columns, message", [
    ({"solution": ...}, "`solution` is missing"), ({"answer": ...}, "`answer` is missing"),
    ({"solution": ""}, "`solution` is empty"), ({"answer": None}, "`answer` has the wrong type"),
    ({"answer": "8"}, "an earlier row has 5"), ({"response": 5}, "`response` has the wrong type"),
    ({"prompt": [{"role": "user"}]}, "`prompt`")])
def test_a_problem_without_solution_or_answer(stages, tiny_run, tmp_path, capsys, columns, message):
    good = {"prompt": "3+2=", "solution": "3+2=5", "answer": "5", "response": "3+2=6"}
    write_rows(tmp_path / "data.jsonl", [good, good])
    change_rows(tmp_path / "data.jsonl", 2, **columns)
    stops(capsys, stages[1], tmp_path, "line 2", message, run=tmp_path / "new", data=tmp_path / "data.jsonl",
          model=tiny_run / "policy")


@pytest.mark.parametrize("column", ["solution", "answer"])
@pytest.mark.parametrize("value", [..., "", 5])
def test_rlmec_problems_without_solution_or_answer(stages, run, capsys, column, value):
    change_rows(run / "problems.jsonl", 3, **{column: value})
    where = "line 3" if (column, value) == ("answer", 5) else "qa-2"
    stops(capsys, stages[3], run, run / "problems.jsonl", where, column, run=run, overwrite=True, method="rlmec")


def test_a_generative_model_of_another_vocabulary(stages, run, edit_data, capsys):
    model, tokenizer = edit_data.small_policy(["0123456789+-=;"], edit_data.Args(hidden_size=8, layers=1))
    edit_data.save_model(model, tokenizer, run / "other")
    stops(capsys, stages[3], run, run / "other", "vocabulary", run=run, overwrite=True, method="rlmec",
          reward_model=run / "other")


def test_a_generative_model_that_cannot_rewrite(stages, run, capsys, monkeypatch):
    monkeypatch.setattr(stages[3], "rewrite", lambda grm, problems, responses, *rest: [None] * len(responses))
    stops(capsys, stages[3], run, "reward_generative", "could not rewrite", run=run, overwrite=True,
          method="rlmec", rlmec_samples=4)
    stages[3].main(stages[3].Args(run=str(run), method="all", rlmec_samples=4))
    for name in ("rlmec", "rlmec_imitation"):
        shutil.rmtree(run / name)
    stages[3].main(stages[3].Args(run=str(run), rlmec_samples=4))
    assert "rlmec: skipped" in capsys.readouterr().out


def test_solutions_without_an_answer_are_counted(stages, tiny_run, tmp_path, capsys):
    rows = [{"prompt": f"{k}+2=", "solution": f"{k}+2={k + 2}", "answer": k + 2, "response": response}
            for k in range(8) for response in (f"{k}+2=1", f"{k}+2={k + 2}", "½ “of” the\n\ncake", "")]
    rows.append({"prompt": "1-1=", "solution": "I do not know", "answer": "0", "response": "1-1=0"})
    data = write_rows(tmp_path / "data.jsonl", rows)
    args = {"run": str(tmp_path / "new"), "data": str(data), "model": str(tiny_run / "policy"), "max_edit_share": 1.0}
    stages[1].main(stages[1].Args(**args))
    shown = capsys.readouterr().out
    assert "dropped      1  row's solution does not end in its answer" in shown
    kept = [json.loads(line) for line in (tmp_path / "new" / "edits.jsonl").read_text().splitlines()]
    assert len(kept) == 24 and all(row["editor"] == "nearest" for row in kept)
    assert len({(row["prompt"], *row["edited_ids"]) for row in kept}) == 8          # the one right solution
    problems = (tmp_path / "new" / "problems.jsonl").read_text().splitlines()
    assert len(problems) == 8 and all("samples" not in line for line in problems)


# --- Arguments that cannot be ------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, args, message", [
    (2, {"epochs": 0}, "--epochs 0"), (2, {"batch": -1}, "--batch -1"), (3, {"updates": 0}, "--updates 0"),
    (3, {"rlmec_samples": 0}, "--rlmec_samples 0"), (2, {"device": "cuda:99"}, "--device cuda:99"),
    (3, {"device": "abacus"}, "--device abacus"), (1, {"samples": 0}, "--samples 0"),
    (1, {"train_prompts": 0}, "--train_prompts 0"), (4, {"batch": 0}, "--batch 0"),
    (1, {"sft_lr": -1.0}, "--sft_lr -1"), (1, {"temperature": float("nan")}, "--temperature nan"),
    (1, {"hidden_size": 30}, "--hidden_size 30"), (2, {"lr": -1.0}, "--lr -1"),
    (3, {"temperature": 0.0}, "--temperature 0"), (3, {"temperature": -1.0}, "--temperature -1"),
    (4, {"temperature": float("nan")}, "--temperature nan")])
def test_arguments_that_cannot_be(stages, run, capsys, stage, args, message):
    stops(capsys, stages[stage], run, message, run=run, overwrite=True, **args)


# --- Numbers that are none ---------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, kind, message", [(2, "token", "step 0"), (2, "sequence", "step 0"),
                                                  (3, "token", "update 1"), (3, "sequence", "update 1")])
def test_a_reward_that_is_not_finite(stages, run, capsys, monkeypatch, stage, kind, message):
    function = "token_rewards" if kind == "token" else "sequence_reward"
    right = getattr(stages[stage], function)
    monkeypatch.setattr(stages[stage], function, lambda *args: right(*args) * float("nan"))
    args = {"kind": kind} if stage == 2 else {"method": f"ppo_{kind}"}
    stops(capsys, stages[stage], run, kind, message, run=run, overwrite=True, **args)


@pytest.mark.parametrize("stage, args, message", [
    (1, {"sft_lr": 1e30, "sft_steps": 3, "train_prompts": 9, "val_prompts": 1, "test_prompts": 1,
         "task": "qa"}, "step"),
    (3, {"lr": 1e30, "ppo_epochs": 2}, "update 1"),
    (3, {"lr": 1e30, "updates": 2}, "update"), (3, {"lr": 1e4, "updates": 3, "method": "ppo_token"}, "update"),
    (3, {"rlmec_lr": 1e30, "eval_every": 1, "method": "rlmec", "rlmec_samples": 8, "rlmec_batch": 2}, "rlmec")])
def test_training_that_diverges(stages, run, tmp_path, capsys, stage, args, message):
    folder = tmp_path / "new" if stage == 1 else run
    stops(capsys, stages[stage], tmp_path, message, run=folder, overwrite=True, **args)


def test_a_reward_model_that_diverges_on_the_last_step(stages, run, capsys, monkeypatch):
    """The loss was finite at every step, the rewards on held-out pairs are not: nothing is saved."""
    right = stages[2].token_rewards
    monkeypatch.setattr(stages[2], "token_rewards",
                        lambda *args: right(*args) * (1 if torch.is_grad_enabled() else float("nan")))
    stops(capsys, stages[2], run, "reward_token", run=run, overwrite=True)


@pytest.mark.parametrize("stage, name", [(2, "policy"), (3, "policy"), (3, "reward_token"), (4, "ppo_token")])
def test_weights_that_are_not_finite(stages, run, capsys, stage, name):
    path = run / name / "model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    stops(capsys, stages[stage], run, run / name, run=run, overwrite=True)


# --- A second call, and a real shell -----------------------------------------------------------------------

@pytest.mark.parametrize("stage, other", [(1, {"sft_steps": 3}), (2, {"alpha": 7.0}), (3, {"kappa": 7.0}),
                                          (4, {"split": "val"})])
def test_a_second_call_changes_no_byte(stages, run, stage, other):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    args = {**json.loads((run / f"0{stage}_args.json").read_text()), "run": str(run)}
    for changed in ({}, other):
        stages[stage].main(stages[stage].Args(**{**args, **changed}))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_settings_than_those_of_what_is_kept_are_said(stages, run, capsys):
    saved = {**json.loads((run / "03_args.json").read_text()), "run": str(run)}
    shutil.rmtree(run / "ppo_sequence")
    stages[3].main(stages[3].Args(**{**saved, "lr": 2e-4, "method": "ppo_sequence"}))
    assert "other settings" not in capsys.readouterr().out                 # nothing is kept
    stages[3].main(stages[3].Args(**{**saved, "kappa": 7.0, "method": "ppo_token"}))
    assert "last call had other settings: --lr 0.0002 --kappa 0.1\n" in capsys.readouterr().out


def test_a_console_without_unicode_stops_no_stage(stages, tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    stages[3].start_stage(stages[3].Args(run=str(tmp_path)), "03")
    print("half a character: \ufffd")
    console.flush()
    assert b"half a character: ?" in console.buffer.getvalue()


@pytest.mark.parametrize("script, args, message", [
    ("01_edit_data.py", ["--data", "none.jsonl", "--model", "none"], "none.jsonl"),
    ("02_reward_model.py", [], "01_edit_data.py")])
def test_exit_status_in_a_shell(tmp_path, script, args, message):
    result = subprocess.run([sys.executable, str(ROOT / script), "--run", "new", *args], cwd=tmp_path,
                            text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert "Traceback" not in result.stderr and not any(tmp_path.iterdir())

"""Stage 4: the report on hostile text, the human sheet, several runs, and what is wrong with their files."""

import csv
import json
import random
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

HOSTILE = "<script>alert(1)</script>\"'&\u202eevil\u200b" + "x" * 3000


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def parsed(text):
    page = Page()
    page.feed(text)
    return page


def stops(capsys, evaluation, needle, **args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(evaluation.Args(**args))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and needle in error


def test_hostile_text_is_harmless(evaluation):
    page = parsed(evaluation.page(HOSTILE, [HOSTILE], [HOSTILE], {"data": evaluation.safe(HOSTILE)}))
    assert "script" not in page.tags and page.text.count("alert(1)") >= 4
    shown = evaluation.safe(HOSTILE)
    assert "\u202e" not in shown and "\u200b" not in shown and "U+202E" in shown and "U+200B" in shown


def test_the_report_of_a_run(evaluation, tiny_run):
    text = (tiny_run / "report.html").read_text(encoding="utf-8")
    page = parsed(text)
    assert len(text) < 2_000_000 and "script" not in page.tags and "svg" in page.tags and "http" not in text
    for word in ("wins", "episodes", "GRM", "sequence model", "Before and after", "Settings"):
        assert word in page.text
    errors = json.loads((tiny_run / "eval.json").read_text())["errors"]
    assert errors["groups"] and len(errors["examples"]) <= 10


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished tiny run, to be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def change(path, split, change_row, most=1):
    """Apply change_row to the first rows of a split in a JSONL file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in [row for row in rows if row["split"] == split][:most]:
        change_row(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluate(evaluation, run, **args):
    evaluation.main(evaluation.Args(run=str(run), overwrite=True, max_new_tokens=40, **args))
    return parsed((run / "report.html").read_text(encoding="utf-8"))


def test_hostile_data_in_a_whole_run(evaluation, run):
    hostile = lambda row: row.update(prompt=HOSTILE + row["prompt"])
    change(run / "problems.jsonl", "test", hostile)
    change(run / "edits.jsonl", "val", hostile, most=5)
    (run / "01_args.json").write_text(json.dumps({"task": HOSTILE}))
    shutil.copytree(run / "ppo_token", run / "<img src=x onerror=alert(2)>")
    policies = [str(run / name) for name in ("ppo_token", "<img src=x onerror=alert(2)>")]
    page = evaluate(evaluation, run, policies=policies)
    assert not {"script", "img"} & set(page.tags) and page.text.count("alert(1)") >= 3 and "alert(2)" in page.text
    assert "\u202e" not in page.text and "\u200b" not in page.text


@pytest.mark.parametrize("examples", [1, 2000])
def test_one_example_or_many(evaluation, run, examples):
    page = evaluate(evaluation, run, examples=examples)
    assert page.text.count("sequence model") >= 1 and "Before and after" in page.text


def test_without_rlmec_and_without_an_oracle(evaluation, run, capsys):
    for name in [*run.glob("rlmec*"), run / "reward_generative"]:
        shutil.rmtree(name) if name.is_dir() else name.unlink()
    metrics = json.loads((run / "reward_metrics.json").read_text())
    (run / "reward_metrics.json").write_text(json.dumps({k: metrics[k] for k in ("token", "sequence")}))
    for column in ("solutions", "answer"):
        for split in ("train", "val", "test"):
            change(run / "problems.jsonl", split, lambda row: row.pop(column, None), most=10**6)
    page = evaluate(evaluation, run)
    assert "reward_sequence, for want of an oracle" in page.text and "RLMEC:" not in page.text
    assert json.loads((run / "eval.json").read_text())["policies"]["ppo_token"]["accuracy"] is None


def test_another_baseline(evaluation, run, tmp_path, capsys):
    evaluate(evaluation, run, baseline=str(run / "ppo_token"))
    policies = json.loads((run / "eval.json").read_text())["policies"]
    assert policies["ppo_token"]["win_rate"] == policies["baseline"]["win_rate"] == 0.5       # itself: all ties
    problems = [json.loads(line) for line in (run / "problems.jsonl").read_text().splitlines()]
    rows = [{"prompt": p["prompt"], "response": p["solution"]} for p in problems if p["split"] == "test"]
    path = tmp_path / "references.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(evaluation, run, baseline=str(path))
    policies = json.loads((run / "eval.json").read_text())["policies"]
    assert policies["baseline"]["accuracy"] == 1.0 and policies["sft"]["win_rate"] < 0.5
    path.write_text(json.dumps(rows[0]) + "\n")
    stops(capsys, evaluation, "references.jsonl", run=str(run), overwrite=True, baseline=str(path))


def test_the_human_sheet_of_a_run(evaluation, run, capsys):
    before = (run / "eval.json").read_bytes()
    evaluation.main(evaluation.Args(run=str(run), human_eval=5, max_new_tokens=40))
    table = list(csv.DictReader((run / "human_eval.csv").open(encoding="utf-8-sig", newline="")))
    assert len(table) == 5 and (run / "eval.json").read_bytes() == before
    with (run / "human_eval.csv").open("w", encoding="utf-8", newline="") as file:     # saved by a spreadsheet
        writer = csv.DictWriter(file, table[0], delimiter=";")
        writer.writeheader()
        writer.writerows({**row, "preference": "1,5"} for row in table)
    capsys.readouterr()
    evaluation.main(evaluation.Args(human_verdicts=str(run / "human_eval.csv")))
    assert capsys.readouterr().out == "win_rate 50.000\nstandard_error 0.000\nn 5\nleft_out 0\n"


def test_the_last_screen_fits_80_by_24(evaluation, run, capsys):
    evaluate(evaluation, run)
    lines = capsys.readouterr().out.splitlines()
    screen = lines[next(k for k, line in enumerate(lines) if line.startswith("policy ")):]
    assert max(map(len, screen)) < 80 and "\033" not in "".join(screen) and str(screen[-1]).endswith("report.html")
    assert len(screen) - 2 * sum(line.startswith("WARNING") for line in screen) <= 24


def test_a_broken_log_of_stage_3(evaluation, run, capsys):
    (run / "ppo_token.csv").write_text("update,episodes\n1,x\n")
    with pytest.raises(SystemExit):
        evaluate(evaluation, run)
    assert "ppo_token.csv: not a log that 03_ppo.py writes" in capsys.readouterr().err


@pytest.mark.parametrize("wins, losses, draws, win_rate, standard_error", [
    (783, 16, 5, "97.699", "0.510"), (761, 32, 12, "95.280", "0.716"), (716, 83, 5, "89.366", "1.079"),
    (642, 134, 25, "81.710", "1.331"), (578, 227, 0, "71.801", "1.587"), (436, 356, 13, "54.969", "1.740"),
    (328, 469, 8, "41.242", "1.727"), (234, 543, 22, "30.663", "1.606"), (112, 672, 20, "15.174", "1.235")])
def test_verdicts_agree_with_published_results(evaluation, tmp_path, capsys, wins, losses, draws, win_rate,
                                               standard_error):
    """Nine rows of AlpacaEval's own leaderboard (alpaca_eval_gpt4_leaderboard.csv in tatsu-lab/alpaca_eval: gpt4_turbo,
    gpt4, chatgpt, gpt35_turbo_instruct, guanaco-65b, oasst-sft-llama-33b, alpaca-farm-ppo-human, phi-2,
    text_davinci_001), their counts turned back into verdicts."""
    verdicts = [{"preference": 2}] * wins + [{"preference": 1}] * losses + [{"preference": 1.5}] * draws
    (tmp_path / "verdicts.json").write_text(json.dumps(verdicts))
    evaluation.main(evaluation.Args(verdicts=str(tmp_path / "verdicts.json")))
    assert capsys.readouterr().out.startswith(f"win_rate {win_rate}\nstandard_error {standard_error}\n")


def test_verdicts_against_an_independent_computation(evaluation, tmp_path, capsys):
    rng = random.Random(0)
    rows = [{"preference": rng.choice([1, 2, 1.5, 0, None, rng.uniform(1, 2)])} for _ in range(5000)]
    (tmp_path / "verdicts.json").write_text(json.dumps(rows))
    evaluation.main(evaluation.Args(verdicts=str(tmp_path / "verdicts.json")))
    values = [0.5 if row["preference"] == 0 else row["preference"] - 1 for row in rows if row["preference"] is not None]
    error = statistics.stdev(values) / len(values) ** 0.5
    assert capsys.readouterr().out == (f"win_rate {100 * statistics.mean(values):.3f}\nstandard_error "
                                       f"{100 * error:.3f}\nn {len(values)}\nleft_out {5000 - len(values)}\n")


def test_verdicts(evaluation, tmp_path, capsys):
    path = tmp_path / "verdicts.json"
    rows = [{"output_1": "a", "output_2": "b", "preference": p} for p in (2, 2, 1, 0, None)]
    path.write_text(json.dumps(rows))
    evaluation.main(evaluation.Args(verdicts=str(path)))
    # 1, 1, 0, 1/2: mean 0.625, sample variance (0.140625 * 2 + 0.390625 + 0.015625) / 3
    assert capsys.readouterr().out == "win_rate 62.500\nstandard_error 23.936\nn 4\nleft_out 1\n"
    for content, needle in (("{", "not a JSON"), ("[{}]", "`preference`"), ('[{"preference": 9}]', "no usable")):
        path.write_text(content)
        stops(capsys, evaluation, needle, verdicts=str(path))


def test_human_sheet_round_trip(evaluation, tmp_path, capsys):
    path = tmp_path / "sheet.csv"
    rows = [(f"question\u2028\x0b{k}", "=good", f"bad, \"{k}\"\nnew line") for k in range(20)] + [("same", "x", "x")]
    evaluation.write_sheet(path, rows, ("model", "sft"), 1)
    table = list(csv.DictReader(path.open(encoding="utf-8-sig", newline="")))
    assert len({row["output_a"] for row in table}) > 2 and all(row["output_a"][0] != "=" for row in table)
    for row in table[:20]:
        row["preference"] = "1" if row["output_a"] == "'=good" else "2"

    def save():
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)

    save()
    assert evaluation.read_sheet(path) == [2] * 20 + [1.5]
    for column, value, needle in (("preference", "A", "row 4"), ("output_b", "other", "row 4")):
        table[2][column], old = value, table[2][column]
        save()
        stops(capsys, evaluation, needle, human_verdicts=str(path))
        table[2][column] = old


def test_runs_together(evaluation, tiny_run, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(tiny_run, tmp_path / name)
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    evaluation.main(evaluation.Args(runs=runs, run=str(tmp_path / "both")))
    combined = json.loads((tmp_path / "both" / "combined.json").read_text())
    assert combined["policies"]["ppo_token"]["win_rate"]["sd"] == 0.0
    assert "svg" in parsed((tmp_path / "both" / "combined.html").read_text()).tags
    first = json.loads((tmp_path / "b" / "01_args.json").read_text())
    (tmp_path / "b" / "01_args.json").write_text(json.dumps({**first, "task": "math"}))
    stops(capsys, evaluation, "task", runs=runs, run=str(tmp_path / "new"))
    (tmp_path / "b" / "01_args.json").write_text(json.dumps(first))
    result = json.loads((tmp_path / "b" / "eval.json").read_text())
    result["policies"]["baseline"] = result["policies"]["sft"]
    (tmp_path / "b" / "eval.json").write_text(json.dumps(result))
    stops(capsys, evaluation, "opponent", runs=runs, run=str(tmp_path / "new"))
    (tmp_path / "a" / "ppo_token.csv").write_text("update,episodes\n1,x\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluation.read_log(tmp_path / "a" / "ppo_token.csv")
    capsys.readouterr()
    (tmp_path / "b" / "eval.json").unlink()
    stops(capsys, evaluation, "eval.json", runs=runs, run=str(tmp_path / "new"))

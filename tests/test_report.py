"""Stage 4: the report on hostile text, the human sheet, several runs, and what is wrong with their files."""

import csv
import json
import shutil
from html.parser import HTMLParser

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
    rows = [(f"question {k}", "=good", f"bad, \"{k}\"\nnew line") for k in range(20)] + [("same", "x", "x")]
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
    (tmp_path / "a" / "ppo_token.csv").write_text("update,episodes\n1,x\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluation.read_log(tmp_path / "a" / "ppo_token.csv")
    capsys.readouterr()
    (tmp_path / "b" / "eval.json").unlink()
    stops(capsys, evaluation, "eval.json", runs=runs, run=str(tmp_path / "new"))

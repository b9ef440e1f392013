"""Stage 4: the statistics by hand, verdicts, several runs, the report."""

import json, shutil
import numpy as np
import pytest
from conftest import four, rows_of

def test_win_rate_as_alpacaeval_counts_it_and_intervals():
    result = four.win_rate([2, 1, 1.5, 0, None, 3, 0.5, -1, "2", True, float("nan")])  # four count
    assert result["n"] == 4 and result["win_rate"] == 0.5
    assert four.win_rate([None, 7])["win_rate"] is None
    values = np.random.default_rng(0).choice([0, 0.5, 1], 20_000, p=[0.2, 0.3, 0.5])
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5      # the normal one, for large n
    low, high = four.interval(values)
    assert (low + half, high - half) == pytest.approx([values.mean()] * 2, abs=0.04 * half)
    paired = four.difference([2, 1, None, 1.5, 2], [1, 1, 2, 1, None])
    assert paired["difference"] == pytest.approx(0.5) and paired["n"] == 3
    assert four.difference(values, values)["ci95"] == [0, 0]           # paired

def test_measure_by_hand():
    log = [{"update": k, "episodes": 10 * k, "seconds": k / 2, "val_kl": 0.3} for k in range(1, 9)]
    for row, accuracy in zip(log[1::2], (0.5, 0.9, 0.6, 0.8)):
        row["accuracy"] = accuracy
    assert four.measure([0, 2, 0, 1], log) == pytest.approx({"accuracy": 0.5, "episodes": 80,
        "wrong_steps_per_response": 0.75, "kl_to_ref": 0.3, "updates": 8, "seconds": 4.0,
        "best_accuracy": 0.9, "largest_drop": 0.3, "updates_to_95": 4})    # 0.9 >= 0.95 x 0.8
    assert [four.first_update(log, level) for level in (0.5, 0.51, 0.95)] == [2, 4, None]
    assert four.measure([None, 1], log)["accuracy"] is None
    policies = {"ppo_sequence": four.measure([], log) | {"best_accuracy": 0.95}}
    *_, said, _ = four.checks({}, policies, {}, {"ppo_token": log})
    assert said.endswith("reaches 95.0 %, ppo_sequence's best, at update –.")   # it never came

@pytest.mark.parametrize("reward, token, row, needle", [
    ({}, {}, {}, None), ({"pair_accuracy": 0.7}, {}, {"kl": -20.0}, None),
    ({"pair_accuracy": 0.69}, {}, {}, "reward accuracy under 70 %: reward_token"),
    ({"pair_accuracy": 0.0}, {}, {}, "reward accuracy"),
    ({}, {"difference": 0.0}, {}, "win rate not above the baseline"),
    ({}, {}, {"val_kl": 20.5}, "ppo_token reached a val_kl of 20.5, over 20"),
    ({}, {"largest_drop": 0.21}, {}, "ppo_token lost 21% accuracy"),
    ({}, {}, {"kl": -91.0}, "kl of 91,"), ({}, {}, {"approx_kl": 0.11}, "approx_kl of 0.11,"),
    ({}, {}, {"advantage_rms": float("nan")}, "advantage_rms of nan, over 10")])
def test_failure_signatures(reward, token, row, needle):
    good = {"pair_accuracy": 0.9, "preference_accuracy": 0.9}
    token = {"difference": 0.1, "largest_drop": 0.1, **token}
    policies = {"ppo_token": token, "ppo_sequence": {"largest_drop": 0.1}}
    models = {"sequence": good, "token": {**good, **reward}, "generative": good}
    logs = {"ppo_token": [{"kl": 2.0}, row], "ppo_sequence": [{"kl": 2.0}]}
    warnings = [*four.failure_signatures(models, policies, {four.CONTRASTS[0]: token}, logs)]
    assert len(warnings) == (needle is not None) and (not needle or needle in warnings[0])

def test_files_of_the_stage(run, monkeypatch):
    """Of the SFT policy as ppo_sequence, a KL of 91 in a CSV, and prompts of HTML."""
    wrong = iter([2] * 40 + [0] * 40 + [2] * 40)               # sft, ppo_token, ppo_sequence
    monkeypatch.setattr(four, "wrong_steps", lambda *_: next(wrong))
    shutil.copytree(run / "policy", run / "ppo_sequence", dirs_exist_ok=True)
    (run / "ppo_token.csv").write_text(
        "update,episodes,seconds,kl,val_kl,accuracy\n1,32,0.5,91,,\n2,64,1.0,2,0.3,0.5\n")
    for path in (run / "problems.jsonl", run / "reward_examples.jsonl"):
        path.write_text(path.read_text().replace(
            '"prompt": "', '"prompt": "<script>alert(1)</script>&'))
    four.main(four.Args(run=str(run)))
    result, rows = json.loads((run / "eval.json").read_text()), rows_of(run / "responses.jsonl")
    policies, gap = result["policies"], result["differences"]["ppo_token - ppo_sequence"]
    assert set(policies) == {"sft", "ppo_token", "ppo_sequence"}
    assert all({"win_rate_ci95", "n", "episodes"} <= {*row} for row in policies.values())
    seen = [[row[x] for x in ("win_rate", "win_rate_se", "accuracy")] for row in policies.values()]
    assert seen == [[0.5, 0, 0], [1, 0, 1], [0.5, 0, 0]] and gap["difference"] == 0.5
    assert [row["prompt"] for row in rows] == [
        row["prompt"] for row in rows_of(run / "problems.jsonl") if row["split"] == "test"]
    assert all([*row][2:] == [*policies] and row["sft"] == row["ppo_sequence"] for row in rows)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.count("<polyline") == 2 and ';outline:1.5px solid"' in text    # curves, heat map
    assert "<ins>" in text and "<del>" in text and "reached a kl of 91, over 20" in text
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") == 16
    assert not any(word in text for word in ("http", "url(", "@import", " src=", " href="))

def test_combine_several_runs(tmp_path, capsys):
    runs = [tmp_path / name for name in "abc"]
    for run, win in zip(runs, (0.5, 0.6, 0.9)):
        run.mkdir()
        (run / "eval.json").write_text(json.dumps({
            "policies": {"ppo_token": {"win_rate": win, "accuracy": None}},
            "differences": {"x - y": {"difference": win / 2, "ci95": [0, 1]}}}))
    four.main(four.Args(runs=[*map(str, runs)]))
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[text.strip() for text in row if text] for row in rows] == [
        ["differences x - y difference", "0.333 ± 0.104", "0.250 0.300 0.450"],
        ["policies ppo_token win_rate", "0.667 ± 0.208", "0.500 0.600 0.900"]]   # sd²: 0.0867 / 2

def test_verdicts_of_alpacaeval(tmp_path, capsys, fails):
    path = tmp_path / "annotations.json"
    rows = [{"preference": p, "output_1": "a", "output_2": "b"} for p in (2, 2, 1, 0, None)]
    path.write_text(json.dumps([*rows, {"preference": 2, "output_1": "c", "output_2": "c"}]))
    four.main(four.Args(verdicts=str(path)))         # wins 1, 1, 0, 1/2, 1/2; n - 1 = 4
    assert capsys.readouterr().out.split()[1::2] == ["60.000", "18.708", "5"]
    for text in ("[]", "{", '[{"output_1": "a", "output_2": "b"}]', '[{"preference": 9}]'):
        path.write_text(text)
        fails(str(path), four.main, four.Args(verdicts=str(path)))

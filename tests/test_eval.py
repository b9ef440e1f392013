"""Stage 4: wins and statistics by hand, the papers' checks, other judges, the report."""

import json
import shutil
from html import escape

import numpy as np
import pytest
from conftest import four, one, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

HTML = "<script>alert(1)</script>&"  # in the prompts below: no browser may run it


# --- What is measured: each policy against sft, prompt by prompt ---

def test_a_policy_wins_a_prompt_with_fewer_wrong_steps():
    assert [four.win(count, 2) for count in (1, 2, 3)] == [1.0, 0.5, 0.0]
    assert four.win(None, None) is None


@pytest.fixture
def problems(run):
    """The test prompts of the run, to be changed and written back."""
    return [row for row in rows_of(run / "problems.jsonl") if row["split"] == "test"]


def test_a_response_stands_beside_the_prompt_that_it_answers(run, problems):
    for problem, length in zip(problems, (12, 8, 4)):
        problem["prompt_ids"] += problem["solution_ids"][:length]
    args = four.Args(temperature=0, max_new_tokens=6)

    # together: sorted by length, which turns them round, and padded
    four.write_jsonl(run / "problems.jsonl", problems[:3])
    *_, rows = four.compare(run, {}, args)
    for problem, row in zip(problems, reversed(rows)):
        four.write_jsonl(run / "problems.jsonl", [problem])
        *_, alone = four.compare(run, {}, args)
        assert alone == [row]


def test_a_response_is_judged_by_its_own_problem_and_by_its_end(run, problems):
    problems[0]["rules"] = ["zebra"]  # never hit
    problems[1]["rules"] = [r"\A"]    # hit once in every text
    four.write_jsonl(run / "problems.jsonl", problems[:2])
    policies, *_ = four.compare(run, {}, four.Args(temperature=0, max_new_tokens=1))
    # 0 + 1 and 1 + 1
    assert policies["sft"]["wrong_steps_per_response"] == 1.5


def test_a_response_that_has_ended_may_be_right(run, problems):
    for problem in problems:
        problem["rules"] = ["zebra"]
    four.write_jsonl(run / "problems.jsonl", problems)
    policies, *_ = four.compare(run, {}, four.Args(max_new_tokens=48))
    assert policies["sft"]["accuracy"] > 0


@pytest.fixture
def two_ends(run, problems):
    """The run, where a full stop ends a response as well, and no word is wrong."""
    path = run / "policy" / "config.json"
    config = json.loads(path.read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    config["eos_token_id"] = [config["eos_token_id"], *tokenizer(".").input_ids]
    path.write_text(json.dumps(config))
    for problem in problems:
        problem["rules"] = ["zebra"]
    four.write_jsonl(run / "problems.jsonl", problems)
    return run


def test_each_of_several_end_tokens_ends_a_response(two_ends):
    policies, _, rows = four.compare(two_ends, {}, four.Args(max_new_tokens=48))
    assert policies["sft"]["accuracy"] == 1
    for row in rows:
        assert "." not in row["sft"]


@pytest.mark.parametrize("stage", [one, four])
def test_generate_keeps_the_first_end_token_and_drops_what_follows(two_ends, stage):
    model = AutoModelForCausalLM.from_pretrained(two_ends / "policy")
    tokenizer = AutoTokenizer.from_pretrained(two_ends / "policy")
    prompts = [row["prompt_ids"] for row in rows_of(two_ends / "problems.jsonl")]
    args = stage.Args(max_new_tokens=48, device="cpu")
    lengths = set()
    for response in stage.generate(model, tokenizer, prompts, args):
        assert response[-1] in model.config.eos_token_id
        assert not {*response[:-1]} & {*model.config.eos_token_id}
        lengths.add(len(response))
    assert len(lengths) > 1  # so that some are padded


# --- Statistics ---

def test_the_win_rate_and_its_standard_error_by_hand():
    # deviations from 2.5 / 4: 0.375, 0.375, -0.125, -0.625; the sum of their squares: 0.6875
    found = four.win_rate([1, 1, 0.5, 0, None])
    assert found["win_rate"] == 0.625
    assert found["win_rate_se"] == pytest.approx((0.6875 / 3) ** 0.5 / 4 ** 0.5)
    assert found["n"] == 4  # None was no verdict


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).choice([0, 0.5, 1], 20_000, p=[0.2, 0.3, 0.5])
    half = 1.96 * values.std() / 20_000 ** 0.5
    expected = [values.mean() - half, values.mean() + half]
    assert four.interval(values) == pytest.approx(expected, abs=0.04 * half)


def test_a_difference_counts_the_prompts_where_both_are_known():
    # 1 - 0, 0 - 0 and 0.5 - 0
    found = four.difference([1, 0, None, 0.5, 1], [0, 0, 1, 0, None])
    assert found["difference"] == 0.5
    assert found["n"] == 3


def test_a_difference_is_paired():
    # either win rate is uncertain, and yet one is 0.5 above the other on every prompt
    assert four.difference([1, 0.5, 1, 0.5], [0.5, 0, 0.5, 0])["ci95"] == [0.5, 0.5]


@pytest.fixture
def log():
    """A training log of twelve updates, with an accuracy after every other one."""
    rows = []
    for k in range(1, 13):
        rows.append({"update": k, "episodes": 10 * k, "seconds": k / 2, "val_kl": k / 10})
    for row, accuracy in zip(rows[1::2], (0.5, 0.75, 0.77, 0.9, 0.6, 0.8)):
        row["accuracy"] = accuracy
    return rows


def test_the_numbers_of_one_policy_by_hand(log):
    assert four.measure([0, 2, 0, 0], log) == pytest.approx({
        "accuracy": 3 / 4, "wrong_steps_per_response": 2 / 4,
        "updates": 12, "episodes": 120, "seconds": 6.0, "kl_to_ref": 1.2,  # the last row
        "best_accuracy": 0.9,
        "updates_to_95": 6,         # 0.77 >= 0.95 * 0.8 = 0.76
        "largest_drop": 0.9 - 0.6,  # 0.5 came before the best
    })


def test_what_nobody_knows_is_no_number(log):
    assert four.win_rate([None, None])["win_rate"] is None
    assert four.measure([None, 1], log)["accuracy"] is None


def test_a_policy_that_ends_with_nothing_right_reaches_nothing(log):
    log[-1]["accuracy"] = 0.0
    assert four.measure([], log)["updates_to_95"] is None


def test_the_first_update_that_reaches_a_level(log):
    assert [four.first_update(log, level) for level in (0.5, 0.51, 0.95)] == [2, 4, None]


# --- The papers' checks, and signs of failure ---

def test_the_checks_of_the_papers(log):
    models = {"token": {"pair_accuracy": 0.999, "preference_accuracy": 0.8, "epochs": 4},
              "sequence": {"pair_accuracy": None, "preference_accuracy": 0.773}}
    policies = {"ppo_sequence": four.measure([], log) | {"best_accuracy": 0.95}}
    gap = {"difference": 0.127, "n": 40, "ci95": [-0.02, 0.2]}
    gaps = {"ppo_token - ppo_sequence": gap, "ppo_token - rlmec": gap}  # no claim of the second
    assert four.checks(models, policies, gaps, {"ppo_token": log}, "runs/x") == [
        "Reward models, held-out (edited, rejected) in order: token 99.9 %.",
        "Reward models, held-out (chosen, rejected) in order: token 80.0 %, sequence 77.3 %.",
        "Epochs of the reward models: token 4; the sequence kinds gain from more (README, "
        "Results).",
        "Win rate, ppo_token - ppo_sequence: +12.7 (-2.0 to +20.0) points, 40 prompts.",
        "Updates to 95 % of their own final accuracy: ppo_sequence 6.",
        "ppo_token reaches 95.0 %, ppo_sequence's best, at update –.",  # it never came
        "Steadiness, largest drop after the best: ppo_sequence 30.0 %.",
        "ppo_token and ppo_sequence differ in two things: what the reward model learns from "
        "(edits, siblings), and how many rewards a response gets. To separate them:",
        "python 02_reward_model.py --run runs/x --kind cross --overwrite",
        "python 03_ppo.py --run runs/x --method cross",
        "python 04_eval.py --run runs/x",
    ]


# --- The cross: what each ingredient brings ---

# wins of four policies on four prompts. The edit alone brings 1/4 (one prompt of four), the token
# reward alone 2/4, both 1: more than 1/4 + 2/4 by 1/4
CELLS = {
    "sft": [0.5, 0.5, 0.5, 0.5],
    "ppo_sequence": [0, 0, 0, 0],
    "ppo_sequence_edit": [1, 0, 0, 0],
    "ppo_token_sibling": [0, 1, 1, 0],
    "ppo_token": [1, 1, 1, 1],
}


@pytest.fixture
def crossed(run, problems):
    """`policies` and `differences` of eval.json of a run whose wins are those of CELLS."""
    four.write_jsonl(run / "problems.jsonl", problems[:4])
    logs = {}
    for name in [*four.POLICIES]:
        if name in CELLS:
            shutil.copytree(run / "policy", run / name, dirs_exist_ok=True)
            logs[name] = [{"update": 1, "episodes": 1, "seconds": 0}]
    # errors: sft has one everywhere; a win has none, a loss has two
    order = ["sft", *logs]
    counts = iter([int(2 - 2 * win) for name in order for win in CELLS[name]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(four, "wrong_steps", lambda *values: next(counts))
        policies, differences, _ = four.compare(run, logs, four.Args(max_new_tokens=1))
    return policies, differences


def test_the_interaction_is_what_both_bring_beyond_the_sum_of_both_alone(crossed):
    policies, differences = crossed
    assert policies["ppo_token_sibling"]["win_rate"] == 0.5
    assert differences[four.INTERACTION]["difference"] == 1 - 1 / 4 - 2 / 4


def test_the_sentences_of_the_cross(crossed):
    gaps = {name: row | {"ci95": [0, 1]} for name, row in crossed[1].items()}
    assert four.cross_sentences(gaps) == [
        "What each ingredient brings in this run, in points of win rate (95 % interval):",
        "the minimal edit +25.0 (+0.0 to +100.0) alone, +50.0 (+0.0 to +100.0) beside the token "
        "reward;",
        "a reward on every token +50.0 (+0.0 to +100.0) alone, +75.0 (+0.0 to +100.0) beside the "
        "edit;",
        "both together +100.0 (+0.0 to +100.0); less the sum of both alone: +25.0 (+0.0 to "
        "+100.0).",
    ]


def test_the_table_of_the_cross_has_a_cell_for_each_pair_and_reward(crossed):
    policies, differences = crossed
    gaps = {name: row | {"ci95": [0, 1]} for name, row in differences.items()}
    text = four.cross_table(policies, gaps)
    assert [row.split() for row in text.strip().split("\n")[1:]] == [
        "one reward a response 0.0 %, 0.0 % 25.0 %, 25.0 % +25.0 (+0.0 to +100.0)".split(),
        "a reward on every token 50.0 %, 50.0 % 100.0 %, 100.0 % +50.0 (+0.0 to +100.0)".split(),
        "PPO: every token brings +50.0 (+0.0 to +100.0) +75.0 (+0.0 to +100.0)".split(),
    ]


def test_dpo_is_the_off_line_row_of_the_cross(crossed):
    policies, differences = crossed
    policies |= {"dpo": policies["ppo_sequence"], "dpo_edit": policies["ppo_token"]}
    differences["dpo_edit - dpo"] = differences["ppo_token - ppo_sequence"]
    row = four.cross_table(policies, differences).split("\n")[-2]
    assert row.split()[:9] == "no reward model: DPO 0.0 %, 0.0 % 100.0".split()


def test_without_one_of_the_four_cells_there_is_no_cross(crossed):
    policies, differences = crossed
    del differences[four.INTERACTION]
    assert four.cross_table(policies, differences) == ""


def test_the_interaction_is_of_the_prompts_where_all_four_are_judged(run, problems, monkeypatch):
    four.write_jsonl(run / "problems.jsonl", problems[:4])
    preferences = {name: [1 + win for win in wins] for name, wins in CELLS.items()}
    preferences["ppo_sequence"][0] = None  # longer than the judge's context
    logs = {}
    for name in CELLS.keys() - {"sft"}:
        shutil.copytree(run / "policy", run / name, dirs_exist_ok=True)
        logs[name] = [{"update": 1, "episodes": 1, "seconds": 0}]

    def judged(name, rows, judge, args):
        return [{"output_1": "a", "output_2": "b", "preference": x} for x in preferences[name]]

    monkeypatch.setattr(four, "judged", judged)
    policies, differences, _ = four.compare(run, logs, four.Args(max_new_tokens=1), judge="some")
    # of the last three prompts: token 3/3, sequence 0, sibling 2/3, edit 0
    assert differences[four.INTERACTION]["n"] == 3
    assert differences[four.INTERACTION]["difference"] == pytest.approx(1 / 3)
    assert policies["ppo_sequence"]["not_judged"] == 1


def test_a_difference_of_nothing_is_a_dash():
    assert four.points(four.difference([None], [1])) == "–"


def test_where_nobody_judges_there_is_no_cross(run, problems):
    for problem in problems:
        problem.pop("solutions")
    four.write_jsonl(run / "problems.jsonl", problems[:1])
    logs = {}
    for name in CELLS.keys() - {"sft"}:
        shutil.copytree(run / "policy", run / name, dirs_exist_ok=True)
        logs[name] = [{"update": 1, "episodes": 1, "seconds": 0}]
    _, differences, _ = four.compare(run, logs, four.Args(max_new_tokens=1))
    assert four.INTERACTION not in differences


def test_the_picture_of_the_cross_has_a_line_for_each_reward(crossed):
    html = four.cross_picture(crossed[0])
    # 50 % at y = 200, 100 % at 0: 0 and 25 %, then 50 and 100 %
    assert 'points="60,400.0 340,300.0 "' in html
    assert 'points="60,200.0 340,0.0 "' in html
    assert "ppo_token 100.0 %" in html


def signs_of_failure(changed):
    """The warnings of a good run in which some numbers of ppo_token or of its reward change."""
    good = {"pair_accuracy": 0.9, "preference_accuracy": 0.6, "largest_drop": 0.1, "kl": 2.0}
    token = good | {"difference": 0.1} | changed
    return four.failure_signatures(
        {"token": token, "sequence": good},
        {"ppo_token": token, "ppo_sequence": good},
        {"ppo_token - ppo_sequence": token},
        {"ppo_token": [good, token], "ppo_sequence": [good]},
    )


@pytest.mark.parametrize("changed", [{}, {"pair_accuracy": 0.7, "kl": -20.0, "largest_drop": 0.2}],
                         ids=["a good run", "all at the limits"])
def test_within_the_limits_there_is_no_warning(changed):
    assert signs_of_failure(changed) == []


@pytest.mark.parametrize("changed, warning", [
    pytest.param({"pair_accuracy": 0.69}, "under 70 %: reward_token, 69.0%", id="69 %"),
    pytest.param({"pair_accuracy": 0.0}, "under 70 %: reward_token, 0.0%", id="0 is a number"),
    pytest.param({"pair_accuracy": None}, "reward_token, 60.0%", id="no edit was held out"),
    pytest.param({"difference": 0.0}, "win rate not above the baseline", id="no gain"),
    pytest.param({"kl": -91.0}, "kl of ppo_token reached 91, over 20", id="kl"),
    pytest.param({"val_kl": 20.5}, "val_kl of ppo_token reached 20.5, over 20", id="val_kl"),
    pytest.param({"approx_kl": 0.11}, "approx_kl of ppo_token reached 0.11,", id="approx_kl"),
    pytest.param({"score_std": 10.1}, "score_std of ppo_token reached 10.1,", id="score_std"),
    pytest.param({"advantage_rms": np.nan}, "advantage_rms of ppo_token reached nan,", id="nan"),
    pytest.param({"largest_drop": 0.21}, "ppo_token lost 21% accuracy", id="a drop"),
])
def test_beyond_a_limit_there_is_one_warning(changed, warning):
    [found] = signs_of_failure(changed)
    assert warning in found


def test_the_table_has_a_dash_for_what_was_not_measured_and_not_for_0():
    row = {"win_rate": 0.75, "win_rate_se": None, "accuracy": 0.5, "kl_to_ref": 0.15,
           "wrong_steps_per_response": 0.0, "updates": 3, "seconds": 8}
    _, line = four.table({"dpo": row}).splitlines()
    assert line.split() == "dpo 75.0 % – 50.0 % 0.00 0.15 3 8".split()


# --- Several runs, another judge ---

def test_runs_prints_mean_and_deviation_of_the_numbers_that_all_runs_have(tmp_path, capsys):
    runs = [tmp_path / name for name in "abc"]
    for run, win in zip(runs, (0.5, 0.6, 0.9)):
        run.mkdir()
        row = {"win_rate": win, "accuracy": None, "win_rate_ci95": [0, 1], f"only_{run.name}": 1}
        (run / "eval.json").write_text(json.dumps({"policies": {"ppo_token": row}}))
    four.main(four.Args(runs=[*map(str, runs)]))
    # the mean is 2 / 3; squared deviations 0.0278, 0.0044, 0.0544; their sum 0.0867, by 3 - 1
    expected = "policies ppo_token win_rate 0.667 ± 0.208 0.500 0.600 0.900"
    assert capsys.readouterr().out.split() == expected.split()


def test_a_verdict_of_1_to_2_is_a_win_of_0_to_1():
    wins = [four.win_of_verdict({"preference": x}) for x in (2, 1, 1.5, 0)]
    assert wins == [1, 0, 0.5, 0.5]  # 0 is AlpacaEval's tie


@pytest.mark.parametrize("preference", [None, 3, 0.5, -1, "2", True, float("nan")], ids=repr)
def test_another_preference_is_no_verdict(preference):
    assert four.win_of_verdict({"preference": preference}) is None


def test_verdicts_prints_what_alpacaeval_does(tmp_path, capsys):
    path = tmp_path / "annotations.json"
    rows = [{"preference": x, "output_1": "a", "output_2": "b"} for x in (2, 2, 1, 0, None)]
    # equal outputs: a tie
    rows.append({"preference": 2, "output_1": "c", "output_2": "c"})
    path.write_text(json.dumps(rows))
    four.main(four.Args(verdicts=str(path)))
    # wins 1, 1, 0, 0.5, 0.5; deviations from 0.6: 0.4, 0.4, -0.6, -0.1, -0.1; squares 0.7;
    # (0.7 / 4) ** 0.5 / 5 ** 0.5 = 0.18708
    expected = "win_rate 60.000 standard_error 18.708 n 5"
    assert capsys.readouterr().out.split() == expected.split()


@pytest.mark.parametrize("text", ["[]", "{", '[{"output_1": "a"}]', '[{"preference": 9}]'])
def test_a_file_without_verdicts_is_named(tmp_path, fails, text):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    fails(str(path), four.main, four.Args(verdicts=str(path)))


# --- The report ---

def test_what_each_reward_model_gives_to_the_tokens_of_a_wrong_response():
    row = {"tokens": ["a", "b", "c"], "token": [0.1, -3.0, 0.0], "sequence": -0.7,
           "generative": [0.9, 0.45, 0.1]}
    assert four.rewards_by_token(row, "token") == [0.1, -3.0, 0.0]     # A2
    assert four.rewards_by_token(row, "sequence") == [0.0, 0.0, -0.7]  # A7
    row |= {"sequence_edit": 0.5, "token_sibling": [1.0, 2.0, 3.0]}
    assert four.rewards_by_token(row, "sequence_edit") == [0.0, 0.0, 0.5]
    assert four.rewards_by_token(row, "token_sibling") == [1.0, 2.0, 3.0]
    # B3: clip(p - 0.5, -0.1, 0) of 0.4, -0.05 and -0.4
    assert four.rewards_by_token(row, "generative") == pytest.approx([0.0, -0.05, -0.1])


def test_in_the_heat_map_punished_is_orange_praised_blue_and_wrong_framed():
    row = {"tokens": ["<b>", "c"], "wrong": [0], "token": [-2.0, 1.0]}
    row |= {kind: None for kind in ("sequence", "token_sibling", "sequence_edit", "generative")}
    [(_, html)] = four.heat_map(row)
    punished, praised, _ = html.split("</span>")
    assert "rgb(213 94 0/1.00);outline" in punished
    assert 'rgb(0 114 178/0.50)"' in praised
    assert punished.endswith(">&lt;b&gt;")


def test_before_and_after_shows_what_goes_and_what_comes_word_by_word():
    row = {"id": "1", "prompt": "", "sft": "2 < 3; so", "dpo": "2 & 3; so"}
    sft, dpo = four.before_after(row)
    assert sft == ("sft", "2 &lt; 3; so")
    assert dpo == ("dpo", "2<del> &lt;</del><ins> &amp;</ins> 3; so")


# --- The stage as a whole ---

@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """A run after stage 4 whose outcome is known: on all 40 prompts sft has two wrong steps, and so
    has ppo_sequence, which is the same model; ppo_token has none on 30 and three on 10. Its CSV
    tells of a kl of 91, and the prompts are HTML."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "evaluated")
    shutil.copytree(run / "policy", run / "ppo_sequence", dirs_exist_ok=True)
    (run / "ppo_token.csv").write_text(
        "update,episodes,seconds,kl,val_kl,accuracy\n1,32,0.5,91,,\n2,64,1.0,2,0.3,0.75\n")
    for name in ("problems", "reward_examples"):
        path = run / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"prompt": "', f'"prompt": "{HTML}{name} '))

    # sft, ppo_token, ppo_sequence
    counts = iter([2] * 40 + [0] * 30 + [3] * 10 + [2] * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(four, "wrong_steps", lambda *values, **named: next(counts))
        four.main(four.Args(run=str(run)))
    return run


@pytest.fixture
def result(evaluated):
    return json.loads((evaluated / "eval.json").read_text())


@pytest.fixture
def report(evaluated):
    return (evaluated / "report.html").read_text(encoding="utf-8")


def test_the_numbers_of_sft_and_of_every_policy_with_a_csv(result):
    rows = {}
    for name, row in result["policies"].items():
        rows[name] = [row[column] for column in ("win_rate", "accuracy", "n", "episodes")]
    assert rows == {
        "sft": [0.5, 0, 40, 0],  # ties with itself
        "ppo_token": [30 / 40, 30 / 40, 40, 64],
        "ppo_sequence": [0.5, 0, 40, 64],
    }


def test_a_difference_is_of_two_policies_on_the_same_prompts(result):
    # 30 times 1 - 0.5 and 10 times 0 - 0.5: (15 - 5) / 40
    assert result["differences"]["ppo_token - ppo_sequence"]["difference"] == 0.25


def test_every_test_prompt_gets_a_response_of_every_policy(evaluated):
    problems = rows_of(evaluated / "problems.jsonl")
    expected = [row["prompt"] for row in problems if row["split"] == "test"]
    rows = rows_of(evaluated / "responses.jsonl")
    assert [row["prompt"] for row in rows] == expected
    assert [*rows[0]] == ["id", "prompt", "sft", "ppo_token", "ppo_sequence"]


def test_every_policy_samples_with_the_same_seed(evaluated):
    for row in rows_of(evaluated / "responses.jsonl"):
        assert row["sft"] == row["ppo_sequence"]  # the same model


def test_every_policy_samples_from_its_own_model(evaluated):
    rows = rows_of(evaluated / "responses.jsonl")
    assert any(row["sft"] != row["ppo_token"] for row in rows)


def test_without_a_reward_model_policies_are_compared_all_the_same(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    for name in ("reward_metrics.json", "reward_examples.jsonl"):
        (run / name).unlink()
    four.main(four.Args(run=str(run)))
    result = json.loads((run / "eval.json").read_text())
    assert result["reward_models"] == {}
    assert [*result["policies"]] == ["sft", "ppo_token", "ppo_sequence"]
    assert "Held-out rewards" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", [
    pytest.param("WARNING: unstable: kl of ppo_token reached 91, over 20", id="a warning"),
    # x: the last update of 400; y: from the top, 75 % of 200
    pytest.param(f'stroke={four.COLOURS["ppo_token"]} points="400,50.0"', id="ppo_token's curve"),
    pytest.param(f'<polyline stroke={four.COLOURS["ppo_sequence"]}', id="ppo_sequence's curve"),
    pytest.param(';outline:1.5px solid"', id="wrong tokens framed"),
])
def test_the_page_shows(report, part):
    assert part in report


@pytest.mark.parametrize("name", ["problems", "reward_examples"])
def test_a_prompt_of_html_is_escaped_everywhere_it_occurs(report, name):
    assert escape(f"{HTML}{name}") in report
    assert "<script" not in report


@pytest.mark.parametrize("word", ["http", "url(", "@import", " src=", " href="])
def test_the_page_loads_nothing_from_elsewhere(report, word):
    assert word not in report

"""--judge llm: verdicts by hand, both orders, a server that misbehaves, and nothing paid twice."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KEY


@pytest.mark.parametrize("answer, verdict", [
    ("A", "A"), ("b", "B"), (" B.\n", "B"), ("**A**", "A"), ("```\nB\n```", "B"), ("```text\nA```", "A"), ('"B"', "B"),
    ("“A”", "A"), ("(B)", "B"), ("[[A]]", "A"), ("Answer: A", "A"), ("**Answer:** B", "B"), ("Response A is better.", "A"),
    ("The better response is B.", "B"), ("My final verdict is: [[B]]", "B"), ("I prefer response A.", "A"),
    ('{"answer": "B"}', "B"), ("A is better than B.", "A"), ("A\n\nIt is more polite than B.", "A"),
    ("B is shorter.\nA names the town.\n\nFinal answer: A", "A"), ("A. It names the town.", "A"),
    ("B, because A is rude", "B"),
    ("<think>Is it A? It is A.</think>\nB", "B"), ("tie", "tie"), ("It's a tie.", "tie"),
    ("A tie", "tie"), ("Draw!", "tie"),
    ("", None), ("A or B", None), ("both", None), ("AB", None), ("A/B", None), ("A B", None), ("A, B", None),
    ("Answer: A or B", None), ("A and B", None), ("A\nB", None), ("Neither is better.", None), ("A is not better.", None),
    ("Is A better?", None), ("I'm sorry, but I can't compare A and B.", None), ("I cannot say that A is better.", None),
    ("A good answer would name the town.", None), ("Apples", None), ("C", None), ("The answer is a matter of taste", None),
    ("the answer is " * 200 + "x", None)])                            # a model in a loop must not hang the parser
def test_a_verdict_is_read_or_refused(evaluation, answer, verdict):
    assert evaluation.parse_verdict(answer) == verdict


class Said:
    """A judge without a server; answers: a function of the request's text."""
    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def ask_all(self, conversations):
        self.asked += [messages[0]["content"] for messages in conversations]
        return [(self.answers(messages[0]["content"]), None) for messages in conversations]


def test_both_orders_have_to_agree(evaluation):
    answers = {"o>w": "B", "w>o": "A", "o>l": "A", "l>o": "B", "o>x": "A", "x>o": "A", "o>t": "tie", "t>o": "tie",
               "o>h": "B", "h>o": "?", "o>n": "", "n>o": "", "o>m": "tie", "m>o": "A"}
    judge = Said(answers.get)
    problems = [{"prompt": "p"}] * 8
    verdicts, counts = evaluation.llm_verdicts(judge, "{a}>{b}", problems, list("wlxthnmo"), ["o"] * 8)
    # w wins in both orders, l loses, x hangs on the order, t ties, h has one verdict, n none, m a tie and a win
    assert verdicts == [2, 1, 1.5, 1.5, None, None, 1.5, 1.5] and sorted(judge.asked) == sorted(answers)
    assert counts == Counter(asked=7, judged=5, disagreed=2, one=1, none=1, first=5, second=3)
    client = SimpleNamespace(name="m", tokens=Counter())
    report, text = evaluation.judge_report(client, {"ppo_token": counts}, [True, True, True, False], "oracle")
    numbers = report["llm_judge"]
    assert (numbers["position_bias"], numbers["first_shown"], numbers["agreement"]) == (0.4, 5 / 8, 0.75)
    assert "40.0 % of 5 pairs" in text and "1 pairs with a verdict in one order" in text and "75.0 % of 4" in text


def test_paired_differences_leave_out_what_one_of_them_lacks(evaluation):
    gap = evaluation.difference([1, None, 0.5, 1, 0], [0, 1, None, 0.5, 0], 1)
    assert gap["n"] == 3 and gap["difference"] == pytest.approx((1 + 0.5 + 0) / 3)


# --- A whole run --------------------------------------------------------------------------------------------

def responses_of(body):
    """(A, B) of a request."""
    a, b = body["messages"][0]["content"].split("Response A:\n")[1].split("\n\nResponse B:\n")
    return a, b


def longer(n, body):
    """A judge that really prefers something: the longer response."""
    a, b = map(len, responses_of(body))
    return "A" if a > b else "B" if b > a else "tie"


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished tiny run; what stage 1 made is kept, its policies differ by chance alone."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def judge(evaluation, run, capsys):
    """Run stage 4; returns (eval.json, what was printed), or the one line of the error."""
    def call(server=None, stops=False, **flags):
        if server:
            flags = {"judge": "llm", "llm_url": server.url, "llm_model": "m", "llm_timeout": 0.5, **flags}
        args = evaluation.Args(**{"run": str(run), "overwrite": True, "max_new_tokens": 40,
                                  "policies": [str(run / "ppo_token"), str(run / "rlmec")], **flags})
        capsys.readouterr()
        if stops:
            with pytest.raises(SystemExit) as stop:
                evaluation.main(args)
            assert stop.value.code == 2
        else:
            evaluation.main(args)
        shown = capsys.readouterr()
        assert KEY not in shown.out + shown.err
        assert all(KEY not in path.read_text(errors="ignore") for path in run.glob("*.*"))
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == stops
        return errors[0] if stops else (json.loads((run / "eval.json").read_text()), shown.out)
    return call


def lines(run):
    return [json.loads(line) for line in (run / "llm_verdicts.jsonl").read_text().splitlines()]


def test_a_judge_with_a_preference(serve, judge, run, evaluation, capsys):
    server = serve(longer)
    result, shown = judge(server)
    row = result["policies"]["ppo_token"]
    saved = json.loads((run / "verdicts_ppo_token.json").read_text())
    gaps = [len(x["output_2"].strip()) - len(x["output_1"].strip()) for x in saved]
    assert row["win_rate"] == pytest.approx(sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / 20)
    assert row["n"] == 20 and row["left_out"] == 0 and row["position_bias"] == 0.0
    assert row["wrong_steps_per_response"] is not None and row["accuracy"] is not None
    asked = result["llm_judge"]
    assert asked["position_bias"] == 0.0 and asked["tokens"]["prompt"] == 10 * len(server.bodies)
    assert f"{10 * len(server.bodies)} prompt tokens" in shown
    assert {"oracle" in text and "Position bias: 0.0 %" in text for text in
            (" ".join(shown.split()), result["judge"], (run / "report.html").read_text())} == {True}
    assert set(server.keys) == {f"Bearer {KEY}"} and "Which of them is better?" in server.bodies[0]["messages"][0]["content"]
    oracle = {x["preference"] for x in saved}
    assert oracle <= {1, 1.5, 2} and 0 <= asked["agreement"] <= 1
    pairs = {(x["instruction"], x["output_1"], x["output_2"]) for name in ("ppo_token", "rlmec")
             for x in json.loads((run / f"verdicts_{name}.json").read_text()) if x["output_1"] != x["output_2"]}
    assert len(server.bodies) == 2 * len(pairs) == len(lines(run))           # equal responses are not paid
    for name, row in result["policies"].items():
        evaluation.main(evaluation.Args(verdicts=str(run / f"verdicts_{name}.json")))
        assert capsys.readouterr().out == (f"win_rate {100 * row['win_rate']:.3f}\nstandard_error "
                                           f"{100 * row['win_rate_se']:.3f}\nn {row['n']}\nleft_out {row['left_out']}\n")


def test_agreement_with_the_oracle_by_hand(serve, judge, run, evaluation):
    result, _ = judge(serve(longer), policies=[str(run / "ppo_token")])
    problems = {json.dumps(x["prompt"]): x for x in map(json.loads, (run / "problems.jsonl").read_text().splitlines())}
    same = []
    for x in json.loads((run / "verdicts_ppo_token.json").read_text()):
        if x["output_1"] != x["output_2"]:
            problem = problems[json.dumps(x["instruction"])]
            old, new = (evaluation.judge(x[side], problem) for side in ("output_1", "output_2"))
            oracle = evaluation.preferences_of([(-new[0], new[1])], [(-old[0], old[1])], ["new"], ["old"])[0]
            same.append(oracle == x["preference"])
    assert result["llm_judge"]["agreement"] == pytest.approx(sum(same) / len(same))


def test_a_judge_that_always_says_a(serve, judge):
    result, shown = judge(serve(lambda n, body: "A"))
    assert result["llm_judge"]["position_bias"] == 1.0 and result["llm_judge"]["first_shown"] == 1.0
    assert all(row["win_rate"] == 0.5 for row in result["policies"].values())
    assert "Position bias: 100.0 %" in " ".join(shown.split())


def test_what_is_no_verdict_is_left_out_and_counted(serve, judge, run):
    first = serve(longer)
    judge(first, policies=[str(run / "ppo_token")])
    shown_pairs = sorted(body["messages"][0]["content"] for body in first.bodies)
    refused, (a, b) = shown_pairs[0], responses_of({"messages": [{"content": shown_pairs[-1]}]})
    both = {shown_pairs[-1], shown_pairs[-1].replace(f"{a}\n\nResponse B:\n{b}", f"{b}\n\nResponse B:\n{a}")}
    assert len(both & set(shown_pairs)) == 2 and refused not in both

    def answer(n, body):
        text = body["messages"][0]["content"]
        return "A or B" if text in both else "I'm sorry, I can't." if text == refused else longer(n, body)

    result, shown = judge(serve(answer), llm_model="other", policies=[str(run / "ppo_token")])
    row, asked = result["policies"]["ppo_token"], result["llm_judge"]
    assert (row["left_out"], row["n"], asked["one"], asked["none"]) == (2, 18, 1, 1)
    assert asked["asked"] == asked["judged"] + 2 == len(shown_pairs) // 2
    assert "1 pairs with a verdict in one order only, 1 in none" in " ".join(shown.split())
    verdicts = [x["preference"] for x in json.loads((run / "verdicts_ppo_token.json").read_text())]
    assert verdicts.count(None) == 2


@pytest.mark.parametrize("bad, why", [("both", ""), ({"finish_reason": "length"}, "times: the answer is cut off"),
                                      ((400, {}), "times: the server refuses the request (400)")])
def test_a_judge_without_verdicts(serve, judge, bad, why):
    error = judge(serve(lambda n, body: bad), stops=True)
    assert "verdict" in error and "llm_verdicts.jsonl" in error and "--llm_prompt" in error and why in error


def test_differences_of_judged_runs_are_the_paired_ones(serve, judge, run, evaluation, tmp_path):
    """Where pairs are left out, the win rates of two policies are of different prompts."""
    result, shown = judge(serve(lambda n, body: "no idea" if n % 3 == 0 else longer(n, body)), llm_workers=1)
    (gap,) = result["differences"]
    assert gap["left_out"] > 0 and gap["n"] + gap["left_out"] == 20
    assert f"on the {gap['n']} prompts with a verdict on both" in (run / "report.html").read_text()
    shutil.copytree(run, tmp_path / "second")
    evaluation.main(evaluation.Args(runs=[str(run), str(tmp_path / "second")], run=str(tmp_path / "both")))
    (combined,) = json.loads((tmp_path / "both" / "combined.json").read_text())["differences"]
    assert {gap["a"], gap["b"]} == {combined["a"], combined["b"]}
    assert abs(combined["difference"]) == pytest.approx(abs(gap["difference"]))
    rates = [result["policies"][gap[name]]["win_rate"] for name in "ab"]
    assert gap["difference"] != pytest.approx(rates[0] - rates[1])        # else this test would prove nothing


def test_an_interrupted_judge_goes_on(serve, judge, run):
    whole = serve(longer)
    expected, _ = judge(whole)
    n = len(whole.bodies)
    (run / "llm_verdicts.jsonl").unlink()
    (run / "eval.json").unlink()
    dead = serve(lambda k, body: longer(k, body) if k < 5 else None)
    error = judge(dead, stops=True, llm_workers=1, overwrite=False)
    assert "5 answers are kept" in error and len(lines(run)) == 5 and not (run / "eval.json").exists()
    with (run / "llm_verdicts.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    alive = serve(longer)
    result, _ = judge(alive, overwrite=False)
    assert len(alive.bodies) == n - 5                      # the same responses are sampled, the same pairs asked
    assert result["policies"] == expected["policies"]
    again = serve(longer)
    judge(again)
    assert again.bodies == []


def test_faults_that_pass(serve, judge):
    faults = [(429, {"Retry-After": "0.01"}), (500, {}), b"{not json", b'{"choices": []}', None]
    server = serve(lambda n, body: faults[n // 2] if n % 2 == 0 and n < 10 else longer(n, body))
    result, _ = judge(server, llm_workers=1)
    assert result["policies"]["ppo_token"]["left_out"] == result["llm_judge"]["none"] == 0
    assert len(server.bodies) == 2 * result["llm_judge"]["asked"] + 5


def test_waits_and_time_outs(serve, judge, evaluation, monkeypatch):
    server = serve(lambda n, body: [(429, {"Retry-After": "7"}), (503, {}), "A"][min(n, 2)])
    client = evaluation.LlmClient(evaluation.Args(llm_url=server.url, llm_model="m"), "/dev/null", "verdicts")
    waits = []
    client.stop.wait = waits.append
    client.ask("key", [{"role": "user", "content": "A or B?"}])
    assert waits == [7.0, 0.02] and client.saved["key"] == ("A", None)
    slow = serve(lambda n, body: time.sleep(0.4) or "B" if n == 0 else "A")
    client = evaluation.LlmClient(evaluation.Args(llm_url=slow.url, llm_model="m", llm_timeout=0.2), "/dev/null", "")
    client.ask("key", [{"role": "user", "content": "A or B?"}])
    assert client.saved["key"] == ("A", None) and len(slow.bodies) == 2


@pytest.mark.parametrize("status, needle", [(401, "key"), (404, "model m")])
def test_a_wrong_key_or_model_fails_at_once(serve, judge, run, status, needle):
    server = serve(lambda n, body: (status, {}))
    error = judge(server, stops=True, llm_workers=1)
    assert needle in error and len(server.bodies) <= 2


def test_another_opponent_a_prompt_of_ones_own_and_no_oracle(serve, judge, run, tmp_path):
    problems = [json.loads(line) for line in (run / "problems.jsonl").read_text().splitlines()]
    references = [{"prompt": x["prompt"], "response": x["solution"]} for x in problems if x["split"] == "test"]
    (tmp_path / "references.jsonl").write_text("".join(json.dumps(row) + "\n" for row in references))
    (run / "problems.jsonl").write_text("".join(json.dumps(
        {name: x[name] for name in ("id", "prompt", "split")}) + "\n" for x in problems))
    (run / "reward_metrics.json").unlink()
    (tmp_path / "prompt.txt").write_text("{braces} {prompt}\nResponse A:\n{a}\n\nResponse B:\n{b}")
    server = serve(longer)
    result, shown = judge(server, baseline=str(tmp_path / "references.jsonl"), llm_prompt=str(tmp_path / "prompt.txt"))
    assert result["policies"]["ppo_token"]["accuracy"] is None and result["llm_judge"]["agreement"] is None
    assert "agrees" not in result["judge"] and server.bodies[0]["messages"][0]["content"].startswith("{braces} Q:")
    assert {references[0]["response"].strip()} & {text.strip() for body in server.bodies for text in responses_of(body)}


@pytest.mark.parametrize("flags, needle", [
    ({"judge": "gpt"}, "--judge gpt"), ({"judge": "llm"}, "--llm_url"),
    ({"judge": "llm", "llm_url": "localhost", "llm_model": "m"}, "http://"),
    ({"judge": "llm", "llm_url": "http://x"}, "--llm_model"),
    ({"judge": "llm", "llm_url": "http://x", "llm_model": "m", "llm_workers": 0}, "--llm_workers"),
    ({"judge": "llm", "llm_url": "http://x", "llm_model": "m", "llm_timeout": 0.0}, "--llm_timeout"),
    ({"judge": "llm", "llm_url": "http://x", "llm_model": "m", "llm_prompt": "none"}, "none: cannot be read")])
def test_flags_that_do_not_fit(judge, flags, needle):
    assert needle in judge(stops=True, **flags)


@pytest.mark.parametrize("text, needle", [("{prompt} {a}", "{b}"), ("{prompt} {b}", "{a}")])
def test_a_prompt_that_hides_a_response(judge, tmp_path, text, needle):
    (tmp_path / "prompt.txt").write_text(text)
    assert f"has no {needle}" in judge(stops=True, judge="llm", llm_url="http://x", llm_model="m",
                                       llm_prompt=str(tmp_path / "prompt.txt"))

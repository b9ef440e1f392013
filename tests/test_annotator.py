"""A language model as the annotator (stage 1) and as the judge (stage 4): what it is asked, what
its answer is taken for, and that it is asked once."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, four, one, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "{% for m in messages %}"
    "{{ 'A:' if m.role == 'assistant' else 'Q:' }}{{ m.content }}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture
def chat_model(tiny_run, tmp_path, tokenizer):
    """The folder of a small model with a chat template: an annotator, or a judge."""
    path = tmp_path / "chat_model"
    tokenizer.add_tokens(["What", "The answer is tea", "The answer is salt"])
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(tiny_run / "policy")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# --- What the annotator is asked ---

def test_the_request_holds_prompt_solution_and_response():
    request = "Edit.\n\n{prompt}\n\nRight: {solution}\n\n{response}"
    problem = {"prompt": "Who?", "solution": "Tom"}
    filled = one.fill_request(request, problem, {"rejected": "Tim"})
    assert filled == "Edit.\n\nWho?\n\nRight: Tom\n\nTim"


def test_without_a_solution_its_paragraph_is_left_out():
    filled = one.fill_request(one.REQUEST, {"prompt": "Who?"}, {"rejected": "Tim"})
    assert filled.endswith("alone.\n\nPrompt:\nWho?\n\nResponse:\nTim")


def test_braces_in_a_text_are_text():
    problem = {"prompt": "{response} {x}", "solution": "{prompt}"}
    filled = one.fill_request("{prompt}|{solution}|{response}", problem, {"rejected": "{solution}"})
    assert filled == "{response} {x}|{prompt}|{solution}"


@pytest.mark.parametrize("stage", [one, four])
def test_the_text_of_a_prompt(stage):
    user = {"role": "user", "content": "Who?"}
    bot = {"role": "assistant", "content": "Tom."}
    assert stage.prompt_text("Who?") == stage.prompt_text([user]) == "Who?"
    assert stage.prompt_text([user, bot]) == "user: Who?\n\nassistant: Tom."


def test_it_is_asked_through_its_own_template(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    ids, thought = one.request_ids("What", tokenizer)
    assert (tokenizer.decode(ids), thought) == ("Q:What</s>A:", "")


def test_a_thought_that_its_template_opens_belongs_to_the_answer(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = TEMPLATE + "<think>"
    assert one.request_ids("What", tokenizer)[1] == "<think>"


# --- What its answer is taken for ---

@pytest.mark.parametrize("answer, response, text", [
    pytest.param("It is 5.", "It is 4.", "It is 5.", id="the text alone"),
    pytest.param("It is 5.\n", "\n It is 4. ", "\n It is 5. ", id="spaces are the response's"),
    pytest.param("```\nIt is 5.\n```", "It is 4.", "It is 5.", id="a fence"),
    pytest.param("```text\nx = 5\ny = 6\n```\n", "x = 4", "x = 5\ny = 6", id="a fence with a name"),
    pytest.param("```\nx = 5\n```", "```\nx = 4\n```", "```\nx = 5\n```", id="the response has it"),
    pytest.param('"It is 5."', "It is 4.", "It is 5.", id="quotes"),
    pytest.param("“It is 5.”", "It is 4.", "It is 5.", id="curly quotes"),
    pytest.param("'It isn't 5.'", "It isn't 4.", "It isn't 5.", id="an apostrophe in quotes"),
    pytest.param('"5" or "6"', "4 or 6", '"5" or "6"', id="two quotations are no quotes"),
    pytest.param('"Five"', '"Four"', '"Five"', id="the response is quoted"),
    pytest.param("<think>4?\n\n5!</think>\n\nIt is 5.", "It is 4.", "It is 5.", id="thoughts"),
    pytest.param("[THINK]4?[/THINK]It is 5.", "It is 4.", "It is 5.", id="thoughts of another"),
    pytest.param("<think>\n</think>```\n\"5\"\n```", "4", "5", id="all of it"),
    pytest.param("<think>It is 5, or", "It is 4.", "", id="a thought without an end"),
    pytest.param(" \n", "It is 4.", "", id="nothing"),
    pytest.param("<think>5!</think>5", "<think>4!</think>4", "<think>5!</think>5",
                 id="the response thinks"),
    pytest.param("```\na\n```\n```\nb\n```", "a", "```\na\n```\n```\nb\n```", id="two fences"),
])
def test_the_edit_in_an_answer(answer, response, text):
    assert one.edited_text(answer, response) == text


# --- Stage 1 ---

class Killed(Exception):
    """No answer is left."""


class Annotator:
    """Answers in the place of a model, one after the other; the policy says " soap" or " tea"."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = 0
        self.batches = []
        self.limits = set()

    def generate(self, model, tokenizer, prompts, args, temperature=1.0):
        if temperature > 0:  # the policy
            texts = [" soap</s>", " tea</s>"] * len(prompts)
        else:
            texts = self.answers[self.asked:self.asked + len(prompts)]
            if len(texts) < len(prompts):
                raise Killed
            self.asked += len(prompts)
            self.batches.append(len(prompts))
            self.limits.add(args.max_new_tokens)
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        return [encode(text) for text in texts[:len(prompts)]]


@pytest.fixture
def annotated(tiny_run, tmp_path, chat_model, monkeypatch):
    """Stage 1 on rows of data with an annotator that gives these answers; returns the rows of
    edits.jsonl and the annotator. A batch holds two requests."""
    def call(rows, answers, **flags):
        annotator = Annotator(answers)
        monkeypatch.setattr(one, "generate", annotator.generate)
        (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
        args = {
            "run": str(tmp_path / "new"), "data": str(tmp_path / "data"), "micro_batch": 2,
            "model": str(tiny_run / "policy"), "editor": f"model:{chat_model}",
            "max_edit_share": 1.0, **flags,
        }
        one.main(one.Args(**args))
        return rows_of(tmp_path / "new" / "edits.jsonl"), annotator
    return call


PROMPTS = "abcd"
RESPONSES = [{"prompt": prompt, "response": " soap"} for prompt in PROMPTS]
GOOD = [" salt</s>"] * 4


def test_an_edit_of_the_annotator_makes_a_pair(annotated, chat_model):
    rows, annotator = annotated(RESPONSES, GOOD)
    assert annotator.asked == len(rows) == 4
    for row in rows:
        assert row["editor"] == chat_model
        assert row["chosen"] == row["edited"] == " salt"
        assert row["edit_ops"] == [["replace", 0, 0]]


def test_of_prompts_alone_it_edits_both_samples(annotated):
    rows, _ = annotated([{"prompt": prompt} for prompt in PROMPTS], GOOD * 2)
    assert [row["rejected"] for row in rows] == [" soap", " tea"] * 4
    assert {row["chosen"] for row in rows} == {" salt"}


def test_what_data_prefers_stays_preferred(annotated):
    pairs = [{"prompt": prompt, "chosen": " tea", "rejected": " soap"} for prompt in PROMPTS]
    for row in annotated(pairs, GOOD)[0]:
        assert (row["chosen"], row["edited"]) == (" tea", " salt")
        assert row["chosen_ops"] == [["replace", 0, 0]]


def test_what_a_person_has_edited_is_not_asked(annotated):
    rows, annotator = annotated([row | {"edited": " tea"} for row in RESPONSES], [])
    assert annotator.asked == 0
    assert {row["editor"] for row in rows} == {"human"}


SOLVED = {"solution": " The answer is tea", "answer": "tea"}


def test_what_is_right_is_not_asked_and_a_wrong_edit_is_none(annotated, capsys):
    answers = {"a": "The answer is soap", "b": "The answer is tea", "c": "The answer is soap"}
    data = [{"prompt": p, "response": " " + text, **SOLVED} for p, text in answers.items()]
    rows, annotator = annotated(data, ["The answer is tea</s>", "The answer is salt</s>"])
    assert annotator.asked == 2
    assert len([row for row in rows if row["edit_ops"]]) == 1
    assert "'gate: the edit is not better': 1" in capsys.readouterr().out


def test_a_solution_stands_in_the_request(annotated, tmp_path):
    data = [{"prompt": p, "response": " The answer is soap", **SOLVED} for p in PROMPTS]
    annotated(data, ["The answer is tea</s>"] * 4)
    for row in rows_of(tmp_path / "new" / "annotations.jsonl"):
        assert "A right solution:\n The answer is tea\n\n" in row["request"]


def test_what_is_answered_is_not_asked_again(annotated):
    first, _ = annotated(RESPONSES, GOOD)
    again, annotator = annotated(RESPONSES, [])
    assert again == first
    assert annotator.asked == 0


def test_a_killed_stage_asks_for_the_rest_alone(annotated, tmp_path):
    with pytest.raises(Killed):
        annotated(RESPONSES, GOOD[:2])
    with open(tmp_path / "new" / "annotations.jsonl", "a") as file:
        file.write('{"editor": "half a r')
    rows, annotator = annotated(RESPONSES, GOOD)
    assert annotator.asked == 2
    assert len(rows) == 4


def test_another_request_asks_again(annotated, tmp_path):
    annotated(RESPONSES, GOOD)
    (tmp_path / "request").write_text("Mend {response}")
    _, annotator = annotated(RESPONSES, GOOD, editor_request=str(tmp_path / "request"))
    assert annotator.asked == 1  # without {prompt} all four requests are one


def test_another_model_asks_again(annotated, chat_model, tmp_path):
    annotated(RESPONSES, GOOD)
    other = shutil.copytree(chat_model, tmp_path / "other")
    assert annotated(RESPONSES, GOOD, editor=f"model:{other}")[1].asked == 4


def test_an_answer_that_did_not_end_is_asked_again_with_more_room(annotated, capsys):
    rows, annotator = annotated(RESPONSES, [" salt</s>", " salt and", "</s>", " salt</s>"])
    assert len(rows) == 2
    assert annotator.limits == {512}
    out = capsys.readouterr().out
    assert "'the answer did not end within --editor_tokens': 1" in out
    assert "'the answer is empty': 1" in out
    assert "4 responses" in out
    assert annotated(RESPONSES, [])[1].asked == 0
    assert annotated(RESPONSES, GOOD, editor_tokens=600)[1].asked == 1


def test_a_long_request_leaves_the_others_their_room(annotated):
    long = {"prompt": "e", "response": " soap" * 160}  # of 256 tokens, fewer than 100 are left
    _, annotator = annotated([*RESPONSES, long], [*GOOD, " salt</s>"], editor_tokens=100,
                             micro_batch=9)
    assert annotator.batches == [4, 1]


def test_an_answer_without_a_change_is_no_edit(annotated, capsys):
    rows, _ = annotated(RESPONSES, [*GOOD[:3], " soap</s>"])
    assert len(rows) == 3
    assert "'the answer changes nothing': 1" in capsys.readouterr().out


def test_a_request_beyond_the_context_is_counted(annotated, capsys):
    long = {"prompt": "e", "response": " soap" * 220}  # its context has 256 tokens
    rows, annotator = annotated([*RESPONSES, long], GOOD)
    assert annotator.asked == len(rows) == 4
    assert "'the request is longer than its context': 1" in capsys.readouterr().out


def test_an_edit_beyond_the_context_of_the_policy_is_counted(annotated, capsys):
    annotated(RESPONSES, [*GOOD[:3], " salt" * 256 + "</s>"])
    assert "\"the edit is longer than the policy's context\": 1" in capsys.readouterr().out


class TwoEnds:
    """An encoder: a text is token 5, and its end is 2, though 3 ends a response as well."""

    def encode_response(self, problem, text, ended, verbatim):
        return [5, 2]


@pytest.mark.parametrize("ended, rejected_ids, edited_ids", [
    pytest.param(True, [4, 3], [5, 3], id="its own end stays"),
    pytest.param(False, [4], [5, 2], id="the edit ends what was cut"),
])
def test_an_edit_ends_as_the_response_does(monkeypatch, ended, rejected_ids, edited_ids):
    response = {"rejected": "soap", "rejected_ids": rejected_ids, "ended": ended,
                "verbatim": False, "edited": None, "wrong_steps": None}
    problem = {"prompt": "a", "prompt_ids": [1], "responses": [response]}
    monkeypatch.setattr(one, "ask", lambda requests, *_: {requests[0]: "salt"})
    args = one.Args(editor="model:some")
    [row] = one.annotate([problem], (None, None, "{response}"), TwoEnds(), 99, args)
    assert row["responses"][0]["edited_ids"] == edited_ids
    assert response["edited"] is None  # what was passed in stays as it was


@pytest.mark.parametrize("text, message", [
    pytest.param("Mend it", "{response}", id="no response"),
    pytest.param("Mend {response} as {solution}", "{response}", id="none without a solution"),
    pytest.param(None, "No such file", id="no file"),
])
def test_a_bad_request_file_is_named(annotated, fails, tmp_path, text, message):
    path = tmp_path / "request"
    if text is not None:
        path.write_text(text)
    fails(re.escape(message), annotated, RESPONSES, GOOD, editor_request=str(path))
    assert not (tmp_path / "new").exists()


def test_an_annotator_without_a_template_is_refused(annotated, fails, tiny_run, tmp_path):
    fails("template.*instruct", annotated, RESPONSES, GOOD, editor=f"model:{tiny_run / 'policy'}")
    assert not (tmp_path / "new").exists()


def test_an_annotator_that_does_not_open_is_named(annotated, fails):
    fails("--editor model:/none is no causal LM", annotated, RESPONSES, GOOD, editor="model:/none")


def test_a_task_has_its_oracle(fails, tmp_path):
    args = one.Args(run=str(tmp_path / "new"), editor="model:some", train_prompts=9, test_prompts=4)
    fails("--editor model: it does not fit", one.main, args)


def test_a_real_annotator_answers_greedily(tiny_run, tmp_path, chat_model):
    (tmp_path / "data").write_text("\n".join(map(json.dumps, RESPONSES)))
    args = one.Args(run=str(tmp_path / "new"), data=str(tmp_path / "data"), editor_tokens=4,
                    model=str(tiny_run / "policy"), editor=f"model:{chat_model}")
    with pytest.raises(SystemExit):  # it has learnt next to nothing: no edit is of use
        one.main(args)
    [row, *_] = rows_of(tmp_path / "new" / "annotations.jsonl")
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    ids = tokenizer(f"Q:{row['request']}</s>A:", add_special_tokens=False, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids.input_ids.shape[1]:]
    ended = output[-1] == tokenizer.eos_token_id
    assert row["answer"] == (tokenizer.decode(output[:-1]) if ended else None)


# --- The judge: what it is asked ---

def test_a_verdict_is_the_likelier_of_two_letters(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.add_tokens(["A", "B"])
    ids, a, b = four.letter_ids("What", " tea", " soap", tokenizer)
    assert tokenizer.decode(ids).endswith("</s>A:")  # the assistant's turn has begun
    assert tokenizer.convert_ids_to_tokens([a, b]) == ["A", "B"]


def test_a_thought_that_the_template_of_the_judge_opens_is_closed(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.add_tokens(["A", "B", "<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE + "<think>\n"
    ids, *_ = four.letter_ids("What", " tea", " soap", tokenizer)
    assert tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n")


def test_requests_of_a_batch_are_judged_as_if_alone(chat_model):
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    args = four.Args(device="cpu")
    jobs = []
    for length in (3, 9, 6):
        ids = torch.randint(3, len(tokenizer), (length,)).tolist()
        logits = model(torch.tensor([ids])).logits[0, -1]
        low, high = logits.argmin().item(), logits.argmax().item()
        jobs += [(ids, high, low), (ids, low, high)]
    judge = (model, tokenizer)
    assert four.prefers_a(jobs, judge, args) == [True, False] * 3


# --- What its verdicts are ---

class Judge:
    """In the place of a model: prefers a response with `tea`, and else what stands first."""

    def __init__(self, monkeypatch):
        self.asked = 0
        config = SimpleNamespace(max_position_embeddings=99)
        config.get_text_config = lambda: config
        self.models = (SimpleNamespace(config=config), None)
        # a request: its two responses, as many ids as their letters
        monkeypatch.setattr(four, "letter_ids", lambda prompt, a, b, _: (a + "|" + b, 0, 0))
        monkeypatch.setattr(four, "prefers_a", self.prefers_a)

    def prefers_a(self, jobs, judge, args):
        self.asked += len(jobs)
        verdicts = []
        for request, _, _ in jobs:
            first, second = request.split("|")
            verdicts.append("tea" in first or "tea" not in second)
        return verdicts


@pytest.fixture
def judge(monkeypatch):
    return Judge(monkeypatch)


@pytest.fixture
def judged(judge, tmp_path):
    """The verdicts on the responses of sft and of a policy."""
    def call(pairs, name="model:some", **flags):
        rows = [{"prompt": "What", "sft": sft, "dpo": new} for sft, new in pairs]
        args = four.Args(run=str(tmp_path), judge=name, **flags)
        return four.judged("dpo", rows, judge.models, args)
    return call


@pytest.mark.parametrize("sft, new, preference", [
    pytest.param("soap", "tea", 2, id="the policy's is better in both orders"),
    pytest.param("tea", "soap", 1, id="sft's is"),
    pytest.param("soap", "salt", 1.5, id="its place decides: a tie"),
    pytest.param("tea", "tea", 1.5, id="equal responses tie"),
    pytest.param("tea", "soap" * 30, None, id="longer than the context"),
])
def test_the_preference_of_both_orders(judged, sft, new, preference):
    assert judged([(sft, new)])[0]["preference"] == preference


def test_a_verdict_is_written_as_alpacaeval_does(judged, tmp_path):
    judged([("soap", "tea")])
    assert json.loads((tmp_path / "verdicts_dpo.json").read_text()) == [{
        "instruction": "What", "output_1": "soap", "generator_1": "sft", "output_2": "tea",
        "generator_2": "dpo", "annotator": "some", "preference": 2,
    }]


CASES = [("soap", "tea"), ("tea", "soap"), ("soap", "salt"), ("tea", "tea")]


def test_the_position_bias_is_the_share_of_disagreements(judged):
    # two of three different pairs are decided; equal responses, and those too long, do not count
    verdicts = judged([*CASES, ("tea", "soap" * 30)])
    assert four.position_bias(verdicts) == pytest.approx(1 / 3)


def test_without_two_different_responses_there_is_no_position_bias(judged):
    assert four.position_bias(judged([("tea", "tea")])) is None


def test_a_case_is_judged_once(judge, judged):
    first = judged(CASES * 2)
    assert judge.asked == 2 * 3  # in both orders; equal responses need no judge
    assert judged(CASES * 2) == first
    assert judge.asked == 2 * 3
    judged([*CASES, ("salt", "tea")])
    assert judge.asked == 2 * 4


def test_another_judge_judges_again_and_the_first_does_not(judge, judged):
    first = judged(CASES)
    judged(CASES, name="model:another")
    assert judge.asked == 2 * 2 * 3
    assert judged(CASES) == first
    assert judge.asked == 2 * 2 * 3


def test_a_killed_judge_goes_on(judge, judged, monkeypatch):
    answer = judge.prefers_a
    monkeypatch.setattr(four, "prefers_a", lambda *args: judge.asked < 2 and answer(*args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judged(CASES, judge_batch=1)
    monkeypatch.setattr(four, "prefers_a", answer)
    judged(CASES, judge_batch=1)
    assert judge.asked == 2 * 3


# --- Stage 4 with a judge ---

@pytest.fixture
def without_oracle(run):
    """A run where nobody knows what is right."""
    rows = rows_of(run / "problems.jsonl")
    for row in rows:
        row.pop("solutions")
    four.write_jsonl(run / "problems.jsonl", rows)
    return run


def test_without_oracle_and_judge_a_line_says_how_to_get_a_win_rate(without_oracle, capsys):
    four.main(four.Args(run=str(without_oracle)))
    assert f"04_eval.py --run {without_oracle} --judge model:NAME" in capsys.readouterr().out


def test_what_nobody_knows_is_not_drawn():
    page = lambda rows: four.page("", [], "", {"dpo": rows}, [], [])
    assert "<h2>Learning curves" not in page([{"update": 1}])
    assert "<h2>Learning curves" in page([{"update": 1, "accuracy": 0.5}])


def test_verdicts_gives_the_win_rate_of_the_judge(without_oracle, judge, monkeypatch, capsys):
    monkeypatch.setattr(four, "open_judge", lambda args: judge.models)
    monkeypatch.setattr(four, "letter_ids", lambda prompt, a, b, _: (f"{a[-3:]}|{b[-3:]}", 0, 0))
    monkeypatch.setattr(judge, "prefers_a", None)
    longer = lambda jobs, *_: [len(set(a)) > len(set(b)) for a, b in halves(jobs)]
    monkeypatch.setattr(four, "prefers_a", longer)
    four.main(four.Args(run=str(without_oracle), judge="model:some"))
    out = capsys.readouterr().out
    policies = json.loads((without_oracle / "eval.json").read_text())["policies"]
    assert policies["sft"]["win_rate"] == 0.5
    assert "--judge model:NAME" not in out
    for name in ("ppo_token", "ppo_sequence"):
        row = policies[name]
        assert f"Judge, {name}: win rate {row['win_rate']:.1%}".replace("%", " %") in out
        four.main(four.Args(verdicts=str(without_oracle / f"verdicts_{name}.json")))
        printed = capsys.readouterr().out.split()
        assert float(printed[1]) == pytest.approx(100 * row["win_rate"], abs=1e-3)


def halves(jobs):
    return [request.split("|") for request, _, _ in jobs]


def test_a_real_judge_judges_both_policies(without_oracle, chat_model):
    config = AutoModelForCausalLM.from_pretrained(chat_model).config
    config.max_position_embeddings = 2048  # its tokens are characters of the request
    config.save_pretrained(chat_model)
    four.main(four.Args(run=str(without_oracle), judge=f"model:{chat_model}"))
    for name in ("ppo_token", "ppo_sequence"):
        rows = json.loads((without_oracle / f"verdicts_{name}.json").read_text())
        assert len(rows) == 40
        assert {row["preference"] for row in rows} <= {1, 1.5, 2}


@pytest.mark.parametrize("name, message", [
    pytest.param("gpt", "write model:NAME", id="not model:NAME"),
    pytest.param("model:/none", "no causal LM with a chat template", id="no model"),
    pytest.param("model:{policy}", "no causal LM with a chat template", id="no template"),
])
def test_a_judge_that_cannot_judge_is_named(run, fails, name, message):
    name = name.replace("{policy}", str(run / "policy"))
    fails(message, four.main, four.Args(run=str(run), judge=name))


# --- The README: the request, and edits from a server ---

def test_the_request_is_shown_in_the_readme():
    assert f"```\n{one.REQUEST}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that mends soap; it refuses `soap 3` once."""
    asked = []
    at_once = threading.Barrier(2, timeout=20)  # two requests are there at the same time

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        request = json.loads(self.rfile.read(size))["messages"][0]["content"]
        number = int(request.split("soap ")[1])
        self.asked.append(number)
        if number < 2:
            self.at_once.wait()
        refused = number == 3 and self.asked.count(3) == 1
        self.send_response(400 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        message = {"role": "assistant", "content": f"salt {number}"}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        self.wfile.write(json.dumps({"choices": choices}).encode())

    def log_message(self, *values):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_edits_come_from_a_server_and_none_is_asked_for_twice(server, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = [block for block in readme.split("```python\n")[1:] if "InferenceClient" in block]
    code = code.split("```")[0].replace("http://localhost:8000/v1", server)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "Who? {x}", "response": f"soap {k}"} for k in range(4)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))

    exec(code, {})
    edits = lambda: [row["edited"] for row in rows_of("edits_of_llm.jsonl")]
    assert edits() == ["salt 0", "salt 1", "salt 2"]
    exec(code, {})
    assert edits()[3:] == ["salt 3"]
    assert sorted(Server.asked) == [0, 1, 2, 3, 3]
    assert rows_of("edits_of_llm.jsonl")[0] == {**rows[0], "edited": "salt 0", "editor": "NAME"}

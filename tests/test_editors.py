"""Editors that write text: an LLM behind a server that misbehaves on purpose, a local model, a list of rules."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KEY

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"prompt": "Q: What do Ada and Bob send to Cleo, and where?\nA:", "chosen": " Ada makes tea.",
         "rejected": f" {name} makes soap."} for name in "Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Kit".split()]
ROWS = [{**row, "prompt": row["prompt"].replace("Ada", row["rejected"].split()[0])} for row in ROWS]


def edit(n, body):
    """A good edit: soap becomes tea."""
    return body["messages"][0]["content"].split("Response:\n")[1].replace("soap", "tea")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def stage(edit_data, tiny_run, tmp_path, capsys):
    """Run stage 1 on rows of data; returns (rows of edits.jsonl, what was printed)."""
    def call(rows=ROWS, server=None, stops=False, **flags):
        if server:
            flags = {"editor": "llm", "llm_url": server.url, "llm_model": "m", "llm_timeout": 0.5, **flags}
        args = edit_data.Args(**{"run": str(tmp_path / "run"), "data": write(tmp_path / "data.jsonl", rows),
                                 "model": str(tiny_run / "policy"), "max_edit_share": 0.5, **flags})
        capsys.readouterr()
        if stops:
            with pytest.raises(SystemExit) as stop:
                edit_data.main(args)
            assert stop.value.code == 2
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1
            return errors[0]
        edit_data.main(args)
        shown = capsys.readouterr()
        assert KEY not in shown.out + shown.err
        assert all(KEY not in path.read_text(errors="ignore") for path in Path(args.run).glob("*.json*"))
        return read(Path(args.run) / "edits.jsonl"), shown.out
    return call


# --- The server behaves -------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer", [
    "Bob makes tea.", "  Bob makes tea.\n", '"Bob makes tea."', "“Bob makes tea.”", "```\nBob makes tea.\n```",
    "```text\nBob makes tea.\n```", "Here is the edited response:\n\nBob makes tea.", "Edited response: Bob makes tea.",
    "Sure! Here's the corrected text:\n```\nBob makes tea.\n```", "Certainly!\n\"Bob makes tea.\"",
    "<think>\n\n</think>\n\nBob makes tea.", "<think>Soap is wrong.</think>Here is the edited text: Bob makes tea."])
def test_answers_are_stripped(edit_data, answer):
    assert edit_data.clean_answer(answer, " Bob makes soap.\n") == " Bob makes tea.\n"


@pytest.mark.parametrize("text", ['"Quoted," she said.', '"Quoted"', "```\ncode\n```", "Here is the list: tea",
                                  "Note: Sure, he said."])
def test_what_belongs_to_the_text_is_kept(edit_data, text):
    assert edit_data.clean_answer(text, text) == text


def test_quotes_at_both_ends_need_not_be_one_pair(edit_data):
    assert edit_data.clean_answer('"A" and "B"', 'The "A" and "B"') == '"A" and "B"'
    assert edit_data.clean_answer("“A” and “B”", "The “A” and “B”") == "“A” and “B”"


def test_llm_edits_pairs_and_keeps_the_key(serve, stage):
    server = serve(edit)
    rows, shown = stage(server=server)
    assert len(rows) == 10 and all(row["edited"] == row["rejected"].replace("soap", "tea") for row in rows)
    assert all(row["editor"] == "m" and row["edit_distance"] == 1 and row["chosen"] == " Ada makes tea." for row in rows)
    assert set(server.keys) == {f"Bearer {KEY}"} and {body["model"] for body in server.bodies} == {"m"}
    assert "100 prompt tokens and 30 answer tokens" in shown


def test_the_machines_hugging_face_token_is_not_sent(serve, stage, monkeypatch, edit_data):
    monkeypatch.delenv("LLM_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private")
    server = serve(edit)
    stage(server=server)
    assert set(server.keys) == {"Bearer none"}
    assert edit_data.api_key("https://router.huggingface.co/v1") == "hf_private"
    assert edit_data.api_key("https://api.openai.com/v1") == "sk-private"
    assert edit_data.api_key("https://notopenai.com/v1") == "none"


def test_a_response_alone_and_a_reference(serve, stage, tmp_path):
    rows, _ = stage([{"prompt": row["prompt"], "response": row["rejected"]} for row in ROWS], serve(edit))
    assert all(row["chosen"] == row["edited"] for row in rows)
    server = serve(lambda n, body: "Bob makes 5" if n else "Bob makes 4")
    rows, _ = stage([{"prompt": "Ada", "solution": " Bob makes 5", "answer": "5", "response": " Bob makes 3"}], server,
                    run=str(tmp_path / "solved"))
    assert [row["edited"] for row in rows] == [" Bob makes 5"]
    first, second = server.bodies
    assert "Bob makes 5" in first["messages"][0]["content"] and " right " in first["messages"][0]["content"]
    assert "answer of your text is wrong" in second["messages"][-1]["content"]


def test_the_editor_is_told_what_was_wrong(serve, stage):
    server = serve(lambda n, body: edit(n, body) if len(body["messages"]) > 1 else "Tokyo Oslo Rome Bern")
    rows, _ = stage(server=server)
    assert len(rows) == 10 and len(server.bodies) == 20
    told = server.bodies[-1]["messages"]
    assert [message["role"] for message in told] == ["user", "assistant", "user"]
    assert told[1]["content"] == "Tokyo Oslo Rome Bern" and "of the text; change at most 50%" in told[2]["content"]


def test_a_pair_is_counted_once_whatever_its_retries_bring(serve, stage):
    """First an edit that changes nothing, then a refusal: the gate counts the pair, the refusal does not."""
    def answer(n, body):
        asked = len(body["messages"]) > 1
        return "I'm sorry, I cannot do that." if asked else " Gus makes soap." if "Gus" in str(body) else edit(n, body)

    rows, shown = stage(server=serve(answer))
    dropped = [int(line.split()[1]) for line in shown.splitlines() if line.startswith("dropped")]
    assert len(rows) == 9 and dropped == [1]


def test_offline_mode_of_the_client_is_said_at_once(serve, stage, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in stage(server=serve(edit), stops=True)
    assert not (tmp_path / "run").exists()


def test_a_key_that_is_none_is_said_at_once(serve, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", "sk two words")
    error = stage(server=serve(edit), stops=True)
    assert "characters that no key has" in error and "two" not in error and not (tmp_path / "run").exists()


def test_half_a_surrogate_pair_is_dropped_from_an_answer(serve, stage):
    """Or the request that sends the answer back, with what was wrong, could not be encoded."""
    server = serve(lambda n, body: edit(n, body) if len(body["messages"]) > 1 else "Tokyo Oslo Rome Bern\ud83d")
    assert len(stage(server=server)[0]) == 10


def test_retries_end_and_the_gate_drops(serve, stage):
    server = serve(lambda n, body: "Tokyo Oslo Rome Bern" if "Bob" in body["messages"][0]["content"].split(":")[-1]
                   else edit(n, body))
    rows, shown = stage(server=server, llm_retries=1)
    assert len(rows) == 9 and "1  gate: the edit changes more than 50%" in shown and len(server.bodies) == 11


def test_a_prompt_of_ones_own(serve, stage, tmp_path):
    (tmp_path / "prompt.txt").write_text("Fix {response} of {prompt}, keep {braces}. Response:\n{response}")
    server = serve(edit)
    stage(server=server, llm_prompt=str(tmp_path / "prompt.txt"))
    assert "keep {braces}" in server.bodies[0]["messages"][0]["content"]
    (tmp_path / "prompt.txt").write_text("Fix it")
    assert "{response}" in stage(server=server, llm_prompt=str(tmp_path / "prompt.txt"), stops=True, overwrite=True)


def test_built_in_task(serve, stage, edit_data, tiny_run):
    solutions = {row["prompt"]: row["solution"] for row in read(tiny_run / "problems.jsonl")}
    args = json.loads((tiny_run / "01_args.json").read_text())
    server = serve(lambda n, body: body["messages"][0]["content"].split("for reference:\n")[1].split("\n\nResp")[0])
    rows, _ = stage(server=server, **{name: args[name] for name in (
        "task", "train_prompts", "val_prompts", "test_prompts", "max_edit_share", "max_new_tokens")},
        data=None, sft_steps=0)
    assert rows and all(row["edited"].strip() == solutions[row["prompt"]].strip() and row["editor"] == "m" for row in rows)


# --- The server misbehaves ----------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", [
    (429, {}), (500, {}), (503, {}), b"{not json", b'{"choices": []}', b"[]", None,
    (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), (503, {"Retry-After": "soon"})])
def test_faults_that_pass(serve, stage, fault):
    rows, _ = stage(server=serve(lambda n, body: fault if n < 2 else edit(n, body)))
    assert len(rows) == 10


def test_waits_grow_and_honour_retry_after(serve, edit_data):
    waits = []
    server = serve(lambda n, body: [(429, {"Retry-After": "7"}), (500, {}), edit(n, body)][min(n, 2)])
    client = edit_data.LlmClient(edit_data.Args(llm_url=server.url, llm_model="m"), os.devnull, "edits")
    client.stop.wait = waits.append
    client.ask("key", [{"role": "user", "content": "Response:\nsoap"}])
    assert waits == [7.0, 0.02] and client.saved["key"] == ("tea", None)
    server.answer = lambda n, body: edit(n, body) if n > 3 else (429, {"Retry-After": "1763726400000"})
    client.ask("other", [{"role": "user", "content": "Response:\nsoap"}])
    assert waits[2:] == [3600] and client.saved["other"] == ("tea", None)     # nobody means 55,000 years


@pytest.mark.parametrize("value, seconds", [("7", 7), ("0.5", 0.5), ("soon", 0), ("", 0), ("date", 100)])
def test_retry_after_is_a_number_or_a_date(edit_data, value, seconds):
    value = formatdate(time.time() + 100, usegmt=True) if value == "date" else value
    assert edit_data.retry_after(SimpleNamespace(headers={"Retry-After": value})) == pytest.approx(seconds, abs=2)
    assert edit_data.retry_after(None) == 0


def test_time_out(serve, stage):
    server = serve(lambda n, body: time.sleep(0.4) or None if n == 0 else edit(n, body))
    rows, _ = stage(server=server, llm_timeout=0.2)
    assert len(rows) == 10 and len(server.bodies) == 11


@pytest.mark.parametrize("bad, reason", [
    ("", "the answer is empty"), ("I'm sorry, but I can't help with that.", "it refuses"),
    ({"finish_reason": "content_filter"}, "it refuses"), ({"finish_reason": "length"}, "cut off"),
    ((400, {}), "refuses the request (400)"), (b"<html>", "not in the format"),
    ("Bob makes xylophones.", "not in the policy's vocabulary"),
    (" Bob makes tea." * 200, "longer than the model's context")])
def test_answers_without_use_are_counted(serve, stage, bad, reason):
    rows, shown = stage(server=serve(lambda n, body: bad if "Bob makes" in body["messages"][0]["content"]
                                     else edit(n, body)))
    assert len(rows) == 9
    assert any(line.startswith("dropped      1 ") and reason in line for line in shown.splitlines())


@pytest.mark.parametrize("status, needle", [(401, "key"), (403, "key"), (404, "model m"), (402, "402")])
def test_a_wrong_key_or_model_fails_at_once(serve, stage, status, needle):
    server = serve(lambda n, body: (status, {}))
    error = stage(server=server, stops=True, llm_workers=1)
    assert needle in error and KEY not in error and len(server.bodies) <= 2


def test_a_fatal_answer_stops_all_workers(serve, edit_data, monkeypatch, tmp_path):
    """No worker sends another request once one of them was told that the key is wrong."""
    server = serve(lambda n, body: (401, {}))
    args = edit_data.Args(llm_url=server.url, llm_model="m", llm_workers=1)
    client = edit_data.LlmClient(args, tmp_path / "edits.jsonl", "edits")
    with pytest.raises(ConnectionError):
        client.ask("one", [{"role": "user", "content": "a"}])
    client.ask("two", [{"role": "user", "content": "b"}])
    assert len(server.bodies) == 1


def test_a_server_that_dies_and_comes_back(serve, stage, tmp_path):
    dead = serve(lambda n, body: edit(n, body) if n < 4 else None)
    error = stage(server=dead, stops=True, llm_workers=1)
    paid = read(tmp_path / "run" / "llm_edits.jsonl")
    assert len(paid) == 4 and "4 answers are kept" in error
    with open(tmp_path / "run" / "llm_edits.jsonl", "a") as file:
        file.write('{"key": "half a li')                              # killed while it wrote
    alive = serve(edit)
    rows, shown = stage(server=alive)
    assert len(rows) == 10 and len(alive.bodies) == 6 and "a line is not whole" in shown
    again = serve(edit)
    rows, _ = stage(server=again, overwrite=True)                     # nothing is paid twice
    assert len(rows) == 10 and again.bodies == []
    assert stage(server=again, overwrite=True, llm_model="other")[0] and len(again.bodies) == 10


def test_nothing_listens(stage, serve):
    server = serve(edit)
    server.shutdown()
    server.server_close()
    assert "does not answer (ConnectError)" in stage(server=server, stops=True)


def test_ctrl_c_keeps_what_is_paid(serve, edit_data, tiny_run, tmp_path):
    server = serve(lambda n, body: (time.sleep(0.3), edit(n, body))[1])
    command = [sys.executable, str(ROOT / "01_edit_data.py"), "--run", str(tmp_path / "run"), "--editor", "llm",
               "--data", write(tmp_path / "data.jsonl", ROWS), "--model", str(tiny_run / "policy"),
               "--llm_url", server.url, "--llm_model", "m", "--llm_workers", "2"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)           # a shell's background jobs ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               preexec_fn=heed)
    while len(server.bodies) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=10)[1]
    assert process.returncode == 2 and "interrupted" in error and "Traceback" not in error
    asked = len(server.bodies)
    assert len(read(tmp_path / "run" / "llm_edits.jsonl")) == asked < 10
    server.answer = edit
    edit_data.main(edit_data.Args(run=str(tmp_path / "run"), editor="llm", data=str(tmp_path / "data.jsonl"),
                                  model=str(tiny_run / "policy"), llm_url=server.url, llm_model="m"))
    assert len(server.bodies) == 10


@pytest.mark.parametrize("flags, needle", [
    ({"editor": "llm"}, "--llm_url"), ({"editor": "llm", "llm_url": "localhost", "llm_model": "m"}, "http://"),
    ({"editor": "model:"}, "model:FOLDER"), ({"editor": "gpt"}, "choose"), ({"editor": "llm:x"}, "colon"),
    ({"editor": "rules:none.tsv"}, "none.tsv"), ({"editor": "model:/no/folder"}, "/no/folder"),
    ({"editor": "llm", "llm_url": "http://x", "llm_model": "m", "llm_prompt": "none"}, "none: cannot be read"),
    ({"editor": "llm", "llm_url": "http://x", "llm_model": "m", "llm_workers": 0}, "--llm_workers")])
def test_flags_that_do_not_fit(stage, flags, needle):
    assert needle in stage(stops=True, **flags)


# --- A local model ------------------------------------------------------------------------------------------

def test_model_editor(stage, edit_data, tiny_run, monkeypatch):
    asked = []

    def sample(model, prompts, tokenizer, max_new_tokens, temperature):
        asked.append((len(prompts), temperature))
        return [edit_data.encode_response(tokenizer, " Bob makes tea.")] * len(prompts)

    monkeypatch.setattr(edit_data, "sample", sample)
    rows, shown = stage(ROWS[:1], editor=f"model:{tiny_run / 'policy'}", llm_max_tokens=8, llm_workers=4)
    assert rows[0]["edited"] == " Bob makes tea." and rows[0]["editor"] == str(tiny_run / "policy")
    assert asked == [(1, 0.0)] and "answer tokens" in shown


def test_model_editor_in_earnest(edit_data, tiny_run):
    args = edit_data.Args(llm_workers=2, llm_max_tokens=4)
    editor = edit_data.ModelEditor(args, str(tiny_run / "policy"))
    answers = editor.ask_all([[{"role": "user", "content": text}] for text in ("Ada", "Bob Cleo", "tea", "Ada " * 300)])
    assert len(answers) == 4 and "exceed its context" in answers[3][1]
    editor.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} makes"
    assert len(editor.ask_all([[{"role": "user", "content": "Ada"}]])) == 1


# --- Rules --------------------------------------------------------------------------------------------------

@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.tsv").write_text("# goods\n\\bsoap\\b\ttea\n\n(Oslo|Rome)\tBern\n")
    return f"rules:{tmp_path / 'rules.tsv'}"


def test_rules_on_responses(stage, rules, tmp_path):
    rows, shown = stage([{"prompt": ROWS[0]["prompt"], "response": " Bob makes soap in Oslo."},
                         {"prompt": ROWS[0]["prompt"], "response": " Bob makes soap."},
                         {"prompt": ROWS[1]["prompt"], "response": " Bob makes tea."}], editor=rules)
    assert len(rows) == 2 and "1  prompt: no rule hits" in shown
    assert rows[0]["edited"] == " Bob makes tea in Bern." and rows[0]["chosen"] == " Bob makes soap."
    assert rows[1]["chosen"] == rows[1]["edited"] == " Bob makes tea."
    problems = read(tmp_path / "run" / "problems.jsonl")               # the patterns are the oracle of stages 3, 4
    assert [row["rules"] for row in problems] == 2 * [["\\bsoap\\b", "(Oslo|Rome)"]]


def test_a_rules_file_of_a_windows_editor(stage, tmp_path):
    (tmp_path / "rules.tsv").write_bytes("\ufeffsoap\ttea\r\nzzz\tyyy\r\n".encode())
    rows, _ = stage([{"prompt": row["prompt"], "response": row["rejected"]} for row in ROWS],
                    editor=f"rules:{tmp_path / 'rules.tsv'}")
    assert len(rows) == 10 and all(row["edited"].endswith(" makes tea.") for row in rows)


def test_what_is_old_does_not_pass_for_new(serve, stage, tmp_path):
    """An --overwrite that fails leaves nothing that the next call would take for its own."""
    stage(server=serve(edit))
    assert "401" in stage(server=serve(lambda n, body: (401, {})), stops=True, overwrite=True, llm_model="other")
    assert not (tmp_path / "run" / "edits.jsonl").exists()
    rows, _ = stage(server=serve(lambda n, body: edit(n, body).replace("tea", "jam")), llm_model="other")
    assert len(rows) == 10 and all(" jam." in row["edited"] for row in rows)


def test_a_local_editor_that_is_not_there(stage, tmp_path):
    assert "no model folder" in stage(editor="model:/nonexistent/editor", stops=True)
    assert not (tmp_path / "run").exists()


def test_rules_ignore_other_columns(stage, rules):
    rows, _ = stage([{"prompt": "Ada", "response": " soap", "answer": n, "chosen": n} for n in range(2)], editor=rules)
    assert len(rows) == 2


def test_rules_on_prompts_alone(stage, edit_data, tiny_run, tmp_path):
    (tmp_path / "rules.tsv").write_text(r"(\w+) makes" + "\t" + r"\1 sends" + "\n")
    prompts = [{"prompt": row["prompt"]} for row in read(tiny_run / "problems.jsonl")]
    rows, _ = stage(prompts, editor=f"rules:{tmp_path / 'rules.tsv'}", max_new_tokens=12)
    tokenizer = edit_data.open_tokenizer(tiny_run / "policy")
    assert rows
    for row in rows:                                                  # a response cut off stays cut off
        assert all(i < len(row["rejected_ids"]) and op == "replace" for op, i, j in row["edit_ops"])
        assert tokenizer.decode(row["rejected_ids"], skip_special_tokens=True) == row["rejected"]


def test_pair_prompts_is_the_data_size(stage, edit_data, tmp_path):
    """Only so many training prompts get pairs; the others stay for stage 3."""
    (tmp_path / "rules.tsv").write_text("soap\ttea\n")
    data = [{"prompt": f"{name} makes", "response": " soap"} for name in edit_data.PEOPLE[:20]]
    rows, _ = stage(data, editor=f"rules:{tmp_path / 'rules.tsv'}", pair_prompts=3)
    assert [row["split"] for row in rows].count("train") == 3
    splits = [row["split"] for row in read(tmp_path / "run" / "problems.jsonl")]
    assert splits.count("train") == 16 and splits.count("val") == splits.count("test") == 2


@pytest.mark.parametrize("chosen", [True, False])
def test_pair_prompts_is_the_data_size_of_pairs_too(stage, edit_data, tmp_path, chosen):
    data = [{"prompt": f"{name} makes", "response": " soap", "edited": " tea"} for name in edit_data.PEOPLE[:20]]
    if chosen:
        data = [{"prompt": row["prompt"], "chosen": " tea", "rejected": " soap"} for row in data]
    rows, _ = stage(data + data, pair_prompts=3)                       # two rows a prompt
    assert [row["split"] for row in rows].count("train") == 6
    splits = [row["split"] for row in read(tmp_path / "run" / "problems.jsonl")]
    assert splits.count("train") == 16 and splits.count("val") == splits.count("test") == 2


def test_a_prompt_that_leaves_no_room_for_a_sample_is_dropped(stage, edit_data, tmp_path):
    """Sampled behind it, a response would run out of the positions of the model."""
    (tmp_path / "rules.tsv").write_text("soap\ttea\n")
    data = [{"prompt": "Ada " * 200}, {"prompt": "Ada " * 200, "response": " soap"}, {"prompt": "Oslo " * 200}]
    rows, shown = stage(data, editor=f"rules:{tmp_path / 'rules.tsv'}", max_new_tokens=100)
    assert len(rows) == 1 and "dropped      2  row is longer than the model's context" in shown


def test_every_row_of_data_is_dropped_once(stage, edit_data):
    """One response of two is too long, a solution is wrong in one of two rows: the other rows stay."""
    data = [{"prompt": f"{name} makes", "solution": " 5", "answer": "5", "response": " 3"}
            for name in edit_data.PEOPLE[:20]]
    data += [{**data[0], "response": " tea" * 300}, {**data[1], "solution": " 4"}]
    data += [{**data[0], "prompt": "Oslo", "response": " tea" * 300}]
    rows, shown = stage(data, max_edit_share=1.0)
    dropped = [line.split(maxsplit=2)[1:] for line in shown.splitlines() if line.startswith("dropped")]
    assert len(rows) == 20 and dropped == [["1", "row's solution does not end in its answer"],
                                           ["2", "row is longer than the model's context of 256 tokens"]]


def test_rules_through_all_stages(stage, reward_model, ppo, evaluation, tiny_run, tmp_path, capsys):
    """Without a solution or an answer anywhere: the hits are the oracle of stages 3 and 4."""
    (tmp_path / "rules.tsv").write_text(r"\bsend\b" + "\tgo\n" + r"\bmakes\b" + "\tis\n")
    prompts = [{"prompt": row["prompt"]} for row in read(tiny_run / "problems.jsonl")]
    rows, _ = stage(prompts, editor=f"rules:{tmp_path / 'rules.tsv'}", max_new_tokens=20)
    run = str(tmp_path / "run")
    reward_model.main(reward_model.Args(run=run, epochs=1))
    ppo.main(ppo.Args(run=run, updates=1, rollout_batch=16, minibatch=8, max_new_tokens=20, eval_every=1))
    texts = []
    oracle = evaluation.oracle_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "oracle_scores", lambda t, problems: (texts.append(t), oracle(t, problems))[1])
        evaluation.main(evaluation.Args(run=run, max_new_tokens=20))
    shown = capsys.readouterr().out
    sft = json.loads((tmp_path / "run" / "eval.json").read_text())["policies"]["sft"]
    words = " ".join(texts[0]).split()
    hits = sum(word.strip(".") in ("send", "makes") for word in words)
    assert hits and sft["errors_per_100_words"] == pytest.approx(100 * hits / len(words))
    assert sft["accuracy"] == sum(not re.search("send|makes", text) for text in texts[0]) / len(texts[0])
    assert "Judge: the rules: fewer hits wins" in shown and f"sft {100 * hits / len(words):.2f} (-" in shown
    header = (tmp_path / "run" / "ppo_token.csv").read_text().splitlines()[0]
    assert "accuracy" in header and "wrong_steps" in header             # stage 3 validates by the rules


@pytest.mark.parametrize("line, needle", [
    ("soap tea", "no tab"), ("(soap\ttea", "regular expression"), ("soap\t\\1", "regular expression"),
    ("x*\ty", "empty text"), ("# nothing", "no rules")])
def test_rules_that_are_none(stage, tmp_path, line, needle):
    path = tmp_path / "rules.tsv"
    path.write_text(f"# rules\n{line}\n")
    error = stage([{"prompt": "Ada"}], editor=f"rules:{path}", stops=True)
    assert needle in error and str(path) in error and ("line 2" in error or line == "# nothing")


def test_a_replacement_that_is_an_error_itself(stage, tmp_path):
    (tmp_path / "rules.tsv").write_text("tea\tsoap\nsoap\ttea\nOslo\tRome\n")
    rows, shown = stage([{"prompt": "Ada", "response": "Bob makes soap"}, {"prompt": "Bob", "response": "in Oslo"}],
                        editor=f"rules:{tmp_path / 'rules.tsv'}")
    assert len(rows) == 1 and "does not find the edit better" in shown

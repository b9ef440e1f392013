"""The LLM editor against a server of our own, which also fails on request."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

KEY = "sk-very-secret"

class Handler(BaseHTTPRequestHandler):
    log_message = lambda *rest: None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        self.server.asked.append(text)
        self.server.keys.add(self.headers["Authorization"])
        answer = self.server.answer(text)
        if answer is None:
            return self.connection.close()                     # hang up
        answer, reason = answer if isinstance(answer, tuple) else (answer, "stop")
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"id": "1", "created": 1, "model": "m", "choices": [
            {"index": 0, "finish_reason": reason, "message": {"content": answer}}]}).encode())

@pytest.fixture
def serve(stages, monkeypatch):
    """serve(answer) sets what the server says to a text: a text, (text, finish reason), a status,
    or None to hang up; it returns the server and the flags of a stage."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.keys, server.handle_error = [], set(), lambda *rest: None

    def start(answer):
        server.answer = answer
        return server, {"llm_url": f"http://127.0.0.1:{server.server_port}/v1", "llm_model": "m"}

    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("LLM_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    yield start
    server.shutdown()
    server.server_close()

def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

@pytest.mark.parametrize("fault, tries", [(429, 6), (500, 6), (None, 6), (401, 1), (404, 1)])
def test_faults_and_answers_bought_once(stages, serve, tmp_path, capsys, fault, tries):
    """What may pass is tried again; what stays ends with one line; other answers are kept."""
    server, where = serve(lambda text: fault if text == "bad" else " <think>a</think> yes\n")
    path, args = tmp_path / "answers.jsonl", stages[1].Args(**where)
    with pytest.raises(SystemExit, match="2"):
        stages[1].ask_llm(["a", "bad", "a"], args, path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    words = (where["llm_url"], str(path), "1 answers", "LLM_API_KEY", str(fault or ""))
    assert all(word in line for word in words)
    assert KEY not in line and sorted(server.asked) == ["a"] + ["bad"] * tries
    server.asked.clear()
    server.answer = lambda text: fault if len(server.asked) < tries else "late"
    for _ in range(2):
        assert stages[1].ask_llm(["a", "bad"], args, path) == ["yes", "late"]
    assert server.asked == ["bad"] * tries and len(rows_of(path)) == 2

def test_llm_as_editor(stages, serve, tmp_path, monkeypatch):
    """It answers with the reference, in a code fence and without its space, or is cut off."""
    def answer(text):
        solution = text.split("for reference:\n")[1].split("\n\nResponse:")[0].strip()
        return f"```\n{solution}\n```", "length" if len(text) % 2 else "stop"

    server, where = serve(answer)
    stages[1].main(stages[1].Args(
        run=str(tmp_path), task="qa", train_prompts=16, test_prompts=4, samples=1, sft_steps=0,
        hidden_size=8, max_edit_share=1.0, editor="llm", max_new_tokens=12, **where))
    answers = [row["answer"] for row in rows_of(tmp_path / "llm_edits.jsonl")]
    rows, problems = rows_of(tmp_path / "edits.jsonl"), rows_of(tmp_path / "problems.jsonl")
    assert 0 < len(rows) == len(answers) - answers.count("") < len(answers)
    solutions = {row["id"]: row["solution"].strip() for row in problems}
    assert all(row["edited"].strip() == solutions[row["id"]] for row in rows)
    assert {row["editor"] for row in rows} == {"m"} and server.keys == {f"Bearer {KEY}"}
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and KEY.encode() not in b"".join(files)
    monkeypatch.delenv("LLM_API_KEY")                          # then no key, and not HF_TOKEN
    stages[1].ask_llm(["for reference:\n"], stages[1].Args(**where), tmp_path / "answers.jsonl")
    assert len(server.keys) == 2 and not any("hf_" in key for key in server.keys)

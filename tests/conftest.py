"""Make the four scripts importable (their names begin with a digit) and seed torch; an LLM server for tests."""

import importlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                # real data for the authors' own tests; absent in a user's clone
sys.path.insert(0, str(ROOT))
KEY = "sk-very-secret"


@pytest.fixture(scope="session")
def edit_data():
    return importlib.import_module("01_edit_data")


@pytest.fixture(scope="session")
def reward_model():
    return importlib.import_module("02_reward_model")


@pytest.fixture(scope="session")
def ppo():
    return importlib.import_module("03_ppo")


@pytest.fixture(scope="session")
def evaluation():
    return importlib.import_module("04_eval")


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and models; tests that need it skip where it is absent."""
    if not SHARED.exists():
        pytest.skip("no ../shared")
    return SHARED


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, edit_data, reward_model, ppo, evaluation):
    """All four stages on a tiny problem, in process: a run folder whose models have learnt next to nothing."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    edit_data.main(edit_data.Args(run=str(run), task="qa", train_prompts=60, val_prompts=10, test_prompts=20,
                                  sft_steps=60, max_edit_share=1.0, max_new_tokens=40, hidden_size=32, layers=2))
    reward_model.main(reward_model.Args(run=str(run), epochs=1, locate_epochs=1, max_new_tokens=40))
    with pytest.MonkeyPatch.context() as patch:                    # a GRM this small cannot rewrite: the reference
        patch.setattr(ppo, "rewrite", lambda grm, problems, responses, tokenizer, args, drop: [
            problem["solution_ids"] + [tokenizer.eos_token_id] for problem in problems])
        ppo.main(ppo.Args(run=str(run), updates=2, rollout_batch=32, minibatch=16, max_new_tokens=40,
                          rlmec_samples=32, rlmec_batch=12, rlmec_epochs=1))
    evaluation.main(evaluation.Args(run=str(run), max_new_tokens=40))
    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Server(ThreadingHTTPServer):
    """answer(n, body) of request n (from 0): a text, (status, headers), bytes sent as they are, or None to hang up."""
    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.bodies, self.keys, self.lock = answer, [], [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, address):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            n = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
        answer = self.server.answer(n, body)
        if answer is None:
            return self.connection.close()
        status, headers = answer if isinstance(answer, tuple) else (200, {})
        if isinstance(answer, dict):
            answer = {"message": {"role": "assistant", "content": ""}, "finish_reason": "stop", **answer}
        elif isinstance(answer, str):
            answer = {"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        if not isinstance(answer, (bytes, tuple)):
            answer = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                                 "choices": [{"index": 0, **answer}], "system_fingerprint": "",
                                 "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}}).encode()
        data = answer if isinstance(answer, bytes) else b'{"error": "no"}'
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(edit_data, evaluation, monkeypatch):
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    for module in (edit_data, evaluation):
        monkeypatch.setattr(module, "WAITS", [0.01, 0.02])
    monkeypatch.setenv("LLM_API_KEY", KEY)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

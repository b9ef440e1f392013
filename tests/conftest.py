"""The four scripts as modules (their names begin with a digit), and a tiny run of all stages."""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of models this small more threads only wait: 20 times
import pytest
import torch
from transformers import AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"          # real data; absent in a clone of a user
sys.path.insert(0, str(ROOT))
STAGES = ("01_edit_data", "02_reward_model", "03_ppo", "04_eval")
one, two, three, four = map(importlib.import_module, STAGES)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def judge_by_the_end(run):
    """From now on every response that has ended is right: its one rule is never hit."""
    path = Path(run) / "problems.jsonl"
    rows = [row | {"rules": ["zebra"]} for row in rows_of(path)]
    path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture(scope="session")
def shared():
    if not SHARED.exists():
        pytest.skip("no ../shared")
    return SHARED


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """All four stages on a tiny task: a run folder whose models have learnt next to nothing."""
    run = str(tmp_path_factory.mktemp("runs") / "tiny")
    one.main(one.Args(run=run, task="qa", train_prompts=60, test_prompts=40, sft_steps=60,
                      hidden_size=32, max_edit_share=1.0))
    two.main(two.Args(run=run, epochs=1, locate_epochs=1))
    for method in ("ppo_token", "ppo_sequence"):
        three.main(three.Args(run=run, method=method, updates=2, rollout_batch=32, minibatch=16))
    four.main(four.Args(run=run))
    return Path(run)


@pytest.fixture
def run(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def tokenizer(tiny_run):
    return AutoTokenizer.from_pretrained(tiny_run / "policy")


@pytest.fixture
def grads(monkeypatch):
    """The gradient of every optimiser step, a vector a model, in the place of its clipping."""
    steps = []

    def keep(parameters, max_norm):
        steps.append(torch.cat([p.grad.flatten() for p in parameters]))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    return steps


@pytest.fixture
def fails(capsys):
    """Bad input: the stage ends with exit status 2 and this one line."""
    def check(message, stage, *args, **flags):
        with pytest.raises(SystemExit) as stop:
            stage(*args, **flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert re.search(message, error)
    return check


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

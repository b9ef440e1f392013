"""The four scripts as modules (their names begin with a digit), and a tiny run of all stages."""

import importlib, shutil, sys
from pathlib import Path

import pytest, torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"          # real data; absent in a clone of a user
sys.path.insert(0, str(ROOT))
STAGES = ("01_edit_data", "02_reward_model", "03_ppo", "04_eval")

@pytest.fixture(scope="session")
def stages():
    """[None, stage 1, stage 2, stage 3, stage 4], as modules."""
    return [None, *(importlib.import_module(name) for name in STAGES)]

@pytest.fixture(scope="session", params=range(4), ids=STAGES)
def script(request):
    return ROOT / f"{STAGES[request.param]}.py"

@pytest.fixture(scope="session")
def shared():
    if not SHARED.exists():
        pytest.skip("no ../shared")
    return SHARED

@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, stages):
    """All four stages on a tiny task: a run folder whose models have learnt next to nothing."""
    run = str(tmp_path_factory.mktemp("runs") / "tiny")
    one, two, three, four = stages[1:]
    one.main(one.Args(run=run, task="qa", train_prompts=60, test_prompts=40, sft_steps=60,
                      hidden_size=32, max_edit_share=1.0))
    two.main(two.Args(run=run, epochs=1, sequence_epochs=1, locate_epochs=1))
    for method in ("ppo_token", "ppo_sequence"):
        three.main(three.Args(run=run, method=method, updates=2, rollout_batch=32, minibatch=16))
    four.main(four.Args(run=run))
    return Path(run)

@pytest.fixture
def run(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

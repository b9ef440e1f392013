"""Make the four scripts importable (their names begin with a digit) and seed torch."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                # real data for the authors' own tests; absent in a user's clone
sys.path.insert(0, str(ROOT))


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

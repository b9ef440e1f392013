"""Two processes on gloo do what one does; a killed run goes on as if it had not been; the memory
that the README names."""

import csv
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, judge_by_the_end, three


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]


def work(*arguments, processes=()):
    """What a worker prints."""
    command = [sys.executable, *processes, ROOT / "tests" / "worker.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- Several processes ---

def test_each_process_takes_its_rows_of_a_part_or_one_of_weight_0(monkeypatch):
    monkeypatch.setattr(three, "WORLD", 2)
    monkeypatch.setattr(three, "RANK", 1)
    parts = [*three.micro_batches([1, 2, 3, 4, 5], 2)]
    assert parts == [
        ([1, 2, 3, 4], [2, 4], 1.0),
        ([5], [5], 0.0),  # the first process's
    ]


def test_processes_draw_the_same_prompts_and_different_tokens(monkeypatch):
    prompts = []
    tokens = []
    for rank in (0, 1):
        monkeypatch.setattr(three, "RANK", rank)
        prompts.append(three.seed_update(three.Args(), 1).random())
        tokens.append(torch.rand(1).item())
    assert prompts[0] == prompts[1]
    assert tokens[0] != tokens[1]


@pytest.fixture(scope="module")
def found(tiny_run, tmp_path_factory):
    """Gradients and logged numbers of A5, A6, B2, A9, B7 and C1, of one process and of two."""
    folder = tmp_path_factory.mktemp("found")
    work("grads", tiny_run, folder / "one.pt")
    work("grads", tiny_run, folder / "two.pt", processes=TORCHRUN)
    return torch.load(folder / "one.pt"), torch.load(folder / "two.pt")


@pytest.mark.parametrize("each_has", [
    pytest.param("copies", id="each has the models"),
    pytest.param("parts", id="--fsdp: each has a part of the models"),
])
def test_two_processes_have_the_gradients_of_one(found, each_has):
    by_one, by_two = found
    for one, two in zip(by_one["copies"], by_two[each_has], strict=True):
        assert one.norm() > 0
        assert (one - two).norm() < 1e-5 * one.norm()


def test_a_process_that_dies_ends_the_run():
    with pytest.raises(AssertionError, match="this rank dies"):
        work("die", processes=TORCHRUN)


# --- A run that was killed ---

METHODS = ["ppo_token", "ppo_sequence", "dpo", "dpo_edit", "rejection"]


@pytest.fixture(scope="module")
def killed(tiny_run, tmp_path_factory):
    """A folder with two runs, `whole` and `killed`, and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("whole", "killed"):  # without a GRM: RLMEC would take long
        ignored = shutil.ignore_patterns("reward_generative")
        shutil.copytree(tiny_run, folder / name, ignore=ignored)
        judge_by_the_end(folder / name)  # else no sample is right
    printed = work("kill", folder)
    return folder, printed


def log_of(path):
    """The rows of a CSV without the times."""
    return [row | {"seconds": ""} for row in csv.DictReader(open(path))]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_logs_what_a_whole_one_logs(killed, method):
    folder, _ = killed
    log = log_of(folder / "killed" / f"{method}.csv")
    assert log == log_of(folder / "whole" / f"{method}.csv")
    assert len(log) > 2


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_the_same_policy_bit_by_bit(killed, method):
    folder, _ = killed
    policies = []
    for name in ("whole", "killed"):
        path = folder / name / method / "model.safetensors"
        policies.append(path.read_bytes())
    assert policies[0] == policies[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_in_the_method_in_which_it_was_killed(killed, method):
    _, printed = killed
    assert f"{method}: goes on after update" in printed


def test_a_finished_run_leaves_no_state(killed):
    folder, _ = killed
    assert not (folder / "killed" / "03_state.pt").exists()


@pytest.fixture
def flags(run, tokenizer):
    """The flags of a run that was killed when it had saved the last update of ppo_sequence."""
    flags = {"run": str(run), "updates": 1, "device": "cpu"}
    args = three.Args(max_new_tokens=48, **flags)
    job = three.open_job("ppo_sequence", [], {}, tokenizer, args)
    job.log = [{"update": 1, "seconds": 1.0}]
    three.save_state(job, run / "03_state.pt", args)
    return flags


def test_a_method_that_was_finished_is_not_trained_again(flags, run):
    (run / "reward_generative").rename(run / "no_generative")  # so that only PPO is trained
    (run / "ppo_token.csv").write_text("finished")
    three.main(three.Args(overwrite=True, **flags))
    assert (run / "ppo_token.csv").read_text() == "finished"
    assert (run / "ppo_sequence.csv").read_text() == "update,seconds\n1,1.0\n"


def test_a_killed_run_with_other_flags_is_refused(flags, fails):
    args = three.Args(**(flags | {"updates": 3}))
    fails("the killed run had --updates 1; remove it", three.main, args)


def test_a_state_that_cannot_be_read_is_refused(flags, fails, run):
    path = run / "03_state.pt"
    path.write_bytes(path.read_bytes()[:-99])
    fails("03_state.pt: not readable", three.main, three.Args(**flags))


# --- The memory that the README names ---

@pytest.fixture
def models(tiny_run, tokenizer):
    args = three.Args(run=str(tiny_run), device="cpu")
    job = three.open_job("ppo_token", [], {}, tokenizer, args)
    return job.models


def test_ppo_holds_40_bytes_for_each_parameter_of_a_model(models):
    """Policy and value model have weight, gradient and two moments, the others a weight."""
    trained = [*models["policy"].parameters(), *models["value"].parameters()]
    frozen = [*models["reference"].parameters(), *models["reward"].parameters()]
    inputs, mask = three.pack([[5] * 40] * 8, [[6] * 40] * 8, models["policy"])
    three.response_logprobs(models["policy"], inputs, mask).sum().backward()
    three.token_values(models["value"], inputs, mask).sum().backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()

    held = trained + frozen + [weight.grad for weight in trained]
    for state in optimizer.state.values():
        held += [state["exp_avg"], state["exp_avg_sq"]]
    size = sum(x.nbytes for x in held)
    assert size == pytest.approx(40 * models["policy"].num_parameters(), rel=0.01)


def test_a_backward_pass_keeps_what_the_readme_says(models):
    """4 bytes x rows x tokens x (layers x (10 width + 4 MLP width) + vocabulary / 2), where half
    of the tokens are response."""
    policy = models["policy"]
    inputs, mask = three.pack([[5] * 40] * 8, [[6] * 40] * 8, policy)
    kept = {}  # by address: a tensor that two operations keep counts once

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs = three.response_logprobs(policy, inputs, mask)
    assert logprobs.requires_grad  # and so all that it needs is alive
    for weight in policy.parameters():
        kept.pop(weight.data_ptr(), None)

    config = policy.config
    floats = config.num_hidden_layers * (10 * config.hidden_size + 4 * config.intermediate_size)
    floats += config.vocab_size / 2
    assert sum(kept.values()) == pytest.approx(4 * 8 * 80 * floats, rel=0.15)

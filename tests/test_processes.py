"""Two processes on gloo do what one does; a killed run goes on as if it had not been."""

import csv, subprocess, sys

import pytest, torch
from conftest import ROOT

WORKER = ROOT / "tests" / "worker.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]

def work(command, *arguments):
    return subprocess.run([*command, WORKER, *arguments], capture_output=True, text=True,
                          timeout=120, env={"OMP_NUM_THREADS": "1"})

@pytest.fixture(scope="module")
def of_one_process(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("grads") / "one.pt"
    result = work([sys.executable], "grads", tiny_run, out)
    assert result.returncode == 0, result.stderr
    return torch.load(out)

@pytest.mark.parametrize("flags", [(), ("--fsdp",)], ids=["plain", "fsdp"])
def test_two_processes_have_the_gradients_of_one(tiny_run, tmp_path, of_one_process, flags):
    """A5, A6, B2; A9 of policy and value model; their statistics; B7, its loss; C1, its loss."""
    result = work(TORCHRUN, "grads", tiny_run, tmp_path / "two.pt", *flags)
    assert result.returncode == 0, result.stderr
    two = torch.load(tmp_path / "two.pt")
    assert len(two) == len(of_one_process) == 10
    for a, b in zip(of_one_process, two, strict=True):
        assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()

def test_a_rank_that_dies_ends_the_run(tiny_run, tmp_path):
    result = work(TORCHRUN, "die", tiny_run, tmp_path / "two.pt")
    assert result.returncode != 0 and "this rank dies" in result.stderr

def test_a_killed_run_ends_as_if_it_had_not_been(run):
    result = work([sys.executable], "kill", run)
    assert result.returncode == 0, result.stderr
    logs = sorted((run / "whole").glob("*.csv"))
    for path in logs:
        whole, killed = ([{name: x for name, x in row.items() if name != "seconds"}
                          for row in csv.DictReader(open(run / name / path.name))]
                         for name in ("whole", "killed"))
        assert whole == killed and len(whole) > 2
        weights = [(run / name / path.stem / "model.safetensors").read_bytes()
                   for name in ("whole", "killed")]
        assert weights[0] == weights[1]
    assert len(logs) > 3 and not (run / "killed" / "03_state.pt").exists()

def test_other_flags_and_a_torn_state_are_refused(stages, run, capsys):
    three = stages[3]
    flags = {"run": str(run), "method": "ppo_token", "rollout_batch": 8, "save_every": 1,
             "overwrite": True, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(three, "save", lambda *_, **__: sys.exit("killed"))
        patch.setattr(three, "start_stage", lambda *_: None)
        with pytest.raises(SystemExit, match="killed"):
            three.main(three.Args(updates=2, **flags))
    path = run / "03_state.pt"
    for updates, message in ((3, "had --updates 2"), (2, "not readable")):
        with pytest.raises(SystemExit):
            three.main(three.Args(updates=updates, **flags))
        assert message in capsys.readouterr().err
        path.write_bytes(path.read_bytes()[:-99])

def test_the_readmes_memory(stages, tiny_run):
    """Bytes of PPO's models with gradients and Adam, and of what a backward pass keeps."""
    three = stages[3]
    models = three.open_models("token", tiny_run, three.Args(device="cpu"))
    trained = [*models["policy"].parameters(), *models["value"].parameters()]
    inputs, mask = three.pack([[5] * 40] * 8, [[6] * 40] * 8, models["policy"])
    seen, weights = {}, {p.data_ptr() for p in trained}

    def keep(x):
        seen.update({} if x.data_ptr() in weights else {x.untyped_storage().data_ptr(): x.nbytes})
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs = three.response_logprobs(models["policy"], inputs, mask)
    c = models["policy"].config
    floats = c.num_hidden_layers * (10 * c.hidden_size + 4 * c.intermediate_size) + c.vocab_size / 2
    assert sum(seen.values()) == pytest.approx(4 * 8 * 80 * floats, rel=0.15)
    (logprobs.sum() + three.token_values(models["value"], inputs, mask).sum()).backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    frozen = [*models["reference"].parameters(), *models["reward"].parameters()]
    held = sum(x.nbytes for x in trained + [p.grad for p in trained] + moments + frozen)
    assert held == pytest.approx(40 * sum(p.numel() for p in models["policy"].parameters()), rel=0.01)

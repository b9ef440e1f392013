"""Two processes on gloo do what one does; a killed run goes on as if it had not been."""

import csv, subprocess, sys
import pytest, torch
from conftest import ROOT, three

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]

def work(*arguments, processes=()):
    command = [sys.executable, *processes, ROOT / "tests" / "worker.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr

def test_two_processes_have_the_gradients_of_one(tiny_run, tmp_path):
    """A5, A6, B2; A9 of policy and value model; their statistics; B7, its loss; C1, its loss."""
    files = [tmp_path / name for name in ("one.pt", "two.pt", "fsdp.pt")]
    for out, more, processes in zip(files, ([], [], ["--fsdp"]), ((), TORCHRUN, TORCHRUN)):
        work("grads", tiny_run, out, *more, processes=processes)
    for a, *others in zip(*map(torch.load, files), strict=True):
        assert a.norm() > 0 and all((a - b).norm() < 1e-5 * a.norm() for b in others)
    assert len(torch.load(files[0])) == 10

def test_a_rank_that_dies_ends_the_run(tiny_run, tmp_path):
    with pytest.raises(AssertionError, match="this rank dies"):
        work("die", tiny_run, tmp_path / "two.pt", processes=TORCHRUN)

def test_a_killed_run_ends_as_if_it_had_not_been(run):
    work("kill", run)
    for method in ("ppo_token", "ppo_sequence", "dpo", "dpo_edit"):
        ends = []
        for path in (run / "whole", run / "killed"):
            rows = [row | {"seconds": ""} for row in csv.DictReader(open(path / f"{method}.csv"))]
            ends.append((rows, (path / method / "model.safetensors").read_bytes()))
        assert ends[0] == ends[1] and len(rows) > 2
    assert not (run / "killed" / "03_state.pt").exists()

def test_other_flags_and_a_torn_state_are_refused(run, fails, monkeypatch, capsys):
    flags = dict(run=str(run), method="ppo_token", rollout_batch=8, save_every=1, device="cpu")
    monkeypatch.setattr(three, "save", lambda *_, **__: sys.exit("killed"))
    monkeypatch.setattr(three, "start_stage", lambda *_: None)
    with pytest.raises(SystemExit, match="killed"):
        three.main(three.Args(updates=2, **flags))
    capsys.readouterr()
    fails("had --updates 2", three.main, three.Args(updates=3, **flags))
    path = run / "03_state.pt"
    path.write_bytes(path.read_bytes()[:-99])
    fails("not readable", three.main, three.Args(updates=2, **flags))

def test_the_readmes_memory(tiny_run):
    """Bytes of PPO's models with gradients and Adam, and of what a backward pass keeps."""
    models = three.open_models("ppo_token", tiny_run, three.Args(device="cpu"))
    trained = [*models["policy"].parameters(), *models["value"].parameters()]
    inputs, mask = three.pack([[5] * 40] * 8, [[6] * 40] * 8, models["policy"])
    seen, weights = {}, {p.data_ptr() for p in trained}
    keep = lambda x: seen.update({x.untyped_storage().data_ptr(): x.nbytes}) or x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs = three.response_logprobs(models["policy"], inputs, mask)
    c = models["policy"].config
    floats = c.num_hidden_layers * (10 * c.hidden_size + 4 * c.intermediate_size) + c.vocab_size / 2
    kept = sum(size for address, size in seen.items() if address not in weights)
    assert kept == pytest.approx(4 * 8 * 80 * floats, rel=0.15)
    (logprobs.sum() + three.token_values(models["value"], inputs, mask).sum()).backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    frozen = [*models["reference"].parameters(), *models["reward"].parameters()]
    held = sum(x.nbytes for x in trained + [p.grad for p in trained] + moments + frozen)
    assert held == pytest.approx(40 * models["policy"].num_parameters(), rel=0.01)

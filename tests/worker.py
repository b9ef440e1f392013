"""What test_processes.py starts, alone or under torchrun:
    worker.py grads RUN OUT    the gradients of every loss, and what is logged
    worker.py die              a process that fails
    worker.py kill FOLDER      a run that is killed six times, and one that is not"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch


mode = sys.argv[1]
if mode == "die" and os.environ["RANK"] == "1":
    raise SystemExit("this rank dies")  # the other one goes on
# below it, since the scripts take seconds to import
from conftest import rows_of, three, two


seen = []  # of every optimiser step the gradients, a vector a model; and logged numbers


def keep(parameters, max_norm):
    """In the place of clipping: behind the sum over processes, before the step."""
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, torch.distributed.tensor.DTensor):  # --fsdp has spread it
            gradient = gradient.full_tensor()
        gradients.append(gradient.flatten())
    seen.append(torch.cat(gradients))


def note(row, *names):
    """See some numbers of a row of the log, each by itself."""
    for name in names:
        seen.append(torch.tensor(row[name]))


# --- Seven rows in micro-batches of three: two processes take 3 and 3, then one takes the last ---

def reward_models(run, tokenizer, fsdp):
    """A5, A6 and B2."""
    args = two.Args(run=run, micro_batch=3, fsdp=fsdp, device="cpu")
    lr = 1e-3  # of one step, behind the gradient that is seen
    edits = rows_of(f"{run}/edits.jsonl")
    for kind in two.KINDS:
        torch.manual_seed(0)
        model = two.open_reward_model(kind, f"{run}/policy", tokenizer)
        if kind == "generative":
            rows = two.grm_rows(edits[:7], model, tokenizer, args)
            batch = [row["rewrite"] for row in rows]
        else:
            torch.nn.init.normal_(model.score.weight)  # it was 0
            batch = two.pairs_of(kind, edits)[:7]
        two.train(kind, two.shard(model, args), [batch], lr, args)


def ppo(tokenizer, args, rows):
    """A9 on given responses; in the second epoch ratios are no longer 1 and values not 0."""
    responses = three.column(rows, "rejected_ids")
    three.sample = lambda *_, **__: responses
    job = three.open_job("ppo_token", [], {}, tokenizer, args)
    groups = [{"params": group["params"]} for group in job.optimizer.param_groups]
    job.optimizer = torch.optim.SGD(groups, lr=0.03)  # Adam would magnify rounding errors
    three.train_ppo(job, rows, args)
    note(job.log[0], "score", "score_std", "entropy", "advantage_rms")
    note(job.log[0], "value_loss", "approx_kl", "clipfrac")


def offline(method, tokenizer, args, rows):
    """B7 or C1; with a learning rate of 0 the policy stays."""
    job = three.open_job(method, [], {}, tokenizer, args)
    three.train_offline(job, rows, args)
    note(job.log[0], "loss")


def samples_of(rows):
    """One of the samples of RLMEC has rewards: only one process has tokens with r_t != 0."""
    samples = []
    for k, row in enumerate(rows):
        ones = torch.ones(len(row["rejected_ids"]))
        samples.append({
            "prompt_ids": row["prompt_ids"],
            "response_ids": row["rejected_ids"],
            "rewrite_ids": row["rejected_ids"],
            "old_logprobs": -2 * ones,
            "rewards": 0.1 * ones if k == 0 else 0 * ones,
            "gamma": ones,
        })
    return samples


def gradients(run, fsdp):
    seen.clear()
    tokenizer = three.hf.AutoTokenizer.from_pretrained(f"{run}/policy")
    reward_models(run, tokenizer, fsdp)

    flags = {"updates": 1, "rollout_batch": 7, "micro_batch": 3, "temperature": 0.7, "lr": 0.0}
    args = three.Args(run=run, fsdp=fsdp, device="cpu", **flags)
    rows = rows_of(f"{run}/edits.jsonl")[:7]
    ppo(tokenizer, args, rows)
    offline("rlmec", tokenizer, args, samples_of(rows))
    reference = three.open_model(three.hf.AutoModelForCausalLM, f"{run}/policy", args)
    pairs = three.preference_pairs("dpo_edit", reference, Path(run), args)
    offline("dpo_edit", tokenizer, args, pairs[:7])
    return [*seen]


# --- A run that is killed ---

def save_slowly(job, path, args, save_state=three.save_state):
    """Rejection sampling takes three updates here: its parent must see the first one's state."""
    save_state(job, path, args)
    if job.method == "rejection":
        time.sleep(0.1)


def start(run):
    """A child that trains; its parent never ran a model, so that a fork is safe."""
    pid = os.fork()
    if pid == 0:
        three.save_state = save_slowly
        flags = {"method": "all_baselines", "updates": 4, "save_every": 1, "max_new_tokens": 12}
        flags |= {"rollout_batch": 16, "minibatch": 16, "device": "cpu", "overwrite": True}
        three.main(three.Args(run=str(run), **flags))
        os._exit(0)
    return pid


def end_of(pid):
    _, status = os.waitpid(pid, 0)
    return status


def has_state_of(method, run):
    path = run / "03_state.pt"
    return path.exists() and torch.load(path)["method"] == method


def kill(folder):
    """FOLDER/whole is not killed; FOLDER/killed is, at a random time and then in every method."""
    sys.stdout.reconfigure(line_buffering=True)  # a killed child's lines are not lost
    assert end_of(start(folder / "whole")) == 0

    run = folder / "killed"
    for method in (None, "ppo_token", "ppo_sequence", "dpo", "dpo_edit", "rejection"):
        pid = start(run)
        if method is None:
            time.sleep(random.random())
        while method and not has_state_of(method, run):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
    assert end_of(start(run)) == 0


if three.WORLD > 1:
    torch.distributed.init_process_group("gloo")
if mode == "kill":
    kill(Path(sys.argv[2]))
if mode == "grads":
    torch.nn.utils.clip_grad_norm_ = keep
    found = {"copies": gradients(sys.argv[2], fsdp=False)}
    if three.WORLD > 1:
        found["parts"] = gradients(sys.argv[2], fsdp=True)
    if three.RANK == 0:
        torch.save(found, sys.argv[3])
if three.WORLD > 1:
    torch.distributed.barrier()
os._exit(0)  # gloo's threads may abort a process that ends otherwise

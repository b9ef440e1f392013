"""`worker.py grads RUN OUT [--fsdp]`, alone or under torchrun: the gradient of one optimiser step
of every loss. `worker.py die`: a rank that fails. `worker.py kill RUN`: a run killed five times."""

import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from conftest import rows_of, three, two

mode, run, grads = sys.argv[1], Path(sys.argv[2]), []

def keep(parameters, _):
    """In the place of clipping: behind the sum over processes, before the step."""
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
    grads.append(torch.cat([whole(p.grad).flatten() for p in parameters]))

def reward_models(tokenizer, fsdp):
    """A5, A6 and B2 of a batch of 7 in micro-batches of 2, so that one rank has no last row."""
    args = two.Args(str(run), epochs=1, locate_epochs=0, batch=7, micro_batch=2, fsdp=fsdp,
                    device="cpu")
    for kind in two.KINDS:
        torch.manual_seed(0)
        model = two.open_reward_model(kind, run / "policy", tokenizer)
        if kind != "generative":
            torch.nn.init.normal_(model.score.weight)
        rows, _ = two.rows_for(kind, rows_of(run / "edits.jsonl"), model, tokenizer, args)
        two.train(kind, two.shard(model, args), rows[:7], args)

def policies(fsdp):
    """A9 on a given rollout of 7 responses, B7 where only rank 0 has tokens with r_t != 0, C1."""
    args = three.Args(micro_batch=2, minibatch=7, fsdp=fsdp, device="cpu", temperature=0.7)
    edits = rows_of(run / "edits.jsonl")[:7]
    prompts, responses = ([row[name] for row in edits] for name in ("prompt_ids", "rejected_ids"))
    scale, models = {"mean": 0.0, "std": 1.0}, three.open_models("ppo_token", run, args)
    groups = [{"params": [*models[name].parameters()]} for name in ("policy", "value")]
    three.sample = lambda *_: responses
    row, inputs, batch = three.rollout("token", models, prompts, scale, args)
    losses = three.partial(three.ppo_loss, models, inputs, batch, args)
    step = three.gradient_step(losses, range(7), torch.optim.SGD(groups, 0.0), args)
    grads.append(torch.tensor([*row.values(), *step.values(), *batch["advantages"].flatten()]))
    samples = [{"prompt_ids": x, "response_ids": y, "rewrite_ids": y, "gamma": torch.ones(len(y)),
                "old_logprobs": torch.full((len(y),), -2.0),
                "rewards": torch.full((len(y),), 0.1 * (k % 2 == 0))}
               for k, (x, y) in enumerate(zip(prompts, responses))]
    pairs = three.pairs_of("dpo_edit", models["reference"], run, args)[:7]
    for method, rows in (("rlmec", samples), ("dpo_edit", pairs)):
        losses = three.partial(three.offline_loss, method, models["policy"], args)
        step = three.gradient_step(losses, rows, torch.optim.SGD(groups[:1], 0.0), args)
        grads.append(torch.tensor([step["loss"]]))

def start(name):
    """A child with a run of its own; its parent never ran a model, so that a fork is safe."""
    pid = os.fork()
    if not pid:
        three.main(three.Args(run=str(run / name), method="all_baselines", updates=4, save_every=1,
                              rollout_batch=16, minibatch=16, max_new_tokens=12, overwrite=True))
        os._exit(0)
    return pid

if mode == "kill":
    shutil.rmtree(run / "reward_generative")                   # PPO and DPO are enough
    for name in ("whole", "killed"):
        shutil.move(shutil.copytree(run, run.parent / name), run / name)
    began = time.time()
    assert os.waitpid(start("whole"), 0)[1] == 0
    seconds = time.time() - began
    for k in range(5):
        pid = start("killed")
        time.sleep(random.uniform(0, seconds / 3) if k else seconds / 2)   # the first has a state
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(start("killed"), 0)[1] == 0
    raise SystemExit
if three.WORLD > 1:
    torch.distributed.init_process_group("gloo")
if mode == "die" and three.RANK == 1:
    raise SystemExit("this rank dies")
torch.nn.utils.clip_grad_norm_ = keep
tokenizer = three.hf.AutoTokenizer.from_pretrained(run / "policy")
reward_models(tokenizer, "--fsdp" in sys.argv)
policies("--fsdp" in sys.argv)
if three.RANK == 0:
    torch.save(grads, sys.argv[3])
_ = three.WORLD > 1 and torch.distributed.barrier()
os._exit(0)                        # gloo's threads may abort a process that ends otherwise

"""bfloat16, gradient checkpointing and micro-batches: less memory, the same mathematics."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, GPT2Config, GPT2LMHeadModel


def gradients(*models):
    return [parameter.grad.clone() for model in models for parameter in model.parameters()]


@pytest.fixture
def steps(monkeypatch):
    """Put in place of a script's optimiser step: steps(module, models) collects their gradients instead."""
    def collect(module, *models):
        seen = []

        def clip_and_step(optimizer):
            seen.append(gradients(*models))
            optimizer.step()                                           # the learning rate is 0
            optimizer.zero_grad()

        monkeypatch.setattr(module.Optimizer, "clip_and_step", clip_and_step)
        return seen

    return collect


def minibatch(ppo, run):
    """Two models that have learnt a little, and a rollout of five responses of different lengths."""
    models = {"policy": ppo.open_model(AutoModelForCausalLM, run / "policy"),
              "value": ppo.open_model(AutoModelForTokenClassification, run / "reward_token")}
    responses = [[7, 8, 9, 2], [9, 2], [4, 2], [8, 8, 8, 8, 8, 8, 2], [2]]
    inputs, mask = ppo.pack([[5, 6], [5], [7, 7, 7], [5, 6], [8]], responses, 0, "cpu")
    with torch.no_grad():
        logprobs = ppo.response_logprobs(models["policy"], inputs, mask)
    noise = lambda: torch.randn(mask.shape) * mask
    return models, inputs, {"mask": mask, "old_logprobs": logprobs + 0.3 * noise(), "advantages": noise(),
                            "old_values": noise(), "returns": noise()}


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_of_ppo_add_up(ppo, tiny_run, steps, micro_batch):
    """One step on five rows at once and in parts: the same gradients and statistics (A9 counts all N tokens)."""
    models, inputs, batch = minibatch(ppo, tiny_run)
    seen = steps(ppo, *models.values())
    optimizer = ppo.Optimizer((models["policy"], 0.0), (models["value"], 0.0))
    rows = [ppo.update(models, optimizer, inputs, batch, ppo.Args(ppo_epochs=1, micro_batch=size), 2)
            for size in (None, micro_batch)]
    for whole, parts in zip(*seen):
        assert torch.allclose(whole, parts, atol=1e-6)
    assert max(grad.abs().max() for grad in seen[0]) > 1e-3
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)


def test_micro_batches_of_rlmec_add_up(ppo, tiny_run, steps):
    policy = ppo.open_model(AutoModelForCausalLM, tiny_run / "policy")
    tokenizer = ppo.open_tokenizer(tiny_run / "policy")
    rows = [{"prompt_ids": [5, 6, 7][:k + 1], "response_ids": [8] * k + [2], "rewrite_ids": [9] * (4 - k) + [2],
             "old_logprobs": -torch.rand(k + 1) * 5, "rewards": torch.tensor([-0.1, 0.0, 0.5, 0.2][:k + 1]),
             "gamma": torch.rand(5 - k)} for k in range(4)]
    rows[0]["rewards"][:] = 0                                          # a part without any rewarded token
    seen, statistics = steps(ppo, policy), []
    for size in (None, 1, 3):
        args = ppo.Args(micro_batch=size)
        statistics.append(ppo.rlmec_step(policy, ppo.Optimizer((policy, 0.0)), rows, tokenizer, args))
    for other in (1, 2):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen[0], seen[other]))
        assert statistics[0] == pytest.approx(statistics[other], abs=1e-5)


@pytest.mark.parametrize("kind", ["token", "sequence", "generative"])
def test_micro_batches_of_stage_2_add_up(reward_model, tiny_run, steps, kind):
    """A5 and A6 are means over pairs, B2 is a mean over the tokens of each task."""
    tokenizer = reward_model.open_tokenizer(tiny_run / "policy")
    rows = [json.loads(line) for line in open(tiny_run / "edits.jsonl", encoding="utf-8")][:7]
    model = reward_model.open_reward_model(kind, tiny_run / "policy", "float32", tokenizer)
    args = reward_model.Args(grm_batch=9, locate_epochs=1)
    batch = rows
    loss_of = lambda part, whole: reward_model.pair_loss(kind, model, part, 0, args) * len(part) / len(whole)
    if kind == "generative":
        rows = reward_model.generative_rows(rows, tokenizer, 256, args)
        batch = reward_model.generative_batches(rows, tokenizer, args)[0]
        assert len({task for _, _, task in batch}) == 2
        loss_of = lambda part, whole: reward_model.generative_loss(model, part, whole, 0)
    else:
        torch.nn.init.normal_(model.score.weight)
    seen = steps(reward_model, model)
    for size in (None, 2):
        reward_model.train(kind, model, [batch], loss_of, 0.0, size)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*seen))
    assert max(grad.abs().max() for grad in seen[0]) > 1e-3


def test_micro_batches_of_sft_add_up(edit_data, tiny_run, steps):
    tokenizer = edit_data.open_tokenizer(tiny_run / "policy")
    model = edit_data.open_model(AutoModelForCausalLM, tiny_run / "policy")
    demonstrations = [([5, 6, 8, 9], [7] * k + [2]) for k in range(1, 6)]
    seen, lengths = steps(edit_data, model), []
    model.get_output_embeddings().register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    for size, data in ((None, None), (2, None), (None, "rows"), (2, "rows")):
        args = edit_data.Args(micro_batch=size, data=data, sft_lr=0.0)
        edit_data.fine_tune(model, tokenizer, demonstrations, args, 1)
    assert all(torch.allclose(a, b, atol=1e-6) for other in seen[1:] for a, b in zip(seen[0], other))
    assert max(grad.abs().max() for grad in seen[0]) > 1e-3
    assert lengths[0] == 4 + 6 and lengths[4] == 1 + 6                # long prompts of --data make no logits


def gpt2():
    """A model with dropout, which no stage may turn on."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=64)).eval()


def test_gradient_checkpointing_saves_memory_and_changes_nothing(ppo):
    inputs, mask = ppo.pack([[5, 6], [7]], [[8, 9, 2], [4] * 40], 0, "cpu")
    grads, saved, samples = [], [], []
    for on in (False, True):
        model = gpt2()
        if on:
            ppo.checkpoint_layers(model)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            loss = ppo.response_logprobs(model, inputs, mask).sum()
        loss.backward()
        grads.append(gradients(model))
        saved.append(sum(kept))
        model.generation_config.pad_token_id = 0
        samples.append(model.generate(torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=9).tolist())
    assert all(torch.equal(a, b) for a, b in zip(*grads))               # dropout would make them differ
    assert saved[1] < saved[0] / 2 and samples[0] == samples[1]


def test_checkpointing_needs_layers(ppo, capsys):
    with pytest.raises(SystemExit):
        ppo.checkpoint_layers(torch.nn.Linear(2, 2))
    assert "Linear has no layers" in capsys.readouterr().err


def test_small_steps_are_not_lost_in_bfloat16(ppo):
    """Weights of 1 and steps of 1e-3: bfloat16 has no number between 1 - 1/256 and 1, so a plain step is lost.
    By hand: AdamW moves by the learning rate, 40 steps of 1e-3 from 1 end at 0.96."""
    plain, ours, exact = (torch.nn.Linear(3, 1, bias=False) for _ in range(3))
    for model in (plain, ours, exact):
        torch.nn.init.ones_(model.weight)
    plain, ours = plain.bfloat16(), ours.bfloat16()
    optimizers = [torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0),
                  ppo.Optimizer((ours, 1e-3)), ppo.Optimizer((exact, 1e-3))]
    for _ in range(40):
        for model, optimizer in zip((plain, ours, exact), optimizers):
            model(torch.ones(1, 3, dtype=model.weight.dtype)).sum().backward()
            if isinstance(optimizer, ppo.Optimizer):
                optimizer.clip_and_step()
            else:
                optimizer.step()
                optimizer.zero_grad()
    assert plain.weight.float().tolist() == [[1.0, 1.0, 1.0]]
    assert exact.weight.tolist()[0] == pytest.approx([0.96] * 3, abs=1e-3)
    assert ours.weight.float().tolist()[0] == pytest.approx([0.96] * 3, abs=1 / 256)
    assert ours.weight.grad is None and optimizers[1].copies[0][1].dtype == torch.float32


def test_gradients_in_bfloat16_add_up_in_float32(ppo):
    """256 + 1 + 1 + ...: in bfloat16 the ones would vanish."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = ppo.Optimizer((model, 0.0))
    for x in [256.0] + [1.0] * 9:
        model(torch.tensor([[x]], dtype=torch.bfloat16)).sum().backward()
    assert optimizer.copies[0][1].grad.item() == 265.0


def test_the_four_stages_in_bfloat16(edit_data, reward_model, ppo, evaluation, tmp_path):
    run = str(tmp_path / "run")
    little = {"run": run, "dtype": "bfloat16", "max_new_tokens": 40}
    savings = {"gradient_checkpointing": True, "micro_batch": 5}
    edit_data.main(edit_data.Args(**little, **savings, task="qa", train_prompts=60, val_prompts=10, test_prompts=10,
                                  sft_steps=60, max_edit_share=1.0, hidden_size=32, layers=2))
    reward_model.main(reward_model.Args(**little, **savings, epochs=1, locate_epochs=1))
    ppo.main(ppo.Args(**little, **savings, updates=2, rollout_batch=16, minibatch=8, rlmec_samples=16))
    evaluation.main(evaluation.Args(**little))
    for folder in ("policy", "reward_token", "reward_sequence", "reward_generative", "ppo_token", "ppo_sequence"):
        assert json.loads((tmp_path / "run" / folder / "config.json").read_text())["dtype"] == "bfloat16"
    policies = json.loads((tmp_path / "run" / "eval.json").read_text())["policies"]
    assert all(math.isfinite(policies[name]["win_rate"]) for name in ("sft", "ppo_token", "ppo_sequence"))


def test_logprobs_and_rewards_are_float32(ppo, tiny_run):
    inputs, mask = ppo.pack([[5, 6]], [[7, 8, 2]], 0, "cpu")
    policy = ppo.open_model(AutoModelForCausalLM, tiny_run / "policy", "bfloat16")
    value = ppo.open_model(AutoModelForTokenClassification, tiny_run / "reward_token", "bfloat16")
    assert policy.dtype == value.dtype == torch.bfloat16
    assert ppo.response_logprobs(policy, inputs, mask).dtype == torch.float32
    assert ppo.token_values(value, inputs, mask).dtype == ppo.token_rewards(value, inputs, mask).dtype == torch.float32
    exact = ppo.response_logprobs(ppo.open_model(AutoModelForCausalLM, tiny_run / "policy"), inputs, mask)
    assert torch.allclose(ppo.response_logprobs(policy, inputs, mask), exact, atol=0.2)

"""Stage 2, A2 to A6 and B2: by hand, against slow versions, under padding, and in parts."""

import copy
from math import exp, log

import pytest, torch
import torch.nn.functional as F

@pytest.fixture(scope="module")
def two(stages):
    return stages[2]

@pytest.fixture(scope="module")
def tokenizer(two, tiny_run):
    return two.AutoTokenizer.from_pretrained(tiny_run / "policy")

def new_model(two, run, kind):
    """Stage 2's new model; its head of zeros is made random, so that it rewards something."""
    tokenizer = two.AutoTokenizer.from_pretrained(run / "policy")
    model = two.open_reward_model(kind, run / "policy", tokenizer, two.Args(device="cpu"))
    if kind != "generative":
        assert not model.score.weight.any()
        torch.nn.init.normal_(model.score.weight, std=0.3)
    return model

# Prompts and responses of many lengths; the last response is cut off and ends in the pad id
ROWS = [([5, 6, 7], [8, 9, 2]), ([5] * 9, [9, 4, 7, 6, 5, 3, 2]), ([8], [11, 12, 0, 0])]

@pytest.mark.parametrize("kind", ["token", "sequence", "generative"])
def test_rewards_are_those_of_a_plain_forward_of_one_row(two, tiny_run, kind):
    model = new_model(two, tiny_run, kind)
    rows = [{"prompt_ids": x, "rewrite_prompt": x, "rejected_ids": y} for x, y in ROWS]
    rewards, _ = two.score(kind, model, rows, "rejected")
    for reward, (x, y) in zip(rewards, ROWS):
        ids = torch.tensor([x + y])
        if kind == "sequence":                                     # A6: at the last token, pad too
            plain = model.score(model.model(ids).last_hidden_state[0, -1])[0]
        elif kind == "token":                                      # A2: at the token's own place
            plain = F.pad(model(ids).logits[0, len(x):, 0], (0, 7 - len(y)))
        else:                                                      # the logits before a token
            p = model(ids).logits[0].softmax(-1)[range(len(x) - 1, len(x + y) - 1), y]
            plain = F.pad(p - 0.5, (0, 7 - len(y)))
        assert torch.allclose(reward, plain, atol=1e-5)

@pytest.mark.parametrize("ops, lengths, kept", [
    ([["replace", 0, 0], ["replace", 4, 4], ["insert", 6, 6]], (6, 7),  # kitten, sitting
     [(1, 1), (2, 2), (3, 3), (5, 5)]),
    ([["delete", 1, 1]], (3, 2), [(0, 0), (2, 1)]), ([["insert", 0, 0]], (1, 2), [(0, 1)]),
    ([["replace", 0, 0]], (1, 1), [])])
def test_kept_tokens(two, ops, lengths, kept):
    assert two.kept_tokens(ops, *lengths) == kept                  # A4

@pytest.mark.parametrize("how, margin", [("mean", 1.5 - 0.25), ("sum", 3.0 - 0.75)])  # A3
def test_fine_grained_loss_by_hand(two, how, margin):
    # edited 1 2 and padding, rejected 0 1.75 -1; U_0: first with first, third with second
    w, l = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.0, 1.75, -1.0]])
    mask_w, mask_l = torch.tensor([[True, True, False]]), torch.tensor([[True] * 3])
    pull, zero = ((1 - 0) ** 2 + (2 + 1) ** 2) / 2, ((1 + 0) / 2 + (4 + 1) / 2) / 2
    for b, z in ((0, 0), (3, 0), (3, 5)):
        loss = two.fine_grained_loss(w, mask_w, l, mask_l, [[(0, 0), (2, 1)]], 1, 2.0, b, z, how)
        assert loss.item() == pytest.approx(log(1 + exp(-2 * margin)) + b * pull + z * zero)

def test_fine_grained_loss_equals_a_slow_one_and_its_parts_add_up(two):
    w, l, kept = torch.randn(3, 5), torch.randn(3, 6), [[(0, 0), (1, 2), (3, 4)], [(5, 1)], []]
    T_w, T_l, slow = [5, 2, 3], [4, 6, 1], []                      # the last U_0 is empty
    mask_w, mask_l = (torch.arange(n) < torch.tensor(T)[:, None] for n, T in ((5, T_w), (6, T_l)))
    for k in range(3):
        r_w, r_l = w[k].tolist(), l[k].tolist()
        slow.append(log(1 + exp(1.5 * (sum(r_l[:T_l[k]]) - sum(r_w[:T_w[k]])))))
        for i, j in kept[k]:
            square = 2 * (r_w[j] - r_l[i]) ** 2 + 0.5 * (r_w[j] ** 2 + r_l[i] ** 2) / 2
            slow[k] += square / len(kept[k])
    for part in (slice(0, 3), slice(0, 2), slice(2, 3)):
        rows = (x[part] for x in (w, mask_w, l, mask_l, kept))
        loss = two.fine_grained_loss(*rows, 3, 1.5, 2, 0.5)
        assert loss.item() == pytest.approx(sum(slow[part]) / 3, rel=1e-5)

def test_a6_and_b2_count_the_pairs_and_the_output_tokens_of_the_batch(two, tiny_run):
    loss = two.sequence_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 5)
    assert loss.item() == pytest.approx((log(1 + exp(-1)) + log(1 + exp(2))) / 5)
    assert two.generative_loss(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), 4).item() == 6 / 4
    model = new_model(two, tiny_run, "generative")
    for x, y in ROWS:
        logits = model(torch.tensor([x + y])).logits[0, len(x) - 1:-1]
        slow = F.cross_entropy(logits, torch.tensor(y), reduction="sum").item() / 14
        part = two.loss_of("generative", model, [(x, y)], 14, two.Args())
        assert part.item() == pytest.approx(slow, rel=1e-5)

@pytest.mark.parametrize("kind", ["token", "sequence", "generative"])
def test_micro_batches_give_the_batches_gradient(two, tiny_run, tokenizer, kind, monkeypatch):
    model, grads, calls, loss_of = new_model(two, tiny_run, kind), [], [], two.loss_of
    monkeypatch.setattr(two, "loss_of", lambda *call: calls.append(call) or loss_of(*call))
    rows = two.read_rows(tiny_run, kind, model, tokenizer, two.Args())[0][:7]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: grads.append(
        torch.cat([p.grad.flatten() for p in parameters])))
    for micro_batch in (256, 3):
        args = two.Args(epochs=1, sequence_epochs=1, locate_epochs=1, micro_batch=micro_batch)
        two.train(kind, copy.deepcopy(model), rows, tokenizer, args)
    for _, _, batch, N, _ in calls[:len(grads) // 2]:              # whole batches
        assert N == (sum(len(y) for _, y in batch) if kind == "generative" else len(batch))
    parts = grads[len(grads) // 2]                                 # the first step of each run
    assert (grads[0] - parts).norm() < 1e-5 * grads[0].norm()

def test_prompts_of_the_grm_carry_the_ids_as_they_are(two, tokenizer, tiny_run):
    words = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    end, dot = tokenizer.eos_token_id, words("They send jam.")[-1]
    problem = {"prompt_ids": [5, 6], "solution_ids": [8, 9, dot, 7, end]}
    attempt, (first, second, third) = [7, 7, dot, 9, dot, 4], map(words, ("[1]", "[2]", "[3]"))
    before, behind = [5, 6] + words("\nReference solution:\n"), words("\nAttempt:\n")
    rewrite = before + [8, 9, dot, 7] + behind + attempt + words("\nCorrected attempt:\n")
    locate = before + first + [8, 9, dot] + second + [7] + behind + first + [7, 7, dot] + second + [
        9, dot] + third + [4] + words("\nFirst wrong step:\n")
    for response in (attempt, attempt + [end]):                    # cut off, and ended
        assert two.grm_prompt("rewrite", problem, response, tokenizer) == rewrite
        assert two.grm_prompt("locate", problem, response, tokenizer) == locate

def test_examples_of_a_wrong_and_a_right_response(two, tokenizer):
    names = ("rewrite_prompt", "locate_prompt", "edited_ids", "first_wrong_step")
    rows = [dict(zip(names, row)) for row in (([5], [6], [7, 2], 2), ([8], [9], [3, 2], None))]
    assert two.examples_of(rows, tokenizer) == (
        [([5], [7, 2]), ([8], [3, 2])], [([6], tokenizer("[2]").input_ids + [2])])

def test_words_of_b2_are_told_apart(two, tiny_run, tokenizer):
    model, policy = (new_model(two, tiny_run, "generative").lm_head.weight,
                     two.AutoModelForCausalLM.from_pretrained(tiny_run / "policy").lm_head.weight)
    one, other = (tokenizer(f"[{k}]").input_ids[0] for k in (1, 2))
    assert F.cosine_similarity(model[one], model[other], dim=0).abs() < 0.7
    assert model[:9].equal(policy[:9]) and not model[one].equal(policy[one])

def test_exact_is_what_greedy_decoding_writes(two, tiny_run):
    model = new_model(two, tiny_run, "generative")
    prompts, examples = [[5, 6], [7] * 9, [8, 9, 4]], []
    for x in prompts:
        ids = torch.tensor([x])
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=2)], dim=1)
        examples.append((x, ids[0, len(x):].tolist()))
    assert two.exact(model, examples, two.Args()) == 1.0
    examples[1][1][2] += 1
    assert two.exact(model, examples, two.Args(micro_batch=2)) == pytest.approx(2 / 3)

def test_pairs_limit_the_models_of_a_and_not_the_grm(two, tokenizer, tiny_run):
    model = new_model(two, tiny_run, "generative")
    for kind in two.KINDS:
        (training, held_out), (fewer, same) = (two.read_rows(
            tiny_run, kind, model, tokenizer, two.Args(pairs=pairs)) for pairs in (None, 10))
        assert len(training) > 20 and same == held_out
        assert fewer == training if kind == "generative" else fewer == training[:10]
        assert (kind == "generative") == any(row["chosen"] is None for row in training)

def test_auroc_and_in_order(two):
    assert two.auroc([3.0, 1.0], [2.0, 0.0]) == 0.75 and two.auroc([], [1.0]) is None
    positive, negative = torch.randint(9, (40,)).tolist(), torch.randint(7, (60,)).tolist()
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert two.auroc(positive, negative) == pytest.approx(sum(pairs) / 2400)
    better, worse = [[1.0, 1.0], [2.0]], [[1.5], [1.0, 1.0]]
    assert two.in_order("token", better, worse, "sum") == 0.75     # the second is a tie
    assert two.in_order("token", better, worse, "mean") == 0.5
    assert two.in_order("sequence", [1.0, 2.0, 0.0], [0.0, 1.0, 0.0], "sum") == pytest.approx(5 / 6)
    assert two.in_order("generative", [[-0.2, -0.2]], [[-0.45, 0.4]], "sum") == 1.0  # log p

def test_localisation_by_hand(two):
    rows = [{"first_error": 1, "edit_ops": [["replace", 1, 1], ["delete", 3, 3]]},
            {"first_error": None, "edit_ops": [["insert", 1, 1]]},  # no token is the error
            {"first_error": 2, "edit_ops": [["replace", 2, 2]]}]
    rejected = [[-2.0, -1.0, -0.1, -0.3], [0.0, -9.0], [0.0, 0.5, -0.2]]
    edited = [[-2.0, 0.0, -0.1], [0.0, 1.0, -9.0], [0.0, 0.5, -0.3]]
    found = two.localisation("token", rows, rejected, edited)
    assert (found["auroc"], found["first_edit"]) == pytest.approx((4 / 6, 2 / 3))
    assert found["called_wrong"] == {"right": 0.2, "replace": 0.5, "first": 0.5, "delete": 1.0,
                                     "insert": 1.0}
    found = two.localisation("generative", rows, rejected, edited)["called_wrong"]
    assert found["right"] == 0.4 and found["replace"] == 1.0       # p_t < 0.5

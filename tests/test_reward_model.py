"""Stage 2, A2, A3, A5, A6 and B2: by hand, against slow versions, under padding, and in parts."""

import copy
from math import exp, log
import pytest, torch
import torch.nn.functional as F
from conftest import rows_of, two

@pytest.fixture
def new_model(tiny_run, tokenizer):
    """Stage 2's new model; its head of zeros is made random, so that it rewards something."""
    def call(kind):
        model = two.open_reward_model(kind, tiny_run / "policy", tokenizer)
        if kind != "generative":
            assert not model.score.weight.any()
            torch.nn.init.normal_(model.score.weight, std=0.3)
        return model
    return call

@pytest.mark.parametrize("how, size", [("mean", len), ("sum", lambda tokens: 1)])  # A3
def test_fine_grained_loss_equals_a_slow_one_and_its_parts_add_up(how, size):
    w, l, kept = torch.randn(3, 5), torch.randn(3, 6), [[(0, 0), (1, 2), (3, 4)], [(5, 1)], []]
    T_w, T_l, slow = [5, 2, 3], [4, 6, 1], []                      # the last U_0 is empty
    mask_w, mask_l = (torch.arange(n) < torch.tensor(T)[:, None] for n, T in ((5, T_w), (6, T_l)))
    for k in range(3):
        r_w, r_l = w[k, :T_w[k]].tolist(), l[k, :T_l[k]].tolist()
        slow.append(log(1 + exp(1.5 * (sum(r_l) / size(r_l) - sum(r_w) / size(r_w)))))
        for i, j in kept[k]:
            square = 2 * (r_w[j] - r_l[i]) ** 2 + 0.5 * (r_w[j] ** 2 + r_l[i] ** 2) / 2
            slow[k] += square / len(kept[k])
    for part in (slice(0, 3), slice(0, 2), slice(2, 3)):
        rows = (x[part] for x in (w, mask_w, l, mask_l, kept))
        loss = two.fine_grained_loss(*rows, 3, 1.5, 2, 0.5, how)
        assert loss.item() == pytest.approx(sum(slow[part]) / 3, rel=1e-5)

def test_a5_a6_and_b2_of_rows_count_all_of_the_batch(new_model, monkeypatch):
    reward = {"chosen_token_ids": [1.0, 0.0], "rejected_ids": [0.0, 2.0], "edited_ids": [3.0, 3.0]}
    monkeypatch.setattr(two, "score", lambda *call: (torch.tensor([reward[call[3]]]).T, 1))
    rows = [{"edit_ops": [["replace", 0, 0]], "rejected_ids": [4], "edited_ids": [5]}] * 2
    for kind, margins in (("token", [2 * 3, 2 * 1]), ("sequence", [1, -2])):     # alpha is 2
        loss = two.loss_of(kind, None, rows, 5, two.Args())
        assert loss.item() == pytest.approx(sum(log(1 + exp(-x)) for x in margins) / 5)
    model = new_model("generative")
    for x, y in (([5, 6, 7], [8, 9, 2]), ([5] * 9, [9, 4, 7, 6, 5, 3, 2]), ([8], [11, 12, 0, 0])):
        logits = model(torch.tensor([x + y])).logits[0, len(x) - 1:-1]
        slow = F.cross_entropy(logits, torch.tensor(y), reduction="sum").item() / 14
        loss = two.loss_of("generative", model, [(x, y)], 14, two.Args())
        assert loss.item() == pytest.approx(slow, rel=1e-5)

@pytest.mark.parametrize("kind", ["token", "sequence", "generative"])
def test_micro_batches_give_the_gradient(new_model, tiny_run, tokenizer, kind, monkeypatch, grads):
    model, calls, made, loss_of, AdamW = new_model(kind), [], [], two.loss_of, torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *call: made.append(call) or AdamW(*call))
    edits = rows_of(tiny_run / "edits.jsonl")                      # the first: right, not located
    edits[0].update(edited_ids=edits[0]["rejected_ids"], edit_ops=[], first_wrong_step=None)
    monkeypatch.setattr(two, "loss_of", lambda *call: calls.append(call[2:4]) or loss_of(*call))
    for n in (256, 3):
        args = two.Args(str(tiny_run), epochs=1, locate_epochs=1, micro_batch=n, weight_decay=0.5)
        rows, _ = two.rows_for(kind, edits, model, tokenizer, args)
        two.train(kind, copy.deepcopy(model), rows[:7], args)
    steps = len(grads) // 2                                        # of each of the two runs
    for batch, N in calls[:steps]:
        assert N == (sum(len(y) for _, y in batch) if kind == "generative" else len(batch))
    assert sum(len(batch) for batch, _ in calls[:steps]) == (13 if kind == "generative" else 7)
    assert (grads[0] - grads[steps]).norm() < 1e-5 * grads[0].norm() and made[0][4] == 0.5

def test_prompts_and_examples_of_the_grm_carry_the_ids_as_they_are(tokenizer, tiny_run, new_model):
    words = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    end, dot = tokenizer.eos_token_id, words("They send jam.")[-1]
    problem = {"prompt_ids": [5, 6], "solution_ids": [8, 9, dot, 7, end]}
    attempt, (first, second, third) = [7, 7, dot, 9, dot, 4], map(words, ("[1]", "[2]", "[3]"))
    before, behind = [5, 6] + words("\nReference solution:\n"), words("\nAttempt:\n")
    rewrite = before + [8, 9, dot, 7] + behind + attempt + words("\nCorrected attempt:\n")
    locate = before + first + [8, 9, dot] + second + [7] + behind + first + [7, 7, dot] + second + [
        9, dot] + third + [4] + words("\nFirst wrong step:\n")
    for response in (attempt, attempt + [end]):                    # cut off, and ended
        row = {"rejected_ids": response, "edited_ids": [7, 2], "first_wrong_step": 2}
        assert two.examples_of(row, problem, tokenizer) == {
            "rewrite": (rewrite, [7, 2]), "locate": (locate, second + [end])}
    weight = new_model("generative").lm_head.weight                # the labels are told apart
    assert F.cosine_similarity(*weight[first + second], dim=0).abs() < 0.7
    policy = two.hf.AutoModelForCausalLM.from_pretrained(tiny_run / "policy").lm_head.weight
    assert weight[:9].equal(policy[:9]) and not weight[first].equal(policy[first])

def test_exact_is_what_greedy_decoding_writes(new_model):
    model = new_model("generative")
    write = lambda x: model.generate(torch.tensor([x]), do_sample=False, min_new_tokens=4,
                                     max_new_tokens=4)[0, len(x):].tolist()
    rows = [{"locate": (x, write(x))} for x in ([5, 6], [7] * 9, [8, 9, 4])]
    assert two.exact("locate", model, rows, two.Args()) == 1.0
    rows[1]["locate"][1][2] += 1
    assert two.exact("locate", model, rows, two.Args(micro_batch=2)) == pytest.approx(2 / 3)

def test_pairs_limit_the_models_of_a_and_not_the_grm(new_model, tokenizer, tiny_run):
    model, rows = new_model("generative"), rows_of(tiny_run / "edits.jsonl")
    rows.append({**rows[0], "chosen": "", "edit_ops": None})       # no edit: no pair, for A6 too
    for kind in two.KINDS:
        (training, held_out), (fewer, same) = (two.rows_for(
            kind, rows, model, tokenizer, two.Args(str(tiny_run), pairs=n)) for n in (None, 10))
        assert len(training) > 20 and same == held_out
        assert fewer == training if kind == "generative" else fewer == training[:10]
        assert (kind == "generative") == any(row["chosen"] is None for row in training)
        assert kind == "generative" or rows[-1] not in training + held_out

def test_examples_keep_the_rewards_of_an_earlier_run(run, tokenizer):
    before = rows_of(path := run / "reward_examples.jsonl")
    pairs = two.rows_for("token", rows_of(run / "edits.jsonl"), None, None, two.Args())[1]
    two.save_examples(path, pairs, tokenizer)
    assert before == rows_of(path) and all(before[0][kind] is not None for kind in two.KINDS)

def test_auroc_order_and_localisation():
    assert two.auroc([3.0, 1.0], [2.0, 0.0]) == 0.75 and two.auroc([], [1.0]) is None
    positive, negative = torch.randint(9, (40,)).tolist(), torch.randint(7, (60,)).tolist()
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert two.auroc(positive, negative) == pytest.approx(sum(pairs) / 2400)
    better, worse = [[1.0, 1.0], [2.0]], [[1.5], [1.0, 1.0]]
    assert two.in_order("token", better, worse, "sum") == 0.75     # the second is a tie
    assert two.in_order("token", better, worse, "mean") == 0.5
    assert two.in_order("sequence", [1.0, 2.0, 0.0], [0.0, 1.0, 0.0], "sum") == pytest.approx(5 / 6)
    assert two.in_order("generative", [[-0.2, -0.2]], [[-0.45, 0.4]], "sum") == 1.0  # log p
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

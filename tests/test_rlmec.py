"""B1-B8: the generative reward model, the token-level objective, the imitation term, and the faults of earlier code."""

import csv
import json
import math
import random
import shutil
from collections import Counter

import pytest
import torch


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- B1 ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [
    ("She has 3 + 4 = 7 eggs.\nThe answer is 7", 7), ("#### 1,450,000", 1450000), ("The answer is $18.50", 18.5),
    ("the answer is: -3", -3), ("The answer is 4. No, the answer is 5", 5), ("3+2=5;-1=4", 4), ("2 * .5 = 1.0", 1),
    ("It is 12%", 12), ("no number at all", None), ("", None), ("½ of the “cake”\n\nThe answer is 0.5\n", 0.5),
])
def test_final_answer(edit_data, text, number):
    assert edit_data.final_answer(text) == number


def test_right_by_oracle_by_number_and_by_words(edit_data):
    oracle = {"solutions": ["1+1=2;+1=3"], "answer": "3"}
    assert edit_data.right("1+1=2;+1=3", oracle) and not edit_data.right("1+1=3;+1=3", oracle)    # a step is wrong
    assert edit_data.right("I say 70,000", {"answer": "70000"}) and not edit_data.right("", {"answer": "70000"})
    assert edit_data.right("Think.\nIn Rome.", {"answer": "In Rome."})
    assert not edit_data.right("In Rome.\nOr Bern.", {"answer": "In Rome."})


@pytest.mark.parametrize("answer, response, is_right", [
    ("1/2", "So the answer is 1/2.", True), ("1/2", "The answer is 2.", False), ("1/2", "#### 1/2", True),
    ("12:30", "The answer is 12:30.\nThat is late.", True), ("12:30", "It is 30.", False),
    (r"\frac{1}{2}", r"The answer is \frac{3}{2}", False), ("Rome", "The answer is: Rome.", True),
    ("Rome", "The answer is Bern.", False), ("3 * 6\n#### 18", "The answer is 18", True),
    ("3 * 6\n#### 18", "The answer is 6", False), ("$5", "It costs 5", True), ("", "The answer is 5", False)])
def test_an_answer_that_is_not_one_number_counts_word_for_word(edit_data, answer, response, is_right):
    assert edit_data.right(response, {"answer": answer}) == is_right


def test_the_answer_parser_agrees_with_real_labels(edit_data, shared):
    rows = rows_of(shared / "data" / "gsm8k_model_solutions.jsonl")
    assert len(rows) == 5276
    assert all(edit_data.right(row["response"], row) == row["is_correct"] for row in rows)
    assert all(edit_data.right(row["solution"], row) for row in rows)


def test_nearest_editor_takes_the_nearest_right_solution_at_hand(edit_data):
    _, tokenizer = edit_data.small_policy(["0123456789+-=;"], edit_data.Args(hidden_size=8, layers=1))
    encode = lambda text: edit_data.encode_response(tokenizer, text)
    problem = {"prompt": "8+1=", "solution": "8+1=9", "answer": "9",
               "samples": [encode(text) for text in ("8+1=7", "9=9", "1+8=9", "1+8=6")]}
    drop = Counter()
    pairs = edit_data.pairs_of(problem, "nearest", tokenizer, drop)
    assert [(p["rejected"], p["edited"], p["chosen"]) for p in pairs] == [
        ("8+1=7", "8+1=9", "9=9"), ("1+8=6", "1+8=9", "1+8=9")]      # the reference; another sample
    assert not drop
    problem["samples"] = [encode("8+1=7")]
    assert [p["chosen"] for p in edit_data.pairs_of(problem, "nearest", tokenizer, drop)] == ["8+1=9"]
    problem["samples"] = [encode("8+1=9")]
    assert edit_data.pairs_of(problem, "nearest", tokenizer, drop) == [] and sum(drop.values()) == 1
    unfinished = {**problem, "samples": [encode("0+8+1=7"), encode("0+8+1=9")[:-1]]}     # nearer, but endless
    assert edit_data.pairs_of(unfinished, "nearest", tokenizer, drop)[0]["edited"] == "8+1=9"


def test_step_starts_cut_the_ids_as_they_are(edit_data):
    texts = ["0123456789+-=;"]
    _, tokenizer = edit_data.small_policy(texts, edit_data.Args(hidden_size=8, layers=1))
    ids = edit_data.encode_response(tokenizer, "3+2=5;-1=4;+4=8")
    assert edit_data.step_starts(ids, tokenizer) == [0, 6, 11]
    assert edit_data.step_starts([tokenizer.eos_token_id], tokenizer) == []
    _, words = edit_data.small_policy([" One makes x. The other."], edit_data.Args(hidden_size=8, layers=1))
    ids = edit_data.encode_response(words, " One makes x. The other.")
    assert edit_data.step_starts(ids, words) == [0, 4]


def test_step_starts_of_a_real_tokenizer(edit_data, shared):
    tokenizer = edit_data.open_tokenizer(shared / "models" / "stories260K")
    for row in rows_of(shared / "data" / "gsm8k_model_solutions.jsonl")[:200:7]:
        ids = edit_data.encode_response(tokenizer, row["response"])
        starts = edit_data.step_starts(ids, tokenizer)
        steps = edit_data.split_steps(row["response"])
        assert len(starts) == len(steps) and starts == sorted(set(starts))
        for start, step in zip(starts, steps):
            text = tokenizer.decode(ids[start:], skip_special_tokens=True).lstrip()
            assert text.startswith(step[1:]) or text.startswith(step) or step in text[:len(step) + 4]


# --- B2 ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain_tokenizer(edit_data):
    """A tokenizer that knows the words of the plain instructions, as a pretrained one does."""
    texts = ["\nReference solution:\nAttempt:\nThe attempt, corrected with as few changes as possible:\n",
             "\nThe first wrong step of the attempt:\n[0123456789] ", "correct incorrect step"]
    return edit_data.small_policy(texts, edit_data.Args(hidden_size=8, layers=1))[1]


def test_prompts_of_both_forms(reward_model, edit_data, plain_tokenizer):
    parts, end = reward_model.instructions(plain_tokenizer), plain_tokenizer.eos_token_id
    encode = lambda text: plain_tokenizer(text, add_special_tokens=False).input_ids
    prompt = reward_model.rewrite_prompt(parts, encode("1"), encode("2"), encode("3") + [end], end)
    assert plain_tokenizer.decode(prompt) == ("1\nReference solution:\n2\nAttempt:\n3\nThe attempt, corrected with "
                                              "as few changes as possible:\n")
    prompt = reward_model.locate_prompt(parts, encode("1"), encode("2"), encode("3\n4") + [end], end, plain_tokenizer)
    assert plain_tokenizer.decode(prompt) == ("1\nReference solution:\n[1] 2\nAttempt:\n[1] 3\n[2] 4\nThe first "
                                              "wrong step of the attempt:\n")
    _, tiny = edit_data.small_policy(["0123456789+-=;"], edit_data.Args(hidden_size=8, layers=1))
    parts = reward_model.instructions(tiny)
    ids = [tiny(text, add_special_tokens=False).input_ids for text in ("1+1=", "1+1=2", "1+1=3")]
    assert tiny.decode(reward_model.rewrite_prompt(parts, *ids, 2)) == "1+1=1+1=2</s>1+1=3</s>"
    assert tiny.decode(reward_model.locate_prompt(parts, *ids, 2, tiny)) == "1+1=11+1=2</s>11+1=3</s>"


def test_a_located_step_is_exactly_one_that_exists(reward_model, plain_tokenizer):
    """`[12]` is step 12 and not step 1; neither `correct` nor `incorrect` names a step."""
    parts, end = reward_model.instructions(plain_tokenizer), plain_tokenizer.eos_token_id
    encode = lambda text: plain_tokenizer(text, add_special_tokens=False).input_ids
    twelve = reward_model.locate_answer(parts, 12, end)
    assert plain_tokenizer.decode(twelve).endswith("[11] [12] </s>")
    assert reward_model.located_step(parts, twelve, 12, end) == 12
    assert reward_model.located_step(parts, twelve, 11, end) is None              # no such step
    for text in ("correct", "incorrect", "[12] ", "[0] ", "", "[1] [3] ", "step 1"):
        assert reward_model.located_step(parts, encode(text) + [end], 20, end) is None
    assert reward_model.located_step(parts, encode("[1] "), 20, end) is None     # it never ended


def test_generative_loss_is_on_output_tokens_only(reward_model, edit_data):
    model, tokenizer = edit_data.small_policy(["0123456789+-=;"], edit_data.Args(hidden_size=16, layers=2))
    prompts, outputs = [[4, 5, 6, 7], [8, 9]], [[10, 11, 2], [12, 2]]

    def loss_of(*tasks):
        examples = list(zip(prompts, outputs, tasks))
        return reward_model.generative_loss(model, examples, examples, 0)

    loss = loss_of("rewrite", "rewrite")
    total = 0.0
    for prompt, output in zip(prompts, outputs):                                 # one by one, without padding
        logprobs = model(torch.tensor([prompt + output])).logits[0].log_softmax(-1)
        total -= sum(logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(output))
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    alone = [reward_model.generative_loss(model, [(p, o, "x")], [(p, o, "x")], 0) for p, o in zip(prompts, outputs)]
    assert loss_of("rewrite", "locate").item() == pytest.approx(sum(alone).item(), rel=1e-5)


def test_no_tail_rows_are_lost(reward_model):
    batches = reward_model.shuffled(list(range(10)), 3, 4, random.Random(0))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    assert all(sorted(sum(batches[k:k + 3], [])) == list(range(10)) for k in (0, 3, 6))


def test_rows_of_the_generative_model(reward_model, tiny_run):
    tokenizer = reward_model.open_tokenizer(tiny_run / "policy")
    rows = [row for row in rows_of(tiny_run / "edits.jsonl") if row.get("edit_ops")]
    fitting = reward_model.generative_rows(rows, tokenizer, 256, reward_model.Args(max_new_tokens=40))
    assert fitting == rows
    examples = sum(reward_model.generative_batches(rows, tokenizer, reward_model.Args(locate_epochs=1)), [])
    tasks = Counter(task for prompt, output, task in examples)
    n_right = sum(row["chosen_right"] for row in rows)
    assert tasks == {"rewrite": len(rows) + n_right, "locate": sum(bool(r["first_wrong_step"]) for r in rows)}
    for row in rows:
        assert reward_model.right(row["edited"], row) and not reward_model.right(row["rejected"], row)
        starts = reward_model.step_starts(row["rejected_ids"], tokenizer)
        if row["first_wrong_step"]:                                   # the first operation stands in that step
            step = row["first_wrong_step"]
            assert 1 <= step <= len(starts)
            first = row["edit_ops"][0][1]
            assert step == 1 or starts[step - 1] <= first
            assert step == len(starts) or first < starts[step]


def test_prompts_are_the_same_ids_in_training_scoring_and_generation(reward_model, ppo, tiny_run):
    """Stage 2 trains on exactly the ids that stage 3 scores and generates from, not a newline more."""
    tokenizer = ppo.open_tokenizer(tiny_run / "policy")
    rows = [row for row in rows_of(tiny_run / "edits.jsonl") if row.get("edit_ops")]
    reward_model.generative_rows(rows, tokenizer, 256, reward_model.Args(max_new_tokens=40))
    problems = {problem["prompt"]: problem for problem in rows_of(tiny_run / "problems.jsonl")}
    ppo.encode_problems("problems", list(problems.values()), tokenizer, 256, 40)
    ppo.add_solutions("problems", list(problems.values()), tokenizer)
    parts, end = ppo.instructions(tokenizer), tokenizer.eos_token_id
    for row in rows:
        problem = problems[row["prompt"]]
        given = (parts, problem["prompt_ids"], problem["solution_ids"], row["rejected_ids"], end)
        assert row["rewrite_prompt"] == ppo.rewrite_prompt(*given)
        assert row["locate_prompt"] == ppo.locate_prompt(*given, tokenizer)


def test_several_samples_a_problem(edit_data, tiny_run, tmp_path):
    args = json.loads((tiny_run / "01_args.json").read_text())
    shutil.copytree(tiny_run / "policy", tmp_path / "run" / "policy")
    edit_data.main(edit_data.Args(**{**args, "run": str(tmp_path / "run"), "samples": 4}))
    counts = Counter(row["id"] for row in rows_of(tmp_path / "run" / "edits.jsonl"))
    assert max(counts.values()) == 3                                  # three worse ones beside the best
    assert len(counts) > len({row["id"] for row in rows_of(tiny_run / "edits.jsonl")})


def test_problems_without_responses_are_sampled(edit_data, tiny_run, tmp_path):
    rows = [row for row in rows_of(tiny_run / "problems.jsonl")][:20]
    data = [{"prompt": row["prompt"], "solution": row["solution"], "answer": row["answer"]} for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    edit_data.main(edit_data.Args(run=str(tmp_path / "run"), data=str(tmp_path / "data.jsonl"), samples=3,
                                  model=str(tiny_run / "policy"), max_edit_share=1.0, max_new_tokens=40))
    edits = rows_of(tmp_path / "run" / "edits.jsonl")
    assert {row["editor"] for row in edits} == {"nearest"} and max(Counter(r["id"] for r in edits).values()) == 3
    assert all(edit_data.right(row["edited"], row) and not edit_data.right(row["rejected"], row) for row in edits)


def test_rows_that_are_too_long_are_counted(reward_model, tiny_run, capsys):
    tokenizer = reward_model.open_tokenizer(tiny_run / "policy")
    rows = [row for row in rows_of(tiny_run / "edits.jsonl") if row.get("edit_ops")]
    assert reward_model.generative_rows(rows, tokenizer, 30, reward_model.Args()) == []
    assert f"dropped {len(rows)} of {len(rows)} rows" in capsys.readouterr().out


# --- B3 ---------------------------------------------------------------------------------------------------------------

def test_generative_rewards(ppo):
    p = torch.tensor([[0.9, 0.6, 0.3, 0.45, 0.7]] * 2)
    mask = torch.tensor([[True] * 4 + [False]] * 2)
    r = ppo.generative_rewards(p, torch.tensor([True, False]), mask)
    assert torch.allclose(r, torch.tensor([[0.4, 0.1, 0, 0, 0], [0, 0, -0.1, -0.05, 0]]))


# --- B5 ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reward, ratio, weight", [
    (0.4, 1.0, 0.4), (-0.1, 1.0, -0.1),
    (0.4, 2.0, 1.3 * 0.4),        # clipped, but the gradient stays: PPO's would be 0
    (0.4, 0.5, 0.5 * 0.4),        # min takes the smaller product
    (-0.1, 2.0, 2.0 * -0.1),
    (-0.1, 0.5, 0.7 * -0.1),      # clipped from below, and the gradient stays
])
def test_gradient_of_the_token_objective(ppo, reward, ratio, weight):
    old = torch.tensor([[-1.0, -2.0, 0.0]])
    logprobs = (old + torch.tensor([[math.log(ratio), 0.3, 0.0]])).requires_grad_()
    rewards = torch.tensor([[reward, 0.0, 0.0]])                     # a token without reward, and padding
    loss = ppo.rlmec_loss(logprobs, old, rewards, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-weight * (math.log(ratio) - 1), rel=1e-5)
    assert torch.allclose(logprobs.grad, torch.tensor([[-weight, 0.0, 0.0]]), atol=1e-6)


def test_the_token_objective_counts_rewarded_tokens_only(ppo):
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    rewards = torch.tensor([[0.5, 0.0], [-0.1, 0.0]])
    loss = ppo.rlmec_loss(logprobs, logprobs.detach(), rewards, 0.3)
    assert loss.item() == pytest.approx((0.5 * 1.0 - 0.1 * 3.0) / 2)


def test_all_rewards_zero_gives_zero_and_not_nan(ppo):
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = ppo.rlmec_loss(logprobs, logprobs.detach(), torch.zeros(1, 2), 0.3)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logprobs.grad, torch.zeros(1, 2))


def test_no_clip(ppo):
    old = torch.zeros(1, 1)
    loss = ppo.rlmec_loss(torch.tensor([[math.log(5.0)]]), old, torch.tensor([[0.5]]), float("inf"))
    assert loss.item() == pytest.approx(-5 * 0.5 * math.log(5))


# --- B6 ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("response, rewrite, gamma", [
    ("kitten", "sitting", [1, .5, .5, .5, 1, .5, 1]), ("aXbc", "abc", [.5, .5, .5]), ("abc", "XYabc", [1, 1, .5, .5, .5]),
    ("abc", "abc", [.5, .5, .5]), ("", "ab", [1, 1]),
])
def test_imitation_weights(ppo, response, rewrite, gamma):
    assert ppo.imitation_weights(list(response), list(rewrite)) == gamma
    assert ppo.imitation_weights(list(response), list(rewrite), uniform=True) == [1.0] * len(rewrite)


def test_imitation_loss(ppo):
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    gamma = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.0, 0.0]])
    assert ppo.imitation_loss(logprobs, gamma, mask).item() == pytest.approx((1 + 1 + 1.5) / 3)


# --- B4, B7, B8 -------------------------------------------------------------------------------------------------------

@pytest.fixture
def rlmec_parts(ppo, tiny_run):
    """Policy, tokenizer and five problems of the tiny run, ready for RLMEC."""
    policy = ppo.open_model(ppo.AutoModelForCausalLM, tiny_run / "policy")
    tokenizer = ppo.open_tokenizer(tiny_run / "policy")
    problems = rows_of(tiny_run / "problems.jsonl")[:5]
    ppo.encode_problems("problems", problems, tokenizer, 256, 40)
    ppo.add_solutions("problems", problems, tokenizer)
    return policy, tokenizer, problems


def scripted(monkeypatch, ppo, *answers):
    """Let ppo.sample give these lists of responses, call after call; returns the prompts it was given."""
    queue, seen = list(answers), []

    def sample(model, prompts, tokenizer, max_new_tokens, temperature=1.0):
        seen.append(prompts)
        return queue.pop(0)

    monkeypatch.setattr(ppo, "sample", sample)
    return seen


def test_rewrite_keeps_the_steps_before_the_error(ppo, rlmec_parts, monkeypatch):
    _, tokenizer, problems = rlmec_parts
    problem, end = problems[0], tokenizer.eos_token_id
    right_ids = problem["solution_ids"] + [end]
    starts = ppo.step_starts(right_ids, tokenizer)
    wrong_ids = right_ids[:starts[2]] + [right_ids[0]] + right_ids[starts[2] + 1:]
    parts = ppo.instructions(tokenizer)
    drop = Counter()
    seen = scripted(monkeypatch, ppo, [ppo.locate_answer(parts, 3, end)], [right_ids[starts[2]:]])
    args = ppo.Args(max_new_tokens=40)
    grm = rlmec_parts[0]
    assert ppo.rewrite(grm, [problem], [wrong_ids], tokenizer, args, drop) == [right_ids] and not drop
    prompt = ppo.rewrite_prompt(parts, problem["prompt_ids"], problem["solution_ids"], wrong_ids, end)
    assert seen[1] == [prompt + right_ids[:starts[2]]]                # ids carried, never re-tokenised


@pytest.mark.parametrize("answer, rewrites, reason", [
    ("the end token alone: no step, all correct", None, "the locator names no step that is there"),
    ("a step that does not exist", None, "the locator names no step that is there"),
    ("step 1", "wrong", "the rewrite is wrong"), ("step 1", "endless", "the rewrite does not end"),
])
def test_a_wrong_sample_is_never_praised_nor_imitated(ppo, rlmec_parts, monkeypatch, answer, rewrites, reason):
    """Whatever the locator says: right is what the answer says, and a failed rewrite is dropped and counted."""
    policy, tokenizer, problems = rlmec_parts
    end, parts = tokenizer.eos_token_id, ppo.instructions(tokenizer)
    wrong_ids = problems[0]["solution_ids"][:-3] + [end]
    located = {"step 1": ppo.locate_answer(parts, 1, end), "a step that does not exist": ppo.locate_answer(parts, 9, end)}
    responses = [wrong_ids, problems[1]["solution_ids"] + [end]]
    endings = {"wrong": [wrong_ids], "endless": [problems[0]["solution_ids"]], None: []}[rewrites]
    scripted(monkeypatch, ppo, responses, [located.get(answer, [end])], endings)
    samples = ppo.collect(policy, policy, problems[:2], tokenizer, ppo.Args(max_new_tokens=40, device="cpu"))
    assert [row["right"] for row in samples] == [True]               # the wrong one is gone
    assert samples[0]["response_ids"] is responses[1] and samples[0]["rewrite_ids"] is responses[1]
    assert set(samples[0]["gamma"].tolist()) == {0.5} and (samples[0]["rewards"] >= 0).all()


def test_dropped_samples_are_counted(ppo, rlmec_parts, monkeypatch, capsys):
    policy, tokenizer, problems = rlmec_parts
    end = tokenizer.eos_token_id
    responses = [problems[0]["solution_ids"][:-3] + [end], problems[1]["solution_ids"] + [end]]
    scripted(monkeypatch, ppo, responses, [[end]])
    ppo.collect(policy, policy, problems[:2], tokenizer, ppo.Args(max_new_tokens=40, device="cpu"))
    assert "2 sampled: 1 right, 0 wrong and rewritten; dropped: 1 because the locator" in capsys.readouterr().out
    scripted(monkeypatch, ppo, responses)
    ppo.collect(policy, policy, problems[:2], tokenizer, ppo.Args(max_new_tokens=200, device="cpu"))
    assert "dropped: 1 because the rewrite may be longer than the GRM's context" in capsys.readouterr().out
    parts = ppo.instructions(tokenizer)
    longest = [len(ppo.rewrite_prompt(parts, problem["prompt_ids"], problem["solution_ids"], response, end))
               + len(response) for problem, response in zip(problems, responses)]
    monkeypatch.setattr(ppo, "context_of", lambda model: min(longest))        # the other one cannot be scored
    scripted(monkeypatch, ppo, responses)
    samples = ppo.collect(policy, policy, problems[:2], tokenizer, ppo.Args(max_new_tokens=200, device="cpu"))
    assert len(samples) <= 1 and "context is too short to score it" in capsys.readouterr().out


def test_rewards_are_teacher_forced_on_the_sample_itself(ppo, rlmec_parts, monkeypatch):
    """B3's p_t by hand: after the rewrite prompt, one sample at a time, without padding."""
    monkeypatch.setattr(ppo, "generative_rewards", lambda probabilities, is_right, mask: probabilities * mask)
    policy, tokenizer, problems = rlmec_parts
    end = tokenizer.eos_token_id
    responses = [problem["solution_ids"] + [end] for problem in problems]
    scripted(monkeypatch, ppo, responses)
    samples = ppo.collect(policy, policy, problems, tokenizer, ppo.Args(max_new_tokens=40, device="cpu"))
    parts = ppo.instructions(tokenizer)
    for problem, row in zip(problems, samples):
        prompt = ppo.rewrite_prompt(parts, problem["prompt_ids"], problem["solution_ids"], row["response_ids"], end)
        with torch.no_grad():
            probabilities = policy(torch.tensor([prompt + row["response_ids"]])).logits[0].softmax(-1)
        p = [probabilities[len(prompt) - 1 + t, token].item() for t, token in enumerate(row["response_ids"])]
        assert row["rewards"].tolist() == pytest.approx(p, rel=1e-4)


def sample_row(ppo, policy, prompt_ids, response_ids, rewrite_ids, rewards):
    inputs, mask = ppo.pack([prompt_ids], [response_ids], 0, "cpu")
    with torch.no_grad():
        old = ppo.token_logprobs(ppo.response_logits(policy, inputs, mask), inputs, mask)[0]
    return {"prompt_ids": prompt_ids, "response_ids": response_ids, "right": False, "old_logprobs": old,
            "rewards": torch.tensor(rewards), "rewrite_ids": rewrite_ids,
            "gamma": torch.tensor(ppo.imitation_weights(response_ids, rewrite_ids))}


def test_padding_changes_neither_loss(ppo, rlmec_parts):
    """Left padding against a mask for right padding would lose the first tokens of short prompts."""
    policy, tokenizer, _ = rlmec_parts
    optimizer = ppo.Optimizer((policy, 0.0))
    short = sample_row(ppo, policy, [5], [6, 7, 2], [6, 8, 9, 2], [-0.1, 0.0, -0.05])
    long = sample_row(ppo, policy, [5, 6, 7, 8, 9, 10], [11, 2], [11, 2], [0.5, 0.25])
    both = ppo.rlmec_step(policy, optimizer, [short, long], tokenizer, ppo.Args(device="cpu"))
    one, two = (ppo.rlmec_step(policy, optimizer, [row], tokenizer, ppo.Args(device="cpu")) for row in (short, long))
    assert both["reward_loss"] == pytest.approx((2 * one["reward_loss"] + 2 * two["reward_loss"]) / 4, rel=1e-4)
    assert both["imitation_loss"] == pytest.approx((4 * one["imitation_loss"] + 2 * two["imitation_loss"]) / 6, rel=1e-4)
    assert abs(both["approx_kl"]) < 1e-6 and both["clipfrac"] == 0     # rho = 1 before the first step


class SGD(torch.optim.SGD):
    """Plain gradient steps: AdamW's first one moves every weight as far."""

    def __init__(self, policy):
        super().__init__(policy.parameters(), lr=0.01)

    def clip_and_step(self):
        self.step()
        self.zero_grad()


@pytest.mark.parametrize("reward, sign", [(0.5, 1), (-0.1, -1)])
def test_with_lambda_0_only_the_rewarded_token_moves(ppo, rlmec_parts, reward, sign):
    policy, tokenizer, _ = rlmec_parts
    row = sample_row(ppo, policy, [5, 6], [7, 8, 2], [9, 2], [0.0, reward, 0.0])
    optimizer = SGD(policy)
    args = ppo.Args(device="cpu", imitation_weight=0.0)
    ppo.rlmec_step(policy, optimizer, [row], tokenizer, args)
    inputs, mask = ppo.pack([row["prompt_ids"]], [row["response_ids"]], 0, "cpu")
    moved = (ppo.token_logprobs(ppo.response_logits(policy, inputs, mask), inputs, mask)[0] - row["old_logprobs"])
    assert sign * moved[1].item() > 0, moved
    assert abs(moved[1]) > max(abs(moved[0]), abs(moved[2])), moved


def test_the_variants_change_one_setting_each(ppo):
    changed = {name: list(settings) for name, settings in ppo.VARIANTS.items()}
    assert changed == {"rlmec": [], "rlmec_imitation": ["reward_weight"], "rlmec_reward": ["imitation_weight"],
                       "rlmec_uniform": ["uniform_gamma"], "rlmec_noclip": ["rlmec_clip"]}


def test_logs_of_the_tiny_run(ppo, tiny_run):
    for name in ("rlmec", "rlmec_imitation"):
        with open(tiny_run / f"{name}.csv", newline="") as file:
            log = list(csv.DictReader(file))
        assert len(log) == 3                                          # 32 samples by 12: 12, 12 and the last 8
        assert abs(float(log[0]["approx_kl"])) < 1e-6 and float(log[0]["clipfrac"]) == 0
        assert {"update", "episodes", "seconds", "accuracy", "reward_loss", "imitation_loss"} <= set(log[0])
        assert log[-1]["accuracy"] and (tiny_run / name / "model.safetensors").exists()


def test_rounds_sample_again_from_the_current_policy(ppo, tiny_run, monkeypatch):
    weights = []
    collect = ppo.collect

    def spy(policy, *rest):
        weights.append(next(policy.parameters()).detach().clone())
        return collect(policy, *rest)

    monkeypatch.setattr(ppo, "collect", spy)
    monkeypatch.setattr(ppo, "rewrite", lambda grm, problems, responses, tokenizer, args, drop: [
        problem["solution_ids"] + [tokenizer.eos_token_id] for problem in problems])
    tokenizer = ppo.open_tokenizer(tiny_run / "policy")
    problems = rows_of(tiny_run / "problems.jsonl")
    ppo.encode_problems("problems", problems, tokenizer, 256, 40)
    ppo.add_solutions("problems", problems, tokenizer)
    args = ppo.Args(rounds=2, rlmec_samples=20, rlmec_batch=8, rlmec_epochs=1, max_new_tokens=40, device="cpu")
    paths = {"policy": tiny_run / "policy", "reward": tiny_run / "reward_generative"}
    _, log = ppo.rlmec("rlmec", problems, tokenizer, args, paths)
    assert len(weights) == 2 and not torch.equal(*weights)
    assert log[-1]["episodes"] == 40 and log[0]["episodes"] == 20

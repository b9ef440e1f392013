"""Stage 4: the win rate by hand, convergence, failure signatures."""

import pytest
import torch


def test_win_rate_by_hand(evaluation):
    # one win, one tie, two losses: mean 0.375; deviations .625 .125 -.375 -.375, sample variance 0.6875 / 3
    verdicts = evaluation.preferences_of([3, 1, 0, 0], [2, 1, 1, 1], "abcd", "wxyz")
    assert verdicts == [2, 1.5, 1, 1]
    result = evaluation.win_rate(verdicts + [None, float("nan"), 7, "2", True])
    assert result["win_rate"] == 0.375 and result["n"] == 4 and result["left_out"] == 5
    assert result["win_rate_se"] == pytest.approx((0.6875 / 3 / 4) ** 0.5)
    assert result["win_rate_ci95"][0] < 0.375 < result["win_rate_ci95"][1]
    assert evaluation.win_rate([0, 1.5])["win_rate"] == 0.5
    assert evaluation.preferences_of([5], [1], ["same"], ["same"]) == [1.5]


def test_bootstrap_agrees_with_the_normal_interval_when_n_is_large(evaluation):
    low, high = evaluation.bootstrap([0.0] * 600 + [1.0] * 400, seed=1)
    error = (0.4 * 0.6 / 1000) ** 0.5
    assert low == pytest.approx(0.4 - 1.96 * error, abs=0.004) and high == pytest.approx(0.4 + 1.96 * error, abs=0.004)


def test_paired_difference_and_t_test(evaluation):
    assert not evaluation.difference([1, 0] * 50, [0, 1] * 50, 1)["seen"]
    assert evaluation.difference([1] * 9 + [0], [0] * 10, 1)["seen"]
    # t = 4.303 is the 97.5 % point of Student's t with 2 degrees of freedom, 12.706 with 1
    assert evaluation.paired_t_test([4.3027 / 3 ** 0.5 + x for x in (-1, 0, 1)]) == pytest.approx(0.05, abs=1e-4)
    assert evaluation.paired_t_test([11.706, 13.706]) == pytest.approx(0.05, abs=1e-4)
    assert evaluation.paired_t_test([0.2]) is None


def test_area_under_the_curve_by_hand(evaluation):
    log = [{"episodes": 10, "accuracy": 0.4}, {"episodes": 15, "accuracy": None}, {"episodes": 20, "accuracy": 0.8}]
    # from 0.2: (0.2 + 0.4) / 2 * 10 + (0.4 + 0.8) / 2 * 10 + 0.8 * 20 = 25, over 40
    assert evaluation.accuracy_area(log, 0.2, 40) == pytest.approx(25 / 40)
    assert evaluation.accuracy_area([], 0.2, 40) is None


def test_fewer_wrong_steps_wins_then_the_right_answer(evaluation):
    scores = [(-1, False), (-2, True), (-1, True), (0, True)]
    against = [(-2, True), (-2, False), (-1, True), (0, True)]
    assert evaluation.preferences_of(scores, against, "abcd", "wxyz") == [2, 2, 1.5, 1.5]


def test_first_update_that_reaches_a_level(evaluation):
    log = [{"update": 1, "accuracy": None}, {"update": 2, "accuracy": 0.4}, {"update": 4, "accuracy": 0.6}]
    assert evaluation.first_update_at(log, 0.5)["update"] == 4
    assert evaluation.first_update_at(log, 0.4)["update"] == 2
    assert evaluation.first_update_at(log, 0.7) is None


def test_failure_signatures(evaluation):
    row = {"accuracy": 0.5, "approx_kl": 0.01, "ended": 1.0}
    models = {"token": {"pair_accuracy": 0.9, "preference_accuracy": 0.6},
              "sequence": {"pair_accuracy": None, "preference_accuracy": 0.8}}
    good = {"ppo_token": {"win_rate": 0.8}, "ppo_sequence": {"win_rate": 0.6}}
    assert evaluation.failure_signatures(models, good, {"ppo_token": [row]}) == []
    models["sequence"]["pair_accuracy"] = 0.71
    models["token"]["pair_accuracy"] = 0.69
    assert len(evaluation.failure_signatures(models, {}, {})) == 1
    equal = {"ppo_token": {"win_rate": 0.6}, "ppo_sequence": {"win_rate": 0.6}}
    assert "not above" in evaluation.failure_signatures({}, equal, {})[0]
    for bad in ([row, {**row, "accuracy": 0.3}], [{**row, "approx_kl": 0.5}], [{**row, "ended": 0.5}]):
        assert len(evaluation.failure_signatures({}, good, {"ppo_token": bad})) == 1
    cut = [{**row, "ended": 0.1}, {**row, "ended": 0.0}]           # the SFT policy did not end its responses either
    assert "10.0 % before training" in evaluation.failure_signatures({}, good, {"ppo_token": cut})[0]
    assert "unstable" not in evaluation.failure_signatures({}, good, {"ppo_token": cut})[0]


def test_the_reference_against_itself_has_no_kl(evaluation, tiny_run):
    from transformers import AutoModelForCausalLM
    model = evaluation.open_model(AutoModelForCausalLM, tiny_run / "policy")
    tokenizer = evaluation.open_tokenizer(tiny_run / "policy")
    prompts = [tokenizer("Q: What do Ada and Bob send to Cleo, and where?\nA:").input_ids] * 3
    args = evaluation.Args(batch=2, max_new_tokens=9)
    given = evaluation.answer(model, model, prompts, tokenizer, args)
    assert len(given.ids) == len(given.texts) == 3 and given.kl == 0.0
    total = 0.0                                     # each response alone, without padding
    for prompt, response in zip(prompts, given.ids):
        logprobs = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        total += logprobs[range(len(response)), response].sum().item()
    assert given.ref_logprob == pytest.approx(total / sum(map(len, given.ids)), rel=1e-4)


def test_a_difference_reads_from_both_sides(evaluation):
    row = {"a": "ppo_sequence", "b": "ppo_token", "difference": -0.2, "ci95": [-0.3, -0.1], "seen": True}
    gaps = evaluation.both_ways([row])
    assert gaps["ppo_sequence", "ppo_token"] == row
    assert (gaps["ppo_token", "ppo_sequence"]["difference"], gaps["ppo_token", "ppo_sequence"]["ci95"]) == (0.2, [0.1, 0.3])
    rates = {name: {"win_rate": rate, "win_rate_ci95": [0.1, 0.9], "best_accuracy": None, "largest_drop": None}
             for name, rate in (("ppo_sequence", 0.5), ("ppo_token", 0.7))}
    assert "+20.0 points" in evaluation.headline(rates, [row], "x")[2] and "+20.0" in evaluation.checks({}, rates, {}, [row])[0]

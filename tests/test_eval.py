"""Stage 4: the win rate by hand, convergence, failure signatures."""

import pytest


def test_win_rate_by_hand(evaluation):
    # one win, one tie, two losses: mean 0.375; deviations .625 .125 -.375 -.375, sample variance 0.6875 / 3
    result = evaluation.win_rate([3, 1, 0, 0], [2, 1, 1, 1])
    assert result["win_rate"] == 0.375 and result["n"] == 4
    assert result["win_rate_se"] == pytest.approx((0.6875 / 3 / 4) ** 0.5)
    low, high = result["win_rate_ci95"]
    assert (low + high) / 2 == pytest.approx(0.375) and high - low == pytest.approx(2 * 1.96 * result["win_rate_se"])


def test_fewer_wrong_steps_wins_then_the_right_answer(evaluation):
    # (- wrong steps, answer right): fewer wrong steps first, then the answer, else a tie
    scores = [(-1, False), (-2, True), (-1, True), (0, True)]
    against = [(-2, True), (-2, False), (-1, True), (0, True)]
    assert evaluation.win_rate(scores, against)["win_rate"] == (1 + 1 + 0.5 + 0.5) / 4


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


def test_the_reference_against_itself_has_no_kl(evaluation, tiny_run):
    from transformers import AutoModelForCausalLM
    model = evaluation.open_model(AutoModelForCausalLM, tiny_run / "policy")
    tokenizer = evaluation.open_tokenizer(tiny_run / "policy")
    prompts = [tokenizer("Q: What do Ada and Bob send to Cleo, and where?\nA:").input_ids] * 3
    responses, kl = evaluation.answer(model, model, prompts, tokenizer, evaluation.Args(batch=2, max_new_tokens=9))
    assert len(responses) == 3 and kl == 0.0

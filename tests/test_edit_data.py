"""Stage 1: E1 (with A4 and B6) by hand and by its properties, what is right, the tasks, the policy
and its responses, B1, A1 and B2: editors, gates, rows; then data of a user's own, chats, files, the
texts of tokens, and bad input. Token ids of chats: test_chat.py."""

import json
import random
import re
import shutil
from collections import Counter
from functools import cache
from itertools import cycle, product
from os.path import commonprefix
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import one, rows_of, three, two
from pytest import approx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.optim.optimizer import register_optimizer_step_pre_hook



def ids_of(text, tokenizer, ended=True):
    """The ids of a response, where no token straddles its border with the prompt."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id] if ended else ids


def encoder_of(tokenizer):
    """The encoder of a tokenizer whose end token alone ends a response."""
    return one.Encoder(tokenizer, [tokenizer.eos_token_id])


# --- E1, and beside it A4 and B6, by hand ---
# Of the path from the last cell back to the first, in brackets, every step that costs 1 is an
# operation: insert g, replace e by i, replace k by s.
#
#              s    i    t    t    i    n    g
#       [0]    1    2    3    4    5    6    7
#   k    1   [1]    2    3    4    5    6    7
#   i    2    2   [1]    2    3    4    5    6
#   t    3    3    2   [1]    2    3    4    5
#   t    4    4    3    2   [1]    2    3    4
#   e    5    5    4    3    2   [2]    3    4
#   n    6    6    5    4    3    3   [2]  [3]

examples = pytest.mark.parametrize("a, b, ops, kept", [
    pytest.param(
        "kitten", "sitting", [["replace", 0, 0], ["replace", 4, 4], ["insert", 6, 6]],
        [(1, 1), (2, 2), (3, 3), (5, 5)], id="kitten to sitting"),
    pytest.param(
        "abc", "XYabc", [["insert", 0, 0], ["insert", 0, 1]],
        [(0, 2), (1, 3), (2, 4)], id="an insertion marks X and Y alone"),
    pytest.param(
        "aXbc", "abc", [["delete", 1, 1]],
        [(0, 0), (2, 1), (3, 2)], id="a deletion marks nothing in b"),
    pytest.param("ab", "ab", [], [(0, 0), (1, 1)], id="equal"),
    pytest.param("a", "b", [["replace", 0, 0]], [], id="nothing in common"),
    pytest.param("ab", "", [["delete", 0, 0], ["delete", 1, 0]], [], id="b is empty"),
    pytest.param("", "a", [["insert", 0, 0]], [], id="a is empty"),
])


@examples
def test_e1_the_operations_by_hand(a, b, ops, kept):
    assert one.edit_ops(a, b) == ops


@examples
def test_a4_the_kept_tokens_by_hand(a, b, ops, kept):
    assert two.kept_tokens(ops, len(a), len(b)) == kept


@examples
def test_b6_the_weight_of_a_kept_token_is_0_5_and_of_a_new_one_1(a, b, ops, kept):
    gamma = [1.0] * len(b)
    for i, j in kept:
        gamma[j] = 0.5
    assert three.imitation_gamma([*a], [*b]).tolist() == gamma


# --- E1: its properties ---

def apply(ops, a, b):
    """What the operations make of a; tokens that they bring in come from b."""
    a = list(a)
    for op, i, j in reversed(ops):  # from the end: i is then still right
        if op == "insert":
            a.insert(i, b[j])
        elif op == "delete":
            del a[i]
        else:
            a[i] = b[j]
    return a


def plain_distance(a, b):
    """The textbook table, cell by cell."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last = row
        row = [i]
        for j, y in enumerate(b, 1):
            replace = last[j - 1] if x == y else last[j - 1] + 1
            row.append(min(last[j] + 1, row[-1] + 1, replace))
    return row[-1]


@pytest.fixture(scope="module")
def edits():
    """The operations between any two of 23 random words, three of them long."""
    rng = random.Random(0)
    words = []
    for k in range(23):
        length = rng.randint(0, 10) if k < 20 else 150
        words.append("".join(rng.choices("abc", k=length)))
    return {(a, b): one.edit_ops(a, b) for a, b in product(words, words)}


def test_e1_the_cost_of_the_path_is_the_distance(edits):
    for (a, b), ops in edits.items():
        assert len(ops) == plain_distance(a, b)


def test_e1_applying_the_operations_gives_b(edits):
    for (a, b), ops in edits.items():
        assert apply(ops, a, b) == list(b)


def test_a4_kept_tokens_are_equal_pairs_in_increasing_order(edits):
    for (a, b), ops in edits.items():
        last = (-1, -1)
        for i, j in two.kept_tokens(ops, len(a), len(b)):
            assert a[i] == b[j]
            assert i > last[0] and j > last[1]
            last = (i, j)


def test_e1_the_distance_is_a_metric(edits):
    words = {a for a, b in edits}
    for (a, b), ops in edits.items():
        assert (ops == []) == (a == b)
        assert len(ops) == len(edits[b, a])
        for c in words:
            assert len(ops) <= len(edits[a, c]) + len(edits[c, b])


def test_e1_the_first_operation_stands_where_the_two_begin_to_differ(edits):
    for (a, b), ops in edits.items():
        if a != b:
            start = len(commonprefix([a, b]))
            assert ops[0][1:] == [start, start]


def test_e1_agrees_with_the_errors_that_people_marked(shared):
    """All 487 edits, by words. The minimum edits that agree best have only 0.865 and 0.923."""
    both = ours = people = 0
    for row in rows_of(shared / "data" / "qa_feedback.jsonl"):
        if not row["edited"]:
            continue
        words = list(re.finditer(r"\S+", row["response"]))
        ops = one.edit_ops([word[0] for word in words], row["edited"].split())
        changed = {i for op, i, j in ops if op != "insert"}
        marked = set()
        for span in row["error_spans"]:
            marked |= {k for k, word in enumerate(words)
                       if word.start() < span["end"] and word.end() > span["start"]}
        both += len(changed & marked)
        ours += len(changed)
        people += len(marked)
    assert both > 0.85 * ours
    assert both > 0.91 * people


# --- Right and wrong ---

def is_right(answer, text):
    return re.search(one.answer_pattern(answer), text) is not None


@pytest.mark.parametrize("answer, text", [
    pytest.param("18", "3 * 6 = 20, no: 18.\nThe answer is 18", id="answer is"),
    pytest.param("18", "Answer: 18 dollars for 9 eggs.", id="answer and a colon"),
    pytest.param("18", "#### 18", id="the mark of GSM8K"),
    pytest.param("18", r"So it is \boxed{18}. I used line 1.", id="a box"),
    pytest.param("18", "**Final Answer:** **18**", id="markdown"),
    pytest.param("18", "The answer is 17. No: the answer is 18", id="the last marker"),
    pytest.param("18", "The answer is:\n18\nThere are 9 eggs.", id="on a line of its own"),
    pytest.param("18", "The answer would be 18, not 19", id="not another"),
    pytest.param("18", "The answer is 18 (eggs at $2)", id="in brackets behind it"),
    pytest.param("18", "The answer is n = 18, because 9 * 2 is.", id="a letter and a reason"),
    pytest.param("18", "The answer is 18.00", id="zeros behind the point"),
    pytest.param("18.50", "The answer is $18.5.", id="a zero less"),
    pytest.param("1200", "The answer is $1,200.00 a year.", id="money"),
    pytest.param("$1,200", "The answer is 1200", id="money as the label"),
    pytest.param("1000000", "The answer is 1,000,000 (one million)", id="two commas"),
    pytest.param("0.25", "The answer is .25", id="no zero before the point"),
    pytest.param(".25", "The answer is 0.25", id="none in the label"),
    pytest.param("0", "The answer is 0.", id="zero"),
    pytest.param("-5", "The answer is $-5$", id="below zero, in LaTeX"),
    pytest.param("-5", "The answer is (−5)", id="the minus of typesetting"),
    pytest.param("100%", "The answer is 100%", id="per cent"),
    pytest.param("42", "The answer is 42.0 square miles", id="words of a unit"),
    pytest.param("12 cm^2", "The answer is 12 cm^2.", id="a unit in the label, as it is written"),
    pytest.param("1/2", "The answer is 1/2.", id="a fraction"),
    pytest.param("2 1/2", "The answer is 2 1/2", id="a mixed number"),
    pytest.param("12:30", "The answer is 12:30", id="a time"),
    pytest.param("(1, 2)", "The answer is (1,2)", id="a pair, closer together"),
    pytest.param("x=3 or x=4", "The answer is x=3 or x=4", id="two values"),
    pytest.param("B", "The answer is **B**", id="a letter"),
    pytest.param("B", "The answer is (B) because water boils.", id="a letter in brackets"),
    pytest.param("yes", "The answer is Yes, since 1990 came first.", id="a word, a reason"),
    pytest.param("New York", "The answer is new york.\nIt is big.", id="two words"),
])
def test_an_answer_is_right_in_many_forms(answer, text):
    assert is_right(answer, text)


@pytest.mark.parametrize("answer, text", [
    pytest.param("18", "9 * 2 = 18", id="no marker"),
    pytest.param("18", "The answer is 17. It is not 18", id="another number behind the marker"),
    pytest.param("18", "The answer is 18. No, the answer is 17", id="the last marker"),
    pytest.param("18", r"\boxed{17}. Checked against hint 18", id="another number in the box"),
    pytest.param("18", "The answer is not 18", id="not"),
    pytest.param("18", "The answer is 180", id="it goes on"),
    pytest.param("18", "The answer is 118", id="it has begun before"),
    pytest.param("18", "The answer is 18.5", id="a decimal"),
    pytest.param("1", "The answer is 1,200", id="thousands"),
    pytest.param("1200", "The answer is 1,20", id="no thousands"),
    pytest.param("18", "The answer is 18 + 2", id="an operator"),
    pytest.param("18", "The answer is 18/2", id="a fraction"),
    pytest.param("2", "The answer is 2 1/2", id="a mixed number"),
    pytest.param("2", "The answer is 1/2", id="the lower half of a fraction"),
    pytest.param("12", "The answer is 12:30", id="a time"),
    pytest.param("18", "The answer is 18^2", id="a power"),
    pytest.param("18", "The answer is 18 squared", id="a power in words"),
    pytest.param("18", "The answer is 18 million", id="millions"),
    pytest.param("3", "The answer is 3 quarters", id="a fraction in words"),
    pytest.param("18", "The answer is 18 or 19", id="or"),
    pytest.param("18", "The answer is 18 boys and 3 girls", id="and"),
    pytest.param("18", "The answer is 18, 19", id="a list"),
    pytest.param("1", "The answer is (1, 2)", id="a pair"),
    pytest.param("(1, 2)", "The answer is (1, 3)", id="another pair"),
    pytest.param("5", "The answer is -5", id="below zero"),
    pytest.param("5", "The answer is −5", id="the minus of typesetting"),
    pytest.param("-5", "The answer is 5", id="above zero"),
    pytest.param("0", "The answer is .5", id="no zero"),
    pytest.param("0", "The answer is unknown.", id="a word is no zero"),
    pytest.param("0.25", "The answer is 25%", id="per cent of one"),
    pytest.param("100", "The answer is 100%", id="per cent"),
    pytest.param("100", r"So \boxed{100\%}", id="per cent in LaTeX"),
    pytest.param("100", "The answer is 100 percent", id="per cent in words"),
    pytest.param("100%", "The answer is 10%", id="another percentage"),
    pytest.param("1e6", "The answer is 1e7", id="another power of ten"),
    pytest.param("12 cm^2", "The answer is 15 cm^2", id="another number with the unit"),
    pytest.param("12 cm^2", "The answer is 12", id="no unit"),
    pytest.param("1/2", "The answer is 11/2", id="another numerator"),
    pytest.param("March 5, 2020", "The answer is March 6, 2020", id="another day"),
    pytest.param("x=3 or x=4", "The answer is x=3 or x=5", id="another second value"),
    pytest.param("B", "The answer is C", id="another letter"),
    pytest.param("B", "The answer is B or C", id="two letters"),
    pytest.param("B", "The answer is B, C", id="a list of letters"),
    pytest.param("A", "The answer is a dog", id="a letter is not a word"),
    pytest.param("York", "The answer is New York", id="a part of a name"),
    pytest.param("New York", "The answer is New York State", id="a longer name"),
    pytest.param("yes", "The answer is yes and no", id="two words"),
    pytest.param("a.c", "The answer is abc", id="no sign of the label is a pattern"),
])
def test_a_wrong_answer_is_never_right(answer, text):
    assert not is_right(answer, text)


def test_answers_that_went_wrong_in_public_reports(shared):
    refused = 0
    right = 0
    for row in rows_of(shared / "cases" / "answers.jsonl"):
        if not is_right(row["answer"], row["solution"]):  # stage 1 drops it, with a count
            continue
        if row["right"]:
            right += 1
            refused += not is_right(row["answer"], row["response"])
        else:
            assert not is_right(row["answer"], row["response"])
    assert right >= 13
    assert refused <= right / 8


TAPE = "3+2=5;-1=4;+4=8;-6=2"
MATH = {"solutions": [TAPE], "answer": "2"}
QA = {"solutions": [" A makes tea. B is in Rome.", " A makes tea. So B lives in Rome."]}
FIVE = {"answer": "5", "right": one.answer_pattern("5")}
RULES = {"rules": [r"\bsad\b", "(a|b)c"], **FIVE}


@pytest.mark.parametrize("text, problem, wrong", [
    pytest.param(TAPE, MATH, 0, id="the solution"),
    pytest.param("3+2=6;-1=5;+4=9;-6=3", MATH, 4, id="every step differs"),
    pytest.param("3+2=5;-1=4;-6=2", MATH, 2, id="a step is missing: place by place"),
    pytest.param(TAPE + ";-6=2", MATH, 2, id="4 has its semicolon now, 5 is additional"),
    pytest.param("", MATH, 4, id="nothing was said"),
    pytest.param(" A makes tea. B is in Rome.", QA, 0, id="one right solution"),
    pytest.param(" A makes tea. So B lives in Rome.", QA, 0, id="another"),
    pytest.param(" A is. So B lives in Rome.", QA, 1, id="the nearest counts"),
    pytest.param(" A makes soap.", QA, 2, id="wrong and cut short"),
    pytest.param("sad, sadly sad: ac", RULES, 3, id="every hit of a rule"),
    pytest.param("glad 6", RULES, 0, id="rules go before the answer"),
    pytest.param("9 is right. The answer is 5", FIVE, 0, id="the same answer"),
    pytest.param("The answer is 5 or 6", FIVE, 1, id="another answer"),
    pytest.param("The solution is 5", FIVE, 1, id="without a marker no answer is right"),
])
def test_errors_are_counted_and_one_more_for_a_missing_end(text, problem, wrong):
    assert one.wrong_steps(text, True, problem) == wrong
    assert one.wrong_steps(text, False, problem) == wrong + 1


def test_without_solution_answer_or_rule_nobody_knows():
    assert one.wrong_steps("The answer is 5", True, {"rules": []}) is None


@pytest.fixture(scope="module")
def solutions(shared):
    """Real solutions by language models, with labels."""
    rows = rows_of(shared / "data" / "gsm8k_model_solutions.jsonl")
    return [{**row, "right": one.answer_pattern(row["answer"])} for row in rows]


def test_right_is_what_the_labels_of_gsm8k_say(solutions):
    assert len(solutions) == 5276
    for row in solutions:
        assert (one.wrong_steps(row["response"], True, row) == 0) == row["is_correct"]


def test_the_solutions_of_gsm8k_are_right(solutions):
    assert not any(one.wrong_steps(row["solution"], True, row) for row in solutions)


# --- The tasks ---

tasks = pytest.mark.parametrize("task", ["math", "qa"])


@cache
def problems_of(task):
    """260 problems for training, 32 for the test, 8 for validation."""
    return one.make_problems(one.Args(task=task, train_prompts=260, test_prompts=32))


@tasks
def test_no_prompt_comes_twice(task):
    assert len({problem["prompt"] for problem in problems_of(task)}) == 260 + 32 + 32 / 4


@pytest.mark.parametrize("task, count", [("math", 1), ("qa", 4)])
def test_all_right_solutions_are_known(task, count):
    for problem in problems_of(task):
        wrong = [one.wrong_steps(text, True, problem) for text in problem["solutions"]]
        assert wrong == [0] * count


@tasks
def test_some_demonstrations_are_right_and_some_are_wrong(task):
    right = [p for p in problems_of(task) if one.wrong_steps(p["demonstration"], True, p) == 0]
    assert 80 < len(right) < 220


@pytest.mark.parametrize("task, kinds", [
    pytest.param("math", {"replace"}, id="math"),
    pytest.param("qa", {"replace", "delete", "insert"}, id="qa"),
])
def test_the_kinds_of_edits_that_a_task_needs(task, kinds):
    words = re.compile(r"\w+|\S").findall
    count = Counter()
    for problem in problems_of(task):
        said = words(problem["demonstration"])
        edits = [one.edit_ops(said, words(text)) for text in problem["solutions"]]
        count.update(op for op, i, j in min(edits, key=len))
    assert set(count) == kinds
    assert min(count.values()) > 20


def test_the_answer_of_a_sum_is_its_value():
    for problem in problems_of("math"):
        terms = re.findall(r"[+-]?\d", problem["prompt"])
        assert int(problem["answer"]) == sum(map(int, terms))


def test_all_values_of_sums_are_single_digits():
    for problem in problems_of("math"):
        assert re.fullmatch(r"\d([+-]\d){4}=", problem["prompt"])
        assert re.fullmatch(r"\d([+-]\d=\d;?){4}", problem["demonstration"])


def test_every_step_of_a_sum_can_be_the_first_wrong_one():
    first = set()
    for problem in problems_of("math"):
        said = problem["demonstration"] + ";"
        first.add(commonprefix([said, problem["solution"] + ";"]).count(";"))
    assert first == {0, 1, 2, 3, 4}  # 4: none is wrong


def test_about_a_fourth_of_the_steps_of_a_sum_are_wrong_and_the_rest_carries_on():
    wrong = 0
    for problem in problems_of("math"):
        value, *numbers = map(int, re.findall(r"[+-]?\d", problem["demonstration"]))
        for x, said in zip(numbers[::2], numbers[1::2]):  # what is added, and what it makes
            if said != value + x:
                wrong += 1
            value = said
    assert 0.2 * 1200 < wrong < 0.28 * 1200  # 300 times 4 steps


def test_who_makes_what_and_lives_where_is_the_same_in_all_problems():
    facts = {}
    for problem in problems_of("qa"):
        a, b, c = re.findall("|".join(one.PEOPLE), problem["prompt"])
        pattern = r"makes (\w+)\..* makes (\w+)\..* lives in (\w+)\."
        x, y, town = re.search(pattern, problem["solution"]).groups()
        for person, fact, value in ((a, "makes", x), (b, "makes", y), (c, "lives in", town)):
            assert facts.setdefault((person, fact), value) == value


# --- The policy and its responses ---

@pytest.fixture
def small():
    """A small policy, its encoder, and four encoded problems."""
    args = one.Args(task="qa", train_prompts=4, test_prompts=0, hidden_size=16)
    problems = one.make_problems(args)
    model, tokenizer = one.small_policy(problems, args)
    encoder = encoder_of(tokenizer)
    problems = [encoder.encode_problem(problem, args) for problem in problems]
    return model, encoder, problems


def sft(small, sft_lr=3e-3, **flags):
    """Fine-tune the small policy; a batch holds all four problems."""
    model, encoder, problems = small
    args = one.Args(device="cpu", sft_lr=sft_lr, **flags)
    one.fine_tune(model, encoder.tokenizer, problems, args)


@pytest.fixture
def norms():
    """The norm of the gradient at every step of an optimiser."""
    seen = []

    def note(optimizer, args, kwargs):
        parameters = optimizer.param_groups[0]["params"]
        seen.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


def test_sft_is_the_mean_loss_of_the_tokens_of_all_demonstrations(small, grads):
    model, _, problems = small
    loss = 0
    N = 0
    for problem in problems:
        x = problem["prompt_ids"]
        y = problem["demonstration_ids"]
        logits = model(torch.tensor([x + y])).logits[0, len(x) - 1:-1]  # t-1 scores t
        loss += F.cross_entropy(logits, torch.tensor(y), reduction="sum")
        N += len(y)
    gradient = torch.autograd.grad(loss / N, list(model.parameters()))

    sft(small, sft_steps=1, micro_batch=3)
    assert torch.allclose(grads[0], torch.cat([g.flatten() for g in gradient]), atol=1e-6)


def test_sft_clips_the_gradient_to_norm_1(small, norms):
    for p in small[0].parameters():
        p.data *= 3  # it says wrong tokens firmly: a large gradient
    sft(small, sft_steps=1)
    assert norms == [approx(1, abs=1e-4)]


def test_sft_takes_each_gradient_once(small, grads):
    sft(small, sft_steps=2, sft_lr=0.0)  # the model stays the same, so does its gradient
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


def test_sft_takes_sft_batch_rows_a_step(small, monkeypatch):
    sizes = []

    def batches(rows, size):
        sizes.append(len(rows))
        return [rows]

    monkeypatch.setattr(one, "batches", batches)
    sft(small, sft_steps=2, sft_batch=3)
    assert sizes == [3, 3]


def test_b1_sampling_is_at_temperature_1_from_all_tokens(small):
    model, encoder, _ = small
    model.lm_head.weight.data *= 3  # likely and unlikely tokens
    logprobs = model(torch.tensor([[5, 6]])).logits[0, -1].log_softmax(dim=0)
    entropy = -(logprobs.exp() * logprobs).sum().item()
    args = one.Args(max_new_tokens=1, device="cpu")
    tokens = one.generate(model, encoder.tokenizer, [[5, 6]] * 4000, args)
    assert logprobs[tokens].mean().item() == approx(-entropy, abs=0.06)


@pytest.fixture
def policy_says(monkeypatch):
    """What the policy says: (text, ended), one prompt after the other, again and again."""
    def call(*said):
        def generate(model, tokenizer, prompts, args, **_):
            responses = cycle([ids_of(text, tokenizer, ended) for text, ended in said])
            return [next(responses) for _ in prompts]
        monkeypatch.setattr(one, "generate", generate)
    return call


def test_a_response_stands_beside_the_prompt_that_it_answers(small, monkeypatch):
    _, encoder, problems = small
    for problem, length in zip(problems, (9, 3, 5)):  # sorting by length turns them round
        problem["prompt_ids"] = problem["prompt_ids"][:length]
    echo = lambda model, tokenizer, prompts, args, **_: [ids[-2:] for ids in prompts]
    monkeypatch.setattr(one, "generate", echo)
    for problem in one.sample_responses(problems, None, encoder, one.Args(samples=3)):
        last = encoder.tokenizer.decode(problem["prompt_ids"][-2:])
        assert [response["rejected"] for response in problem["responses"]] == [last] * 3


def test_a_sampled_response_is_judged_and_keeps_its_end_token(small, policy_says):
    _, encoder, problems = small
    right = problems[0]["solution"]
    policy_says((right, True), (right, False))
    [problem] = one.sample_responses(problems[:1], None, encoder, one.Args())
    whole, cut = problem["responses"]
    assert (whole["ended"], whole["wrong_steps"]) == (True, 0)
    assert (cut["ended"], cut["wrong_steps"]) == (False, 1)
    assert whole["rejected_ids"] == [*cut["rejected_ids"], *encoder.ends]


# --- The ids of a sample ---

@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer of bytes; `ab` is one token, too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate([*letters, "ab", "</s>", "<eot>"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = one.hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens(["<eot>"], special_tokens=True)
    return tokenizer


@pytest.fixture
def sampled(bytewise, monkeypatch):
    """What becomes of a sample, and what its encoder notes; `|` is between its tokens, and a
    token of the policy, <eot>, ends a response, too. A chat's turn is trimmed and ends in </s>;
    before the assistant's words stands a space that the generation prompt does not have."""
    def call(drawn, prompt="Q:"):
        bytewise.chat_template = (
            "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' }}{{ m.content | trim }}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}")
        encoder = one.Encoder(bytewise, [bytewise.eos_token_id, *ids_of("<eot>", bytewise, False)])
        ids = []
        for part in drawn.split("|"):
            ids += ids_of(part, bytewise, False)
        monkeypatch.setattr(one, "generate", lambda *_: [ids])
        problem = {"id": "a", "prompt": prompt, "responses": [], **encoder.encode_prompt(prompt)}
        [problem] = one.sample_responses([problem], None, encoder, one.Args(samples=1))
        [response] = problem["responses"]
        return response, ids, encoder.notes
    return call


CHAT = [{"role": "user", "content": "Q"}]


@pytest.mark.parametrize("drawn, prompt, text, ended, verbatim", [
    pytest.param("ab| c|</s>", "Q:", "ab c", True, False, id="ended"),
    pytest.param("ab| c", "Q:", "ab c", False, False, id="cut by the limit"),
    pytest.param(" |ab|</s>", CHAT, "ab", True, False, id="a chat: the space is the template's"),
    pytest.param(" |ab", CHAT, "ab", False, False, id="a chat, cut by the limit"),
    pytest.param("ab|</s>", CHAT, "ab", True, True, id="verbatim: without the template's space"),
    pytest.param("  ab|</s>", CHAT, "  ab", True, True, id="verbatim: a space that it trims"),
    pytest.param("\u4e16|</s>", "Q:", "\u4e16", True, False, id="a character of three tokens"),
    pytest.param("ab|<eot>", "Q:", "ab", True, False, id="another end token than its prompt's"),
])
def test_a_sample_keeps_the_ids_that_were_drawn(sampled, drawn, prompt, text, ended, verbatim):
    response, ids, notes = sampled(drawn, prompt)
    assert response["rejected_ids"] == ids
    assert response["rejected"] == text
    assert response["ended"] == ended
    assert response["verbatim"] == verbatim
    assert not notes


def test_a_sample_that_would_merge_with_its_prompt_keeps_its_ids_and_is_counted(sampled):
    response, ids, notes = sampled("b|</s>", prompt="Q:a")
    assert response["rejected_ids"] == ids
    assert notes == {"encoded apart from its prompt, since a token would straddle the border": 1}


ANEW = {"sample: encoded anew, its tokens are not the tokenizer's own": 1}


@pytest.mark.parametrize("drawn, prompt, anew", [
    pytest.param("a|b|</s>", "Q:", "ab", id="two tokens for one"),
    pytest.param(" |a|b|</s>", CHAT, " ab", id="in a chat"),
    pytest.param("a|b|<eot>", "Q:", "ab", id="with another end token, which stays"),
])
def test_a_sample_that_the_tokenizer_splits_otherwise_is_encoded_anew(
        sampled, bytewise, drawn, prompt, anew):
    response, ids, notes = sampled(drawn, prompt)
    assert response["rejected_ids"] == [*ids_of(anew, bytewise, False), ids[-1]] != ids
    assert response["rejected"] == "ab"
    assert response["ended"]
    assert notes == ANEW


# --- B1: the editor and the nearest edit; A1: the preferred response ---

def response(text, wrong, **more):
    """A sampled response with so many errors; its words stand in for ids."""
    return {
        "from_data": False, "rejected": text, "rejected_ids": text.split(), "wrong_steps": wrong,
        "chosen": None, "edited": None, "edit_ops": [], **more,
    }


WRONG = response("bad tea", 2)
SIBLINGS = {
    "responses": [WRONG, response("so-so", 1), response("good", 0), response("fine", 0)],
    "solution": "right",
    "solution_ids": ["right"],
    "solutions": ["right", "correct"],
}
ENDED = {"ended": True, "verbatim": False}
CUT = {"ended": False, "verbatim": True}


class Asked:
    """An encoder whose ids say what it was asked for."""

    def encode_response(self, problem, text, ended=True, verbatim=False):
        return [text, ended, verbatim]


@pytest.mark.parametrize("editor, row, texts", [
    pytest.param("oracle", WRONG | CUT, {"right": ["right", True, False],
                 "correct": ["correct", True, False]}, id="the oracle knows every solution"),
    pytest.param("nearest", WRONG, {"right": ["right"], "good": ["good"], "fine": ["fine"]},
                 id="a solution, right siblings"),
    pytest.param("human", WRONG | {"edited": "better", "edited_ids": [7]}, {"better": [7]},
                 id="a person has edited"),
    pytest.param("human", WRONG, {}, id="no person has"),
    pytest.param("rules", WRONG | ENDED, {"[good] cake": ["[good] cake", False, False, "tea"]},
                 id="rules replace what they match, in order, but not the end"),
    pytest.param("rules", WRONG | CUT, {"[good] cake": ["[good] cake", False, True]},
                 id="rules end no sample, and leave its form"),
    pytest.param("oracle", response("good", 0), {"good": ["good"]}, id="B2: what is right stays"),
])
def test_the_texts_and_ids_that_an_editor_accepts(editor, row, texts):
    rules = {"(b)ad": r"\1etter", "better": "[good]", "tea": "cake"}
    assert one.accepted(editor, SIBLINGS | row, rules, Asked()) == [*texts.items()]


SUM = {"id": "a", "split": "train", "prompt": "3+2-1+4-6=", "prompt_ids": [3], **MATH}


@pytest.fixture(scope="module")
def characters():
    """The tokenizer of sums: a token is a character."""
    problems = one.make_problems(one.Args(train_prompts=99, test_prompts=0))
    return one.small_policy(problems, one.Args(hidden_size=16))[1]


def test_b1_the_edit_is_the_nearest_of_the_texts(characters):
    texts = [(text, ids_of(text, characters)) for text in ("9", "2+3=5", "3+2=5", "3+2=4")]
    assert one.nearest_edit(ids_of("3+2=6", characters), texts) == {
        "edited": "3+2=5",  # one operation, and so has 3+2=4, behind it
        "edited_ids": ids_of("3+2=5", characters),
        "edit_ops": [["replace", 4, 4]],
    }


def test_b1_without_texts_there_is_no_edit():
    assert one.nearest_edit([1], []) == {"edited": None, "edited_ids": None, "edit_ops": None}


def test_a1_the_sibling_with_the_fewest_errors_is_preferred():
    chosen = one.preferred(SIBLINGS | WRONG, "oracle")
    assert (chosen["chosen"], chosen["chosen_token_ids"]) == ("good", ["good"])


def test_e1_of_a_sibling_leads_from_the_rejected_response_to_it():
    chosen = one.preferred(SIBLINGS | WRONG, "oracle")
    assert chosen["chosen_ops"] == [["replace", 0, 0], ["delete", 1, 1]]  # bad tea -> good


EDITED = {"from_data": True, "edited": "e", "edited_ids": ["e"], "edit_ops": [["replace", 0, 0]]}
NO_SIBLING = {"chosen_ops": None}
EDIT_IS_CHOSEN = {"chosen": "e", "chosen_token_ids": ["e"], "chosen_ops": None}
SIBLING_IS_CHOSEN = {
    "chosen": "s", "chosen_token_ids": ["s"], "chosen_ops": [["replace", 0, 0]],  # r -> s
}
DATA_PREFERS = {"chosen": "c d", "chosen_token_ids": ["c", "d"]}
DATA_OPS = {"chosen_ops": [["replace", 0, 0], ["insert", 1, 1]]}  # r -> c d
DATA_PREFERS_THE_EDIT = {"chosen": "e", "chosen_token_ids": ["e"]}


@pytest.mark.parametrize("editor, wrong, more, columns", [
    pytest.param("oracle", 2, {}, SIBLING_IS_CHOSEN, id="a sibling with fewer errors"),
    pytest.param("oracle", 1, {}, NO_SIBLING, id="no sibling is better"),
    pytest.param("oracle", 0, {}, NO_SIBLING, id="none is better than right"),
    pytest.param("oracle", None, {}, NO_SIBLING, id="nobody knows"),
    pytest.param("human", None, EDITED, EDIT_IS_CHOSEN, id="a person's edit of data"),
    pytest.param("rules", 1, EDITED, EDIT_IS_CHOSEN, id="an edit of data by rules"),
    pytest.param("human", None, EDITED | {"from_data": False}, EDIT_IS_CHOSEN,
                 id="a language model's edit of a sample"),
    pytest.param("human", 1, EDITED | {"from_data": False}, NO_SIBLING,
                 id="but not where siblings are judged"),
    pytest.param("nearest", 1, EDITED, NO_SIBLING, id="but none that the solution has made"),
    pytest.param("rules", 1, EDITED | {"from_data": False}, NO_SIBLING, id="nor that of a sample"),
    pytest.param("human", None, EDITED | {"edit_ops": []}, NO_SIBLING,
                 id="nor one that changes nothing"),
    pytest.param("human", None, EDITED | DATA_PREFERS, DATA_OPS,
                 id="nor beside what data prefers"),
    pytest.param("human", None, {"edited_ids": None, **DATA_PREFERS}, DATA_OPS,
                 id="what data prefers, without an edit"),
    pytest.param("human", None, EDITED | DATA_PREFERS_THE_EDIT, NO_SIBLING,
                 id="what data prefers is the edit itself"),
])
def test_a1_what_is_preferred(editor, wrong, more, columns):
    row = response("r", wrong, **more)
    row["responses"] = [row, response("s", 1)]
    assert one.preferred(row, editor) == columns


# --- B1: gates ---

def gate(wrong=None, ops=1, rejected=4, edited=4, text="glad", ended=True, **more):
    """The gate of a row with so many operations and tokens; `sad` is an error."""
    row = {
        "rules": ["sad"], "wrong_steps": wrong, "rejected_ids": [0] * rejected,
        "edited": text, "edited_ids": [0] * edited, "edit_ops": [["replace", 0, 0]] * ops,
        "chosen_token_ids": None, **more,
    }
    return one.gate(row, ended, one.Args(max_edit_share=0.5))


CHANGES_NOTHING = "gate: the edit changes nothing"
CHANGES_MUCH = "gate: the edit changes more than 50%"
NOT_BETTER = "gate: the edit is not better"
SAME = "pair: chosen and rejected are the same"


@pytest.mark.parametrize("row, reason", [
    pytest.param({"edit_ops": None, "chosen": None}, "editor: no edit", id="no edit, no pair"),
    pytest.param({"edit_ops": None, "chosen": "c"}, None, id="no edit, and yet a pair, for A6"),
    pytest.param({"edited": 0}, "gate: the edit leaves nothing", id="no token is left"),
    pytest.param({"chosen_token_ids": [0] * 4}, SAME, id="a pair without a difference"),
    pytest.param({"chosen_token_ids": [0] * 3}, None, id="a pair with a difference"),
    pytest.param({"edit_ops": None, "chosen": "c", "chosen_token_ids": [0] * 4}, SAME,
                 id="a pair without a difference, and no edit"),
    pytest.param({"ops": 0, "wrong": 1}, CHANGES_NOTHING, id="what is wrong stays"),
    pytest.param({"ops": 0}, CHANGES_NOTHING, id="what nobody judged stays"),
    pytest.param({"ops": 0, "wrong": 0}, None, id="what is right stays"),
    pytest.param({"ops": 2}, None, id="half of 4 tokens change"),
    pytest.param({"ops": 3}, CHANGES_MUCH, id="3 of 4 tokens change"),
    pytest.param({"ops": 3, "rejected": 6}, None, id="half of the longer, rejected"),
    pytest.param({"ops": 3, "edited": 6}, None, id="half of the longer, edited"),
    pytest.param({"wrong": 1}, None, id="better"),
    pytest.param({"wrong": 2, "text": "sad"}, None, id="better, if not right"),
    pytest.param({"wrong": 1, "text": "sad"}, NOT_BETTER, id="as wrong as before"),
    pytest.param({"wrong": 1, "ended": False}, NOT_BETTER, id="without an end it is no better"),
])
def test_a_gate_lets_small_edits_pass_that_make_it_better(row, reason):
    assert gate(**row) == reason


# --- The row of an edit ---

@pytest.fixture
def row_of(characters):
    """The row of edits.jsonl of a response to a sum, edited into the solution."""
    def call(text):
        ids = ids_of(text, characters)
        row = SUM | response(
            text, 1, rejected_ids=ids, chosen_token_ids=None, chosen_ops=None)
        row |= one.nearest_edit(ids, [(TAPE, ids_of(TAPE, characters))])
        return one.edit_row(row, "oracle", characters)
    return call


@pytest.mark.parametrize("text, first, first_error, first_wrong_step", [
    pytest.param("3+2=6;-1=4;+4=8;-6=2", ["replace"], 4, 1, id="in the first step"),
    pytest.param("3+2=5;-1=4;+4=8;-6=3", ["replace"], 19, 4, id="in the last step"),
    pytest.param(TAPE + "-", ["delete"], 20, 4, id="behind the last step"),
    pytest.param("3+2=5;-1=4;-6=2", ["insert"], None, 3, id="a missing step stands nowhere"),
    pytest.param("", ["insert"], None, 1, id="nothing was said: in the first step"),
    pytest.param(TAPE, [], None, None, id="what is right has no error"),
])
def test_where_the_first_error_stands(row_of, text, first, first_error, first_wrong_step):
    row = row_of(text)
    assert [op for op, i, j in row["edit_ops"]][:1] == first
    assert row["first_error"] == first_error
    assert row["first_wrong_step"] == first_wrong_step


def test_a_character_of_several_tokens_shows_its_step_whole(bytewise):
    """The first error is the first byte of a wide space: it stands before the second step."""
    ids = ids_of("A\n\u3000B", bytewise)
    row = SUM | response(
        "A\n\u3000B", 1, rejected_ids=ids, chosen_token_ids=None, chosen_ops=None)
    row |= one.nearest_edit(ids, [("A\nB", ids_of("A\nB", bytewise))])
    assert one.edit_row(row, "oracle", bytewise)["first_error"] == 2
    assert one.edit_row(row, "oracle", bytewise)["first_wrong_step"] == 1


def test_an_edit_is_shown_in_one_text(row_of, characters):
    row = row_of("3+2=6;-1=4;+8;-6=2;")
    assert one.marked(row, characters) == "3+2=[-6-]{+5+};-1=4;+{+4+}{+=+}8;-6=2[-;-]</s>"


@pytest.mark.parametrize("prompt", [
    pytest.param("3+2-1+4\n-6=", id="text"),
    pytest.param([{"content": "Sum!"}, {"content": "3+2-1+4\n-6="}], id="the last of a chat"),
])
def test_the_report_shows_edits_and_counts_what_was_dropped_or_not_as_usual(
        row_of, characters, capsys, prompt):
    row = row_of("3+2=6;-1=4;+4=8;-6=2") | {"prompt": prompt}
    right = row_of(TAPE)
    encoder = encoder_of(characters)
    encoder.notes["odd"] = 2
    one.report([row, row | {"chosen": TAPE}, right], Counter(gate=3), encoder)
    assert capsys.readouterr().out == (
        "3+2-1+4 -6=\n    3+2=[-6-]{+5+};-1=4;+4=8;-6=2</s>\n" * 2
        + "3 rows: 2 edits, 1 with a preferred response; dropped: {'gate': 3}\n"
        + "responses: {'odd': 2}\n")


# --- B2: right responses ---

@pytest.fixture(params=["oracle", "nearest"])
def proportion(request, policy_says, characters):
    """The rows of 200 sums and why other responses have none. To each there is a right response,
    and a wrong one, in turn with a wrong last digit and without anything of the solution."""
    args = one.Args(train_prompts=160, test_prompts=32)
    encoder = encoder_of(characters)
    problems = []
    said = []
    for k, problem in enumerate(one.make_problems(args)):
        problems.append(encoder.encode_problem(problem, args))
        right = problem["solution"]
        digit = (int(right[-1]) + 1) % 10
        wrong = f"{right[:-1]}{digit}" if k % 2 else ";;;;"
        said += [(right, True), (wrong, True)]
    policy_says(*said)
    sampled = one.sample_responses(problems, None, encoder, args)
    return one.edit_responses(sampled, request.param, {}, args, encoder)


def test_b1_a_wrong_response_has_a_row_and_its_right_sibling_is_preferred(proportion):
    edits = [row for row in proportion[0] if row["edit_ops"]]
    assert len(edits) == 100
    for row in edits:
        assert row["edit_ops"] == [["replace", 19, 19]]
        assert row["chosen"] == row["edited"]


def test_b1_a_response_without_a_row_has_a_reason(proportion):
    rows, reasons = proportion
    assert reasons == {
        "gate: the edit changes more than 80%": 100,
        "response: right": 400 - 100 - len(rows),
    }


def test_b2_right_responses_are_rows_in_the_proportion_of_usable_edits(proportion):
    right = [row for row in proportion[0] if not row["edit_ops"]]
    assert 70 < len(right) < 130  # of 200, since half of the edits are usable
    for row in right:
        assert row["edited"] == row["rejected"]
        assert row["chosen"] is None


# --- What stage 1 writes ---

@pytest.fixture(scope="module")
def stage(tiny_run):
    """Run stage 1 in a folder, on rows of --data, or on a task of 13 prompts without SFT."""
    def call(folder, rows=None, **flags):
        args = {"run": str(folder / "new"), "max_edit_share": 1.0}
        if rows is None:
            args |= {"train_prompts": 8, "test_prompts": 4, "sft_steps": 0, "hidden_size": 16}
        else:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (folder / "data").write_text("\n".join(lines))
            args |= {"data": str(folder / "data"), "model": str(tiny_run / "policy")}
        args |= flags
        one.main(one.Args(**args))
        return rows_of(Path(args["run"]) / "edits.jsonl")
    return call


def test_every_sample_has_a_row_with_the_columns_of_its_problem(tiny_run):
    rows = rows_of(tiny_run / "edits.jsonl")
    for problem in rows_of(tiny_run / "problems.jsonl"):
        samples = [row for row in rows if row["id"] == problem["id"]]
        assert len(samples) == 2
        for row in samples:
            assert row["editor"] == "oracle"
            assert row["edited"] in problem["solutions"]
            assert all(row[name] == problem[name] for name in ("split", "prompt", "prompt_ids"))


def test_no_more_than_edit_prompts_problems_for_training_are_edited(stage, tmp_path, capsys):
    rows = stage(tmp_path, edit_prompts=5)
    assert Counter(row["split"] for row in rows) == {"train": 10, "test": 8, "val": 2}
    assert "'problem: beyond --edit_prompts': 3" in capsys.readouterr().out


@pytest.mark.parametrize("is_data, flags, rate", [
    pytest.param(False, {}, 3e-3, id="the small policy"),
    pytest.param(True, {}, 1e-5, id="a pretrained one"),
    pytest.param(True, {"sft_lr": 1e-4}, 1e-4, id="a rate of one's own"),
])
def test_the_learning_rate_fits_the_policy_and_is_saved(stage, tmp_path, is_data, flags, rate):
    stage(tmp_path, [GOOD] * 3 if is_data else None, **flags)
    assert json.loads((tmp_path / "new" / "01_args.json").read_text())["sft_lr"] == rate


def test_problems_that_fit_no_context_or_no_template_are_counted(chat_model):
    encoder = encoder_of(one.hf.AutoTokenizer.from_pretrained(chat_model))
    problems = []
    for role, words in (("user", 3), ("user", 40), ("tool", 3)):
        prompt = [{"role": role, "content": " tea" * words}]
        problems.append({"id": words, "prompt": prompt, "responses": []})
    dropped = Counter()
    args = one.Args(max_new_tokens=20)
    [problem] = one.fitting(problems, encoder, 30, dropped, args)
    assert problem["id"] == 3
    assert problem["tokens"] == len(problem["prompt_ids"]) + 20
    assert dropped == {
        "problem: longer than the model's context": 1,
        "problem: the tokenizer or its chat template refuses it (no tools)": 1,
    }


# --- Rules ---

@pytest.fixture
def rules_file(tmp_path):
    """A file of rules, as an editor on Windows writes it."""
    path = tmp_path / "rules"
    path.write_text("\ufeffsoap\tsalt\n\nwine\tcheese\n", encoding="utf-8")
    return f"rules:{path}"


@pytest.fixture
def ruled(stage, tmp_path, rules_file, policy_says):
    """The edits by rules of 30 prompts with three samples each; one is without an error."""
    policy_says((" tea and soap", False), (" soap", True), (" tea", True))
    prompts = [{"prompt": f"Ada {name}"} for name in one.PEOPLE]
    return stage(tmp_path, prompts, editor=rules_file, samples=3)


def test_rules_edit_the_samples_that_they_match_and_end_none(ruled, tokenizer):
    edits = Counter()
    for row in ruled:
        ended = row["edited_ids"][-1] == tokenizer.eos_token_id
        edits[row["rejected"], row["edited"], ended] += 1
    assert edits == {(" tea and soap", " tea and salt", False): 30, (" soap", " salt", True): 30}


def test_a_sample_that_breaks_no_rule_is_preferred(ruled):
    assert {(row["chosen"], row["editor"]) for row in ruled} == {(" tea", "rules")}


def test_later_stages_get_the_rules_that_judge(ruled, tmp_path):
    for problem in rows_of(tmp_path / "new" / "problems.jsonl"):
        assert problem["rules"] == ["soap", "wine"]


def test_an_edit_by_rules_of_data_makes_its_pair(stage, tmp_path, rules_file):
    data = [{"prompt": "What", "response": " soap"}] * 3
    for row in stage(tmp_path, data, editor=rules_file):
        assert row["edit_ops"] == [["replace", 0, 0]]  # the end token stays
        assert row["chosen"] == row["edited"] == " salt"


# --- Data of a user's own ---

PAIR = {"chosen": " tea", "rejected": " soap"}
EDIT = {"response": " soap", "edited": " salt"}
SOLVED = {"solution": " The answer is tea", "answer": "tea", "response": " The answer is soap"}
TEA = "The answer is tea"
LLM = {"editor": "some LLM"}
GOOD = {"prompt": "What", **EDIT}
GOOD_PAIR = {"prompt": "What", **PAIR}
USER = [{"role": "user", "content": "What"}]
SAYS = {"role": "assistant", "content": " soap"}


def as_chat(row):
    """The texts of a row as messages. The prompt of a pair stays: it may stand among messages."""
    chat = dict(row)
    for name in set(row) - {"prompt", "answer", "editor"}:
        if row[name]:
            chat[name] = [{"role": "assistant", "content": row[name]}]
    if "response" in row:
        chat["prompt"] = USER
    return chat


@pytest.fixture
def chat_model(tiny_run, tmp_path, tokenizer):
    """The policy with a chat template: a turn ends, the assistant's begins with `A:`; no tools."""
    path = shutil.copytree(tiny_run / "policy", tmp_path / "chat_model")
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ 'A:' if m.role == 'assistant' }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}")
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("columns, editor, chosen, edited", [
    pytest.param(PAIR | {"edited": " salt"}, "human", " tea", " salt", id="pairs and edits"),
    pytest.param(PAIR, "human", " tea", None, id="pairs"),
    pytest.param(PAIR | {"answer": "5"}, "human", " tea", None, id="pairs with answers"),
    pytest.param(EDIT, "human", " salt", " salt", id="edits"),
    pytest.param(EDIT | LLM, "some LLM", " salt", " salt", id="edits with their editor"),
    pytest.param(SOLVED, "nearest", None, " " + TEA, id="problems"),
    pytest.param(SOLVED | LLM | {"edited": TEA}, "some LLM", TEA, TEA, id="edited problems"),
])
@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_a_shape_of_data(stage, tmp_path, chat_model, is_chat, columns, editor, chosen, edited):
    texts = {"chosen": chosen, "edited": edited}
    row = {"prompt": "What", **columns}
    if is_chat:
        row = as_chat(row)
        texts = as_chat(texts)
    for found in stage(tmp_path, [row] * 3, model=chat_model):
        assert found["prompt"] == (USER if is_chat else "What")
        assert {name: found[name] for name in texts} == texts
        assert found["editor"] == editor
        assert edited or found["edit_ops"] is found["edited_ids"] is None


@pytest.mark.parametrize("columns, ops", [
    pytest.param(PAIR, [["replace", 0, 0]], id="pairs: soap, tea"),
    pytest.param(PAIR | {"edited": " salt"}, [["replace", 0, 0]], id="pairs and edits"),
    pytest.param(PAIR | {"edited": " tea"}, None, id="the preferred response is the edit"),
    pytest.param(EDIT, None, id="an edit by a person makes the pair"),
    pytest.param(SOLVED, None, id="nothing is preferred"),
])
def test_a_row_has_the_operations_to_what_data_prefers(stage, tmp_path, columns, ops):
    for row in stage(tmp_path, [{"prompt": "What", **columns}] * 3):
        assert row["chosen_ops"] == ops


def test_an_editor_may_be_chosen(stage, tmp_path):
    row = {"prompt": "What", **SOLVED, **LLM, "edited": TEA}
    for found in stage(tmp_path, [row] * 3, editor="nearest"):
        assert found["editor"] == "nearest"
        assert found["edited"] == " " + TEA


@pytest.mark.parametrize("prompt, text", [
    pytest.param("What", "What", id="text"),
    pytest.param(USER, "What</s>A:", id="chat"),
])
def test_the_template_is_applied_to_a_chat_alone(chat_model, prompt, text):
    tokenizer = one.hf.AutoTokenizer.from_pretrained(chat_model)
    encoded = encoder_of(tokenizer).encode_prompt(prompt)
    assert encoded == {"prompt_text": text, "prompt_ids": tokenizer(text).input_ids}


@pytest.mark.parametrize("pattern, begin", [("$A </s>", []), ("<pad> $A </s>", ["<pad>"])])
@pytest.mark.parametrize("has_begin", [False, True])
def test_a_prompt_begins_as_a_text_of_its_tokenizer_once_and_does_not_end_so(
        tokenizer, pattern, begin, has_begin):
    ids = tokenizer("What").input_ids
    specials = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<pad>", "</s>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        pattern, special_tokens=specials)
    begin_ids = tokenizer.convert_tokens_to_ids(begin)
    assert tokenizer("What").input_ids == [*begin_ids, *ids, tokenizer.eos_token_id]
    text = "".join(begin) + "What" if has_begin else "What"
    assert encoder_of(tokenizer).encode_prompt(text)["prompt_ids"] == begin_ids + ids


def test_a_response_has_one_end_token(tokenizer):
    encoder = encoder_of(tokenizer)
    problem = {"prompt": "What", **encoder.encode_prompt("What")}
    for text in (" tea", " tea</s>"):
        assert encoder.encode_response(problem, text) == ids_of(" tea", tokenizer)
        assert encoder.encode_response(problem, text, False) == ids_of(" tea", tokenizer, False)


def test_a_tenth_of_the_problems_tests_and_a_tenth_validates():
    problems = one.with_splits([{}] * 40, one.Args())
    assert Counter(p["split"] for p in problems) == {"train": 32, "test": 4, "val": 4}


def test_few_prompts_are_split_row_by_row(stage, tmp_path):
    rows = stage(tmp_path, [GOOD] * 3)
    assert {row["split"] for row in rows} == {"test", "train", "val"}


@pytest.mark.parametrize("prompts, count", [
    pytest.param(["a", "b", "c"], 0, id="none"),
    pytest.param(["a", "a", "b"], 1, id="in two splits"),
    pytest.param(["a", "a", "a"], 2, id="in three splits"),
])
def test_duplicates_of_prompts_over_splits_are_said(read, capsys, prompts, count):
    read([GOOD | {"prompt": prompt} for prompt in prompts])
    assert re.search(rf"rows are split one by one\D* {count} duplicates", capsys.readouterr().out)


def test_many_prompts_have_no_duplicates_over_splits(read, capsys):
    problems, _ = read([GOOD | {"prompt": str(k % 20)} for k in range(40)])
    assert len(problems) == 20
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", [
    pytest.param({"answer": "jam"}, id="another answer"),
    pytest.param({"solution": "It is tea"}, id="no marker"),
    pytest.param({"solution": TEA + " or jam"}, id="two answers"),
])
def test_a_row_whose_solution_does_not_end_in_its_answer_is_dropped(read, columns):
    row = {"prompt": "What", **SOLVED}
    problems, dropped = read([row, row | columns, row, row | columns])
    assert dropped == {"row: its solution does not end in its answer": 2}
    assert {problem["id"] for problem in problems} == {"row-0", "row-2"}
    assert {problem["right"] for problem in problems} == {one.answer_pattern("tea")}


def test_later_stages_get_the_pattern_that_judges(stage, tmp_path, capsys):
    row = {"prompt": "What", **SOLVED}
    assert len(stage(tmp_path, [row, row, row, row | {"answer": "jam"}])) == 3
    assert "'row: its solution does not end in its answer': 1" in capsys.readouterr().out
    for problem in rows_of(tmp_path / "new" / "problems.jsonl"):
        assert re.search(problem["right"], TEA)


def test_pairs_without_a_difference_are_dropped_and_counted(stage, tmp_path, capsys):
    same = GOOD_PAIR | {"chosen": " soap"}
    rows = stage(tmp_path, [GOOD_PAIR, same, GOOD_PAIR, same, GOOD_PAIR])
    assert [row["chosen"] for row in rows] == [" tea"] * 3
    assert "dropped: {'pair: chosen and rejected are the same': 2}" in capsys.readouterr().out


def test_without_any_difference_the_stage_ends(stage, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        stage(tmp_path, [GOOD_PAIR | {"chosen": " soap"}] * 3)
    *_, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert error == (
        "error: no response has a usable edit: {'pair: chosen and rejected are the same': 3}")


@pytest.fixture(scope="module")
def gsm8k(stage, solutions, shared, tmp_path_factory):
    """80 short solutions by language models, and their rows."""
    longest = lambda row: max(row["solution"], row["response"], key=len)
    data = [row for row in solutions if len(row["prompt"] + longest(row)) < 300][:80]
    model = str(shared / "models" / "stories260K")
    rows = stage(tmp_path_factory.mktemp("gsm8k"), data, model=model)
    return data, rows, one.hf.AutoTokenizer.from_pretrained(model)


def test_b1_a_wrong_solution_of_gsm8k_is_edited_into_the_nearest_right_text(gsm8k):
    data, rows, tokenizer = gsm8k
    encoder = encoder_of(tokenizer)
    edits = [row for row in rows if row["edit_ops"]]
    assert len(edits) == len([row for row in data if not row["is_correct"]])
    for edit in edits:
        same = [row for row in data if row["prompt"] == edit["prompt"]]
        right = [row["response"] for row in same if row["is_correct"]]
        distances = {}
        problem = {"prompt": edit["prompt"], **encoder.encode_prompt(edit["prompt"])}
        for text in (same[0]["solution"], *right):
            ids = encoder.encode_response(problem, text)
            distances[text] = plain_distance(edit["rejected_ids"], ids)
        assert len(edit["edit_ops"]) == distances[edit["edited"]] == min(distances.values())
        assert edit["chosen"] in (right or [None])


def test_many_prompts_are_split_by_prompt(gsm8k):
    splits = {}
    for row in gsm8k[1]:
        assert splits.setdefault(row["prompt"], row["split"]) == row["split"]
    assert len(splits) >= 20


# --- The texts of tokens ---

@pytest.fixture(params=["bytes", "sentencepiece"])
def splitter(request, bytewise):
    """A tokenizer to which many characters are several tokens each."""
    if request.param == "bytes":
        return bytewise
    folder = request.getfixturevalue("shared") / "models" / "stories260K"
    return one.hf.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", [
    pytest.param("a \u4e16\u00e9 b", id="characters of three bytes and of two"),
    pytest.param("\U0001F600\U0001F600", id="pictures"),
    pytest.param("", id="nothing"),
])
def test_texts_of_tokens_join_to_the_text(splitter, text):
    ids = ids_of(text, splitter, False)
    assert "".join(one.token_texts(ids, splitter)) == splitter.decode(ids) == text


@pytest.mark.parametrize("text, texts", [
    pytest.param("a\u4e16b", ["a", "", "", "\u4e16", "b"], id="whole"),
    pytest.param("ab\u00e9", ["ab", "", "\u00e9"], id="at the end"),
])
def test_a_character_stands_at_the_last_of_its_tokens(bytewise, text, texts):
    assert one.token_texts(ids_of(text, bytewise, False), bytewise) == texts


def test_texts_of_tokens_join_to_the_text_whatever_the_policy_draws(splitter):
    rng = random.Random(0)
    for length in range(1, 300):
        ids = [rng.randrange(256) for _ in range(length)]  # most bytes are no characters
        texts = one.token_texts(ids, splitter)
        assert len(texts) == length
        assert "".join(texts) == splitter.decode(ids)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_character_that_the_limit_cuts_stands_at_the_last_token(bytewise, size):
    ids = ids_of("ab\U0001F600", bytewise, False)[:1 + size]
    assert one.token_texts(ids, bytewise) == ["ab"] + [""] * (size - 1) + ["\ufffd"]


class Counting:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


@pytest.mark.parametrize("text, stop, most", [
    pytest.param("a", 1, 8, id="letters"),
    pytest.param("\U0001F600", 4, 16, id="pictures"),
    pytest.param("\u4e16", 1, 8, id="the first bytes of characters, without the rest"),
    pytest.param("\u4e16" * 9 + "\u4e17", 29, 64, id="characters, now and then one is cut"),
])
def test_texts_of_tokens_cost_a_few_ids_a_token(bytewise, text, stop, most):
    """So the time grows linearly, and not with the square of the length."""
    ids = ids_of(text, bytewise, False)[:stop] * 1000
    counting = Counting(bytewise)
    one.token_texts(ids, counting)
    assert counting.decoded < most * len(ids)


# --- All rows, of a task and of chats ---

@pytest.fixture(params=["task", "chat"])
def written(request, tiny_run, stage, tmp_path, chat_model):
    """All rows of a task, or of a chat."""
    if request.param == "task":
        return rows_of(tiny_run / "edits.jsonl")
    row = as_chat({"prompt": "What", "edited": " salt", **PAIR})
    return stage(tmp_path, [row] * 3, model=chat_model)


def test_the_operations_make_edited_of_rejected(written):
    for row in written:
        assert apply(row["edit_ops"], row["rejected_ids"], row["edited_ids"]) == row["edited_ids"]


def test_the_operations_make_chosen_of_rejected(written):
    assert any(row["chosen_ops"] for row in written)
    for row in written:
        assert (row["chosen_ops"] is None) == (row["chosen"] is None)
        if row["chosen"] is not None:
            made = apply(row["chosen_ops"], row["rejected_ids"], row["chosen_token_ids"])
            assert made == row["chosen_token_ids"]


@pytest.mark.parametrize("name", ["rejected", "chosen", "edited"])
def test_the_ids_are_those_of_the_texts(written, tokenizer, name):
    for row in written:
        ids = row[one.ID_COLUMNS[name]]
        if row[name] is None:
            assert ids is None
        else:
            ended = tokenizer.eos_token_id in ids
            text = row[name]
            if isinstance(text, list):
                [turn] = text
                text = turn["content"]
            assert ids == ids_of(text, tokenizer, ended)


def test_no_column_has_a_name_with_a_meaning_for_other_trainers(written):
    for row in written:
        assert not {"margin", "chosen_ids"} & set(row)


# --- Messages ---

SYSTEM = {"role": "system", "content": "Be brief."}
MORE = {"role": "user", "content": "And then?"}
CALL = SAYS | {"tool_calls": [{"function": {"name": "look"}}]}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What"}]}


@pytest.fixture
def read(tmp_path):
    """The problems of rows of --data, and the count of the rows that were dropped."""
    def call(rows):
        one.write_jsonl(tmp_path / "data", rows)
        return one.read_data(one.Args(data=str(tmp_path / "data"), model="any"), {})
    return call


@pytest.mark.parametrize("prompt, turns, read_as", [
    pytest.param("What", [], USER, id="the response alone"),
    pytest.param(USER, [], USER, id="the response alone, behind messages"),
    pytest.param("What", USER, USER, id="the whole chat"),
    pytest.param("What", [SYSTEM, *USER], [SYSTEM, *USER], id="a chat with a system turn"),
    pytest.param([SYSTEM, *USER], [SYSTEM, *USER], [SYSTEM, *USER], id="all of the prompt again"),
    pytest.param("What", [SAYS, MORE], [*USER, SAYS, MORE], id="turns behind the prompt"),
])
def test_the_turns_before_a_response_belong_to_its_prompt(read, prompt, turns, read_as):
    chats = {"chosen": [*turns, SAYS | {"content": " tea"}], "rejected": [*turns, SAYS]}
    [problem], dropped = read([{"prompt": prompt, **chats}])
    [found] = problem["responses"]
    assert problem["prompt"] == read_as
    assert found["chosen"] == " tea"
    assert found["rejected"] == " soap"
    assert not dropped


def test_one_response_may_be_messages_and_the_other_a_text(read):
    [problem], dropped = read([{"prompt": "What", "chosen": [*USER, SAYS], "rejected": " tea"}])
    assert problem["prompt"] == USER
    assert problem["responses"][0]["rejected"] == " tea"
    assert not dropped


@pytest.mark.parametrize("columns, reason", [
    pytest.param({"chosen": [SAYS, MORE]}, "chat: it does not end with words of the assistant",
                 id="it ends with the user"),
    pytest.param({"chosen": [SAYS | {"content": ""}]},
                 "chat: it does not end with words of the assistant", id="it ends in silence"),
    pytest.param({"chosen": [SAYS | {"reasoning_content": "Hm."}]},
                 "chat: it does not end with words of the assistant", id="a thought beside"),
    pytest.param({"chosen": [CALL]}, "chat: it does not end with words of the assistant",
                 id="a tool call"),
    pytest.param({"chosen": [CALL | {"content": None}]},
                 "chat: a turn is not text alone (a tool call, parts, an image)",
                 id="a tool call without content"),
    pytest.param({"prompt": [PARTS]},
                 "chat: a turn is not text alone (a tool call, parts, an image)", id="parts"),
    pytest.param({"chosen": [SAYS, MORE, SAYS]}, "chat: its columns differ before the last turn",
                 id="more turns in one"),
    pytest.param({"chosen": [MORE, SAYS], "rejected": [*USER, SAYS]},
                 "chat: its columns differ before the last turn", id="other turns in one"),
    pytest.param({"prompt": [SYSTEM, *USER], "chosen": [*USER, SAYS], "rejected": [*USER, SAYS]},
                 "chat: its columns do not repeat its prompt", id="a part of the prompt again"),
    pytest.param({"prompt": [*USER, SAYS]}, "chat: its prompt ends with words of the assistant",
                 id="a prefill"),
])
def test_a_chat_that_is_no_prompt_with_a_response_is_dropped_and_counted(read, columns, reason):
    row = {"prompt": USER, "chosen": [SAYS], "rejected": [SAYS]}
    problems, dropped = read([row, row | columns, row, row | columns])
    assert {problem["id"] for problem in problems} == {"row-0", "row-2"}
    assert dropped == {reason: 2}


# --- Files ---

LINES = ['{"prompt": "Zo\u00eb"}', '{"prompt": "secret"}', '{"prompt": "Zo\u00eb"}']


@pytest.mark.parametrize("data, places", [
    pytest.param("\n".join(LINES).encode(), [1, 2, 3], id="no line break at the end"),
    pytest.param("\n".join(LINES).encode("utf-8-sig"), [1, 2, 3], id="a byte-order mark"),
    pytest.param("\r\n".join([*LINES, ""]).encode(), [1, 2, 3], id="Windows"),
    pytest.param("\n".join([*LINES, "", ""]).encode(), [1, 2, 3], id="blank lines at the end"),
    pytest.param("\n \r\n".join(LINES).encode(), [1, 3, 5], id="blank lines between"),
])
def test_files_of_many_systems_are_read(tmp_path, data, places):
    path = tmp_path / "data"
    path.write_bytes(data)
    rows = one.read_jsonl(path, "prompt")
    assert [row["prompt"] for row in rows] == ["Zo\u00eb", "secret", "Zo\u00eb"]
    assert [row["place"] for row in rows] == [f"{path}, line {k}" for k in places]


@pytest.mark.parametrize("data, message", [
    pytest.param("\n\n".join(LINES[1:]).encode("cp1252"), "line 3: Unicode", id="cp1252"),
    pytest.param("\n".join(LINES[1:]).encode("utf-16"), "line 1: Unicode", id="UTF-16"),
    pytest.param(b'{"prompt": 1}\n\n{"prompt": secret}', "line 3: JSONDecodeError", id="no JSON"),
    pytest.param(b'{"prompt": 1}\n["secret"]', "line 2: TypeError", id="no object"),
    pytest.param(b'{"prompt": 1}\n{"a": "secret"}', "line 2: KeyError, 'prompt'", id="no column"),
])
def test_a_fault_of_a_file_is_named_by_its_line_and_not_printed(fails, tmp_path, data, message):
    (tmp_path / "data").write_bytes(data)
    fails(f"{message}(?!.*secret)", one.read_jsonl, tmp_path / "data", "prompt")


# --- Bad input: exit status 2 and one line ---

NOT_SOLVED = {"prompt": "What", **SOLVED, "answer": "6"}


@pytest.mark.parametrize("rows, message", [
    pytest.param([], "no rows", id="no rows"),
    pytest.param([GOOD, "{oops"], "line 2: ", id="no JSON"),
    pytest.param([GOOD, [1]], "line 2: ", id="no object"),
    pytest.param([{"edited": "a"}], "line 1: .*'prompt'", id="no prompt"),
    pytest.param([GOOD, {"prompt": "a"}], "line 2: .*'response'", id="no response"),
    pytest.param([GOOD_PAIR, GOOD], "line 2: .*'chosen'", id="no chosen"),
    pytest.param([GOOD_PAIR, {"prompt": "a", "chosen": "b"}], "2: .*'rejected'", id="no rejected"),
    pytest.param([NOT_SOLVED, {"prompt": "a", "answer": "5"}], "2: .*'solution'", id="no solution"),
    pytest.param([NOT_SOLVED | {"answer": "tea", "solution": ""}], "1: .*`solution` is no text",
                 id="an empty solution"),
    pytest.param([NOT_SOLVED], "no row is left.*answer': 1}", id="another answer in the solution"),
    pytest.param([GOOD | {"prompt": 5}], "`prompt` is no text", id="a number"),
    pytest.param([GOOD | {"edited": 5}], "`edited`", id="a number as edit"),
    pytest.param([GOOD, GOOD | {"prompt": ""}], "line 2: .*`prompt`", id="an empty prompt"),
    pytest.param([GOOD, GOOD | {"prompt": ["user"]}], "2: .*`prompt` is no text", id="no turn"),
    pytest.param([GOOD_PAIR | {"chosen": []}], "line 1: .*`chosen` is no text", id="no turns"),
    pytest.param([GOOD, GOOD | {"prompt": [{"content": "a"}]}], "2: .*`prompt` is", id="no role"),
    pytest.param([GOOD | {"prompt": [{"role": "user"}]}], "no row is left.*text alone.*: 1}",
                 id="no content"),
    pytest.param([GOOD | {"prompt": USER}], "no chat template: write", id="no chat template"),
    pytest.param([GOOD | {"edited": "\ud800"}], "no problem is left.*tokenizer.*refuses.*: 1}",
                 id="half a character"),
])
def test_a_bad_row_is_named_before_anything_is_written(stage, fails, tmp_path, rows, message):
    fails(message, stage, tmp_path, rows)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rows, flags, message", [
    pytest.param([GOOD], {"data": "none"}, "no such file", id="no file"),
    pytest.param([GOOD], {"model": "/none"}, "/none", id="no such model"),
    pytest.param([GOOD], {"micro_batch": 0}, "--micro_batch 0: .* at least 1", id="no row"),
    pytest.param([GOOD], {"sft_steps": -1}, "--sft_steps -1: .* at least 0", id="less than none"),
    pytest.param([GOOD], {"model": None}, "needs --model", id="no model"),
    pytest.param([GOOD], {"sft_steps": 1}, "no column `solution`", id="nothing to learn from"),
    pytest.param([GOOD], {"max_new_tokens": 256}, "_tokens", id="no room for responses"),
    pytest.param([GOOD], {"editor": "magic"}, "magic", id="an unknown editor"),
    pytest.param([GOOD], {"editor": "oracle"}, "oracle: .*human", id="no oracle of data"),
    pytest.param([GOOD_PAIR], {"editor": "nearest"}, "fits is .'human'", id="no solution is near"),
    pytest.param(None, {"editor": "human"}, "oracle", id="no person edits a task"),
])
def test_a_bad_option_is_named_before_anything_is_written(
        stage, fails, tmp_path, rows, flags, message):
    fails(message, stage, tmp_path, rows, **flags)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text, message", [
    pytest.param("a b", "a tab and", id="no tab"),
    pytest.param("(a\tb", "a tab and", id="no regular expression"),
    pytest.param("a\t\\1", "a tab and", id="no such group"),
    pytest.param("\n", "has no rules", id="no rules"),
])
def test_bad_rules(fails, tmp_path, text, message):
    (tmp_path / "rules").write_text(text)
    fails(message, one.read_rules, f"rules:{tmp_path / 'rules'}")


# --- Stale outputs ---

@pytest.mark.parametrize("script", [two, three], ids=["stage 2", "stage 3"])
def test_what_later_stages_made_stops_a_stage(script, fails, run):
    fails("--overwrite\n$", script.main, script.Args(run=str(run)))


def test_stage_1_stops_before_it_changes_anything(stage, fails, tmp_path, run):
    times = lambda: {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    before = times()
    fails("^error: .*reward_.*--overwrite\n$", stage, tmp_path, run=str(run))
    assert times() == before


def test_overwrite_removes_what_later_stages_made_and_no_more(stage, tmp_path, run):
    (run / "report_of_mine").touch()
    stage(tmp_path, run=str(run), overwrite=True)
    left = {path.name for path in run.iterdir() if "args" not in path.name}
    assert left == {"policy", "problems.jsonl", "edits.jsonl", "report_of_mine"}


def test_a_run_without_usable_edits_leaves_no_edits_of_another_policy(stage, tmp_path):
    stage(tmp_path)
    with pytest.raises(SystemExit):
        stage(tmp_path, max_edit_share=0.0)
    assert not (tmp_path / "new" / "edits.jsonl").exists()

"""Stage 2: what is read from a model (A2, A6), A3 to A6 and B2 by hand, the rows that each model
learns from, a training step, and the metrics."""

import json
import random
import shutil
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import rows_of, two
from pytest import approx
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


class SaysIds(torch.nn.Module):
    """A stand-in for a reward model, with one weight, 1: what it says of a token is the token's id.
    Padding has the id 9, so that a missing mask shows."""
    config = SimpleNamespace(pad_token_id=9)
    device = "cpu"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids, **_):
        scores = self.weight * input_ids[..., None]  # (B, P + T, 1)
        return SimpleNamespace(logits=scores, hidden_states=[scores])

    def score(self, hidden):
        return hidden


def minus_log_sigmoid(x):
    return log(1 + exp(-x))


# Of the first row's rejected response the first token is replaced, of the second row's it is
# deleted; in both one token is kept. Of the siblings the first keeps one, the second none:
#   rejected 2 1    edited 3 1    U_0 = {(1, 1)}    sibling 2 7 5    U_0 = {(0, 0)}
#   rejected 4 2    edited 2      U_0 = {(1, 0)}    sibling 1        U_0 = {}
ROWS = [
    {
        "line": 3, "prompt_ids": [5], "rejected_ids": [2, 1],
        "edited_ids": [3, 1], "edit_ops": [["replace", 0, 0]],
        "chosen": "", "chosen_token_ids": [2, 7, 5],
        "chosen_ops": [["replace", 1, 1], ["insert", 2, 2]],
    },
    {
        "line": 7, "prompt_ids": [6, 7], "rejected_ids": [4, 2],
        "edited_ids": [2], "edit_ops": [["delete", 0, 0]],
        "chosen": "", "chosen_token_ids": [1],
        "chosen_ops": [["replace", 0, 0], ["delete", 1, 1]],
    },
]
NO_SIBLING = {"chosen": None, "chosen_token_ids": None, "chosen_ops": None}


# --- What is read from a model: A2, A6 ---

@pytest.mark.parametrize("kind", ["token", "token_sibling"])
def test_a2_reads_the_score_of_a_token_at_the_token_itself(kind):
    scores, mask = two.score_column(kind, SaysIds(), ROWS, "edited_ids")
    assert scores.tolist() == [[3, 1], [2, 0]]  # the 0 is padding
    assert mask.tolist() == [[True, True], [True, False]]


def test_a6_reads_the_last_token_of_a_response_even_if_it_is_the_padding_token():
    inputs, _ = two.pack([[5], [6, 7]], [[1, 9], [3]], SaysIds())
    assert two.sequence_score(SaysIds(), inputs).tolist() == [9, 3]


@pytest.mark.parametrize("kind", ["token", "sequence", "token_sibling", "sequence_edit"])
def test_a_new_reward_model_scores_everything_0(tiny_run, tokenizer, kind):
    model = two.open_reward_model(kind, tiny_run / "policy", tokenizer)
    scores, _ = two.score_column(kind, model, ROWS, "edited_ids")
    assert not scores.any()


# --- A3 ---

def test_a3_is_the_mean_over_the_tokens_of_the_response():
    scores = torch.tensor([
        [0.5, -2.0, 3.0],
        [-1.0, 4.0, 7.0],  # the 7 is padding
    ])
    R = two.response_score(scores, scores < 7)
    assert R.tolist() == [(0.5 - 2 + 3) / 3, (-1 + 4) / 2]


# --- A4 ---

def test_a4_keeps_the_tokens_that_no_operation_touches():
    # rejected  a b c d   e     0 1 2 3   4
    # edited    a X   d Y e     0 1   2 3 4
    ops = [["replace", 1, 1], ["delete", 2, 2], ["insert", 4, 3]]
    assert two.kept_tokens(ops, 5, 5) == [(0, 0), (3, 2), (4, 4)]


# --- A5 ---
# Two pairs; brackets are padding. Of the first the middle token is deleted, so of kept tokens, as
# (i in rejected, j in edited), U_0 = {(0, 0), (2, 1)}. Of the second no token is kept.
#
#             rejected                edited
#   first     0.5  -2.0   1.0         0.5   0.0  [7.0]
#   second   -1.0  [7.0] [7.0]        1.0  -0.3  -0.2
#
# Preference, -log sigmoid(alpha (R(edited) - R(rejected))) with alpha = 2 and R a mean, A3:
#   first     R(rejected) = (0.5 - 2.0 + 1.0) / 3 = -0.5 / 3    R(edited) = 0.5 / 2
#   second    R(rejected) = -1.0                                R(edited) = (1 - 0.3 - 0.2) / 3
PREFERENCE_1 = minus_log_sigmoid(2 * (0.5 / 2 + 0.5 / 3))
PREFERENCE_2 = minus_log_sigmoid(2 * (0.5 / 3 + 1.0))
# Kept tokens alike, 1/|U_0| times the sum of (r_j^w - r_i^l)^2; the second pair has no such term:
#   first     ((0.5 - 0.5)^2 + (0.0 - 1.0)^2) / 2
ALIKE_1 = 0.5
# Kept tokens near 0, which is ours, 1/|U_0| times the sum of ((r_j^w)^2 + (r_i^l)^2) / 2:
#   first     ((0.25 + 0.25) / 2 + (0.0 + 1.0) / 2) / 2
NEAR_0_1 = 0.375

BOTH = slice(0, 2)
FIRST = slice(0, 1)
SECOND = slice(1, 2)


def a5(pairs, N, beta=0.0, zero=0.0):
    """A5 over some of the two pairs above."""
    scores_l = torch.tensor([
        [0.5, -2.0, 1.0],
        [-1.0, 7.0, 7.0],
    ])
    scores_w = torch.tensor([
        [0.5, 0.0, 7.0],
        [1.0, -0.3, -0.2],
    ])
    mask_l = scores_l < 7
    mask_w = scores_w < 7
    kept = [[(0, 0), (2, 1)], []]
    return two.fine_grained_loss(
        scores_w[pairs], mask_w[pairs], scores_l[pairs], mask_l[pairs], kept[pairs],
        N=N, alpha=2.0, beta=beta, zero=zero,
    ).item()


def test_a5_prefers_the_edit():
    assert a5(BOTH, N=2) == approx((PREFERENCE_1 + PREFERENCE_2) / 2)


def test_a5_wants_the_same_score_of_a_kept_token_in_both_responses():
    assert a5(FIRST, N=1, beta=3.0) == approx(PREFERENCE_1 + 3 * ALIKE_1)


def test_kept_tokens_are_pulled_to_0():
    assert a5(FIRST, N=1, zero=4.0) == approx(PREFERENCE_1 + 4 * NEAR_0_1)


def test_a5_of_a_pair_without_kept_tokens_is_its_preference():
    assert a5(SECOND, N=1, beta=3.0, zero=4.0) == approx(PREFERENCE_2)


def test_the_token_model_learns_from_the_edit_and_its_original():
    # R(edited) - R(rejected): 4/2 - 3/2 = 1/2 and 2 - 6/2 = -1; 5 pairs in the batch. Kept tokens
    # have the same score in both responses, 1 in the first row, 2 in the second; each |U_0| = 1
    preference = minus_log_sigmoid(2 * 1 / 2) + minus_log_sigmoid(2 * -1)
    near_0 = 1 ** 2 + 2 ** 2
    args = two.Args(alpha=2.0, beta=1.0, zero=0.5)
    loss = two.batch_loss("token", SaysIds(), ROWS, 5, args)
    assert loss.item() == approx((preference + 0.5 * near_0) / 5)


def test_the_sibling_token_model_learns_from_the_sibling_and_the_rejected_response():
    # R(chosen) - R(rejected): 14/3 - 3/2 = 19/6 and 1 - 6/2 = -2; 5 pairs in the batch. In the
    # first row alone a token is kept, of score 2
    preference = minus_log_sigmoid(2 * 19 / 6) + minus_log_sigmoid(2 * -2)
    args = two.Args(alpha=2.0, beta=1.0, zero=0.5)
    loss = two.batch_loss("token_sibling", SaysIds(), ROWS, 5, args)
    assert loss.item() == approx((preference + 0.5 * 2 ** 2) / 5)


class SaysPositions(SaysIds):
    """What it says of a token is its position: in two responses a kept token may differ."""

    def forward(self, position_ids, **_):
        return super().forward(position_ids)


@pytest.mark.parametrize("kind, alike", [
    pytest.param("token", 0, id="the edit keeps 4 in its place"),
    pytest.param("token_sibling", (1 - 2) ** 2, id="the sibling keeps 2, a place further left"),
])
def test_a5_pulls_kept_tokens_of_its_own_alignment_together(kind, alike):
    #   rejected 4 2        positions 1 2        R = 3/2
    #   edited   4 8        positions 1 2        R = 3/2     U_0 = {(0, 0)}
    #   sibling  2 8        positions 1 2        R = 3/2     U_0 = {(1, 0)}
    row = {
        "prompt_ids": [5], "rejected_ids": [4, 2],
        "edited_ids": [4, 8], "edit_ops": [["replace", 1, 1]],
        "chosen_token_ids": [2, 8], "chosen_ops": [["delete", 0, 0], ["insert", 2, 1]],
    }
    args = two.Args(beta=3.0, zero=0.0)
    loss = two.batch_loss(kind, SaysPositions(), [row], 1, args)
    assert loss.item() == approx(log(2) + 3 * alike)


# --- A6 ---

def test_a6_prefers_the_sibling_by_the_scores_of_the_last_tokens():
    # R(chosen) - R(rejected): of 2 7 5 and 2 1 it is 5 - 1 = 4, of 1 and 4 2 it is 1 - 2 = -1
    loss = two.batch_loss("sequence", SaysIds(), ROWS, 5, two.Args())  # 5 pairs in the batch
    assert loss.item() == approx((minus_log_sigmoid(4) + minus_log_sigmoid(-1)) / 5)


def test_a6_on_edits_prefers_the_edit_by_the_scores_of_the_last_tokens():
    # R(edited) - R(rejected): of 2 8 and 2 1 it is 8 - 1 = 7, of 4 and 4 2 it is 4 - 2 = 2
    rows = [
        ROWS[0] | {"edited_ids": [2, 8], "edit_ops": [["replace", 1, 1]]},
        ROWS[1] | {"edited_ids": [4], "edit_ops": [["delete", 1, 1]]},
    ]
    loss = two.batch_loss("sequence_edit", SaysIds(), rows, 5, two.Args())
    assert loss.item() == approx((minus_log_sigmoid(7) + minus_log_sigmoid(2)) / 5)


# --- B2 ---

def test_b2_is_the_sum_over_output_tokens_divided_by_those_of_the_batch():
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])  # the 0 is padding
    assert two.generative_loss(logprobs, 7).item() == approx((1 + 2 + 3) / 7)


@pytest.fixture
def new_model(tiny_run, tokenizer):
    """Stage 2's new model; its head of zeros is made random, so that it tells tokens apart."""
    def call(kind):
        model = two.open_reward_model(kind, tiny_run / "policy", tokenizer)
        if kind != "generative":
            torch.nn.init.normal_(model.score.weight, std=0.3)
        return model
    return call


def test_b2_counts_the_outputs_and_not_the_prompts(new_model):
    model = new_model("generative")
    examples = [
        {"prompt_ids": [5, 6, 7], "output_ids": [8, 9, 2]},
        {"prompt_ids": [5] * 9, "output_ids": [9, 4, 7, 6, 2]},
        {"prompt_ids": [8], "output_ids": [11, 0, 0]},  # 0, the padding token, is none here
    ]
    plain = 0.0
    for example in examples:
        x = example["prompt_ids"]
        y = example["output_ids"]
        logits = model(torch.tensor([x + y])).logits[0, len(x) - 1:-1]
        plain += F.cross_entropy(logits, torch.tensor(y), reduction="sum").item()
    loss = two.batch_loss("generative", model, examples, 13, two.Args())
    assert loss.item() == approx(plain / 13, rel=1e-5)


@pytest.fixture
def words(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture
def problem(words, tokenizer):
    solution_ids = words(" One lives. They send.") + [tokenizer.eos_token_id]
    return {"prompt_ids": words("Q: One"), "solution_ids": solution_ids}


@pytest.fixture
def ends(words, tokenizer):
    """Two tokens end a response."""
    return [tokenizer.eos_token_id, *words(" Rome")]


@pytest.fixture(params=[
    pytest.param("", id="cut off"),
    pytest.param("</s>", id="ended"),
    pytest.param(" Rome", id="ended by the other end token"),
])
def attempt(request, words):
    """A response. Its first two tokens, Q and A, must be carried as ids: to read the text QA would
    make one unknown word of them."""
    return words("Q") + words("A") + words(". They go. The other" + request.param)


def test_the_rewrite_prompt_holds_problem_solution_and_attempt(problem, attempt, tokenizer, ends):
    ids = two.grm_prompt("rewrite", problem, attempt, tokenizer, ends)
    assert tokenizer.decode(ids) == (
        "Q: One"
        "\nReference solution:\n One lives. They send."
        "\nAttempt:\nQA. They go. The other"
        "\nCorrected attempt:\n"
    )


def test_the_locate_prompt_numbers_the_steps_of_solution_and_attempt(
        problem, attempt, tokenizer, ends):
    ids = two.grm_prompt("locate", problem, attempt, tokenizer, ends)
    assert tokenizer.decode(ids) == (
        "Q: One"
        "\nReference solution:\n[1] One lives.[2] They send."
        "\nAttempt:\n[1]QA.[2] They go.[3] The other"
        "\nFirst wrong step:\n"
    )


def test_an_example_is_the_prompt_and_the_edit_or_the_label_of_the_wrong_step(
        problem, words, tokenizer, ends):
    row = {"rejected_ids": [8, 9], "edited_ids": [8, 2], "first_wrong_step": 2}
    rewrite = two.grm_prompt("rewrite", problem, [8, 9], tokenizer, ends)
    locate = two.grm_prompt("locate", problem, [8, 9], tokenizer, ends)
    label = words("[2]") + [tokenizer.eos_token_id]
    assert two.grm_examples(row, problem, tokenizer, ends) == {
        "rewrite": {"prompt_ids": rewrite, "output_ids": [8, 2]},
        "locate": {"prompt_ids": locate, "output_ids": label},
    }


# --- B2: steps and token texts, where a character has several tokens ---

def byte_fallback():
    """As SentencePiece has it: a character that is no token of its own is one of bytes."""
    tokens = ["</s>", "<unk>", *(f"<0x{k:02X}>" for k in range(256)), *"▁+=;.0123456789abn"]
    numbers = {token: k for k, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(numbers, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    return backend


def byte_level():
    """As GPT-2 has it: every token is a byte."""
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.fixture(params=[byte_fallback, byte_level], ids=["byte fallback", "byte-level"])
def of_bytes(request):
    """A tokenizer with which 山 has three tokens, an emoji four."""
    return PreTrainedTokenizerFast(tokenizer_object=request.param(), eos_token="</s>")


def plain_ids(text, tokenizer):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("steps", [
    pytest.param(["3+2=4;", "😀+1=5;", "n山."], id="a step begins with several tokens"),
    pytest.param(["😀😀;", "😀;", "b"], id="a step ends behind several"),
    pytest.param([" é. ", "山山.\n\n", "😀"], id="sentences and lines, with the space behind"),
])
def test_a_step_begins_at_the_first_token_of_its_first_character(of_bytes, steps):
    end = of_bytes.eos_token_id
    ids = plain_ids("".join(steps), of_bytes)
    expected = [plain_ids(step, of_bytes) for step in steps]
    assert two.steps_of([*ids, end], of_bytes, [end]) == expected


def test_a_character_of_several_tokens_stands_at_its_last_one(of_bytes):
    ids = plain_ids("a山b", of_bytes)
    assert two.token_texts(ids, of_bytes) == ["a", "", "", "山", "b"]


def test_a_character_that_the_limit_cut_is_shown_as_decode_shows_it(of_bytes):
    ids = plain_ids("a😀", of_bytes)[:-1]
    texts = two.token_texts(ids, of_bytes)
    assert texts[0] == "a"
    assert "".join(texts) == of_bytes.decode(ids) != "a"


def test_of_any_ids_texts_add_up_to_decode_and_steps_to_the_ids(of_bytes):
    rng = random.Random(0)
    end = of_bytes.eos_token_id
    valid = plain_ids("a😀; 1.\n山. ", of_bytes)
    for length in range(1, 200):
        ids = [rng.choice([rng.randrange(1, 250), *valid]) for _ in range(length)]
        assert "".join(two.token_texts(ids, of_bytes)) == of_bytes.decode(ids)
        assert sum(two.steps_of([*ids, end], of_bytes, [end]), []) == ids


@pytest.mark.parametrize("text", [
    pytest.param("3+2=4;", id="a token a character"),
    pytest.param("😀山;", id="several"),
    pytest.param("", id="no characters: half of one again and again"),
])
def test_steps_take_time_in_proportion_to_the_tokens(of_bytes, monkeypatch, text):
    unit = plain_ids(text, of_bytes) or plain_ids("山", of_bytes)[1:]
    decode = of_bytes.decode
    decoded = []

    def count(ids, **options):
        decoded.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(of_bytes, "decode", count)
    sums = []
    for length in (600, 1200):
        decoded.clear()
        ids = (unit * length)[:length]
        two.steps_of(ids, of_bytes, [of_bytes.eos_token_id])
        sums.append(sum(decoded))
    assert sums[1] <= 2.1 * sums[0] <= 2.1 * 20 * 600


def test_the_embeddings_of_b2s_words_are_drawn_anew_and_no_others(tiny_run, new_model, words):
    policy = AutoModelForCausalLM.from_pretrained(tiny_run / "policy")
    before = policy.get_input_embeddings().weight
    after = new_model("generative").get_input_embeddings().weight
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    texts = [*two.INSTRUCTIONS.values(), *(f"[{k}]" for k in range(1, 10))]
    assert changed == sorted(words(text)[0] for text in texts)
    first, second = after[words("[1][2]")]
    assert F.cosine_similarity(first, second, dim=0).abs() < 0.7  # so labels are told apart


# --- Which rows ---

def test_an_epoch_takes_every_row_once_in_a_new_order():
    plan = two.plan_of("token", [*range(10)], 2, 4, two.Args())
    assert [len(batch) for batch in plan] == [4, 4, 2, 4, 4, 2]
    first = sum(plan[:3], [])
    second = sum(plan[3:], [])
    assert sorted(first) == sorted(second) == [*range(10)]
    assert first != second


def grm_plan(epochs, locate_epochs, size=16):
    """The batches for five rows, of which two are right; an example is its task and its row."""
    rows = []
    for k in range(5):
        edit_ops = [] if k < 2 else [["delete", 0, 0]]
        rows.append({"rewrite": ("rewrite", k), "locate": ("locate", k), "edit_ops": edit_ops})
    return two.plan_of("generative", rows, epochs, size, two.Args(locate_epochs=locate_epochs))


def test_the_grm_rewrites_every_response_and_locates_in_wrong_ones_alone():
    plan = grm_plan(epochs=1, locate_epochs=2)
    wrong = [("locate", k) for k in (2, 2, 3, 3, 4, 4)]
    assert sorted(sum(plan, [])) == wrong + [("rewrite", k) for k in range(5)]


def test_a_batch_of_the_grm_has_one_task_and_the_tasks_are_mixed():
    tasks = []
    for batch in grm_plan(epochs=9, locate_epochs=9, size=3):
        assert len({task for task, _ in batch}) == 1
        tasks.append(batch[0][0])
    assert tasks != sorted(tasks) and tasks != sorted(tasks, reverse=True)


@pytest.mark.parametrize("row", [
    pytest.param({"chosen": None, "edit_ops": [["insert", 0, 0]], "chosen_ops": None},
                 id="no sibling"),
    pytest.param({"chosen": "", "edit_ops": None, "chosen_ops": [["insert", 0, 0]]},
                 id="no edit"),
    pytest.param({"chosen": "", "edit_ops": [], "chosen_ops": [["insert", 0, 0]]},
                 id="an edit that changes nothing"),
])
def test_a_pair_has_a_preferred_response_and_an_edit(row):
    for kind in two.LEARNS_FROM:
        assert two.pairs_of(kind, [row, *ROWS]) == ROWS


EDIT_IS_CHOSEN = ROWS[0] | {"chosen_token_ids": [3, 1], "chosen_ops": None}


@pytest.mark.parametrize("kind, pairs", [
    ("token", [EDIT_IS_CHOSEN, ROWS[1]]),
    ("sequence_edit", [EDIT_IS_CHOSEN, ROWS[1]]),
    ("sequence", [ROWS[1]]),
    ("token_sibling", [ROWS[1]]),
])
def test_where_the_edit_is_chosen_there_is_no_pair_for_models_of_siblings(kind, pairs):
    assert two.pairs_of(kind, [EDIT_IS_CHOSEN, ROWS[1]]) == pairs


@pytest.mark.parametrize("kind, learns", [
    ("token", False), ("sequence_edit", False), ("sequence", True), ("token_sibling", True),
])
def test_without_any_edit_models_of_siblings_alone_learn(kind, learns):
    unedited = [row | {"edited_ids": None, "edit_ops": None} for row in ROWS]
    right = ROWS[0] | NO_SIBLING | {"edit_ops": []}
    assert two.pairs_of(kind, [*unedited, right]) == (unedited if learns else [])


@pytest.fixture
def edits(tiny_run):
    return rows_of(tiny_run / "edits.jsonl")


@pytest.fixture(scope="module")
def pairs_10(tiny_run, tmp_path_factory):
    """The metrics of stage 2 with --pairs 10; it takes no step."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("pairs") / "run")
    two.main(two.Args(run=str(run), pairs=10, epochs=0, locate_epochs=0, overwrite=True))
    return json.loads((run / "reward_metrics.json").read_text())


def test_a5_and_a6_learn_from_the_pairs_of_the_budget(pairs_10):
    assert pairs_10["token"]["training_rows"] == 10
    assert pairs_10["sequence"]["training_rows"] == 10


def test_the_budget_does_not_limit_the_grm(pairs_10, edits):
    training = [row for row in edits if row["split"] == "train"]
    assert pairs_10["generative"]["training_rows"] == len(training)


def test_the_budget_does_not_limit_what_is_held_out(pairs_10, tiny_run):
    without = json.loads((tiny_run / "reward_metrics.json").read_text())
    for kind in ("token", "sequence", "generative"):
        assert pairs_10[kind]["pairs"] == without[kind]["pairs"] > 20


# --- Which kinds ---

@pytest.fixture
def trained(run, monkeypatch):
    """The kinds that stage 2 trains with a flag --kind; nothing is learnt."""
    def call(kind, overwrite=True):
        seen = []
        monkeypatch.setattr(two, "train", lambda kind, *_: seen.append(kind))
        two.main(two.Args(run=str(run), kind=kind, overwrite=overwrite))
        return seen
    return call


@pytest.mark.parametrize("kind, kinds", [
    ("all", ["token", "sequence", "generative"]),
    ("cross", ["token_sibling", "sequence_edit"]),
    ("sequence_edit", ["sequence_edit"]),
])
def test_kind_names_a_kind_or_a_group_of_them(trained, kind, kinds):
    assert trained(kind) == kinds


@pytest.fixture
def rewrite_edits(run):
    """Change every row of edits.jsonl, by a function of the row."""
    def call(change):
        path = run / "edits.jsonl"
        rows = [json.dumps(row | change(row)) for row in rows_of(path)]
        path.write_text("\n".join(rows))
    return call


@pytest.mark.parametrize("group, left_out, learns", [
    ("all", "sequence", ["token", "generative"]),
    ("cross", "token_sibling", ["sequence_edit"]),
])
def test_models_of_siblings_are_left_out_and_it_is_said_where_the_edit_is_chosen(
        trained, rewrite_edits, capsys, group, left_out, learns):
    rewrite_edits(lambda row: {
        "chosen": row["edited"], "chosen_token_ids": row["edited_ids"], "chosen_ops": None})
    assert trained(group) == learns
    said = capsys.readouterr().out
    assert said.count("is left out: ") == 1
    assert f"reward_{left_out} is left out: `chosen` is the edit itself; the kinds" in said


def test_without_any_pair_models_are_left_out_and_no_edit_is_blamed(
        trained, rewrite_edits, capsys):
    rewrite_edits(lambda row: NO_SIBLING)
    assert trained("all") == ["generative"]
    said = capsys.readouterr().out
    assert "reward_token is left out: no rows for training" in said
    assert "reward_sequence is left out: no rows for training" in said
    assert "the edit itself" not in said


def test_without_any_edit_the_sibling_token_model_is_trained_and_measured(run, rewrite_edits):
    rewrite_edits(lambda row: {"edited": None, "edited_ids": None, "edit_ops": None})
    two.main(two.Args(run=str(run), kind="token_sibling", epochs=1, overwrite=True))
    rows = [row for row in rows_of(run / "edits.jsonl") if row["chosen"] is not None]
    training = [row for row in rows if row["split"] == "train"]
    metrics = json.loads((run / "reward_metrics.json").read_text())["token_sibling"]
    assert metrics["training_rows"] == len(training)
    assert metrics["preference_pairs"] == len(rows) - len(training) > 0
    assert metrics["pair_accuracy"] is None
    assert (run / "reward_token_sibling" / "model.safetensors").exists()


# --- What later stages made ---

OF_STAGE_3 = [
    "ppo_token", "ppo_sequence", "ppo_token_sibling", "ppo_sequence_edit", "rlmec",
    "rlmec_imitation", "rejection", "dpo", "dpo_edit",
]


@pytest.fixture
def finished(run):
    """A run with the policies of all methods, and what stage 4 made of them."""
    for name in OF_STAGE_3:
        (run / name).mkdir(exist_ok=True)
        (run / f"{name}.csv").touch()
    return run


@pytest.mark.parametrize("kind, made", [
    ("token", {"ppo_token"}),
    ("sequence", {"ppo_sequence"}),
    ("token_sibling", {"ppo_token_sibling"}),
    ("sequence_edit", {"ppo_sequence_edit"}),
    ("generative", {"rlmec", "rlmec_imitation"}),
    ("all", {"ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation"}),
    ("cross", {"ppo_token_sibling", "ppo_sequence_edit"}),
])
def test_overwrite_removes_the_policies_that_were_made_from_what_is_trained(
        trained, finished, kind, made):
    trained(kind)
    for name in OF_STAGE_3:
        stays = name not in made
        assert (finished / name).exists() == (finished / f"{name}.csv").exists() == stays


def test_overwrite_removes_what_stage_4_made_and_what_a_killed_run_had_saved(trained, finished):
    stale = ["03_state.pt", "responses.jsonl", "eval.json", "report.html"]
    for name in stale:
        (finished / name).touch()
    trained("token_sibling")
    assert not [name for name in stale if (finished / name).exists()]


@pytest.fixture
def before_stage_4(finished):
    for name in ("responses.jsonl", "eval.json", "report.html"):
        (finished / name).unlink()
    return finished


def test_a_policy_that_was_made_from_what_is_trained_stops_the_stage(before_stage_4, fails):
    args = two.Args(run=str(before_stage_4), kind="token_sibling")
    fails("/ppo_token_sibling would be stale", two.main, args)


def test_a_policy_that_was_made_from_another_kind_does_not(before_stage_4, trained):
    (before_stage_4 / "ppo_token_sibling").rmdir()
    (before_stage_4 / "ppo_token_sibling.csv").unlink()
    assert trained("token_sibling", overwrite=False) == ["token_sibling"]
    assert (before_stage_4 / "ppo_token").exists()


# --- Settings: the flags, or what fits the policy ---

@pytest.fixture
def settings(tmp_path):
    """Epochs, rows a step and learning rate where the policy came from `model`, or from none."""
    def call(kind, model, **flags):
        (tmp_path / "01_args.json").write_text(json.dumps({"model": model}))
        return two.settings(kind, two.Args(run=str(tmp_path), **flags))
    return call


@pytest.mark.parametrize("kind, small, pretrained", [
    ("token", [8, 64, 1.5e-3], [1, 16, 3e-5]),
    ("sequence", [12, 32, 1e-3], [1, 16, 3e-5]),
    ("token_sibling", [8, 64, 1.5e-3], [1, 16, 3e-5]),
    ("sequence_edit", [12, 32, 1e-3], [1, 16, 3e-5]),
    ("generative", [1, 16, 1.5e-3], [1, 16, 2e-5]),
])
def test_the_default_settings_fit_the_policy_and_are_said(
        settings, capsys, kind, small, pretrained):
    assert settings(kind, None) == small
    said = capsys.readouterr().out
    assert said == "reward_{}: epochs {}, rows a step {}, learning rate {}\n".format(kind, *small)
    assert settings(kind, "org/name") == pretrained


def test_a_run_folder_from_elsewhere_gets_the_settings_of_a_small_policy(tmp_path):
    assert two.settings("token", two.Args(run=str(tmp_path))) == [8, 64, 1.5e-3]


@pytest.mark.parametrize("flags, expected", [
    pytest.param({"epochs": 0}, [0, 16, 3e-5], id="0 epochs"),
    pytest.param({"batch": 3}, [1, 3, 3e-5], id="--batch"),
    pytest.param({"lr": 0.0}, [1, 16, 0.0], id="a rate of 0"),
])
def test_a_flag_is_taken_in_place_of_the_default(settings, flags, expected):
    assert settings("token", "org/name", **flags) == expected


def test_main_trains_with_the_settings(run, monkeypatch):
    seen = []
    monkeypatch.setattr(two, "train", lambda kind, model, plan, lr, args: seen.append((plan, lr)))
    flags = {"epochs": 3, "batch": 5, "lr": 0.25, "pairs": 10}
    two.main(two.Args(run=str(run), kind="token", overwrite=True, **flags))
    [(plan, lr)] = seen
    assert [len(batch) for batch in plan] == [5] * 6
    assert lr == 0.25


# --- A training step ---

@pytest.fixture
def batch_of(edits, tiny_run, tokenizer):
    """Seven rows of the tiny run; for the GRM seven of its examples."""
    def call(kind, model):
        if kind != "generative":
            return two.pairs_of(kind, edits)[:7]
        rows = two.grm_rows(edits[:7], model, tokenizer, two.Args(run=str(tiny_run)))
        return [row["rewrite"] for row in rows]
    return call


@pytest.mark.parametrize("micro_batch", [256, 3])
@pytest.mark.parametrize("kind", two.KINDS)
def test_a_step_takes_the_gradient_of_the_whole_batch(
        new_model, batch_of, grads, kind, micro_batch):
    model = new_model(kind)
    batch = batch_of(kind, model)
    N = 7  # pairs; for B2 output tokens
    if kind == "generative":
        N = sum(len(example["output_ids"]) for example in batch)
    two.batch_loss(kind, model, batch, N, two.Args()).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    two.train(kind, model, [batch], 1e-3, two.Args(micro_batch=micro_batch))
    assert len(grads) == 1
    assert (grads[0] - whole).norm() < 1e-5 * whole.norm()


def weights(steps, lr, **options):
    """The weight w of SaysIds before every step, and after the last one, of A6 on a pair in which
    the chosen response has R = 0 and the rejected one R = 8 w. The gradient, 8 sigmoid(8 w), is
    clipped to 1: it is always the same, so that a step of Adam lowers w by the learning rate."""
    seen = []
    model = SaysIds()
    model.register_forward_pre_hook(lambda *_: seen.append(model.weight.item()))
    row = {"prompt_ids": [5], "chosen_token_ids": [0], "rejected_ids": [8]}
    two.train("sequence", model, [[row]] * steps, lr, two.Args(**options))
    return seen[::2] + [model.weight.item()]  # each step looks at two responses


@pytest.mark.parametrize("step, rate", [
    pytest.param(0, 0, id="warm-up, 3 % of 40 steps"),
    pytest.param(1, 1, id="cosine at 0"),
    pytest.param(14, 0.75, id="cosine at 60 degrees, after 13 of 39 steps"),
    pytest.param(27, 0.25, id="cosine at 120 degrees, after 26 of 39 steps"),
])
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(step, rate):
    w = weights(40, lr=0.01)
    assert w[step] - w[step + 1] == approx(0.01 * rate, abs=1e-5)


def test_weight_decay_is_that_of_adamw():
    # w becomes w - lr weight_decay w - lr
    assert weights(1, lr=0.01, weight_decay=0.5) == approx([1, 1 - 0.005 - 0.01])


def after_a_step(*gradients):
    """Parameters that were 0 and had these gradients, each of another model, after a step of
    gradient descent with learning rate 1."""
    parameters = []
    for gradient in gradients:
        p = torch.nn.Parameter(torch.zeros(len(gradient)))
        p.grad = torch.tensor(gradient)
        parameters.append(p)
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    two.optimizer_step(optimizer, two.Args())
    return parameters


@pytest.mark.parametrize("gradient, step", [
    pytest.param([3.0, 4.0], [-0.6, -0.8], id="of norm 5"),
    pytest.param([0.3, 0.4], [-0.3, -0.4], id="of norm 0.5"),
])
def test_the_gradient_is_clipped_to_norm_1(gradient, step):
    [p] = after_a_step(gradient)
    assert p.tolist() == approx(step)


def test_each_model_is_clipped_by_itself():
    small, large = after_a_step([0.5], [12.0])
    assert small.item() == approx(-0.5)
    assert large.item() == approx(-1)


def test_a_step_leaves_no_gradient_behind():
    [p] = after_a_step([3.0, 4.0])
    assert p.grad is None


# --- Metrics ---

@pytest.mark.parametrize("positive, negative, area", [
    pytest.param([3, 1], [2, 0], 3 / 4, id="3 is above 2 and 0, 1 is above 0"),
    pytest.param([3, 1], [1], 1.5 / 2, id="a tie is one half"),
    pytest.param([3, 1], [], None, id="nothing to compare with"),
])
def test_auroc_is_the_share_of_pairs_in_which_the_positive_is_above(positive, negative, area):
    assert two.auroc(positive, negative) == area


@pytest.mark.parametrize("kind, better, worse, share", [
    pytest.param("token", [[1, 1], [2]], [[1], [1, 2]], 1.5 / 2, id="means: a tie, and 2 to 1.5"),
    pytest.param("token", [[2]], [[1, 1, 1.5]], 1, id="the rejected has the larger sum, 3.5 to 2"),
    pytest.param("token", [[-1, -1, -1]], [[-2]], 1, id="the better has the lower sum, -3 to -2"),
    pytest.param("token_sibling", [[1, 1, 1]], [[2]], 0, id="its larger sum, 3, does not count"),
    pytest.param("sequence", [1, 2, 0], [2, 1, -1], 2 / 3, id="the first is not"),
    pytest.param("sequence_edit", [[1], [2]], [[2], [2]], 0.5 / 2, id="1 to 2, and a tie"),
    pytest.param("generative", [[0.3, 0.3]], [[0.05, 0.9]], 1, id="products, 0.09 to 0.045"),
])
def test_accuracy_is_the_share_of_pairs_in_order(kind, better, worse, share):
    assert two.in_order(kind, better, worse) == approx(share)


@pytest.fixture
def located():
    """`localisation` on three rows, of which it uses:

    row    first edit    its token    those before    the edited token there
     1     replace 1       -1.0       -2.0              0.0, above it
     2     insert 1        none                         1.0, above the -9.0 at its place
     3     replace 2       -0.2        0.0, 0.5        -0.3, below it
    """
    rows = [
        {"edit_ops": [["replace", 1, 1], ["delete", 3, 3]]},
        {"edit_ops": [["insert", 1, 1]]},
        {"edit_ops": [["replace", 2, 2]]},
    ]
    rejected_scores = [[-2.0, -1.0, -0.1, -0.3], [0.0, -9.0], [0.0, 0.5, -0.2]]
    edited_scores = [[-2.0, 0.0, -0.1], [0.0, 1.0, -9.0], [0.0, 0.5, -0.3]]
    return two.localisation(rows, rejected_scores, edited_scores)


def test_a_low_score_marks_the_first_wrong_token(located):
    # -1.0 is below 0.0 and 0.5, but not below -2.0; the same holds for -0.2
    assert located["auroc"] == approx(4 / 6)


def test_first_edit_is_the_share_of_edited_tokens_above_the_original(located):
    assert located["first_edit"] == approx(2 / 3)


def test_the_accuracies_are_those_of_edits_and_of_siblings():
    # means: edited 2, rejected 3/2; edited 2, rejected 3; chosen 14/3, rejected 3/2; no sibling
    rows = [ROWS[0], ROWS[1] | NO_SIBLING]
    metrics, _ = two.evaluate("token", SaysIds(), rows, two.Args(micro_batch=1))
    assert metrics["pair_accuracy"] == 1 / 2
    assert metrics["preference_accuracy"] == 1


def test_pairs_and_preference_pairs_count_edits_and_siblings():
    rows = [ROWS[0], ROWS[1] | NO_SIBLING, EDIT_IS_CHOSEN]
    metrics, _ = two.evaluate("token", SaysIds(), rows, two.Args())
    assert (metrics["pairs"], metrics["preference_pairs"]) == (3, 1)


def test_the_edit_itself_is_no_preferred_sibling():
    # the edit, 3 1, is above 2 1; of the siblings 1 is below 4 2, and no other is one
    metrics, _ = two.evaluate("token", SaysIds(), [EDIT_IS_CHOSEN, ROWS[1]], two.Args())
    assert metrics["preference_accuracy"] == 0


def test_the_scale_of_rewards_on_every_token_is_that_of_their_sums():
    # rejected 2 + 1 and 4 + 2, chosen 2 + 7 + 5 and 1: 3, 6, 14, 1 with mean 6, squares 242 / 4
    metrics, _ = two.evaluate("token", SaysIds(), ROWS, two.Args())
    assert metrics["scale"] == approx({"mean": 6, "std": (242 / 4 - 6 ** 2) ** 0.5})


@pytest.mark.parametrize("kind, knows", [("token_sibling", True), ("sequence_edit", False)])
def test_a_reward_on_every_token_alone_says_where_the_error_is(kind, knows):
    metrics, _ = two.evaluate(kind, SaysIds(), ROWS, two.Args())
    assert (metrics["localisation"] is not None) == knows


def test_the_scale_is_that_of_both_siblings():
    # the last tokens of rejected and chosen, 1, 2, 5, 1: the mean is 9 / 4, squares have 31 / 4
    metrics, _ = two.evaluate("sequence", SaysIds(), ROWS, two.Args())
    deviation = (31 / 4 - (9 / 4) ** 2) ** 0.5
    assert metrics["scale"] == approx({"mean": 9 / 4, "std": deviation})


def test_rewards_that_do_not_vary_are_said(capsys):
    model = SaysIds()
    two.evaluate("token", model, ROWS, two.Args())
    assert capsys.readouterr().out == ""
    torch.nn.init.zeros_(model.weight)
    metrics, _ = two.evaluate("token", model, ROWS, two.Args())
    assert metrics["scale"]["std"] == 0
    assert "reward_token: its rewards do not vary" in capsys.readouterr().out


def test_exact_is_the_share_of_outputs_that_greedy_decoding_writes(new_model):
    model = new_model("generative")
    examples = []
    for x, T in (([5, 6], 4), ([7] * 9, 4), ([8, 9, 4], 2)):
        ids = model.generate(torch.tensor([x]), do_sample=False, max_new_tokens=T)[0].tolist()
        examples.append({"prompt_ids": x, "output_ids": ids[len(x):]})
    assert two.exact(model, examples, two.Args()) == 1
    examples[1]["output_ids"][-1] += 1
    assert two.exact(model, examples, two.Args(micro_batch=2)) == approx(2 / 3)


# --- reward_examples.jsonl ---

@pytest.mark.parametrize("kind, scores", [
    ("token", {3: [2, 1], 7: [4, 2]}),
    ("token_sibling", {3: [2, 1], 7: [4, 2]}),
    ("sequence", {3: 1, 7: 2}),
    ("sequence_edit", {3: 1, 7: 2}),
])
def test_the_scores_of_rejected_responses_go_by_their_line_in_edits(kind, scores):
    assert two.evaluate(kind, SaysIds(), ROWS, two.Args())[1] == scores


def test_an_example_has_scores_of_all_models_of_the_run(tiny_run):
    for example in rows_of(tiny_run / "reward_examples.jsonl"):
        T = len(example["tokens"])
        assert len(example["token"]) == len(example["generative"]) == T
        assert isinstance(example["sequence"], float)


def test_the_cross_adds_its_scores_to_the_examples(run, tiny_run):
    two.main(two.Args(run=str(run), kind="cross", epochs=0, overwrite=True))
    before = rows_of(tiny_run / "reward_examples.jsonl")
    after = rows_of(run / "reward_examples.jsonl")
    for example, earlier in zip(after, before, strict=True):
        assert len(example["token_sibling"]) == len(example["tokens"])
        assert isinstance(example["sequence_edit"], float)
        for kind in ("token", "sequence", "generative"):
            assert example[kind] == earlier[kind]


def test_the_score_of_the_grm_is_the_probability_itself(tiny_run):
    for example in rows_of(tiny_run / "reward_examples.jsonl"):
        assert all(0 <= p <= 1 for p in example["generative"])  # p_t, not p_t - 0.5


def test_an_example_names_its_wrong_tokens_and_keeps_earlier_scores(tmp_path, words, tokenizer):
    row = {
        "id": "a", "line": 3, "prompt": "Q:", "rejected_ids": words(" One lives. They"),
        "edit_ops": [["replace", 1, 1], ["insert", 2, 2], ["delete", 3, 4]],
    }
    path = tmp_path / "reward_examples.jsonl"
    two.save_examples(path, "token", [row], {3: [0.0, -1.0, 0.0, 0.5]}, tokenizer)
    two.save_examples(path, "sequence", [row], {3: 2.0}, tokenizer)
    assert rows_of(path) == [{
        "id": "a", "prompt": "Q:", "tokens": [" One", " lives", ".", " They"], "wrong": [1, 3],
        "token": [0.0, -1.0, 0.0, 0.5], "sequence": 2.0, "token_sibling": None,
        "sequence_edit": None, "generative": None,
    }]


# --- Bad input ---

@pytest.mark.parametrize("flags, least", [
    pytest.param({"batch": -1}, 1, id="rows a step"),
    pytest.param({"pairs": 0}, 1, id="pairs"),
    pytest.param({"epochs": -1}, 0, id="epochs, of which there may be none"),
])
def test_a_count_below_its_least_is_refused(run, fails, flags, least):
    [name] = flags
    args = two.Args(run=str(run), overwrite=True, **flags)
    fails(f"--{name} .*: it must be at least {least}", two.main, args)


@pytest.mark.parametrize("name", ["split", "chosen_ops"])
def test_a_row_without_a_column_is_named_by_file_line_and_column(run, fails, name):
    path = run / "edits.jsonl"
    path.write_text(path.read_text().replace(f'"{name}"', '"part"'))
    fails(f"edits.jsonl, line 1: KeyError.*'{name}'", two.main, two.Args(run=str(run)))


@pytest.mark.parametrize("family", [
    pytest.param("cohere", id="no class for scores"),
    pytest.param("bert", id="a head of another name"),
])
def test_a_family_without_a_head_for_scores_is_named(tmp_path, fails, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    fails(f"no .* with a head `score` for a {family}", two.check_family, tmp_path)


def test_a_missing_head_for_scores_is_said_before_anything_is_trained(run, fails, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("opened")

    AutoConfig.for_model("bert").save_pretrained(run / "policy")
    monkeypatch.setattr(two, "open_reward_model", forbidden)
    fails("for a bert", two.main, two.Args(run=str(run), overwrite=True))

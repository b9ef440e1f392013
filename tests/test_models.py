"""Other people's models: small random folders of seven families through all four stages."""

import csv
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, STAGES, four, one, rows_of, three, two
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
    PreTrainedTokenizerFast,
)

NAMES = "Ada Bob Cleo Dan Eva Finn Gus Hana Ivo Jane Kit Lena".split()


# --- The models ---

class Family(NamedTuple):
    """What models of a family and their tokenizers usually have. The special tokens have the first
    ids; bos (which begins every text, if there is one), eos and pad are ids."""
    specials: list
    bos: int | None
    eos: int
    pad: int | None
    config: dict
    more_rows: int = 0  # of the embeddings, beyond the tokens
    template: str | None = None  # of chats
    turn_end: str | None = None  # what ends a turn of a chat; by default eos


GPT = ["<|endoftext|>"]
QWEN = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
LLAMA = ["<unk>", "<s>", "</s>"]
GEMMA = ["<pad>", "<bos>", "<eos>"]
OPT = ["<s>", "<pad>", "</s>", "<unk>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ROPE = {"intermediate_size": 32, "num_key_value_heads": 2}
# every other layer of Gemma 3 sees the last eight tokens alone
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "gpt2": Family(GPT, None, 0, None, {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "llama": Family(LLAMA, 1, 2, None, ROPE | {"tie_word_embeddings": False}, template=INST),
    "qwen3": Family(QWEN, None, 0, None, ROPE | {"head_dim": 8, "tie_word_embeddings": True}, 37,
                    CHATML, "<|im_end|>"),
    "gemma3_text": Family(GEMMA, 1, 2, 0, ROPE | WINDOW | {"head_dim": 8}),
    "olmo2": Family(["<|padding|>", *GPT], None, 1, 0, ROPE),
    "opt": Family(OPT, 2, 2, 1, {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.1}),
    "gptj": Family(GPT, 0, 0, None, {"rotary_dim": 4, "n_inner": 32}, 29),
}
INCOMPLETE = {  # families that cannot do all
    "cohere": Family(GPT, 0, 0, None, ROPE),  # no head for scores
    "mamba": Family(GPT, None, 0, None, {"state_size": 4}),  # no keys and values of tokens
}


def make_tokenizer(family):
    texts = [f"What does {name} make? {name} makes bread.\nThe answer is 1." for name in NAMES]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 380, special_tokens=family.specials, show_progress=False)
    backend = Tokenizer.from_str(bpe.to_str())
    roles = {"eos_token": family.specials[family.eos]}
    if family.pad is not None:
        roles["pad_token"] = family.specials[family.pad]
    if family.bos is not None:
        bos = roles["bos_token"] = family.specials[family.bos]
        backend.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, family.bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=family.template, **roles)


def make_model(name, path):
    """Weights large enough that a wrong position or mask shows in the log-probs."""
    family = (FAMILIES | INCOMPLETE)[name]
    tokenizer = make_tokenizer(family)
    settings = {
        "vocab_size": len(tokenizer) + family.more_rows,
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 300, "initializer_range": 0.3,
        "bos_token_id": family.bos, "eos_token_id": family.eos, "pad_token_id": None,
        **family.config,
    }
    config = AutoConfig.for_model(name, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


# --- The data, and the stages ---

def data_row(k, shape):
    """A row of --data. solved, wrong: a problem, its solution and a wrong response; edited: a pair
    of responses and its edit; chat: the same as messages; unedited: a pair alone."""
    person = NAMES[k % 12]
    prompt = "Well, " * (k % 3) + f"what does {person} make? {k}"
    right = f" {person} makes bread.\nThe answer is {k}."
    wrong = f" {person} makes bread.\nThe answer is {k + 1}."
    texts = {"prompt": prompt, "chosen": right, "rejected": wrong}
    if shape == "unedited":
        return texts
    texts["edited"] = right
    if shape == "edited":
        return texts
    if shape == "chat":
        chats = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
        chats["prompt"][0]["role"] = "user"
        return chats
    return {"prompt": prompt, "solution": right, "answer": k, "response": wrong}


def data_rows(shape):
    rows = [data_row(k, shape) for k in range(24)]
    if shape == "solved":  # most of the problems have a right response as well
        rows += [row | {"response": row["solution"]} for row in rows if row["answer"] % 4]
    return rows


def prepare(folder, name, shape):
    """The flags of stage 1 for a random model of a family and data of a shape."""
    torch.manual_seed(0)
    make_model(name, folder / "model")
    (folder / "data").write_text("\n".join(json.dumps(row) for row in data_rows(shape)))
    return one.Args(
        run=str(folder / "run"), data=str(folder / "data"), model=str(folder / "model"),
        sft_steps=2 if shape in ("solved", "wrong") else 0, sft_lr=1e-4, max_new_tokens=6,
    )


def solutions(grm, wrong, *_, **__):
    """In the place of `rewrite`: a random GRM would never write a right response."""
    return [row["solution_ids"] for row in wrong]


CASES = [(name, "solved") for name in FAMILIES]
CASES += [("llama", "chat"), ("qwen3", "chat"), ("gpt2", "unedited"), ("gpt2", "wrong")]
TRAINED = {  # the methods that have what they need in data of a shape
    "solved": {"ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation"},
    "chat": {"ppo_token", "ppo_sequence_edit"},  # `chosen` is the edit: no sibling
    "unedited": {"ppo_sequence"},
    "wrong": {"rlmec", "rlmec_imitation"},
}
GROUPS = {"chat": ["all", "cross"]}  # of kinds, and of methods, by shape; else `all`


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def stages(request, tmp_path_factory):
    """All four stages with a model of a family, on data of a shape."""
    name, shape = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{shape}")
    run = folder / "run"
    one.main(prepare(folder, name, shape))
    groups = GROUPS.get(shape, ["all"])
    for group in groups:
        two.main(two.Args(run=str(run), kind=group, epochs=1, locate_epochs=1))
    flags = {"updates": 1, "rollout_batch": 8, "minibatch": 4, "ppo_epochs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(three, "rewrite", solutions)
        for group in groups:
            three.main(three.Args(run=str(run), method=group, **flags))
    four.main(four.Args(run=str(run)))

    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    edits = [row for row in rows_of(run / "edits.jsonl") if row["edit_ops"] != []]
    return SimpleNamespace(name=name, shape=shape, run=run, tokenizer=tokenizer, edits=edits)


# --- Every family and shape ---

def test_each_method_that_fits_the_data_is_trained_and_measured(stages):
    results = json.loads((stages.run / "eval.json").read_text())
    assert set(results["policies"]) == {"sft"} | TRAINED[stages.shape]


def test_no_embedding_is_without_a_token(stages):
    for name in ("policy", *TRAINED[stages.shape]):
        model = AutoModelForCausalLM.from_pretrained(stages.run / name)
        assert model.get_input_embeddings().num_embeddings == len(stages.tokenizer)


def test_the_pad_token_is_not_the_end_token(stages):
    assert stages.tokenizer.pad_token_id not in (None, stages.tokenizer.eos_token_id)


def test_every_wrong_response_has_a_row(stages):
    assert len(stages.edits) == 24


def test_a_prompt_begins_with_the_bos_token_once_if_there_is_one(stages):
    for row in stages.edits:
        text = row["prompt"]
        if stages.shape == "chat":  # the template writes bos
            text = stages.tokenizer.apply_chat_template(
                text, tokenize=False, add_generation_prompt=True)
        elif FAMILIES[stages.name].bos is not None:
            text = stages.tokenizer.bos_token + text
        assert stages.tokenizer.decode(row["prompt_ids"]) == text


def test_the_end_token_or_in_a_chat_that_of_a_turn_is_the_last_of_a_response(stages):
    end = stages.tokenizer.eos_token
    if stages.shape == "chat":
        end = FAMILIES[stages.name].turn_end or end
    for row in stages.edits:
        text = row["rejected"]
        if stages.shape == "chat":
            text = text[-1]["content"]
        assert stages.tokenizer.decode(row["rejected_ids"]) == text + end


def test_every_policy_ends_where_the_first_one_did_in_generate_of_others_too(stages):
    ends = stages.tokenizer.eos_token_id
    if stages.name == "qwen3":
        ends = [1, 0]  # of a turn, of a text
    for name in ("policy", *TRAINED[stages.shape]):
        model = AutoModelForCausalLM.from_pretrained(stages.run / name)
        assert model.config.eos_token_id == ends
        assert model.generation_config.eos_token_id == ends


def test_stage_4_samples_as_many_tokens_as_stage_1(stages):
    [args] = rows_of(stages.run / "04_args.json")
    assert args["max_new_tokens"] == 6


# --- A padded batch is as each row alone ---
# For shapes with reward models of both heads. The prompts differ in length, and so do the
# responses; one response ends in the padding token, one has it in the middle.

padded = pytest.mark.parametrize("stages", CASES[:9], ids="-".join, indirect=True)
PROMPTS = [[40, 41, 42] * 7, [43], [44, 45]]


@pytest.fixture
def responses(stages):
    end = stages.tokenizer.eos_token_id
    pad = stages.tokenizer.pad_token_id
    return [[50, 51, end], [52, 53, 54, 55, pad], [56, pad, 57, end]]


@pytest.fixture
def policy(stages):
    return AutoModelForCausalLM.from_pretrained(stages.run / "ppo_token")


@pytest.fixture
def open_reward_model(stages):
    """A reward model of the run with a random head: the trained one says next to nothing."""
    def call(kind):
        path = stages.run / f"reward_{kind}"
        model = AutoModelForSequenceClassification.from_pretrained(path)
        torch.nn.init.normal_(model.score.weight)
        return model
    return call


def own_score(model, ids):
    """The score of the last token (of one row, without padding) by the model's own forward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "pad_token_id", None)  # else it passes over such a token
        return model(ids).logits[0, 0]


def rows_with(responses):
    return [{"prompt_ids": x, "rejected_ids": y} for x, y in zip(PROMPTS, responses)]


def compare(batch, responses, alone):
    """A batch (B, T) against what `alone` says of the response tokens of each row, from its ids and
    the length P of its prompt; behind a response the batch is 0."""
    for k, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        T = len(response)
        plain = alone(torch.tensor([prompt + response]), len(prompt))
        assert plain.shape == (T,)
        assert torch.allclose(batch[k, :T], plain, rtol=1e-3, atol=1e-5)
        assert not batch[k, T:].any()


@padded
def test_a_log_prob_is_read_at_the_place_before_its_token(policy, responses):
    def alone(ids, P):
        logprobs = (policy(ids).logits[0, P - 1:-1] / 0.7).log_softmax(dim=1)
        return logprobs[range(len(logprobs)), ids[0, P:]]

    inputs, mask = three.pack(PROMPTS, responses, policy)
    compare(three.response_logprobs(policy, inputs, mask, temperature=0.7), responses, alone)


@padded
def test_a_score_is_that_of_the_text_up_to_its_token(open_reward_model, responses):
    model = open_reward_model("token")

    def alone(ids, P):
        stops = range(P + 1, ids.shape[1] + 1)
        return torch.stack([own_score(model, ids[:, :stop]) for stop in stops])

    scores, _ = two.score_column("token", model, rows_with(responses), "rejected_ids")
    compare(scores, responses, alone)


@padded
def test_a_value_is_read_at_the_place_before_its_token(open_reward_model, responses):
    model = open_reward_model("token")

    def alone(ids, P):
        stops = range(P, ids.shape[1])
        return torch.stack([own_score(model, ids[:, :stop]) for stop in stops])

    inputs, mask = three.pack(PROMPTS, responses, model)
    compare(three.token_values(model, inputs, mask), responses, alone)


@padded
def test_a_sequence_score_is_that_of_the_models_own_forward(stages, open_reward_model, responses):
    kind = "sequence_edit" if stages.shape == "chat" else "sequence"
    model = open_reward_model(kind)
    scores, _ = two.score_column(kind, model, rows_with(responses), "rejected_ids")
    for score, prompt, response in zip(scores, PROMPTS, responses):
        own = own_score(model, torch.tensor([prompt + response]))
        assert torch.allclose(score, own, rtol=1e-3, atol=1e-5)


@padded
def test_a_score_is_a_product_with_the_weight_of_the_head_alone(open_reward_model, responses):
    model = open_reward_model("token")
    alone = lambda ids, P: model.base_model(ids).last_hidden_state[0, P:] @ model.score.weight[0]
    scores, _ = two.score_column("token", model, rows_with(responses), "rejected_ids")
    compare(scores, responses, alone)


@padded
def test_the_grm_scores_a_token_by_its_probability(policy, responses):
    def alone(ids, P):
        probabilities = policy(ids).logits[0, P - 1:-1].softmax(dim=1)
        return probabilities[range(len(probabilities)), ids[0, P:]]

    rows = [{"rewrite": row, "rejected_ids": row["rejected_ids"]} for row in rows_with(responses)]
    scores, mask = two.score_column("generative", policy, rows, "rejected_ids")
    compare(scores * mask, responses, alone)


# --- What a family cannot do is one line, before anything is trained ---

def test_a_model_without_a_cache_of_keys_and_values_is_refused_by_stage_1(tmp_path, fails):
    args = prepare(tmp_path, "mamba", "solved")
    fails("--model .*/model is no causal LM that can be .* sampled from", one.main, args)
    assert not (tmp_path / "run").exists()


def forbidden(*_, **__):
    raise AssertionError("trained")


@pytest.fixture
def cohere(tmp_path):
    """A run after stage 1 with a family that has no head for scores, on data for RLMEC."""
    one.main(prepare(tmp_path, "cohere", "wrong"))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["all", "token", "sequence"])
def test_a_family_without_a_head_for_scores_is_refused_by_stage_2(
        cohere, fails, monkeypatch, kind):
    monkeypatch.setattr(two, "train", forbidden)
    args = two.Args(run=str(cohere), kind=kind)
    fails("no AutoModelForSequenceClassification .* for a cohere; --kind gen", two.main, args)


def test_a_family_without_a_head_for_scores_can_learn_from_a_generative_model(cohere, monkeypatch):
    monkeypatch.setattr(three, "rewrite", solutions)
    two.main(two.Args(run=str(cohere), kind="generative", epochs=1, locate_epochs=1))
    three.main(three.Args(run=str(cohere), updates=1, rollout_batch=8))
    four.main(four.Args(run=str(cohere)))
    results = json.loads((cohere / "eval.json").read_text())
    assert set(results["policies"]) == {"sft", "rlmec", "rlmec_imitation"}


# --- DPO needs no reward model ---

@pytest.fixture
def unedited(tmp_path):
    """A run after stage 1, from `prompt, chosen, rejected`."""
    one.main(prepare(tmp_path, "gpt2", "unedited"))
    return tmp_path / "run"


def test_dpo_and_stage_4_run_straight_after_stage_1(unedited):
    three.main(three.Args(run=str(unedited), method="dpo"))
    four.main(four.Args(run=str(unedited)))
    first = next(csv.DictReader(open(unedited / "dpo.csv")))
    results = json.loads((unedited / "eval.json").read_text())
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert set(results["policies"]) == {"sft", "dpo"}
    assert results["reward_models"] == {}
    assert "Before and after" in (unedited / "report.html").read_text()


def test_dpo_on_edits_needs_edits(unedited, fails):
    args = three.Args(run=str(unedited), method="dpo_edit")
    fails("dpo_edit is left out: there is no pair", three.main, args)


# --- A console that cannot show a character ---

IN_ORDER = """
import json, runpy, sys
for sys.argv in json.load(sys.stdin):
    sys.stdout.reconfigure(errors="strict")
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_stage_ends_because_of_a_character_that_the_console_cannot_show(tmp_path):
    args = prepare(tmp_path, "gpt2", "edited")
    data = (tmp_path / "data").read_text().replace("bread", "\U0001f35e")
    (tmp_path / "data").write_text(data, encoding="utf-8")
    flags = [f"--data {args.data} --model {args.model} --max_new_tokens 6", "--kind token",
             "--updates 1 --rollout_batch 8", ""]
    commands = [[f"{ROOT / stage}.py", "--run", "L\u00e4ufe", *more.split()]
                for stage, more in zip(STAGES, flags)]

    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", IN_ORDER], input=json.dumps(commands), env=ascii,
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" makes ?") >= 6  # an edit of stage 1, a response of stage 2
    assert "no L?ufe/reward_generative" in result.stdout
    assert "win rate   ? error" in result.stdout

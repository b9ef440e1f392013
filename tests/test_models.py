"""Other people's models: small random folders of seven families through all four stages."""

import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import four, one, rows_of, three, two
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

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


GPT = ["<|endoftext|>"]
QWEN = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
LLAMA = ["<unk>", "<s>", "</s>"]
GEMMA = ["<pad>", "<bos>", "<eos>"]
CHATML = "{% for m in messages %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}"
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
ROPE = {"intermediate_size": 32, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": Family(GPT, None, 0, None, {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "llama": Family(LLAMA, 1, 2, None, ROPE | {"tie_word_embeddings": False}, template=INST),
    "qwen2": Family(QWEN, None, 1, 0, ROPE | {"tie_word_embeddings": True}, 37, CHATML),
    "qwen3": Family(QWEN, None, 0, 0, ROPE | {"head_dim": 8}, 37, CHATML),
    "mistral": Family(LLAMA, 1, 2, None, ROPE | {"sliding_window": 8}),
    "gemma": Family(GEMMA, 1, 2, 0, ROPE | {"head_dim": 8}),
    "gpt_neox": Family(GPT, 0, 0, None, {"intermediate_size": 32}, 29),
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
    family = FAMILIES[name]
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
    """A row of --data. solved, wrong: a problem, its solution and a wrong response; chat: a pair of
    responses and its edit, as messages; unedited: a pair alone."""
    person = NAMES[k % 12]
    prompt = "Well, " * (k % 3) + f"what does {person} make? {k}"
    right = f" {person} makes bread.\nThe answer is {k}."
    wrong = f" {person} makes bread.\nThe answer is {k + 1}."
    if shape == "unedited":
        return {"prompt": prompt, "chosen": right, "rejected": wrong}
    if shape == "chat":
        texts = {"prompt": prompt, "chosen": right, "rejected": wrong, "edited": right}
        return {name: [{"role": "user", "content": text}] for name, text in texts.items()}
    return {"prompt": prompt, "solution": right, "answer": k, "response": wrong}


def data_rows(shape):
    rows = [data_row(k, shape) for k in range(24)]
    if shape == "solved":  # most of the problems have a right response as well
        rows += [row | {"response": row["solution"]} for row in rows if row["answer"] % 4]
    return rows


CASES = [(name, "solved") for name in FAMILIES]
CASES += [("llama", "chat"), ("qwen2", "chat"), ("gpt2", "unedited"), ("gpt2", "wrong")]
TRAINED = {  # the methods that have what they need in data of a shape
    "solved": {"ppo_token", "ppo_sequence", "rlmec", "rlmec_imitation"},
    "chat": {"ppo_token", "ppo_sequence"},
    "unedited": {"ppo_sequence"},
    "wrong": {"rlmec", "rlmec_imitation"},
}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def stages(request, tmp_path_factory):
    """All four stages with a model of a family, on data of a shape."""
    name, shape = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{shape}")
    run = folder / "run"
    torch.manual_seed(0)
    make_model(name, folder / "model")
    (folder / "data").write_text("\n".join(json.dumps(row) for row in data_rows(shape)))

    one.main(one.Args(
        run=str(run), data=str(folder / "data"), model=str(folder / "model"),
        sft_steps=2 if shape in ("solved", "wrong") else 0, sft_lr=1e-4, max_new_tokens=6,
    ))
    two.main(two.Args(run=str(run), epochs=1, locate_epochs=1))
    with pytest.MonkeyPatch.context() as patch:  # a random GRM would never write a right response
        solutions = lambda grm, wrong, *_, **__: [row["solution_ids"] for row in wrong]
        patch.setattr(three, "rewrite", solutions)
        three.main(three.Args(run=str(run), updates=1, rollout_batch=8, minibatch=4, ppo_epochs=1))
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
            text = stages.tokenizer.apply_chat_template(text, tokenize=False)
        elif FAMILIES[stages.name].bos is not None:
            text = stages.tokenizer.bos_token + text
        assert stages.tokenizer.decode(row["prompt_ids"]) == text


def test_the_end_token_is_the_last_of_a_response(stages):
    for row in stages.edits:
        text = row["rejected"]
        if stages.shape == "chat":
            text = text[-1]["content"]
        assert stages.tokenizer.decode(row["rejected_ids"]) == text + stages.tokenizer.eos_token


def test_stage_4_samples_as_many_tokens_as_stage_1(stages):
    [args] = rows_of(stages.run / "04_args.json")
    assert args["max_new_tokens"] == 6


# --- A padded batch is as each row alone ---
# For shapes with all three reward models. The prompts differ in length, and so do the responses;
# one response ends in the padding token, one has it in the middle.

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
        model = two.KINDS[kind].from_pretrained(stages.run / f"reward_{kind}")
        head = getattr(model, "classifier", None) or model.score
        torch.nn.init.normal_(head.weight)
        return model
    return call


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
def test_a_score_is_read_at_its_token(open_reward_model, responses):
    model = open_reward_model("token")
    scores, _ = two.score_column("token", model, rows_with(responses), "rejected_ids")
    compare(scores, responses, lambda ids, P: model(ids).logits[0, P:, 0])


@padded
def test_a_value_is_read_at_the_place_before_its_token(open_reward_model, responses):
    model = open_reward_model("token")
    inputs, mask = three.pack(PROMPTS, responses, model)
    values = three.token_values(model, inputs, mask)
    compare(values, responses, lambda ids, P: model(ids).logits[0, P - 1:-1, 0])


@padded
def test_a_sequence_score_is_read_at_the_last_token(open_reward_model, responses):
    model = open_reward_model("sequence")
    scores, _ = two.score_column("sequence", model, rows_with(responses), "rejected_ids")
    for score, prompt, response in zip(scores, PROMPTS, responses):
        hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state
        assert torch.allclose(score, model.score(hidden[0, -1]), atol=1e-4)


@padded
def test_the_grm_scores_a_token_by_its_probability(policy, responses):
    def alone(ids, P):
        probabilities = policy(ids).logits[0, P - 1:-1].softmax(dim=1)
        return probabilities[range(len(probabilities)), ids[0, P:]]

    rows = [{"rewrite": row, "rejected_ids": row["rejected_ids"]} for row in rows_with(responses)]
    scores, mask = two.score_column("generative", policy, rows, "rejected_ids")
    compare(scores * mask, responses, alone)

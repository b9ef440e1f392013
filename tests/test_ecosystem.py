"""What we write, others read, and the reverse: TRL, datasets, pipelines. Skips what is not installed."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

README = Path(__file__).resolve().parent.parent / "README.md"
TEMPLATE = ("{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
            "{% endfor %}")
QUIET = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no", "bf16": False,
         "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def code_of_readme(needle, run):
    """The code block of the README that holds the needle, for another run folder."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    code, = [block for block in blocks if needle in block]
    return code.replace("runs/default", str(run))


@pytest.fixture(scope="module")
def chat_run(edit_data, tiny_run, tmp_path_factory):
    """Stage 1 on conversations: the tiny policy with a chat template, edits in every row but two."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_run / "policy", folder / "policy")
    (folder / "policy" / "chat_template.jinja").write_text(TEMPLATE)
    say = lambda role, text: [{"role": role, "content": text}]
    rows = [{"prompt": say("user", f"Q: What do Ada and {name} send?\nA:"), "chosen": say("assistant", " Bob makes tea."),
             "rejected": say("assistant", f" {name} makes soap."),
             "edited": say("assistant", f" {name} makes tea.") if name not in ("Dan", "Eva") else None}
            for name in "Cleo Dan Eva Finn Gus Hana Ivo Jane Kit Lena Mia Ned".split()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit_data.main(edit_data.Args(run=str(folder / "run"), data=str(folder / "data.jsonl"),
                                  model=str(folder / "policy")))
    return folder / "run"


# --- What we write -----------------------------------------------------------------------------------------

def test_rows_of_conversations_are_conversations(chat_run, edit_data, tmp_path):
    """prompt, chosen, rejected and edited are all lists of messages, and stage 1 reads its own rows again."""
    rows = rows_of(chat_run / "edits.jsonl")
    assert len(rows) == 12 and sum(row["edited"] is None for row in rows) == 2
    for row in rows:
        assert row["chosen"] == [{"role": "assistant", "content": " Bob makes tea."}]
        assert [message["role"] for message in row["rejected"] + (row["edited"] or [])] in (["assistant"] * 2, ["assistant"])
    pairs = edit_data.read_data(chat_run / "edits.jsonl", "", Counter())[1]
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in rows]
    assert [pair["rejected"] for pair in pairs] == [row["rejected"][0]["content"] for row in rows]


def test_stage_2_trains_on_conversations(chat_run, reward_model, tmp_path):
    run = Path(shutil.copytree(chat_run, tmp_path / "run"))
    reward_model.main(reward_model.Args(run=str(run), epochs=1))
    assert (run / "reward_token").is_dir() and (run / "reward_sequence").is_dir()
    tokenizer = reward_model.open_tokenizer(run / "policy")
    (run / "edits.jsonl").write_text((run / "edits.jsonl").read_text().replace('"role": "assistant", "content"', '"x"'))
    with pytest.raises(SystemExit):                                   # no text is left to compare the ids with
        reward_model.open_edits(run / "edits.jsonl", tokenizer)


@pytest.mark.parametrize("which", ["standard", "conversational"])
def test_no_column_has_a_meaning_of_its_own_elsewhere(tiny_run, chat_run, which):
    """chosen_ids beside rejected_ids would pass for TRL's own tokens, and it would train without the prompts."""
    names = set().union(*rows_of((tiny_run if which == "standard" else chat_run) / "edits.jsonl"))
    assert {"prompt", "chosen", "rejected", "rejected_ids"} <= names
    assert not names & {"chosen_ids", "chosen_input_ids", "input_ids", "labels", "margin", "messages", "completion",
                        "ref_chosen_logps", "ref_rejected_logps", "image", "images", "tools", "chat_template_kwargs"}


@pytest.mark.parametrize("which", ["standard", "conversational"])
def test_datasets_reads_the_file(tiny_run, chat_run, tmp_path, which):
    datasets = pytest.importorskip("datasets")
    path = (tiny_run if which == "standard" else chat_run) / "edits.jsonl"
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert rows.to_list() == [{name: row.get(name) for name in rows.column_names} for row in rows_of(path)]


@pytest.mark.parametrize("which", ["standard", "conversational"])
@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_trl_trains_on_the_file_as_it_is(tiny_run, chat_run, tmp_path, kind, which):
    """Its tokens are prompt, response and end token: ours, wherever ours are those of the text."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    run = tiny_run if which == "standard" else chat_run
    data = datasets.load_dataset("json", data_files=str(run / "edits.jsonl"), split="train", cache_dir=str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    auto, options, config, trainer_class = (
        (AutoModelForSequenceClassification, {"num_labels": 1}, trl.RewardConfig, trl.RewardTrainer)
        if kind == "reward" else (AutoModelForCausalLM, {}, trl.DPOConfig, trl.DPOTrainer))
    trainer = trainer_class(model=auto.from_pretrained(run / "policy", **options), processing_class=tokenizer,
                            args=config(output_dir=str(tmp_path / "out"), **QUIET), train_dataset=data)
    rows = rows_of(run / "edits.jsonl")
    assert len(trainer.train_dataset) == len(rows)
    equal = 0
    for row, theirs in zip(rows, trainer.train_dataset):
        for ours, column in (("preferred_ids", "chosen"), ("rejected_ids", "rejected")):
            ids = theirs["prompt_ids"] + theirs[f"{column}_ids"] if kind == "dpo" else theirs[f"{column}_ids"]
            text = row[column] if which == "standard" else row[column][0]["content"]
            response = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == row["prompt_ids"] + response + [tokenizer.eos_token_id]
            equal += ids == row["prompt_ids"] + row[ours]
    assert equal == 24 if which == "conversational" else equal > 20   # the others are cut off or not canonical
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_the_prompt_is_where_trl_finds_it(edit_data, tmp_path):
    """Implicit prompts: what TRL's own extract_prompt says, but strings never part within a word."""
    trl = pytest.importorskip("trl")
    say = lambda *texts: [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts)]
    for row in ({"chosen": say("Sky?", "It is blue."), "rejected": say("Sky?", "It is green.")},
                {"chosen": say("a", "b", "c", "d"), "rejected": say("a", "b", "c", "e")},
                {"chosen": "Sky? It is blue.", "rejected": "Sky? It is green."},
                {"chosen": "\n\nHuman: Sky?\n\nAssistant: Blue", "rejected": "\n\nHuman: Sky?\n\nAssistant: Green"}):
        theirs = trl.extract_prompt(row)
        assert edit_data.part_prompt(row) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
    word = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert trl.extract_prompt(word)["prompt"] == "The sky is bl" and edit_data.part_prompt(word)[0] == "The sky is"


# --- Models that others open -------------------------------------------------------------------------------

@pytest.fixture
def sides(reward_model, tiny_run):
    """Rows with prompts and responses of several lengths, and their ids unpadded and padded on either side."""
    tokenizer = reward_model.open_tokenizer(tiny_run / "policy")
    rows = [row for row in rows_of(tiny_run / "edits.jsonl") if row["edit_ops"]][:6]
    rows[0] = {**rows[0], "edited_ids": rows[0]["edited_ids"][-3:]}
    ids = {"input_ids": [row["prompt_ids"] + row["edited_ids"] for row in rows]}
    assert len({len(row) for row in ids["input_ids"]}) > 1
    return tokenizer, rows, {side: tokenizer.pad(ids, padding_side=side, return_tensors="pt") for side in ("left", "right")}


def lookup(logits, mask, rows, side, shift=0):
    """The output at every response token, or `shift` tokens before it, as one list a row."""
    result = []
    for values, keep, row in zip(logits[..., 0], mask.bool(), rows):
        first = len(row["prompt_ids"]) - shift
        result.append(values[keep][first:first + len(row["edited_ids"])])
    return result


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name, shift", [("reward_token", 0), ("value_token", 1), ("value_sequence", 1)])
def test_token_models_open_elsewhere(reward_model, ppo, tiny_run, sides, name, shift, side):
    """Rewards at the token, values one token before, the same with any padding, as stages 2 and 3 read them."""
    tokenizer, rows, padded = sides
    model = AutoModelForTokenClassification.from_pretrained(tiny_run / name)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    inputs, mask = reward_model.pack([r["prompt_ids"] for r in rows], [r["edited_ids"] for r in rows], 0, "cpu")
    with torch.no_grad():
        ours = (ppo.token_values if shift else reward_model.token_rewards)(model, inputs, mask)
        theirs = lookup(model(**padded[side]).logits, padded[side]["attention_mask"], rows, side, shift)
        alone = [model(input_ids=torch.tensor([r["prompt_ids"] + r["edited_ids"]])).logits for r in rows]
        alone = [lookup(logits, torch.ones(1, logits.shape[1]), [r], side, shift)[0] for logits, r in zip(alone, rows)]
    assert ours.abs().max() > 1e-4
    for values, keep, padded_values, single in zip(ours, mask, theirs, alone):
        assert torch.allclose(values[keep], padded_values, atol=1e-5) and torch.allclose(values[keep], single, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_sequence_model_opens_elsewhere(reward_model, tiny_run, sides, side):
    tokenizer, rows, padded = sides
    model = AutoModelForSequenceClassification.from_pretrained(tiny_run / "reward_sequence")
    with torch.no_grad():
        ours, _ = reward_model.score("sequence", model, rows, "edited", tokenizer.pad_token_id)
        theirs = model(**padded[side]).logits[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.std() > 1e-4


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pipelines_give_the_rewards_of_stage_2(reward_model, tiny_run, sides, batch_size):
    """text-classification gives R(x, y), feature-extraction r_t; token-classification only a softmax of one."""
    tokenizer, rows, _ = sides
    texts = [tokenizer.decode(row["prompt_ids"] + row["edited_ids"]) for row in rows]
    assert [tokenizer(text).input_ids for text in texts] == [row["prompt_ids"] + row["edited_ids"] for row in rows]
    token = AutoModelForTokenClassification.from_pretrained(tiny_run / "reward_token")
    sequence = AutoModelForSequenceClassification.from_pretrained(tiny_run / "reward_sequence")
    with torch.no_grad():
        rewards, mask = reward_model.score("token", token, rows, "edited", tokenizer.pad_token_id)
        totals, _ = reward_model.score("sequence", sequence, rows, "edited", tokenizer.pad_token_id)
    answers = pipeline("text-classification", str(tiny_run / "reward_sequence"))(texts, batch_size=batch_size)
    assert [answer["score"] for answer in answers] == pytest.approx(totals.tolist(), abs=1e-5)
    extract = pipeline("feature-extraction", model=token, tokenizer=tokenizer)
    for row, values, keep, output in zip(rows, rewards, mask, extract(texts)):
        theirs = torch.tensor(output)[0, len(row["prompt_ids"]):, 0]
        assert torch.allclose(values[keep], theirs, atol=1e-5)
    scores = pipeline("token-classification", str(tiny_run / "reward_token"))(texts[0])
    assert len(scores) == len(tokenizer(texts[0]).input_ids) and all(score["score"] == 1.0 for score in scores)


def test_the_ten_lines_of_the_readme(reward_model, tiny_run, sides):
    tokenizer, rows, _ = sides
    code = code_of_readme("def token_rewards", tiny_run)
    assert len(code.splitlines()) == 10
    exec(code, names := {})
    theirs = names["token_rewards"]([row["prompt"] for row in rows], [row["edited_ids"] for row in rows], other=1)
    model = AutoModelForTokenClassification.from_pretrained(tiny_run / "reward_token")
    with torch.no_grad():
        ours, mask = reward_model.score("token", model, rows, "edited", tokenizer.pad_token_id)
    assert [len(rewards) for rewards in theirs] == mask.sum(1).tolist()
    for rewards, values, keep in zip(theirs, ours, mask):
        assert torch.allclose(torch.tensor(rewards), values[keep], atol=1e-5)


def test_the_ten_lines_take_chat_messages(chat_run):
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "policy")
    rows = rows_of(chat_run / "edits.jsonl")
    call = re.search(r"tokenizer.apply_chat_template.*?\]", README.read_text(encoding="utf-8"))[0]
    ids = eval(call, {"tokenizer": tokenizer, "prompts": [row["prompt"] for row in rows]})
    assert ids == [row["prompt_ids"] for row in rows]


def test_the_ten_lines_are_a_reward_function_of_trl(tiny_run, tmp_path):
    """GRPO on the token rewards of the README, summed over the response."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    exec(code_of_readme("def token_rewards", tiny_run), names := {})
    line = re.search(r"lambda \*\*batch.*?\]", README.read_text(encoding="utf-8"))[0]
    reward, seen = eval(line, names), []

    def recorded(**batch):
        seen.append((batch, reward(**batch)))
        return seen[-1][1]

    prompts = [{"prompt": row["prompt"]} for row in rows_of(tiny_run / "edits.jsonl")[:4]]
    options = trl.GRPOConfig(output_dir=str(tmp_path), num_generations=2, max_completion_length=8, **QUIET)
    trl.GRPOTrainer(model=AutoModelForCausalLM.from_pretrained(tiny_run / "policy"), reward_funcs=recorded, args=options,
                    processing_class=AutoTokenizer.from_pretrained(tiny_run / "policy"),
                    train_dataset=datasets.Dataset.from_list(prompts)).train()
    (batch, rewards), = seen
    assert len(rewards) == len(batch["completion_ids"]) == 4 and len(set(rewards)) > 1


def test_the_readme_loads_the_pairs(tiny_run, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    exec(code_of_readme("load_dataset", tiny_run), names := {})
    rows = rows_of(tiny_run / "edits.jsonl")
    assert list(names["pairs"]["chosen"]) == [row["chosen"] for row in rows]
    assert list(names["minimal"]["chosen"]) == [row["edited"] for row in rows]

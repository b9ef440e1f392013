"""Other people's models: small random folders of GPT-2, Llama, Qwen, Mistral, Gemma and GPT-NeoX, with the
tokenizers such models come with, through all four stages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast)

NAMES = ["Ada", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jane", "Kit", "Lena"]
TEXTS = [f"What does {name} make, and for whom? {name} makes {k} loaves of bread. The answer is {k}."
         for k, name in enumerate(NAMES)]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA_CHAT = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0"
              " % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
              "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}"
              "{% endif %}{% endfor %}")
GEMMA_CHAT = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
              "\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
              "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
ROPE = {"num_key_value_heads": 2, "intermediate_size": 32}

# name -> (model type, config, rows of the embedding beyond the vocabulary, special tokens, their roles,
#          does the tokenizer begin with bos?, chat template)
MODELS = {
    "gpt2": ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, 0, ["<|endoftext|>"],
             {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}, False, None),
    "gpt2-bos": ("gpt2", {}, 0, ["<|endoftext|>"],
                 {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}, True, None),
    "llama": ("llama", {**ROPE, "tie_word_embeddings": False}, 0, ["<unk>", "<s>", "</s>"],
              {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, True, LLAMA_CHAT),
    "qwen2": ("qwen2", {**ROPE, "tie_word_embeddings": True}, 37, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
              {"eos": "<|im_end|>", "pad": "<|endoftext|>"}, False, CHATML),
    "qwen3-base": ("qwen3", {**ROPE, "head_dim": 8}, 37, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                   {"eos": "<|endoftext|>", "pad": "<|endoftext|>"}, False, CHATML),
    "mistral": ("mistral", {**ROPE, "sliding_window": 8}, 0, ["<unk>", "<s>", "</s>"],
                {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, True, None),
    "gemma": ("gemma", {**ROPE, "head_dim": 8}, 0, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
              {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}, True, GEMMA_CHAT),
    "gemma2": ("gemma2", {**ROPE, "head_dim": 8, "sliding_window": 8}, 0, ["<pad>", "<eos>", "<bos>"],
               {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}, True, None),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 32, "rotary_pct": 0.5}, 29, ["<|endoftext|>", "<|padding|>"],
                 {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}, False, None),
    "bloom": ("bloom", {"max_position_embeddings": None}, 0, ["<unk>", "<s>", "</s>", "<pad>"],
              {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}, False, None)}
CHATS = ["llama", "qwen2", "qwen3-base", "gemma"]
SMALL = {1: {"sft_steps": 2, "sft_batch": 4, "sft_lr": 1e-3, "max_edit_share": 1.0, "max_new_tokens": 8},
         2: {"epochs": 1, "batch": 8, "grm_batch": 8, "locate_epochs": 1, "max_new_tokens": 8},
         3: {"updates": 1, "rollout_batch": 8, "minibatch": 4, "max_new_tokens": 8, "rlmec_samples": 8},
         4: {"max_new_tokens": 8}}


def make_tokenizer(specials, roles, begins, template, size=330, texts=TEXTS):
    """A byte-level BPE trained here, with the special tokens and habits of a family."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if begins:
        bos = roles["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template,
                                   **{f"{role}_token": token for role, token in roles.items()})


def make_model(path, kind, tokenizer, more_rows=0, **settings):
    """Random weights large enough that a wrong position or mask shows in the log-probs."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{
        "vocab_size": len(tokenizer) + more_rows, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 200, "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
        **settings})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def edited_rows(chat=False):
    """24 human edits, of one prompt each."""
    rows = []
    for k in range(24):
        prompt, response = f"{'Well: ' * (k % 3)}What does {NAMES[k % 12]} make? {k}", f" {NAMES[k % 12]} makes tea."
        edited = response.replace("tea", "bread")
        if chat:
            prompt = [{"role": "user", "content": prompt}]
            response, edited = ([{"role": "assistant", "content": text.strip()}] for text in (response, edited))
        rows.append({"prompt": prompt, "response": response, "edited": edited})
    return rows


def solved_rows(chat=False):
    """24 problems with a reference solution and a wrong response."""
    rows = []
    for k in range(24):
        prompt = f"What is {k} and 1?"
        rows.append({"prompt": [{"role": "user", "content": prompt}] if chat else prompt, "answer": k + 1,
                     "solution": f" One more than {k}.\nThe answer is {k + 1}.",
                     "response": f" One more than {k}.\nThe answer is {k + 2}."})
    return rows


@pytest.fixture(scope="module")
def stages(edit_data, reward_model, ppo, evaluation):
    return {1: edit_data, 2: reward_model, 3: ppo, 4: evaluation}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model folder of a name, made once."""
    root = tmp_path_factory.mktemp("models")

    def make(name):
        kind, settings, more, specials, roles, begins, template = MODELS[name]
        if not (root / name).exists():
            make_model(root / name, kind, make_tokenizer(specials, roles, begins, template), more, **settings)
        return root / name

    return make


@pytest.fixture(scope="module")
def finished(stages, folder, tmp_path_factory):
    """The run folder of a model after all four stages, made once; shape: edited or solved, chat or not."""
    root, done = tmp_path_factory.mktemp("runs"), {}
    rollout = stages[3].rollout

    def recorded(kind, models, prompts, *rest):
        go.rollouts.append((kind, models, prompts, rollout(kind, models, prompts, *rest)))
        return go.rollouts[-1][-1]

    def go(name, shape="edited", chat=False):
        key = f"{name}-{shape}{'-chat' * chat}"
        if key not in done:
            rows = edited_rows(chat) if shape == "edited" else solved_rows(chat)
            data = write_rows(root / f"{key}.jsonl", rows)
            with pytest.MonkeyPatch.context() as patch:         # a GRM this small cannot rewrite: the reference
                patch.setattr(stages[3], "rewrite", lambda grm, problems, responses, tokenizer, args, drop: [
                    problem["solution_ids"] + [tokenizer.eos_token_id] for problem in problems])
                patch.setattr(stages[3], "rollout", recorded)
                go.rollouts = []
                for stage, module in stages.items():
                    more = {"data": str(data), "model": str(folder(name))} if stage == 1 else {}
                    module.main(module.Args(run=str(root / key), **SMALL[stage], **more))
            done[key] = root / key
            go.first[key] = go.rollouts
        return done[key]

    go.first = {}                                           # key -> what the rollouts of stage 3 gave
    return go


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stops(capsys, module, *needles, **args):
    """The stage ends with status 2 and one line of error that holds the needles, before any model is saved."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(module.Args(**{name: str(x) if not isinstance(x, (int, float, list)) else x
                                   for name, x in args.items()}))
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(lines) == 1 and shown.err.rstrip().endswith(lines[0])
    assert "Traceback" not in shown.err
    for needle in needles:
        assert str(needle) in lines[0]
    assert "it/s" not in shown.err and "step" not in shown.err                      # no bar: nothing was trained


def expected_logprobs(model, prompt, response):
    """log pi of the response tokens, from one plain forward of one row without any padding."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, :-1].float()
    every = F.log_softmax(logits, dim=-1)
    return every[torch.arange(len(prompt) - 1, len(logits)), torch.tensor(response)]


# --- Four stages with every family -------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_all_stages(finished, stages, name):
    run = finished(name)
    evaluation = json.loads((run / "eval.json").read_text())
    assert set(evaluation["policies"]) == {"sft", "ppo_token", "ppo_sequence"}
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    rows = rows_of(run / "edits.jsonl")
    assert len(rows) == 24
    for row in rows:
        for column in ("rejected", "edited"):
            ids = row[f"{column}_ids"]
            assert tokenizer.decode(ids[:-1]) == row[column] and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) == row["prompt"]
        begins = [tokenizer.bos_token_id] * MODELS[name][5]
        assert row["prompt_ids"][:1] == begins or not begins
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == len(begins)


@pytest.mark.parametrize("name", MODELS)
def test_rollouts_have_the_log_probs_of_a_plain_forward(finished, stages, name):
    """Padding, positions, sliding windows, dropout: none of them shows, and ratio and KL start at nothing."""
    run = finished(name)
    plain = AutoModelForCausalLM.from_pretrained(run / "policy").eval()
    for kind, models, prompts, (responses, inputs, batch) in finished.first[f"{name}-edited"]:
        assert len(set(map(len, prompts))) > 1 and max(len(p) + len(r) for p, r in zip(prompts, responses)) > 16
        for k, (prompt, response) in enumerate(zip(prompts, responses)):
            expected = expected_logprobs(plain, prompt, response)
            for column in ("old_logprobs", "ref_logprobs"):
                assert torch.allclose(batch[column][k, :len(response)], expected, atol=1e-4)
        assert batch["old_values"].abs().max() == 0                    # a head of zeros, whatever its name
        assert len({len(model.state_dict()) for model in (models["policy"], models["reference"])}) == 1
        assert not any(model.training for model in models.values())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_samples_come_from_the_policy(finished, stages, name):
    """Greedy samples of prompts of mixed length, token by token against a plain forward of each row."""
    tokenizer = stages[3].open_tokenizer(finished(name) / "policy")
    model = stages[3].open_model(AutoModelForCausalLM, finished(name) / "policy")
    prompts = [tokenizer(text).input_ids for text in ("Ada", TEXTS[0], "What does Bob make?")]
    for prompt, response in zip(prompts, stages[3].sample(model, prompts, tokenizer, 12, temperature=0.0)):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        taken = logits[torch.arange(len(response)), torch.tensor(response)]
        assert torch.allclose(taken, logits.max(dim=1).values, atol=1e-3)
        assert len(response) == 12 or response[-1] == tokenizer.eos_token_id
    assert stages[3].context_of(model) == (float("inf") if name == "bloom" else 200)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_rewards_are_those_of_a_plain_forward(finished, stages, name):
    """Rows of mixed length; one response is cut off and ends in the pad token, one has it in the middle."""
    run = finished(name)
    tokenizer = stages[3].open_tokenizer(run / "policy")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts, responses = [[40, 41, 42] * 7, [43], [44, 45]], [[50, 51, end], [52, 53, 54, 55, pad], [56, pad, 57, end]]
    inputs, mask = stages[3].pack(prompts, responses, pad, "cpu")
    token = stages[3].open_model(AutoModelForTokenClassification, run / "reward_token")
    sequence = stages[3].open_model(AutoModelForSequenceClassification, run / "reward_sequence")
    heads = [dict(model.named_children())[head] for model in (token, sequence)
             for head in ("score", "classifier") if hasattr(model, head)]
    for head in heads:
        torch.nn.init.normal_(head.weight)                             # the trained ones are next to nothing
    rewards = stages[3].token_rewards(token, inputs, mask)
    totals = stages[3].sequence_reward(sequence, inputs)
    for k, (prompt, response) in enumerate(zip(prompts, responses)):
        ids = torch.tensor([prompt + response])
        assert torch.allclose(rewards[k, :len(response)], token(input_ids=ids).logits[0, len(prompt):, 0], atol=1e-4)
        hidden = sequence.base_model(input_ids=ids).last_hidden_state[0, -1]
        assert torch.allclose(totals[k], sequence.score(hidden)[0], atol=1e-4)
        if response[-1] == end:                                        # as other programs will read the folder
            assert torch.allclose(totals[k], sequence(input_ids=ids).logits[0, 0], atol=1e-4)
    assert torch.allclose(sequence(**inputs).logits[[0, 2], 0], totals[[0, 2]], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_folders_hold_one_row_a_token_and_open_plainly(finished, stages, folder, name):
    run = finished(name)
    size = stages[3].vocabulary_size(AutoTokenizer.from_pretrained(run / "policy"))
    for part, auto_class in [("policy", AutoModelForCausalLM), ("ppo_token", AutoModelForCausalLM),
                             ("reward_token", AutoModelForTokenClassification),
                             ("reward_sequence", AutoModelForSequenceClassification)]:
        model, info = auto_class.from_pretrained(run / part, output_loading_info=True)
        assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == size
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert stages[3].open_tokenizer(run / part).get_vocab() == AutoTokenizer.from_pretrained(
            run / "policy").get_vocab()
    more = MODELS[name][2]
    rows = AutoModelForCausalLM.from_pretrained(folder(name)).get_input_embeddings().num_embeddings
    new_pad = name in ("gpt2", "gpt2-bos", "qwen3-base", "gpt_neox")   # no named token but the end to pad with
    assert size == rows - more + new_pad


@pytest.mark.parametrize("name", MODELS)
def test_little_memory(finished, stages, tmp_path, name):
    """bfloat16, gradient checkpointing and micro-batches, with each family's layers and new rows."""
    run, little = finished(name), {"dtype": "bfloat16", "gradient_checkpointing": True}
    stages[2].main(stages[2].Args(run=str(tmp_path), edits=str(run / "edits.jsonl"), model=str(run / "policy"),
                                  micro_batch=3, **little, **SMALL[2]))
    stages[3].main(stages[3].Args(run=str(tmp_path), policy=str(run / "policy"), method="ppo_token",
                                  problems=str(run / "problems.jsonl"), **little, **SMALL[3]))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo_token")
    before = AutoModelForCausalLM.from_pretrained(run / "policy")
    moved = [(a.float() - b.float()).abs().max().item() for a, b in zip(saved.parameters(), before.parameters())]
    assert saved.dtype == torch.bfloat16 and sum(x > 0 for x in moved) > len(moved) / 2


# --- Chat templates and solutions --------------------------------------------------------------------------

@pytest.mark.parametrize("name", CHATS)
def test_chat_messages_through_all_stages(finished, stages, name):
    run = finished(name, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    end = {"llama": "</s>", "gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    assert tokenizer.eos_token == end
    for row in rows_of(run / "edits.jsonl"):
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row["prompt_ids"]) == text             # the template writes bos itself
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == MODELS[name][5]
        assert {row[f"{column}_ids"][-1] for column in ("rejected", "edited")} == {tokenizer.eos_token_id}
        assert row["rejected"][-1]["content"].endswith("makes tea.")
    for *_, prompts, (responses, inputs, batch) in finished.first[f"{name}-edited-chat"]:
        plain = AutoModelForCausalLM.from_pretrained(run / "policy").eval()
        for k, (prompt, response) in enumerate(zip(prompts, responses)):
            expected = expected_logprobs(plain, prompt, response)
            assert torch.allclose(batch["old_logprobs"][k, :len(response)], expected, atol=1e-4)


def test_chosen_and_rejected_as_chat_messages(stages, folder, tmp_path):
    """The preference format of the ecosystem; the last message counts, and without edits the baseline runs."""
    rows = [{"prompt": row["prompt"], "chosen": row["edited"], "rejected": row["response"]} for row in edited_rows(True)]
    data, run = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "run"
    stages[1].main(stages[1].Args(run=str(run), data=str(data), model=str(folder("gemma")), **SMALL[1]))
    stages[2].main(stages[2].Args(run=str(run), **SMALL[2]))
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    for row in rows_of(run / "edits.jsonl"):
        text = row["chosen"][-1]["content"]
        assert tokenizer.decode(row["preferred_ids"]) == text + "<end_of_turn>" and "bread" in text
    assert (run / "reward_sequence").is_dir() and not (run / "reward_token").exists()


@pytest.mark.parametrize("name, chat", [("gpt2", False), ("qwen2", True), ("gpt_neox", False)])
def test_solutions_through_all_stages(finished, name, chat):
    run = finished(name, "solved", chat)
    assert {"rlmec", "rlmec_imitation"} < set(json.loads((run / "eval.json").read_text())["policies"])
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    for row in rows_of(run / "edits.jsonl"):
        assert tokenizer.decode(row["edited_ids"], skip_special_tokens=True) == row["solution"]
        assert row["first_wrong_step"] == 2 and row["rejected_ids"][-1] == tokenizer.eos_token_id


def test_chat_edits_without_their_policy_end_as_the_chat_ends(finished, stages, folder, tmp_path):
    edits = shutil.copy(finished("qwen3-base", "solved", True) / "edits.jsonl", tmp_path / "edits.jsonl")
    stages[2].main(stages[2].Args(run=str(tmp_path / "run"), edits=str(edits), model=str(folder("qwen3-base")),
                                  kind="generative", **SMALL[2]))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "reward_generative").eos_token == "<|im_end|>"


def test_samples_that_a_gpt2_cannot_score_are_counted(finished, stages, tmp_path, capsys):
    """Learned positions end where the context ends."""
    run = Path(shutil.copytree(finished("gpt2", "solved"), tmp_path / "run"))
    problems = rows_of(run / "problems.jsonl")
    for problem in problems[::2]:
        problem["solution"] = problem["solution"] + " So it is." * 40 + " " + problem["solution"]
    write_rows(run / "problems.jsonl", problems)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages[3], "rewrite", lambda grm, problems, responses, tokenizer, args, drop: [
            problem["solution_ids"] + [tokenizer.eos_token_id] for problem in problems])
        stages[3].main(stages[3].Args(run=str(run), method="rlmec", overwrite=True, **SMALL[3]))
    assert "context is too short to score it" in capsys.readouterr().out


def test_plain_prompts_keep_the_end_token_of_the_checkpoint(stages, folder, finished):
    """A base model was trained to end in <|endoftext|>: the template counts only where it is used."""
    assert AutoTokenizer.from_pretrained(finished("qwen3-base") / "policy").eos_token == "<|endoftext|>"
    assert stages[3].open_tokenizer(folder("gemma")).eos_token == "<eos>"
    assert stages[3].open_tokenizer(folder("gemma"), chat=True).eos_token == "<end_of_turn>"


# --- Checkpoints of one vocabulary, and of others ----------------------------------------------------------

def test_a_larger_reward_model_of_the_same_vocabulary(finished, stages, tmp_path):
    """As Qwen 0.5B and 7B: the same tokens, other sizes, more unused rows."""
    run = finished("qwen2")
    kind, settings, more, specials, roles, begins, template = MODELS["qwen2"]
    tokenizer = make_tokenizer(specials, roles, begins, template)
    large = make_model(tmp_path / "large", kind, tokenizer, more + 64, **settings, num_attention_heads=4, head_dim=8)
    new = tmp_path / "run"
    stages[2].main(stages[2].Args(run=str(new), edits=str(run / "edits.jsonl"), model=str(large), **SMALL[2]))
    stages[3].main(stages[3].Args(run=str(new), policy=str(run / "policy"), problems=str(run / "problems.jsonl"),
                                  **SMALL[3]))
    assert (new / "ppo_token").is_dir() and (new / "ppo_sequence").is_dir()


@pytest.fixture
def other(tmp_path):
    """A folder with as many tokens as qwen2's, but other ones."""
    kind, settings, more, specials, roles, begins, template = MODELS["qwen2"]
    tokenizer = make_tokenizer(specials, roles, begins, template, texts=[text[::-1] for text in TEXTS])
    assert len(tokenizer) == len(make_tokenizer(specials, roles, begins, template))
    return make_model(tmp_path / "other", kind, tokenizer, more, **settings)


def test_another_vocabulary_is_refused(finished, stages, other, tmp_path, capsys):
    run = finished("qwen2")
    files = {"policy": run / "policy", "problems": run / "problems.jsonl"}
    stops(capsys, stages[2], other, "vocabulary", run=tmp_path / "run", edits=run / "edits.jsonl", model=other)
    stages[2].main(stages[2].Args(run=str(tmp_path / "run"), edits=str(run / "edits.jsonl"), **SMALL[2],
                                  model=str(run / "policy"), kind="token"))
    AutoTokenizer.from_pretrained(other).save_pretrained(tmp_path / "run" / "reward_token")
    stops(capsys, stages[3], "reward_token", "vocabulary", run=tmp_path / "run", method="ppo_token", **files)
    assert not (tmp_path / "run" / "03_args.json").exists()
    stops(capsys, stages[4], other, "vocabulary", run=run, overwrite=True, policies=[str(other)], **SMALL[4])
    stops(capsys, stages[4], "reward_token", "vocabulary", run=tmp_path / "run", **files,
          policies=[str(run / "ppo_token")], **SMALL[4])


def test_a_new_pad_token_gets_the_same_row_everywhere(stages, folder):
    """GPT-2 has no token to pad with. Its row draws nothing from the random numbers of a stage."""
    tokenizer = stages[1].open_tokenizer(folder("gpt2"))
    rows = []
    for stage in (1, 2, 3, 4):
        torch.manual_seed(stage)
        before = torch.get_rng_state()
        model = stages[stage].fit(stages[stage].open_model(AutoModelForCausalLM, folder("gpt2")), tokenizer)
        assert torch.equal(torch.get_rng_state(), before)
        rows.append(model.get_input_embeddings().weight[tokenizer.pad_token_id])
    assert all(torch.equal(row, rows[0]) for row in rows) and rows[0].abs().sum() > 0
    half = stages[1].fit(stages[1].open_model(AutoModelForCausalLM, folder("gpt2"), "bfloat16"), tokenizer)
    row = half.get_input_embeddings().weight[tokenizer.pad_token_id]
    assert row.dtype == torch.bfloat16 and torch.allclose(row.float(), rows[0], atol=0.02)


# --- What a tokenizer or a model cannot do -----------------------------------------------------------------

@pytest.mark.parametrize("name, prompt, needles", [
    ("mistral", [{"role": "user", "content": "Ada?"}], ["chat template"]),
    ("llama", [{"role": "system", "content": "Be kind."}], ["row-7", "roles must alternate"]),
    ("llama", [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], ["row-7", "alternate"])])
@pytest.mark.parametrize("solved", [False, True])
def test_a_chat_template_that_refuses(stages, folder, tmp_path, capsys, name, prompt, needles, solved):
    rows = solved_rows() if solved else edited_rows()
    rows[7]["prompt"] = prompt
    data = write_rows(tmp_path / "data.jsonl", rows)
    args = {"run": tmp_path / "run", "data": data, "model": folder(name)}
    stops(capsys, stages[1], *needles, folder(name), data, **args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", [3, 4])
def test_a_chat_template_that_refuses_later(stages, finished, tmp_path, capsys, stage):
    run = finished("llama", chat=True)
    rows = rows_of(run / "problems.jsonl")
    for row in rows:
        row["prompt"] = [{"role": "system", "content": "Be kind."}]
    problems = write_rows(tmp_path / "problems.jsonl", rows)
    stops(capsys, stages[stage], problems, "roles must alternate", run=run, problems=problems, overwrite=True)


def test_a_tokenizer_that_changes_every_text(stages, tmp_path, capsys):
    kind, settings, more, specials, roles, begins, template = MODELS["llama"]
    tokenizer = make_tokenizer(specials, roles, begins, template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    model = make_model(tmp_path / "model", kind, tokenizer, more, **settings)
    data = write_rows(tmp_path / "data.jsonl", edited_rows())
    stops(capsys, stages[1], data, model, "' ada makes tea.' of ' Ada makes tea.'", run=tmp_path / "run", data=data,
          model=model)
    assert not (tmp_path / "run").exists()
    small = [{**row, "response": row["response"].lower(), "edited": row["edited"].lower()} for row in edited_rows()]
    write_rows(data, small[:-1] + edited_rows()[-1:])
    run = str(tmp_path / "run")
    stages[1].main(stages[1].Args(run=run, data=str(data), model=str(model), **SMALL[1]))
    assert "changes 2 of 48 texts" in capsys.readouterr().out
    stages[2].main(stages[2].Args(run=run, **SMALL[2]))                # the ids are those of this tokenizer


def test_a_tokenizer_that_ends_every_text(stages, tmp_path):
    """Its end token must not stand between prompt and response."""
    kind, settings, more, specials, roles, begins, template = MODELS["llama"]
    tokenizer = make_tokenizer(specials, roles, begins, template)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    assert tokenizer("Ada").input_ids[-1] == tokenizer.eos_token_id
    prompt = stages[1].encode_prompt(tokenizer, "Ada")
    assert prompt == [tokenizer.bos_token_id] + tokenizer("Ada", add_special_tokens=False).input_ids


def test_no_end_token(stages, tmp_path, capsys):
    kind, settings, more, specials, roles, begins, template = MODELS["llama"]
    model = make_model(tmp_path / "model", kind, make_tokenizer(specials, {"bos": "<s>"}, False, None), **settings)
    data = write_rows(tmp_path / "data.jsonl", edited_rows())
    stops(capsys, stages[1], model, "end token", run=tmp_path / "run", data=data, model=model)


def test_a_family_without_a_token_head(stages, tmp_path, capsys):
    """Gemma 3 has no AutoModelForTokenClassification in transformers: said in one line, before any training."""
    kind, settings, more, specials, roles, begins, template = MODELS["gemma"]
    model = make_model(tmp_path / "model", "gemma3_text", make_tokenizer(specials, roles, begins, None), **settings)
    data = write_rows(tmp_path / "data.jsonl", edited_rows())
    run = str(tmp_path / "run")
    stages[1].main(stages[1].Args(run=run, data=str(data), model=str(model), **SMALL[1]))
    stops(capsys, stages[2], "policy", "AutoModelForTokenClassification", "Gemma3", run=run)


def test_rlmec_needs_no_token_head(stages, tmp_path):
    kind, settings, more, specials, roles, begins, template = MODELS["gemma"]
    model = make_model(tmp_path / "model", "gemma3_text", make_tokenizer(specials, roles, begins, None), **settings)
    data, run = write_rows(tmp_path / "data.jsonl", solved_rows()), str(tmp_path / "run")
    stages[1].main(stages[1].Args(run=run, data=str(data), model=str(model), **SMALL[1]))
    stages[2].main(stages[2].Args(run=run, kind="generative", **SMALL[2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages[3], "rewrite", lambda grm, problems, responses, tokenizer, args, drop: [
            problem["solution_ids"] + [tokenizer.eos_token_id] for problem in problems])
        stages[3].main(stages[3].Args(run=run, method="rlmec", **SMALL[3]))
    stages[4].main(stages[4].Args(run=run, **SMALL[4]))
    assert "rlmec" in json.loads((tmp_path / "run" / "eval.json").read_text())["policies"]


def test_an_edit_of_a_cut_off_response_with_gpt2(stages, folder):
    """GPT-2 calls its end token unknown too; an edit that ends is no edit with unknown words."""
    tokenizer = stages[1].open_tokenizer(folder("gpt2"))
    pair = {"rejected": " Ada makes", "rejected_ids": tokenizer(" Ada makes").input_ids}
    new = stages[1].with_edit(pair, " Ada makes bread.", "llm", tokenizer, whole=True)
    assert new["edited_ids"][-1] == tokenizer.eos_token_id and new["rejected_ids"] == pair["rejected_ids"]


def test_characters_of_several_tokens_are_shown_once(stages, folder):
    tokenizer = stages[1].open_tokenizer(folder("gpt2"))
    ids = tokenizer("½ 🍞!").input_ids
    for stage in (1, 2, 3, 4):
        texts = stages[stage].token_texts(ids, tokenizer)
        assert "".join(texts) == "½ 🍞!" and len(texts) == len(ids) and "\ufffd" not in "".join(texts)

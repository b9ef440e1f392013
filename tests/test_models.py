"""Other people's models: small random folders of GPT-2, Llama, Qwen, Mistral, Gemma and GPT-NeoX, with the
tokenizers such models come with, through all four stages."""

import json

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
                 {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}, False, None)}
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

    def go(name, shape="edited", chat=False):
        key = f"{name}-{shape}{'-chat' * chat}"
        if key not in done:
            rows = edited_rows(chat) if shape == "edited" else solved_rows(chat)
            data = write_rows(root / f"{key}.jsonl", rows)
            with pytest.MonkeyPatch.context() as patch:         # a GRM this small cannot rewrite: the reference
                patch.setattr(stages[3], "rewrite", lambda grm, problems, responses, tokenizer, args, drop: [
                    problem["solution_ids"] + [tokenizer.eos_token_id] for problem in problems])
                for stage, module in stages.items():
                    more = {"data": str(data), "model": str(folder(name))} if stage == 1 else {}
                    module.main(module.Args(run=str(root / key), **SMALL[stage], **more))
            done[key] = root / key
        return done[key]

    return go


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", MODELS)
def test_all_stages(finished, name):
    run = finished(name)
    evaluation = json.loads((run / "eval.json").read_text())
    assert set(evaluation["policies"]) == {"sft", "ppo_token", "ppo_sequence"}
    assert len(rows_of(run / "edits.jsonl")) == 24

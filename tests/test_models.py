"""Other people's models: small random folders of seven families through all four stages."""

import json
import pytest, torch
from conftest import four, one, rows_of, three, two
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

NAMES = ["Ada", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jane", "Kit", "Lena"]
TEXTS = [f"What does {name} make? {name} makes bread.\nThe answer is 1." for name in NAMES]
CHATML = "{% for m in messages %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}"
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
GPT, QWEN = ["<|endoftext|>"], ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
SP, GEMMA = ["<unk>", "<s>", "</s>"], ["<pad>", "<bos>", "<eos>"]
ROPE = {"num_key_value_heads": 2, "intermediate_size": 32}
# config, rows beyond the tokens, special tokens; which are bos (begins a text), eos, pad; template
FAMILIES = {
    "gpt2": ({"resid_pdrop": 0.1, "embd_pdrop": 0.1}, 0, GPT, (None, 0, None), None),
    "llama": ({**ROPE, "tie_word_embeddings": False}, 0, SP, (1, 2, None), INST),
    "qwen2": ({**ROPE, "tie_word_embeddings": True}, 37, QWEN, (None, 1, 0), CHATML),
    "qwen3": ({**ROPE, "head_dim": 8}, 37, QWEN, (None, 0, 0), CHATML),
    "mistral": ({**ROPE, "sliding_window": 8}, 0, SP, (1, 2, None), None),
    "gemma": ({**ROPE, "head_dim": 8}, 0, GEMMA, (1, 2, 0), None),
    "gpt_neox": ({"intermediate_size": 32}, 29, GPT, (0, 0, None), None)}

def make_model(name, path):
    """Weights large enough that a wrong position or mask shows in the log-probs."""
    settings, more_rows, specials, roles, template = FAMILIES[name]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, 380, special_tokens=specials, show_progress=False)
    backend = Tokenizer.from_str(bpe.to_str())
    if roles[0] is not None:
        bos = (specials[roles[0]], roles[0])                   # special tokens have the first ids
        backend.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **{
        f"{x}_token": specials[k] for x, k in zip(("bos", "eos", "pad"), roles) if k is not None})
    config = AutoConfig.for_model(name, **{
        "vocab_size": len(tokenizer) + more_rows, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 300, "initializer_range": 0.3,
        "bos_token_id": roles[0], "eos_token_id": roles[1], "pad_token_id": None, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)

def data_rows(shape):
    for k in range(24):
        prompt = "Well, " * (k % 3) + f"what does {NAMES[k % 12]} make? {k}"
        right, wrong = (f" {NAMES[k % 12]} makes bread.\nThe answer is {n}." for n in (k, k + 1))
        if shape == "chat":
            prompt, right, wrong = ([{"role": "user", "content": text}]
                                    for text in (prompt, right, wrong))
        if shape in ("solved", "wrong"):
            for text in [wrong, right][:1 if shape == "wrong" or k % 4 == 0 else 2]:
                yield {"prompt": prompt, "solution": right, "answer": k, "response": text}
        else:
            edit = {} if shape == "unedited" else {"edited": right}
            yield {"prompt": prompt, "chosen": right, "rejected": wrong, **edit}

@torch.no_grad()
def check_plain_forward(run, end, pad):
    """Log-probs, rewards and values of a padded batch equal those of each row alone. One response
    ends in the pad token, one has it in the middle."""
    prompts = [[40, 41, 42] * 7, [43], [44, 45]]
    responses = [[50, 51, end], [52, 53, 54, 55, pad], [56, pad, 57, end]]
    policy = AutoModelForCausalLM.from_pretrained(run / "ppo_token")
    inputs, mask = three.pack(prompts, responses, policy)
    token, sequence = (two.KINDS[kind].from_pretrained(run / f"reward_{kind}")
                       for kind in ("token", "sequence"))
    for head in (getattr(token, "classifier", None) or token.score, sequence.score):
        torch.nn.init.normal_(head.weight)                     # trained ones are next to nothing
    logprobs = three.response_logprobs(policy, inputs, mask, 0.7)
    rows = [{"prompt_ids": x, "rewrite": (x, y), "rejected_ids": y}
            for x, y in zip(prompts, responses)]
    rewards, totals, likelihoods = (two.score(*pair, rows, "rejected_ids")[0] for pair in (
        ("token", token), ("sequence", sequence), ("generative", policy)))
    values = three.token_values(token, inputs, mask)
    for k, (prompt, response) in enumerate(zip(prompts, responses)):
        ids, T = torch.tensor([prompt + response]), len(response)
        logits, own = policy(ids).logits[0, len(prompt) - 1:-1], (range(T), response)
        before, *alone = token(ids).logits[0, len(prompt) - 1:]      # A2: at the token's own place
        hidden = sequence.base_model(ids).last_hidden_state[0, -1]   # A6: the last token, pad too
        for x, plain in ((logprobs[k], (logits / 0.7).log_softmax(dim=1)[own]),
                         (rewards[k], torch.cat(alone)),
                         (values[k], torch.cat([before, *alone[:-1]])),   # V: one place before it
                         (likelihoods[k], logits.softmax(dim=1)[own] - 0.5)):
            assert torch.allclose(x[:T], plain, atol=1e-4) and not x[T:].any()
        assert torch.allclose(totals[k], sequence.score(hidden)[0], atol=1e-4)

@pytest.mark.parametrize("name, shape", [
    *((name, "solved") for name in FAMILIES), ("llama", "chat"), ("qwen2", "chat"),
    ("gpt2", "unedited"), ("gpt2", "wrong")])
def test_all_stages(tmp_path, monkeypatch, name, shape):
    monkeypatch.setattr(three, "rewrite", lambda grm, wrong, *_: [      # a random GRM cannot
        row.update(rewrite_ids=row["solution_ids"], fate="rewritten") for row in wrong])
    model, data, run = make_model(name, tmp_path / "model"), tmp_path / "data", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in data_rows(shape)))
    one.main(one.Args(run=str(run), data=str(data), model=model, sft_lr=1e-4, max_new_tokens=6,
                      sft_steps=2 * (shape in ("solved", "wrong"))))
    two.main(two.Args(run=str(run), epochs=1, locate_epochs=1))
    three.main(three.Args(run=str(run), updates=1, rollout_batch=8, minibatch=4, ppo_epochs=1))
    four.main(args := four.Args(run=str(run)))
    trained = ["ppo_token"] * (shape not in ("unedited", "wrong"))
    trained += ["ppo_sequence"] * (shape != "wrong")
    trained += ["rlmec", "rlmec_imitation"] * (shape in ("solved", "wrong"))
    assert {*json.loads((run / "eval.json").read_text())["policies"]} == {"sft", *trained}
    tokenizer, bos = AutoTokenizer.from_pretrained(run / "policy"), FAMILIES[name][3][0]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for folder in ("policy", trained[0]):                      # no row without a token
        model = AutoModelForCausalLM.from_pretrained(run / folder)
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    rows = [row for row in rows_of(run / "edits.jsonl") if row["rejected"] != row["edited"]]
    assert len(rows) == 24 and pad not in (None, end) and args.max_new_tokens == 6   # stage 1's
    for row in rows:
        ids, prompt, rejected = row["prompt_ids"], row["prompt"], row["rejected"]
        if shape == "chat":                                    # the template writes bos itself
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False)
            rejected = rejected[-1]["content"]
        begins = bos is not None and tokenizer.bos_token * (shape != "chat") or ""
        assert tokenizer.decode(ids) == begins + prompt and (bos is None or ids.count(bos) == 1)
        assert tokenizer.decode(row["rejected_ids"]) == rejected + tokenizer.eos_token
    if "ppo_token" in trained:
        check_plain_forward(run, end, pad)

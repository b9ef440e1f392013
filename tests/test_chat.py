"""Chats to the token: what is the prompt, what is the response, which token ends it; then strings,
borders, thoughts, samples of a policy, and a run of stage 1."""

import copy
import json
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import one, rows_of
from tokenizers import (
    Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

USER = [{"role": "user", "content": "Who?"}]


def reply(text):
    return {"role": "assistant", "content": text}


def encoder_for(tokenizer, template=None, own=None):
    """The encoder of a tokenizer that has this chat template, for a model with its own end ids."""
    tokenizer.chat_template = template
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=own))
    return one.Encoder(tokenizer, one.turn_ends(model, tokenizer))


def problem_of(encoder, prompt):
    return {"prompt": prompt} | encoder.encode_prompt(prompt)


# --- A chat by hand ---
# Tokens are words; </s> is the tokenizer's end token, but <end> ends a turn of its template.
#
#     the user asks "Who?"           the assistant says "Tom!"
#     <user> Who  ?  <end> \n <bot>    Tom  !  <end>    \n
#        2    5   6    4    9   3       7   8    4       9
#     `--------- prompt --------´     `- response -´   what follows is nobody's

WORDS = ["<unk>", "</s>", "<user>", "<bot>", "<end>", "Who", "?", "Tom", "!", "\n"]
TURNS = (
    "{% for m in messages %}"
    "{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}<end>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def numbered(names):
    return {name: k for k, name in enumerate(names)}


@pytest.fixture
def by_hand():
    backend = Tokenizer(models.WordLevel(numbered(WORDS), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens(WORDS[2:5], special_tokens=True)
    return encoder_for(tokenizer, TURNS)


def test_by_hand_the_chat(by_hand):
    chat = [*USER, reply("Tom!")]
    text = by_hand.tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<user>Who?<end>\n<bot>Tom!<end>\n"
    assert by_hand.plain_ids(text) == [2, 5, 6, 4, 9, 3, 7, 8, 4, 9]


def test_by_hand_its_prompt(by_hand):
    prompt = by_hand.encode_prompt(USER)
    assert prompt == {"prompt_text": "<user>Who?<end>\n<bot>", "prompt_ids": [2, 5, 6, 4, 9, 3]}


def test_by_hand_its_response(by_hand):
    problem = problem_of(by_hand, USER)
    assert by_hand.encode_response(problem, "Tom!") == [7, 8, 4]
    assert by_hand.encode_response(problem, "Tom!", ended=False) == [7, 8]


def test_by_hand_what_ends_a_response(by_hand):
    assert by_hand.ends == [4, 1]  # first what ends a turn, then what ends a text


def test_by_hand_strings_have_no_turns(by_hand):
    problem = problem_of(by_hand, "Who?")
    assert problem["prompt_ids"] == [5, 6]
    assert by_hand.encode_response(problem, "Tom!") == [7, 8, 1]


def test_by_hand_a_sample_is_the_response_that_was_drawn(by_hand):
    problem = problem_of(by_hand, USER)
    assert by_hand.encode_sample(problem, [7, 8, 4], ended=True) == ("Tom!", [7, 8, 4], False)
    assert by_hand.encode_sample(problem, [7, 8], ended=False) == ("Tom!", [7, 8], False)


# --- The tokenizers: as of Qwen, Llama 2, transformers' Llama class, BERT ---

TRAINING = ["Who has it? Answer: Tom has two balls.", "Who?\n\nTom. Who?\n\nTom has balls."]
LETTERS = [chr(code) for code in range(33, 127)]
MARKS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Bot|>",
         "<think>", "</think>"]


def with_marks(backend, **roles):
    """The tokenizer of a backend, with the tokens of the templates."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.add_tokens(MARKS, special_tokens=True)
    return tokenizer


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\r\n]+| ?\w+| ?[^\s\w]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TRAINING, trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return with_marks(backend, pad_token="<pad>", eos_token="</s>")


def sentencepiece(prepends):
    """Pieces with `▁` for a space, and one before the text; other characters are bytes. prepends:
    `▁` stands behind every special token as well, as in Llama 2."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TRAINING, trainers.BpeTrainer(
        vocab_size=160, show_progress=False, initial_alphabet=LETTERS))
    learnt = json.loads(trained.to_str())["model"]

    pieces = ["<pad>", "<unk>", "<s>", "</s>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [piece for piece in learnt["vocab"] if piece != "\n"]
    merges = [tuple(pair) for pair in learnt["merges"] if "\n" not in "".join(pair)]
    backend = Tokenizer(models.BPE(
        numbered(pieces), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepends:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)

    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return with_marks(
        backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TRAINING, trainers.WordPieceTrainer(
        vocab_size=230, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False,
        initial_alphabet=LETTERS))
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return with_marks(
        backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]")


@cache
def tokenizer_of(kind):
    if kind == "byte-level":
        return byte_level()
    if kind == "wordpiece":
        return wordpiece()
    return sentencepiece(prepends=kind == "prepend")


KINDS = ["byte-level", "prepend", "metaspace", "wordpiece"]
EXACT = KINDS[:3]  # WordPiece forgets where spaces were
kinds = pytest.mark.parametrize("kind", KINDS)
exact_kinds = pytest.mark.parametrize("kind", EXACT)


@pytest.mark.parametrize("kind, pieces", [
    pytest.param("byte-level", "Who Ġhas Ġ â ĺ ĥ <think> Tom", id="a character is bytes"),
    pytest.param("prepend", "▁Who ▁has ▁ <0xE2> <0x98> <0x83> <think> ▁Tom", id="▁ behind marks"),
    pytest.param("metaspace", "▁Who ▁has ▁ <0xE2> <0x98> <0x83> <think> Tom", id="▁ at the start"),
    pytest.param("wordpiece", "Who has [UNK] <think> Tom", id="no spaces, no bytes"),
])
def test_the_tokenizers_are_what_they_are_called(kind, pieces):
    assert tokenizer_of(kind).tokenize("Who has ☃<think>Tom") == pieces.split()


# --- The templates ---

class Template(NamedTuple):
    text: str
    end: str | None = None  # the token behind a turn, if it is not the tokenizer's end token


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "zephyr": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "inst": Template(  # a space before the response
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}"
    ),
    "chatml": Template(CHATML, "<|im_end|>"),
    "gemma": Template(  # trims
        "{{ bos_token }}{% for m in messages %}"
        "<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}",
        "<end_of_turn>",
    ),
    "system": Template(  # a turn that nobody wrote
        "{% if messages[0].role != 'system' %}"
        "<|im_start|>system\nYou are Tom.<|im_end|>\n"
        "{% endif %}" + CHATML,
        "<|im_end|>",
    ),
    "lines": Template(  # no token ends a turn
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "qwen3": Template(  # finished turns show an empty thought
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
}
R1 = (  # a thought is opened for the response; finished turns do not show it
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|Bot|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<|User|>{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Bot|><think>\n{% endif %}"
)
templates = pytest.mark.parametrize("template", TEMPLATES)


def encoder_of(kind, template):
    return encoder_for(tokenizer_of(kind), TEMPLATES[template].text)


def end_of(tokenizer, template):
    return tokenizer.convert_tokens_to_ids(TEMPLATES[template].end or tokenizer.eos_token)


def rendered_ids(tokenizer, template, prompt, text):
    """The reference: the tokenizer's ids of the whole chat, up to the last token that ends a turn;
    where the template writes none, it is put behind the chat."""
    ids = tokenizer.apply_chat_template([*prompt, reply(text)], tokenize=True, return_dict=False)
    end = end_of(tokenizer, template)
    if template == "lines":
        return [*ids, end]
    while ids[-1] != end:
        ids = ids[:-1]
    return ids


# --- A response is what the template makes of it, behind its prompt ---

LONGER = [{"role": "system", "content": "Be brief."}, *USER, reply("Kit."), *USER]
prompts = pytest.mark.parametrize("prompt", [
    pytest.param(USER, id="one turn"),
    pytest.param(LONGER, id="four turns"),
])
RESPONSES = ["Tom has two balls.", "Tom", " Tom", "Tom.\nKit.", "Tom has ☃", "<s>Tom", ""]


def check_identity(encoder, template, prompt):
    problem = problem_of(encoder, prompt)
    for text in RESPONSES:
        ids = problem["prompt_ids"] + encoder.encode_response(problem, text)
        assert ids == rendered_ids(encoder.tokenizer, template, prompt, text), text
    assert not encoder.notes  # nothing out of the ordinary


@kinds
@templates
@prompts
def test_prompt_and_response_are_the_rendered_chat(kind, template, prompt):
    check_identity(encoder_of(kind, template), template, prompt)


@templates
def test_and_so_it_is_with_a_tokenizer_of_sentencepiece(shared, template):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    tokenizer.add_tokens(MARKS, special_tokens=True)
    check_identity(encoder_for(tokenizer, TEMPLATES[template].text), template, USER)


@kinds
@templates
def test_a_response_that_has_not_ended_lacks_the_end_alone(kind, template):
    encoder = encoder_of(kind, template)
    problem = problem_of(encoder, USER)
    ids = encoder.encode_response(problem, "Tom has")
    assert encoder.encode_response(problem, "Tom has", ended=False) == ids[:-1]


@pytest.mark.parametrize("template", [
    pytest.param("zephyr", id="that ends its turn as well"),
    pytest.param("chatml", id="that ends no turn"),
    pytest.param("lines", id="of a template that ends no turn"),
])
def test_a_response_may_hold_an_end_token(template):
    encoder = encoder_of("byte-level", template)
    problem = problem_of(encoder, USER)
    ids = problem["prompt_ids"] + encoder.encode_response(problem, " Tom</s> has")
    assert ids == rendered_ids(encoder.tokenizer, template, USER, " Tom</s> has")


def test_a_template_that_trims_trims_the_response():
    encoder = encoder_of("byte-level", "gemma")
    problem = problem_of(encoder, USER)
    assert encoder.encode_response(problem, " Tom\n") == encoder.encode_response(problem, "Tom")


def test_a_system_turn_of_the_template_stands_once_before_the_prompt():
    encoder = encoder_of("byte-level", "system")
    problem = problem_of(encoder, USER)
    ids = problem["prompt_ids"] + encoder.encode_response(problem, "Kit")
    assert encoder.tokenizer.decode(ids).count("You are Tom.") == 1


# --- What ends a turn ---

@kinds
@templates
def test_the_token_behind_a_turn_comes_first_then_the_end_token(kind, template):
    encoder = encoder_of(kind, template)
    tokenizer = encoder.tokenizer
    ends = [end_of(tokenizer, template), tokenizer.eos_token_id]
    assert encoder.ends == [*dict.fromkeys(ends)]


@pytest.mark.parametrize("own, more", [
    pytest.param(None, [], id="none"),
    pytest.param(7, [7], id="one"),
    pytest.param([1, 7, 8], [7, 8], id="several, the end token among them"),
])
def test_the_ids_of_the_generation_config_end_a_turn_too(own, more):
    tokenizer = tokenizer_of("byte-level")
    chat_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder_for(tokenizer, CHATML, own).ends == [chat_end, 1, *more]
    assert encoder_for(tokenizer, None, own).ends == [1, *more]


def test_a_token_that_was_added_but_is_not_special_ends_a_turn():
    tokenizer = copy.deepcopy(tokenizer_of("byte-level"))
    tokenizer.add_tokens(["<|end|>"])
    [end] = tokenizer("<|end|>").input_ids
    encoder = encoder_for(tokenizer, CHATML.replace("<|im_end|>", "<|end|>"))
    assert encoder.ends == [end, tokenizer.eos_token_id]


def test_a_line_break_ends_no_turn_though_it_was_added():
    tokenizer = copy.deepcopy(tokenizer_of("byte-level"))
    tokenizer.add_tokens(["\n"])
    assert encoder_for(tokenizer, TEMPLATES["lines"].text).ends == [tokenizer.eos_token_id]


# --- Strings: what the tokenizer makes of the whole text ---

BEGIN = {"byte-level": "", "prepend": "<s>", "metaspace": "<s>", "wordpiece": "[CLS]"}
texts = pytest.mark.parametrize("prompt, text", [
    pytest.param("Who has it?\nAnswer:", " Tom", id="a space before the response"),
    pytest.param("Who has it?\nAnswer:", "Tom", id="no space"),
    pytest.param("Who?\n", "Tom has ☃ balls.", id="a line break before it"),
])


@kinds
@texts
def test_a_string_has_the_ids_of_the_whole_text(kind, prompt, text):
    encoder = encoder_for(tokenizer_of(kind))
    problem = problem_of(encoder, prompt)
    tokenizer = encoder.tokenizer

    whole = tokenizer(prompt + text).input_ids
    if whole[-1] != tokenizer.eos_token_id:  # WordPiece ends every text itself
        whole.append(tokenizer.eos_token_id)
    assert problem["prompt_ids"] + encoder.encode_response(problem, text) == whole
    assert not encoder.notes


@pytest.mark.parametrize("kind", KINDS[1:])
@texts
def test_a_begin_token_in_the_text_comes_once(kind, prompt, text):
    encoder = encoder_for(tokenizer_of(kind))
    tokenizer = encoder.tokenizer
    problem = problem_of(encoder, BEGIN[kind] + prompt)
    assert problem["prompt_ids"].count(tokenizer.bos_token_id) == 1

    ids = problem["prompt_ids"] + encoder.encode_response(problem, text)
    whole = encoder.plain_ids(BEGIN[kind] + prompt + text)
    assert ids == [*whole, tokenizer.eos_token_id]


@kinds
def test_a_string_begins_with_the_begin_token_of_its_tokenizer(kind):
    encoder = encoder_for(tokenizer_of(kind))
    begin = encoder.plain_ids(BEGIN[kind])
    assert encoder.encode_prompt("Who?")["prompt_ids"] == begin + encoder.plain_ids("Who?")


@exact_kinds
@texts
def test_a_string_is_decoded_with_no_space_too_many(kind, prompt, text):
    encoder = encoder_for(tokenizer_of(kind))
    problem = problem_of(encoder, prompt)
    ids = problem["prompt_ids"] + encoder.encode_response(problem, text)
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == prompt + text


def test_an_end_token_in_the_text_comes_once():
    encoder = encoder_for(tokenizer_of("metaspace"))
    problem = problem_of(encoder, "Who?")
    assert encoder.encode_response(problem, "Tom</s>") == encoder.encode_response(problem, "Tom")


@pytest.mark.parametrize("prompt, end", [
    pytest.param("Who?", "</s>", id="a text"),
    pytest.param("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
                 id="a rendered chat"),
])
def test_a_string_that_is_a_rendered_chat_ends_as_a_turn(prompt, end):
    encoder = encoder_for(tokenizer_of("byte-level"), CHATML)
    ids = encoder.encode_response(problem_of(encoder, prompt), "Tom")
    assert ids == encoder.plain_ids("Tom" + end)


# --- A token would straddle the border: the parts are encoded apart ---
# Of "Answer: Tom" the tokenizers make  Answer | : | ▁Tom,  but "Answer: " ends in a token ▁.

APART = "encoded apart from its prompt, since a token would straddle the border"


def check_apart(encoder, prompt, text, behind=""):
    """behind: what the template writes behind the text."""
    problem = problem_of(encoder, prompt)
    ids = encoder.encode_response(problem, text)
    decode = encoder.tokenizer.decode
    prompt_text = decode(problem["prompt_ids"])
    assert decode(problem["prompt_ids"] + ids[:-1]) == prompt_text + text + behind
    assert ids[-1] == encoder.ends[0]
    assert encoder.notes == {APART: 1}


@exact_kinds
def test_a_straddled_border_is_decoded_exactly_and_counted(kind):
    encoder = encoder_for(tokenizer_of(kind))
    prompt_ids = encoder.encode_prompt("Answer: ")["prompt_ids"]
    whole = encoder.encode_prompt("Answer: Tom")["prompt_ids"]
    assert whole[:len(prompt_ids)] != prompt_ids  # a token does straddle it
    check_apart(encoder, "Answer: ", "Tom")


def test_a_line_break_may_straddle_it_as_well():
    encoder = encoder_for(tokenizer_of("byte-level"))
    assert "ĊĊ" in encoder.tokenizer.tokenize("Who?\n\nTom")
    check_apart(encoder, "Who?\n", "\nTom has")


@exact_kinds
def test_a_template_may_put_such_a_border(kind):
    lines = TEMPLATES["lines"].text.replace("assistant:{", "assistant: {")
    encoder = encoder_for(tokenizer_of(kind), lines)
    check_apart(encoder, USER, "Tom", behind="\n")


# --- Thoughts that the prompt opens ---

HIDDEN = "behind the generation prompt, where the template does not show it"
OPEN = "leaves the thought open that its prompt opens"


@kinds
@pytest.mark.parametrize("text", [
    pytest.param("<think>\nTom has it.\n</think>\nTom", id="opened as the prompt does"),
    pytest.param("<think>Tom has it.\n</think>\nTom", id="opened without a line break"),
    pytest.param("Tom has it.\n</think>\nTom", id="not opened"),
])
def test_a_thought_is_opened_once(kind, text):
    encoder = encoder_for(tokenizer_of(kind), R1)
    problem = problem_of(encoder, USER)
    assert problem["prompt_text"].endswith("<|User|>Who?<|Bot|><think>\n")

    ids = problem["prompt_ids"] + encoder.encode_response(problem, text)
    once = problem["prompt_text"] + "Tom has it.\n</think>\nTom"
    assert ids == [*encoder.plain_ids(once), encoder.ends[0]]
    assert encoder.notes == {HIDDEN: 1}


@pytest.mark.parametrize("template, hidden", [
    pytest.param(R1, {HIDDEN: 1}, id="not shown in finished turns"),
    pytest.param(R1.replace(".split('</think>')[-1]", ""), {}, id="shown"),
])
def test_a_thought_may_be_shown_or_not(template, hidden):
    encoder = encoder_for(tokenizer_of("byte-level"), template)
    problem = problem_of(encoder, USER)
    text = "<think>\nTom has it.\n</think>\nTom"
    ids = problem["prompt_ids"] + encoder.encode_response(problem, text)
    assert encoder.tokenizer.decode(ids) == f"<|User|>Who?<|Bot|>{text}</s>"
    assert encoder.notes == hidden


def test_a_response_that_leaves_the_thought_open_is_counted():
    encoder = encoder_for(tokenizer_of("byte-level"), R1)
    problem = problem_of(encoder, USER)
    for text in ("Tom has it.", "<think>\nTom has it.", "Tom has it.</think>Tom"):
        encoder.encode_response(problem, text)
    assert encoder.notes == {HIDDEN: 2, OPEN: 2}


# --- Samples of the policy ---

NEW = "sample: encoded anew, its tokens are not the tokenizer's own"
WAYS = [*product(KINDS, TEMPLATES)]
WAYS.remove(("prepend", "qwen3"))  # it puts a space behind </think>: the text is another then


@pytest.mark.parametrize("kind, template", WAYS)
@pytest.mark.parametrize("text", ["Tom has two balls.", "Tom.\nWho"])
def test_a_sample_in_the_splitting_of_the_tokenizer_stays_as_drawn(kind, template, text):
    encoder = encoder_of(kind, template)
    problem = problem_of(encoder, USER)
    whole = rendered_ids(encoder.tokenizer, template, USER, text)
    drawn = whole[len(problem["prompt_ids"]):]

    said, ids, verbatim = encoder.encode_sample(problem, drawn, ended=True)
    assert ids == drawn
    assert not verbatim and not encoder.notes
    assert rendered_ids(encoder.tokenizer, template, USER, said) == whole


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("text, verbatim", [
    pytest.param("Tom has", False, id="a text"),
    pytest.param("Tom has ☃", False, id="a character of several tokens"),
    pytest.param("<think>\nTom\n</think>\nTom", False, id="special tokens"),
    pytest.param("Tom.<|im_end|>\n<start_of_turn>user\nWho", False, id="turns of others"),
    pytest.param(" Tom", True, id="a space, which the template would trim"),
])
def test_a_sample_that_the_limit_cut_stays_as_drawn(kind, text, verbatim):
    encoder = encoder_of(kind, "gemma")
    problem = problem_of(encoder, USER)
    whole = encoder.plain_ids(encoder.tokenizer.decode(problem["prompt_ids"]) + text)
    drawn = whole[len(problem["prompt_ids"]):]
    assert encoder.encode_sample(problem, drawn, ended=False) == (text, drawn, verbatim)


@exact_kinds
def test_a_sample_of_a_string_prompt_stays_as_drawn(kind):
    encoder = encoder_for(tokenizer_of(kind))
    drawn = encoder.plain_ids("Answer: Tom")[-1:] + encoder.ends
    sample = encoder.encode_sample(problem_of(encoder, "Answer:"), drawn, ended=True)
    assert sample == (" Tom", drawn, False)


def test_a_sample_behind_a_special_token_stays_as_drawn():
    """Some tokenizers split a text behind a special token as if a space stood there, and decode
    this space."""
    encoder = encoder_of("prepend", "inst")
    problem = problem_of(encoder, "Who?<|im_end|>")
    whole = encoder.plain_ids("<s>Who?<|im_end|>Tom has")
    drawn = whole[len(problem["prompt_ids"]):] + [encoder.text_end]
    text, ids, _ = encoder.encode_sample(problem, drawn, ended=True)
    assert encoder.tokenizer.decode(whole).endswith(" Tom has")
    assert (text, ids) == ("Tom has", drawn)
    assert not encoder.notes


def test_a_sample_encoded_anew_gets_no_words_of_the_template():
    encoder = encoder_of("byte-level", "qwen3")
    problem = problem_of(encoder, USER)
    drawn = encoder.tokenizer.convert_tokens_to_ids(["T", "o", "m", "<|im_end|>"])
    sample = encoder.encode_sample(problem, drawn, ended=True)
    assert sample == ("Tom", encoder.plain_ids("Tom<|im_end|>"), True)
    assert encoder.notes == {NEW: 1}


def test_a_sample_without_the_thought_of_the_template_stays_as_drawn():
    encoder = encoder_of("byte-level", "qwen3")
    problem = problem_of(encoder, USER)
    drawn = encoder.plain_ids("Tom<|im_end|>")
    assert encoder.encode_sample(problem, drawn, ended=True) == ("Tom", drawn, True)
    assert encoder.encode_response(problem, "Tom", verbatim=True) == drawn  # as its edit will be
    assert encoder.encode_response(problem, "Tom") != drawn


def test_a_sample_that_leaves_the_thought_open_is_counted_too():
    encoder = encoder_for(tokenizer_of("byte-level"), R1)
    problem = problem_of(encoder, USER)
    drawn = encoder.plain_ids("Tom has it.</s>")
    assert encoder.encode_sample(problem, drawn, ended=True)[:2] == ("Tom has it.", drawn)
    assert encoder.notes[OPEN] == 1


@pytest.mark.parametrize("pieces, text", [
    pytest.param(["T", "o", "m"], "Tom", id="another splitting"),
    pytest.param(["Tom", "<pad>"], "Tom", id="padding, which is no text"),
    pytest.param(["Tom", "Ġ", "â", "ĺ"], "Tom \ufffd", id="a character that was cut"),
])
def test_a_sample_in_another_splitting_is_encoded_anew_and_counted(pieces, text):
    encoder = encoder_of("byte-level", "chatml")
    problem = problem_of(encoder, USER)
    drawn = encoder.tokenizer.convert_tokens_to_ids([*pieces, "<|im_end|>"])
    sample = encoder.encode_sample(problem, drawn, ended=True)
    assert sample == (text, encoder.plain_ids(text + "<|im_end|>"), False)
    assert encoder.notes == {NEW: 1}


@pytest.mark.parametrize("prompt, end", [
    pytest.param(USER, "</s>", id="a chat that ends as a text"),
    pytest.param("Who?", "<|im_end|>", id="a string that ends as a turn"),
])
def test_a_sample_keeps_the_end_that_was_drawn(prompt, end):
    encoder = encoder_of("byte-level", "chatml")
    drawn = encoder.plain_ids("Tom" + end)
    sample = encoder.encode_sample(problem_of(encoder, prompt), drawn, ended=True)
    assert sample[:2] == ("Tom", drawn)


@kinds
@templates
def test_the_texts_of_tokens_join_to_the_chat_wherever_it_is_cut(kind, template):
    tokenizer = encoder_of(kind, template).tokenizer
    ids = rendered_ids(tokenizer, template, USER, "Tom has ☃")
    for stop in range(len(ids) + 1):
        texts = one.token_texts(ids[:stop], tokenizer)
        assert "".join(texts) == tokenizer.decode(ids[:stop])
        assert len(texts) == stop


# --- Stage 1 with a model whose turns end with another token than its end token ---

TURN_END = "<end_of_turn>"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A small random Llama that likes to end its turn: one direction of its embeddings is the same
    for all tokens and speaks for that token alone."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = tokenizer_of("metaspace")
    tokenizer.chat_template = TEMPLATES["gemma"].text
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(TURN_END), 0] = 1.0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def asks(k):
    return [{"role": "user", "content": f"Who has {k} balls?"}]


SHAPES = {
    "pairs": lambda k: {
        "prompt": asks(k),
        "chosen": [reply(f"Tom has {k}.")],
        "rejected": [reply(f"Kit has {k} balls.")],
        "edited": [reply(f" Tom has {k} balls.")],  # with a space, which the template trims
    },
    "problems": lambda k: {"prompt": asks(k), "solution": f"The answer is {k}.", "answer": k},
    "prompts": lambda k: {"prompt": asks(k)},
}


@pytest.fixture(scope="module")
def runs(chat_model, tmp_path_factory):
    """Stage 1 on each shape of data: a run folder by shape."""
    folders = {}
    for shape, row in SHAPES.items():
        folder = tmp_path_factory.mktemp(shape)
        one.write_jsonl(folder / "data.jsonl", [row(k) for k in range(24)])
        (folder / "rules").write_text("[a-z]\tT")
        one.main(one.Args(
            run=str(folder / "run"), data=str(folder / "data.jsonl"), model=str(chat_model),
            editor=f"rules:{folder / 'rules'}" if shape == "prompts" else None,
            max_new_tokens=24, max_edit_share=1.0))
        folders[shape] = folder / "run"
    return folders


@pytest.fixture
def policy(runs):
    """The saved policy, its tokenizer and the ids that end a response."""
    path = runs["pairs"] / "policy"
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = tokenizer.convert_tokens_to_ids([TURN_END, "</s>"])
    model = AutoModelForCausalLM.from_pretrained(path)
    return SimpleNamespace(model=model, tokenizer=tokenizer, ends=ends)


def test_the_policy_is_saved_with_all_that_ends_a_response(policy):
    assert policy.model.config.eos_token_id == policy.ends
    assert policy.model.generation_config.eos_token_id == policy.ends


@pytest.mark.parametrize("name, id_name", [
    pytest.param("rejected", "rejected_ids", id="rejected"),
    pytest.param("edited", "edited_ids", id="edited"),
    pytest.param("chosen", "chosen_token_ids", id="chosen"),
])
def test_a_row_holds_the_rendered_chat(runs, policy, name, id_name):
    rows = rows_of(runs["pairs"] / "edits.jsonl")
    assert len(rows) == 24
    for row in rows:
        whole = rendered_ids(policy.tokenizer, "gemma", row["prompt"], row[name][0]["content"])
        assert row["prompt_ids"] + row[id_name] == whole
        assert row[id_name][-1] == policy.ends[0]


def test_a_solution_ends_as_a_turn(runs, policy):
    for row in rows_of(runs["problems"] / "problems.jsonl"):
        whole = rendered_ids(policy.tokenizer, "gemma", row["prompt"], row["solution"])
        assert row["prompt_ids"] + row["solution_ids"] == whole


@pytest.mark.parametrize("shape", ["problems", "prompts"])
def test_a_sample_stops_where_a_turn_ends(runs, policy, shape):
    rows = rows_of(runs[shape] / "edits.jsonl")
    assert len(rows) > 12
    for row in rows:
        assert not set(policy.ends) & set(row["rejected_ids"][:-1])
    lasts = [row["rejected_ids"][-1] for row in rows]
    assert lasts.count(policy.ends[0]) > len(rows) / 2


def test_an_edit_by_rules_ends_where_its_response_does(runs, policy):
    for row in rows_of(runs["prompts"] / "edits.jsonl"):
        ended = [row[name][-1] in policy.ends for name in ("rejected_ids", "edited_ids")]
        assert ended[0] == ended[1]


def test_generate_of_others_stops_there_too(policy):
    prompt = policy.tokenizer.apply_chat_template(
        asks(5), add_generation_prompt=True, return_dict=True, return_tensors="pt")
    P = prompt.input_ids.shape[1]
    output = policy.model.generate(**prompt, do_sample=True, max_new_tokens=60)
    *words, last = output[0, P:].tolist()
    assert last in policy.ends and len(words) < 59
    assert not set(policy.ends) & set(words)


def test_nothing_stands_behind_the_end_of_a_sample(policy):
    encoder = one.Encoder(policy.tokenizer, policy.ends)
    prompts = [encoder.encode_prompt(asks(k))["prompt_ids"] for k in range(8)] * 4
    args = one.Args(max_new_tokens=24)
    samples = one.generate(policy.model.to(args.device), policy.tokenizer, prompts, args)
    assert len({len(ids) for ids in samples}) > 3
    for ids in samples:
        assert ids[-1] in policy.ends or len(ids) == 24
        assert not set(policy.ends) & set(ids[:-1])

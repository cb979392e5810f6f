# SPDX-License-Identifier: Apache-2.0
"""From text to tokens: which tokens end a text, BOS, chat templates, and tokenizers of every kind of file."""

import json
import os

import pytest
import torch
from characters import character_tokenizer
from models import message_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_comp.inference import model_files
from megatron_comp.inference.text import check_prompt, encode, read_tokenizer, stop_tokens

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[a]"


def tokenizer_in(folder, bos="<", eos="@", adds_bos=True, **more):
    """Of characters, with `<` for BOS, which it puts before every text."""
    from tokenizers import processors

    folder.mkdir(exist_ok=True)
    character_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": bos, **({"eos_token": eos} if eos else {})})
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    for name, value in more.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return read_tokenizer(folder)


def ids(text):
    return [ord(character) for character in text]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_one_bos(tmp_path, adds_bos):
    tokenizer = tokenizer_in(tmp_path / "model", adds_bos=adds_bos)
    bos = "<" if adds_bos else ""
    assert encode(tokenizer, "hi") == ids(bos + "hi")
    assert encode(tokenizer, "<hi") == ids("<hi")
    assert encode(tokenizer, "h<i") == ids(bos + "h<i")
    assert encode(tokenizer, "<<hi") == ids("<<hi")  # who writes two gets two
    assert encode(tokenizer, "") == ids(bos)


def test_chat(tmp_path):
    tokenizer = tokenizer_in(tmp_path / "model", chat_template=TEMPLATE)
    assert encode(tokenizer, "hi", chat=True) == ids("<[user]hi[a]")
    conversation = [{"role": "user", "content": "hi"}]
    theirs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert encode(tokenizer, "hi", chat=True) == theirs
    plain = tokenizer_in(tmp_path / "plain")
    assert f"--chat: the tokenizer in {tmp_path / 'plain'} has no chat template" in message_of(
        encode, plain, "hi", True
    )
    bad = tokenizer_in(tmp_path / "bad", chat_template="{{ raise_exception('two turns only') }}")
    assert "--chat: the chat template in" in (said := message_of(encode, bad, "hi", True)) and "two turns only" in said


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% include 'a' %}", "{% for x in %}", "{% for _ in range(10**9) %}_{% endfor %}"]
)
def test_a_template_that_fails_is_one_error(tmp_path, template):
    said = message_of(encode, tokenizer_in(tmp_path / "bad", chat_template=template), "hi", True)
    assert f"--chat: the chat template in {tmp_path / 'bad'} fails: " in said


def test_bytes_that_are_no_text():
    check_prompt("naïve 日本")
    assert "--prompt is not UTF-8 text: byte 0xff at character 3" in message_of(check_prompt, os.fsdecode(b"abc\xff"))


# generation_config.json's, config.json's and the tokenizer's words, and what ends a text.
@pytest.mark.parametrize(
    "generation, config, tokenizer, expected",
    [
        ([5, 6], 7, "@", {5, 6}),
        (5, [7, 8], "@", {5}),
        (None, 7, "@", {7}),
        (None, [7, 8], "@", {7, 8}),
        ([], 7, "@", {7}),
        ("absent", 7, "@", {7}),
        ("absent", None, "@", {ord("@")}),
        ("missing file", None, "@", {ord("@")}),
        ("missing file", [9], "@", {9}),
        ("missing file", None, None, set()),
        (0, 7, "@", {0}),
    ],
)
def test_the_first_that_names_stop_tokens_counts(tmp_path, generation, config, tokenizer, expected):
    read = tokenizer_in(tmp_path / "model", eos=tokenizer)
    if generation != "missing file":
        said = {} if generation == "absent" else {"eos_token_id": generation}
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"do_sample": False, **said}))
    assert stop_tokens(tmp_path / "model", LlamaConfig(eos_token_id=config), read) == expected


@pytest.mark.parametrize("word", ["2", [1, "2"], True, 1.5, {"a": 1}])
def test_stop_tokens_that_are_none(tmp_path, word):
    read = tokenizer_in(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": word}))
    said = message_of(stop_tokens, tmp_path / "model", LlamaConfig(), read)
    assert (
        said.startswith(f"{tmp_path}/model/generation_config.json: eos_token_id is ") and "allowed: a token's" in said
    )


def test_generation_ends_where_transformers_ends(command, tmp_path):
    """On the token that only generation_config.json names."""
    folder = tmp_path / "model"
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.normal_(0, 0.15)
    model.save_pretrained(folder)
    character_tokenizer(folder)
    prompt = ids("hello")
    free = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, 5:].tolist()
    stop = next(token for place, token in enumerate(free) if place > 2 and token not in free[:place])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop], "max_new_tokens": 16}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False)[0, 5:].tolist()
    assert 3 < len(expected) < 16
    arguments = ("--model", folder, "--tp", 2, "--prompt", "hello", "--max-new-tokens", 16)
    done = command("generate", *arguments, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["new_tokens"] == len(expected)


def test_tokenizers_that_are_not_there(tmp_path, monkeypatch):
    assert "holds no tokenizer: expected one of tokenizer.json" in str(error_of(read_tokenizer, tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr(model_files, "_there", lambda module: module != "sentencepiece")
    said = str(error_of(read_tokenizer, tmp_path))
    assert "tokenizer.model is a sentencepiece file, and sentencepiece cannot be imported" in said
    assert "pip install sentencepiece protobuf" in said and "tiktoken" not in said
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    assert "no tokenizer that transformers can load" in str(error_of(read_tokenizer, tmp_path))


def error_of(call, *args):
    with pytest.raises((ValueError, OSError)) as error:
        call(*args)
    return error.value


@pytest.mark.parametrize("configured", [False, True], ids=["alone", "with tokenizer_config.json"])
def test_sentencepiece(tmp_path, sotu_text, configured):
    """Against sentencepiece itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = sotu_text.read_text()[:100_000]
    (tmp_path / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    if configured:
        words = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    tokenizer = read_tokenizer(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for prompt in ("Hello world", "We must  act. Now!", "naïve 日本", text[500:900].replace("\n", " ")):
        assert encode(tokenizer, prompt) == [oracle.bos_id(), *oracle.encode(prompt)]
    assert encode(tokenizer, "<s>Hello")[:2].count(oracle.bos_id()) == 1
    assert tokenizer.decode(encode(tokenizer, "We must act."), skip_special_tokens=True) == "We must act."
    assert tokenizer.eos_token_id == oracle.eos_id()

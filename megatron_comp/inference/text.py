# SPDX-License-Identifier: Apache-2.0
"""From text to tokens, as the model's folder says: its tokenizer, its chat template, and the tokens that end a text."""

import json
from pathlib import Path

from . import model_files
from .config import TOKENS, read_json


def read_tokenizer(model_dir):
    """The tokenizer of a model's folder. Raises FileNotFoundError or ValueError, naming the folder, without one."""
    folder = Path(model_dir)
    model_files.check_tokenizer(folder)
    from transformers import AutoTokenizer, LlamaTokenizer

    try:
        if model_files.sentencepiece_alone(folder):
            # Of such a file AutoTokenizer makes a tokenizer that puts no space before the text and no BOS. What
            # tokenizer_config.json says goes before these.
            path = folder / "tokenizer_config.json"
            said = read_json(path) if path.is_file() else {}
            return LlamaTokenizer.from_pretrained(folder, add_bos_token=said.get("add_bos_token", True))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(f"{folder}: the tokenizer needs a package that is missing: {error}") from None
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        raise ValueError(f"{folder}: no tokenizer that transformers can load: {error}") from None


def encode(tokenizer, prompt: str, chat: bool = False) -> list[int]:
    """Tokens of a prompt. One that begins with the text of the BOS token gets no second one.

    chat: the prompt is what a user says; it stands in the tokenizer's chat template, before the model's turn.

    Raises ValueError for a prompt that is not text, and for a tokenizer without a template.
    """
    check_prompt(prompt)
    if not chat:
        ids = tokenizer.encode(prompt)
        if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
            written = tokenizer.encode(prompt, add_special_tokens=False)
            added = ids[0] == tokenizer.bos_token_id and ids[1 : len(written) + 1] == written
            return ids[1:] if added else ids
        return ids
    if not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer in {tokenizer.name_or_path} has no chat template")
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program
        raise ValueError(
            f"--chat: the chat template in {tokenizer.name_or_path} fails: {type(error).__name__}: {error}"
        ) from None
    return tokenizer.encode(text, add_special_tokens=False)  # the template has written them


def read_text(path) -> str:
    """A text file. Raises ValueError if it is not UTF-8, OSError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 text: {error}") from None


def check_length(path, tokens: int) -> None:
    """Raises ValueError for a text file that no tokenizer can make so many tokens of: a token is at least a byte, but
    for a few that begin and end a text. Raises also what `read_text` raises."""
    size = len(read_text(path).encode())
    if size + 8 < tokens:
        raise ValueError(f"--text {path} has {size} bytes, too few for {tokens} tokens")


def check_prompt(prompt: str) -> None:
    """Raises ValueError for bytes that are not UTF-8, which Python hands on as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        byte = ord(prompt[error.start]) & 0xFF
        raise ValueError(f"--prompt is not UTF-8 text: byte 0x{byte:02x} at character {error.start}") from None


def stop_tokens(model_dir, config, tokenizer) -> set[int]:
    """The tokens that end a text: of generation_config.json; if it names none, of config.json; else the tokenizer's.

    Raises ValueError for a generation_config.json that is damaged or names what is no token.
    """
    for each in (named_stops(model_dir), config.eos_token_id, tokenizer.eos_token_id):
        if each is not None and each != []:
            return set(each) if isinstance(each, list) else {each}
    return set()


def named_stops(model_dir) -> int | list[int] | None:
    """Those of generation_config.json, as it has them. Raises what `stop_tokens` raises."""
    path = Path(model_dir) / "generation_config.json"
    if not (path.exists() or path.is_symlink()):
        return None
    ends = read_json(path).get("eos_token_id")
    if not TOKENS.holds(ends):
        raise ValueError(f"{path}: eos_token_id is {json.dumps(ends)[:80]}; allowed: {TOKENS.allowed}")
    return ends

# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints whose tokens are characters: with a tokenizer that costs next to nothing."""

from checkpoints import tiny_llama


def character_tokenizer(folder):
    """Writes one beside a model of 128 tokens, and returns `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="?").save_pretrained(folder)
    return folder


def character_llama(folder, **config):
    return character_tokenizer(tiny_llama(folder, **config))

"""Tokenizers that need no download: one token per byte or character, so any two prompts differ."""

from __future__ import annotations

import string

from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

BOS = 512
EOS = 513
VOCABULARY = 514
"""Every byte inside a word, every byte at its end, then `BOS` and `EOS`."""


def clip_tokenizer() -> CLIPTokenizer:
    """CLIPTokenizer without merges: 77 tokens hold 75 letters; spaces cost nothing, the rest is cut off."""
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """T5Tokenizer over the printable ASCII characters; any other is `<unk>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces += [(character, -3.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)

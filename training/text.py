"""The text half of the denoiser: a small BPE tokenizer and an untrained CLIP text encoder."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.vocabulary import COLOURS, OBJECTS, caption, seen_pairs

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 2048
LENGTH = 77

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def corpus() -> list[str]:
    """Captions of every object and colour, to learn the merges from."""
    chance = random.Random(0)
    lines = [caption(o, c, chance.uniform(0.7, 1.05), chance) for o, c in seen_pairs() * 3]
    lines += [caption(None, c, 0.0, chance) for c in COLOURS]
    lines += ["photo painting drawing illustration of the a an and with in on at under over next to"]
    lines += ["two three four five many some beautiful colourful colorful happy shiny soft bright dark"]
    lines += [f"{name}s" for name in OBJECTS]
    return lines


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE of at most 2,048 entries in CLIP's file format, saved in ``folder``."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(letters),
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    vocabulary = bpe.get_vocab()
    for entry in [*(letter + "</w>" for letter in letters), START, END]:
        vocabulary.setdefault(entry, len(vocabulary))

    merges = json.loads(bpe.to_str())["model"]["merges"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"),
        bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=LENGTH,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder: 2 layers, 128 wide, 77 tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

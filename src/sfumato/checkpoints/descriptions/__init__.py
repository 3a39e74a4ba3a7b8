"""What describes single files of Stable Diffusion 1, 2 and XL, without a network: configurations, and CLIP's tokenizer.

A folder for each repository that diffusers would ask for the same, with its configurations' values. `merges.txt.xz` is
the byte-pair encoding of CLIP (c) OpenAI, MIT License; its vocabulary is made of the merges, in their order.
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
MERGES = HERE / "merges.txt.xz"


def of(repo: str) -> Path | None:
    """The folder that stands for a repository; None for one that is not here. Its tokenizers lack their words."""
    folder = HERE / repo.replace("/", "--")
    return folder if folder.is_dir() else None


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder of a repository; one of ours with the tokenizers' words, for as long as this lasts."""
    if folder.parent != HERE:
        yield folder
        return
    with TemporaryDirectory() as copy:
        described = Path(shutil.copytree(folder, copy, dirs_exist_ok=True))
        merges = lzma.decompress(MERGES.read_bytes()).decode()
        words = json.dumps(_vocabulary(merges.splitlines()))
        for tokenizer in described.glob("tokenizer*"):
            (tokenizer / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
            (tokenizer / "vocab.json").write_text(words, encoding="utf-8")
        yield described


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Every byte, the same at the end of a word, what each merge makes, and the two marks of a text's ends."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in printed] + [chr(256 + index) for index in range(256 - len(printed))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}

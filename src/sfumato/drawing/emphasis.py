"""AUTOMATIC1111's markup in a prompt: `(more)`, `((more))`, `(cat:1.5)`, `[less]`, `BREAK` and escaped brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass

MORE, LESS = 1.1, 1 / 1.1
"""Factor of a pair of round and of square brackets."""

_TOKEN = re.compile(
    r"""
      \\(?P<escaped>[()\[\]\\])
    | (?P<editing>\[(?:[^\[\]()|]*\|[^\[\]()]*|[^\[\]()]*:\s*[\d.]+\s*)\])     # [a|b], [a:b:0.5], [a:0.5]
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<close>[)\]])
    | \s*\b(?P<break>BREAK)\b\s*
    | (?P<text>[^\\()\[\]:\sB]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMPOSITION = re.compile(r"\bAND\b")

DEEPEST = 32
"""Brackets within more brackets than these are text."""

HEAVIEST = 100.0
"""Weights are bounded by this on both sides."""

MAX_TOLD = 60
"""Characters of a piece of markup that a warning repeats."""


@dataclass(frozen=True, slots=True)
class Fragment:
    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Emphasis:
    """A prompt as it is read."""

    parts: tuple[tuple[Fragment, ...], ...]
    """What stands between the BREAKs; never empty, but its parts may be."""
    markup: tuple[str, ...] = ()
    """The outermost brackets with what they hold, and BREAKs, as they stand in the prompt."""
    unread: tuple[str, ...] = ()
    """AUTOMATIC1111's prompt editing, alternation and composition, which are text here."""

    @property
    def plain(self) -> str:
        """The text without its markup."""
        return " ".join("".join(fragment.text for fragment in part) for part in self.parts)


def unescaped(prompt: str) -> str:
    """The prompt with its escaped brackets as brackets, all else as it stands."""
    return re.sub(r"\\([()\[\]\\])", r"\1", prompt)


def parse(prompt: str) -> Emphasis:
    """The fragments of a prompt with their weights. A bracket without its partner counts to the end, or is text."""
    parts: list[list[Fragment]] = [[]]
    opened: list[tuple[str, int, int, int]] = []  # bracket, part and fragment that it begins with, place in the prompt
    markup: list[str] = []
    unread = [found[0] for found in _COMPOSITION.finditer(prompt)]

    def close(bracket: str, factor: float, end: int) -> None:
        while opened:  # a bracket of the other kind that was not closed before counts to here
            each, part, first, start = opened.pop()
            weight = factor if each == bracket else MORE if each == "(" else LESS
            _scale(parts, part, first, weight)
            if not opened:
                markup.append(prompt[start:end])
            if each == bracket:
                return

    continued = False  # whether a text goes on in the last fragment
    for token in _TOKEN.finditer(prompt):
        kind, text = token.lastgroup, token[token.lastgroup or 0]
        pair = "(" if kind == "weight" or text == ")" else "["
        if kind == "open" and len(opened) < DEEPEST:
            opened.append((text, len(parts) - 1, len(parts[-1]), token.start()))
        elif kind in ("weight", "close") and any(bracket == pair for bracket, *_ in opened):
            close(pair, float(text) if kind == "weight" else MORE if pair == "(" else LESS, token.end())
        elif kind == "break":
            parts.append([])
            markup.append(text)
        else:
            if kind == "editing":
                unread.append(text)
            text = token[0] if kind in ("weight", "editing") else text
            before = parts[-1].pop().text if continued else ""
            parts[-1].append(Fragment(before + text, 1.0))
            continued = True
            continue
        continued = False
    while opened:
        close(opened[-1][0], MORE if opened[-1][0] == "(" else LESS, len(prompt))
    told = tuple(dict.fromkeys(piece[:MAX_TOLD] for piece in markup))
    return Emphasis(tuple(_merged(part) for part in parts), told, tuple(dict.fromkeys(unread)))


def _scale(parts: list[list[Fragment]], part: int, first: int, factor: float) -> None:
    for number in range(part, len(parts)):
        start = first if number == part else 0
        parts[number][start:] = [
            Fragment(each.text, max(-HEAVIEST, min(HEAVIEST, each.weight * factor))) for each in parts[number][start:]
        ]


def _merged(part: list[Fragment]) -> tuple[Fragment, ...]:
    """Neighbours of one weight as one fragment; without blank ones."""
    merged: list[Fragment] = []
    for each in part:
        if merged and merged[-1].weight == each.weight:
            merged[-1] = Fragment(merged[-1].text + each.text, each.weight)
        else:
            merged.append(each)
    return tuple(each for each in merged if each.text.strip())

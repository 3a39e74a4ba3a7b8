"""Does every family draw the same in a batch as alone? Also writes the list of signatures that may be batched.

    python -m benchmarks.parity                       every family, a table
    python -m benchmarks.parity Flux QwenImage        some of them
    python -m benchmarks.parity --write               write the record, the list and the table in the docs
    python -m benchmarks.parity --write Flux          the same, but measure only some families again
    python -m benchmarks.parity --sources             no measurement: the digests of the record made anew
    python -m benchmarks.parity --unproven            classes whose source is not the measured one; writes them down

Each family of `tests/support/families.py` draws three pictures (prompts, lengths, seeds, steps and guidance differ)
three times: one after another with the plain pipeline, batched while every kind of batch is also computed
member by member, and batched with the verdicts of that; then the same with three calls that differ only in
prompt and seed. All in fp32; then the first three again in bf16, with the shipped list. The counts are
those of the first three.

Every proved batch of a denoiser is repeated with each combination of its optional arguments left out
(see `variations`), so that the list covers everything a pipeline may pass.

`tests/data/parity.json` is the record of all that; the list and the table are made of it alone. What was shown belongs
to the source of the classes that a module consists of: their digests are in the record. `--sources` builds every family
and writes the digests without drawing; it refuses where other versions are installed than those that were measured.
After an upgrade `--unproven` says which classes have another source, so are proved at first use until they are measured
again; the record has to say so (a test).
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from sfumato.batching import shipped_list, verification
from sfumato.batching.batcher import Batcher, Task
from sfumato.batching.calls import Call as ModuleCall
from sfumato.batching.calls import differences_between
from sfumato.batching.outcomes import Reply
from sfumato.batching.views import view
from sfumato.errors import told

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from benchmarks.variations import variations  # noqa: E402
from support.families import FAMILIES as PICTURES  # noqa: E402
from support.families import Call, Family  # noqa: E402
from support.families_controlled import FAMILIES as CONTROLLED  # noqa: E402
from support.families_moving import FAMILIES as MOVING  # noqa: E402
from support.families_newer import FAMILIES as NEWER  # noqa: E402
from support.families_transformers import FAMILIES as TRANSFORMERS  # noqa: E402

FAMILIES: dict[str, Family] = {**PICTURES, **CONTROLLED, **TRANSFORMERS, **NEWER, **MOVING}

RECORD = ROOT / "tests/data/parity.json"

PAGE = ROOT / "docs/concepts/batching.md"
BEGIN, END = "<!-- families: written by benchmarks/parity.py -->", "<!-- end of families -->"

PIXEL = 1e-4
"""Largest pixel error (0 .. 1) that counts as the same picture."""

SHOWN = 3e-4
"""Largest error of a module's output, relative to its largest value, with which its signature goes on the list."""

JITTER = 3e-7
"""About one fp32 rounding error: disturbance of a denoiser's output, to measure how chaotic toy weights are."""

CHAOS = 10.0
"""A family whose pixels differ by more than PIXEL passes if a jitter of one rounding error makes a tenth of that."""

HOPELESS = 0.02
"""If the pixels differ by more, the toy weights prove nothing."""


@dataclass
class Measured:
    """One family."""

    name: str
    error: float
    """Of the worst pixel, in fp32."""
    jitter: float | None
    """Effect of JITTER alone on the worst pixel, if the error is above PIXEL."""
    calls: int
    forwards: int
    """Forward passes of the denoiser, in the run with verdicts."""
    shown: dict[str, float] = field(default_factory=dict)
    """Signature → error of the module's output."""
    refused: dict[str, str] = field(default_factory=dict)
    """Signature → why it may not be batched."""
    wrong: dict[str, str] = field(default_factory=dict)
    """The same for `variations` that no pipeline passed."""
    alone: dict[str, int] = field(default_factory=dict)
    half: tuple[int, int] = (0, 0)
    """Calls and forwards of the denoiser in bf16."""
    sources: dict[str, str] = field(default_factory=dict)
    """Path of each class that took part in what was shown → digest of its source."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that it was measured with."""
    broken: str = ""
    """Why the pipeline does not run in bf16, even alone."""

    @property
    def mean_batch(self) -> float:
        return self.calls / max(1, self.forwards)

    @property
    def same(self) -> bool:
        if self.jitter is None or self.error > HOPELESS:
            return self.error <= PIXEL
        return self.error <= CHAOS * self.jitter


class Learning(Batcher):
    """Keeps two calls of every kind of batch; if text is padded, two that differ in its length."""

    def __init__(self) -> None:
        super().__init__(max_rows=16, verification=verification.Verification("always", frozenset()))
        self.batches: dict[str, list[ModuleCall]] = {}

    def _run(self, group: Sequence[Task], calls: Sequence[ModuleCall]) -> Sequence[Reply]:
        if len(calls) > 1:
            unlike = next(([calls[0], call] for call in calls[1:] if differences_between([calls[0], call])), calls[:2])
            signature = self.verification.signature(calls[0], differences_between(unlike))
            self.batches.setdefault(signature, list(unlike))
        return super()._run(group, calls)


def measure(name: str) -> Measured:
    """Draw the three pictures of a family in the three ways, in fp32."""
    family = FAMILIES[name]
    pipe = family.build()
    pipe.set_progress_bar_config(disable=True)
    alone = [draw(pipe, call) for call in seeded(family.calls)]
    learning = Learning()
    first = together(learning, pipe, family.calls)
    # If text is not padded and requests never meet, some modules are batched only among equal calls.
    twins = alike(family.calls[0])
    alone_twins = [draw(pipe, call) for call in seeded(twins)]
    first_twins = together(learning, pipe, twins)
    trusting = Batcher(
        max_rows=16, verification=verification.Verification("unlisted", frozenset(learning.verification.proved))
    )
    second = together(trusting, pipe, family.calls)
    error = max(difference(alone, first), difference(alone, second))
    count = replace(trusting.counts[family.denoiser])
    second_twins = together(trusting, pipe, twins)
    error = max(error, difference(alone_twins, first_twins), difference(alone_twins, second_twins))
    jitter = None
    if error > PIXEL:
        with jittered(getattr(pipe, family.denoiser)):
            jitter = difference(alone, [draw(pipe, call) for call in seeded(family.calls)])
    variants, wrong = variations(learning.batches.values(), learning.verification)
    shown = variants | learning.verification.proved
    alone_for = {f"{module}: {reason}": times for (module, reason), times in trusting.counts.alone_because.items()}
    return Measured(
        name, error, jitter, count.calls, count.forwards, shown, dict(learning.verification.refused), wrong, alone_for,
        sources=sources(pipe, shown), versions=versions(),
    )  # fmt: skip


def sources(pipe: Any, shown: Iterable[str]) -> dict[str, str]:
    """Digests of all classes in those modules of `pipe` that something was shown of."""
    kinds = {signature.partition(".")[0] for signature in shown}
    modules = {verification.kind_of(module): module for module in _modules(pipe)}
    found: dict[str, str] = {}
    for kind in kinds & modules.keys():
        found |= shipped_list.digests_of(modules[kind])
    return found


def _modules(pipe: Any) -> Iterator[torch.nn.Module]:
    for value in vars(pipe).values():
        if isinstance(value, torch.nn.Module):
            yield value
        elif isinstance(value, diffusers.DiffusionPipeline):
            yield from _modules(value)


def halve(one: Measured, shipped: frozenset[str]) -> None:
    """Fill in how the family batches in bf16, with `shipped` as the list."""
    family = FAMILIES[one.name]
    pipe = family.build().to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    try:
        draw(pipe, seeded(family.calls)[0])
    except (RuntimeError, TypeError, ValueError) as error:
        one.broken = told(error)[:100]
        return
    batcher = Batcher(max_rows=16, verification=verification.Verification("unlisted", shipped))
    together(batcher, pipe, family.calls)
    count = batcher.counts[family.denoiser]
    one.half = (count.calls, count.forwards)


def alike(call: Call) -> list[Call]:
    """Three calls that differ only in seed and prompt, with prompts of equal length."""
    names = [name for name in ("prompt", "negative_prompt") if name in call]
    return [{**call, **dict.fromkeys(names, f"a {word}")} for word in ("cat", "dog", "hen")]


def seeded(calls: Iterable[Call]) -> list[Call]:
    return [{**call, "generator": torch.Generator().manual_seed(seed)} for seed, call in enumerate(calls)]


def draw(pipe: Any, call: Call) -> Any:
    """The pixels or samples of one call, as an array. `scheduler` in a call replaces the pipeline's."""
    call = dict(call)
    if "scheduler" in call:
        own, pipe.scheduler = pipe.scheduler, copy.deepcopy(call.pop("scheduler"))
        try:
            return draw(pipe, call)
        finally:
            pipe.scheduler = own
    torch.manual_seed(call["generator"].initial_seed())  # some pipelines draw noise without their generator
    parameters = inspect.signature(type(pipe).__call__).parameters
    output_type = {"output_type": "np"} if "output_type" in parameters else {}
    return np.asarray(pipe(**output_type, **call)[0])


def together(batcher: Batcher, pipe: Any, calls: Iterable[Call]) -> list[Any]:
    tasks = [batcher.submit(functools.partial(_draw_beside, pipe, call)) for call in seeded(calls)]
    with torch.no_grad():
        while batcher.step():
            pass
    for task in tasks:
        if task.outcome and task.outcome.error:
            raise task.outcome.error
    return [task.outcome.value for task in tasks if task.outcome]


def _draw_beside(pipe: Any, call: Call) -> Any:
    return draw(view(pipe), call)


def difference(one: list[Any], other: list[Any]) -> float:
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
            return float("inf")
        worst = max(worst, float(np.abs(a.astype(np.float64) - b).max()))
    return worst


class jittered:
    """Inside the context, the module's first output is disturbed by `rounding` times its largest value."""

    def __init__(self, module: torch.nn.Module, rounding: float = JITTER) -> None:
        self._module = module
        self._rounding = rounding

    def __enter__(self) -> None:
        noise = torch.Generator().manual_seed(0)

        def disturb(_module: Any, _args: Any, output: Any) -> None:
            first = output[0]
            for tensor in first if isinstance(first, list) else [first]:
                random = torch.randn(tensor.shape, generator=noise).to(tensor)
                tensor.add_(self._rounding * tensor.abs().max() * random)

        self._hook = self._module.register_forward_hook(disturb)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def signatures(measured: Collection[Measured]) -> dict[str, Any]:
    """The content of `mergeable.json`: what was shown in every family that uses it."""
    worst: dict[str, float] = {}
    refused: set[str] = set()
    for one in measured:
        for signature, error in one.shown.items():
            worst[signature] = max(error, worst.get(signature, 0.0))
        refused |= one.refused.keys() | one.wrong.keys()
    calls: dict[str, list[str]] = {}
    for signature in sorted(worst):
        if worst[signature] <= SHOWN and signature not in refused:
            kind, _, call = signature.partition(".")
            calls.setdefault(kind, []).append(call)
    seen: dict[str, set[str]] = {}
    for one in measured:
        for path, digest in one.sources.items():
            seen.setdefault(path, set()).add(digest)
    # Where families were measured with different sources of a class, neither has shown all of it.
    known = {path: digest for path, digests in seen.items() if len(digests) == 1 for digest in digests}
    return {"sources": known, "calls": calls}


def run(names: Iterable[str], tell: Callable[[str], object] = print) -> list[Measured]:
    """Measure and print a table."""
    tell(f"{'family':46} {'worst pixel':>11} {'jitter':>8} {'calls':>6} {'forwards':>8} {'mean batch':>10}")
    results = []
    for name in names:
        one = measure(name)
        results.append(one)
        jitter = f"{one.jitter:8.0e}" if one.jitter is not None else f"{'':8}"
        tell(
            f"{name:46} {one.error:11.1e} {jitter} {one.calls:6} {one.forwards:8} {one.mean_batch:10.2f}"
            f"  {'' if one.same else 'DIFFERS'} {FAMILIES[name].alone}"
        )
        for signature, reason in (one.refused | one.wrong).items():
            tell(f"    refused {signature}: {reason}")
        for reason, times in one.alone.items():
            tell(f"    alone   {times} x {reason}")
    return results


def page(measured: Iterable[Measured]) -> str:
    """The table of families in the docs, between its markers."""
    rows = ["| family | calls per forward in fp32 | in bf16 | worst pixel in fp32 | |", "|---|---|---|---|---|"]
    for one in measured:
        chaos = f"its toy weights make {one.jitter:.0e} of one rounding error" if one.jitter is not None else ""
        error = f"{one.error:.0e}" if one.error else "0"
        half = f"{one.half[0] / max(1, one.half[1]):.1f}" if not one.broken else "-"
        broken = "diffusers doesn't run it in bf16 on a CPU" if one.broken else ""
        why = "; ".join(part for part in (FAMILIES[one.name].alone, chaos, broken) if part)
        rows.append(f"| {one.name} | {one.mean_batch:.1f} | {half} | {error} | {why} |")
    return "\n".join([BEGIN, *rows, END])


def recorded() -> dict[str, Measured]:
    """The last measurement of every family."""
    if not RECORD.exists():
        return {}
    families = json.loads(RECORD.read_text())["families"]
    return {name: Measured(**fields | {"half": tuple(fields["half"])}) for name, fields in families.items()}


def versions() -> dict[str, str]:
    return {package.__name__: package.__version__ for package in (diffusers, transformers)}


def write(measured: Mapping[str, Measured], unproven: Collection[str] = ()) -> None:
    """Write the record, and what is made of it."""
    ordered = [measured[name] for name in FAMILIES if name in measured]
    families = {one.name: asdict(one) for one in ordered}
    record = {"unproven": sorted(unproven), "families": families}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    listed = ROOT / "src/sfumato/batching" / shipped_list.FILE
    listed.write_text(json.dumps(signatures(ordered), indent=1, sort_keys=True) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + page(ordered) + rest.partition(END)[2])


def shipped(measured: Collection[Measured]) -> frozenset[str]:
    """The signatures on the list as it would ship after these measurements."""
    calls = signatures(measured)["calls"].items()
    return frozenset(f"{kind}.{call}" for kind, each in calls for call in each)


def note(unproven: Collection[str]) -> None:
    """Let the record say which classes of the installed versions are not proved."""
    record = json.loads(RECORD.read_text())
    RECORD.write_text(json.dumps(record | {"unproven": sorted(unproven)}, indent=1, sort_keys=True) + "\n")


def digest_again(known: Mapping[str, Measured]) -> None:
    """Fill in `sources` of the record without drawing, for the versions that it was measured with."""
    for name, one in known.items():
        if one.versions != versions():
            raise SystemExit(f"{name} was measured with {one.versions}, not {versions()}: measure it again (--write)")
        one.sources = sources(FAMILIES[name].build(), one.shown)
        print(f"{name:46} {len(one.sources)} classes", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help=f"of: {', '.join(FAMILIES)}")
    parser.add_argument("--write", action="store_true", help="write the record, the list and the table in the docs")
    parser.add_argument("--sources", action="store_true", help="write the digests of the record's classes anew")
    parser.add_argument("--unproven", action="store_true", help="say which classes have another source, and record it")
    options = parser.parse_args()
    if options.sources:
        known = recorded()
        digest_again(known)
        write(known)
        return 0
    if options.unproven:
        changed = shipped_list.shipped().changed()
        print("\n".join(changed) or "every class on the list has the source that was measured")
        note(changed)
        return 0
    results = run(options.families or FAMILIES, lambda line: print(line, flush=True))
    known = recorded() | {one.name: one for one in results}
    for one in results:
        halve(one, shipped(known.values()))
        half = one.broken or f"{one.half[0] / max(1, one.half[1]):.2f}"
        print(f"{one.name:46} mean batch in bf16 {half}", flush=True)
    if options.write:
        write(known)
    return 0 if all(one.same for one in results) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())

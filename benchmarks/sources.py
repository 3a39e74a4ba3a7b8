"""Makes the table of what code decides by the source of diffusers' classes (`sfumato.pipelines.source_table`).

python -m benchmarks.sources              write src/sfumato/pipelines/sources.json
python -m benchmarks.sources --compare    print what would change, and write nothing
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers

from sfumato.batching import exclusive
from sfumato.pipelines import generators, scheduler_calls, source_digest, source_table

TABLE = Path(source_table.__file__).parent / source_table.FILE

METHODS = ("forward", "encode", "decode")


def pipelines() -> Iterator[type]:
    """Every pipeline class that diffusers offers here, modular ones aside: they are not called as pipelines are."""
    for name in sorted(dir(diffusers)):
        if name.endswith("Pipeline") and "Modular" not in name:
            kind = getattr(diffusers, name)
            if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
                yield kind


def models() -> Iterator[type]:
    """Every model class that is given a random generator."""
    for name in sorted(dir(diffusers)):
        if name.startswith(("Autoencoder", "VQ", "Consistency")) or name.endswith(("Model", "Vae", "VAE")):
            kind = getattr(diffusers, name)
            if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) and _given(kind):
                yield kind


def _given(kind: Any) -> list[tuple[str, str]]:
    """Methods with a parameter for a generator, and its name."""
    methods = [method for method in METHODS if callable(getattr(kind, method, None))]
    return [
        (method, name)
        for method in methods
        for name in inspect.signature(getattr(kind, method)).parameters
        if "generator" in name
    ]


def made() -> dict[str, dict[str, Any]]:
    """The table, of the installed diffusers. A class that the readers fail on is left out: it is read at first use."""
    rows: dict[str, dict[str, Any]] = {}
    for kind in (*pipelines(), *models()):
        try:
            rows[source_digest.path(kind)] = of(kind)
        except Exception as error:
            print(f"{source_digest.path(kind)} cannot be read: {error!r}", file=sys.stderr)
    return rows


def of(kind: type) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"source": source_digest.class_digest(kind)}
    if issubclass(kind, diffusers.DiffusionPipeline):
        row["scheduler"] = scheduler_calls.to_row(scheduler_calls.from_source(kind))
        row["intrusion"] = exclusive.intrusion(kind)
    else:
        used = {f"{method}.{name}": generators.from_source(kind, method, name) for method, name in _given(kind)}
        row["generators"] = used
    return row


def differences(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each class whose row is another one, and for each fact in it that is."""
    for path in sorted(old.keys() | new.keys()):
        if path not in old or path not in new:
            yield f"{path}: {'new' if path in new else 'gone'}"
            continue
        facts = [fact for fact in old[path].keys() | new[path].keys() if old[path].get(fact) != new[path].get(fact)]
        for fact in sorted(facts):
            if fact != "source":
                yield f"{path}: {fact} was {json.dumps(old[path].get(fact))}, is {json.dumps(new[path].get(fact))}"
        if facts == ["source"]:
            yield f"{path}: another source, which says the same"


def written(rows: Mapping[str, Any]) -> str:
    """A line for each class."""
    lines = (f"{json.dumps(path)}: {json.dumps(row, sort_keys=True)}" for path, row in sorted(rows.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compare", action="store_true", help="print what would change, and write nothing")
    options = parser.parse_args()
    rows = made()
    if options.compare:
        print("\n".join(differences(source_table.table(), rows)) or "every row is as it was")
    else:
        TABLE.write_text(written(rows))
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())

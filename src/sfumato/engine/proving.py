"""Prove beforehand what batches: draw a few pictures of a loaded model together, so that each kind of call meets.

The proofs are those of the first batches on a server (`batching.proof`), and their verdicts go into the same file.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sfumato.batching.batcher import Batcher, Task
from sfumato.batching.verification import Verification
from sfumato.checkpoints import class_reading
from sfumato.core import Control, Generation
from sfumato.drawing import arguments
from sfumato.drawing.draw import draw
from sfumato.errors import SfumatoError
from sfumato.models.load import Loaded
from sfumato.pipelines import capabilities, request_scheduler, scheduler_owners
from sfumato.pipelines.inputs import CONTROL
from sfumato.sampling import Sampling
from sfumato.status import Abilities

ROUNDS = (
    ("a cat", "a dog", "a red house beside a lake in the evening"),
    ("a car", "a bus", "two old boats on a quiet river, seen from above"),
)
"""Prompts of pictures drawn together: two of one length and a longer one. If different lengths are refused in the first
round, the equal ones meet in the second."""

STEPS = (3, 3, 4)
"""Steps of these pictures: two finish together, so that their decoders meet."""

OTHER_SCHEDULERS = ("ddim", "euler", "heun")
"""The last picture of a round is drawn with one of these: their time steps are of different types."""

Size: TypeAlias = tuple[int | None, int | None]

SIDE = 512
"""Pixels per side of a source picture, for models that state no size."""

DIFFERENCES = {
    "~time": "time steps of different types",
    "~lengths": "lists of different lengths",
    "~text": "texts of different lengths",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about the calls of one module."""

    module: str
    batches: str
    """`yes`, `partly` or `no`."""
    why: str
    calls: int
    forwards: int
    """Forward passes that answered these calls, without those of the proofs."""


@dataclass(frozen=True, slots=True)
class Result:
    findings: tuple[Finding, ...]
    failures: tuple[str, ...]
    """Tasks that could not be drawn, and why."""
    proved: int
    """Kinds of calls proved now, whatever the verdict."""


def prove(
    model: Loaded, verification: Verification, max_rows: int, size: Size, on_task: Callable[[str], None]
) -> Result:
    """Draw pictures of each of the model's tasks together; `on_task` is called with each task before it starts.

    `size`: width and height of the pictures in pixels; None: the model's own.
    """
    size = size if None not in size else arguments.own_size(model)
    batcher = Batcher(max_rows=max_rows, verification=verification)
    failures: dict[str, str] = {}
    with torch.no_grad():
        for task in _abilities(model).tasks:
            on_task(task)
            for prompts in ROUNDS:
                errors = _round(batcher, model, list(_generations(model, task, prompts, size)))
                if errors:
                    failures[task] = errors[0]
                    break
    # The pipelines of other tasks have the same modules.
    modules = dict(_modules(model.pipeline, ""))
    findings = [_finding(name, module, batcher) for name, module in modules.items() if batcher.counts[name].calls]
    proved = len(verification.proved.keys() | {s for s in verification.refused if s not in verification.known})
    return Result(tuple(findings), tuple(f"{task}: {error}" for task, error in failures.items()), proved)


def _round(batcher: Batcher, model: Loaded, generations: Sequence[Generation]) -> list[str]:
    """Draw these together; returns the errors."""
    tasks = [batcher.submit(functools.partial(_draw, batcher, model, each)) for each in generations]
    while batcher.step():
        pass
    return [_text(task) for task in tasks if task.outcome and task.outcome.error]


def _draw(batcher: Batcher, model: Loaded, generation: Generation) -> None:
    draw(model, generation, lambda step, total: batcher.listen())


def _text(task: Task) -> str:
    error = task.outcome.error if task.outcome else None
    return error.message if isinstance(error, SfumatoError) else f"{type(error).__name__}: {error}"


def _generations(model: Loaded, task: str, prompts: Sequence[str], size: Size) -> Iterator[Generation]:
    parameters = capabilities.parameters_of(model.pipeline)
    defaults = arguments.defaults(model, model.pipeline)
    other = _other_scheduler(model.pipeline)
    pictures = _sources(model, task, size)
    drawn = size if task == "text-to-image" and {"width", "height"} <= parameters.keys() else (None, None)
    for at, (prompt, steps) in enumerate(zip(prompts, STEPS, strict=True)):
        sampling = Sampling(scheduler=other if at == len(STEPS) - 1 else None, width=drawn[0], height=drawn[1])
        if "num_inference_steps" in parameters:
            sampling = replace(sampling, steps=steps)
        if (defaults.guidance_scale or 0) > 1:  # distilled models are left without
            sampling = replace(sampling, guidance_scale=(defaults.guidance_scale or 0) + at)
        text = prompt if "prompt" in parameters else str(at) if task == "label-to-image" else ""
        upscaler = capabilities.upscaler(model.pipeline)
        upscale = upscaler.factor if upscaler else None
        yield Generation(id=str(at), prompt=text, seed=at, sampling=sampling, upscale=upscale, **pictures)


def _other_scheduler(pipeline: Any) -> str | None:
    driver = scheduler_owners.drawing_pipeline(pipeline)
    if request_scheduler.keeps_own(driver):
        return None
    fitting = request_scheduler.works_with(driver)
    return next((name for name in OTHER_SCHEDULERS if name in fitting), None)


def _abilities(model: Loaded) -> Abilities:
    return class_reading.abilities_of(model.config, class_reading.kin_of_pipeline(model.pipeline))


def _sources(model: Loaded, task: str, size: Size) -> dict[str, Any]:
    """The pictures and the mask that a task needs, as fields of a Generation."""
    if task not in ("image-to-image", "inpainting", "upscaling"):
        return {}
    can = _abilities(model)
    image, controls = can.input("image"), can.input("controls")
    count = max(1, image.least if image else 0)
    needed = controls.least if controls else 0
    upscaler = capabilities.upscaler(model.pipeline)
    width, height = (64, 64) if upscaler else (side or SIDE for side in size)
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    control = Control(_png(picture), mode=0 if class_reading.kinds_of(model.pipeline) else None)
    fields: dict[str, Any] = {"images": (_png(picture),) * count}
    if needed and (task == "inpainting" or (image and CONTROL not in image.roles)):
        fields["controls"] = (control,) * needed
    elif needed:
        fields["images"] = (_png(picture),) * needed
    if task != "inpainting":
        return fields
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return fields | {"mask": _png(mask)}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _modules(pipeline: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Names as in `views`, and modules."""
    for name, part in vars(pipeline).items():
        if isinstance(part, DiffusionPipeline):
            yield from _modules(part, f"{prefix}{name}.")
        elif isinstance(part, torch.nn.Module):
            yield f"{prefix}{name}", part


def _finding(name: str, module: Any, batcher: Batcher) -> Finding:
    verification, counts = batcher.verification, batcher.counts
    verdicts = verification.verdicts_of(module)
    plain = {
        signature: verdict for signature, verdict in verdicts.items() if not signature.endswith(tuple(DIFFERENCES))
    }
    reasons = [verification.refused[signature] for signature, verdict in plain.items() if verdict == "no"]
    reasons += [reason for (of, reason) in counts.alone_because if of == name]
    good = [signature for signature, verdict in plain.items() if verdict == "yes"]
    untried = [signature for signature, verdict in plain.items() if verdict == "try"]
    texts = [f"calls alone: {reason}" for reason in dict.fromkeys(reasons)]
    texts += ["no two of its calls met"] if untried and not texts else []
    texts += list(dict.fromkeys(verification.known.get(signature, "proved now") for signature in good))
    for ending, what in DIFFERENCES.items():
        refused = [s for s, verdict in verdicts.items() if s.endswith(ending) and verdict == "no"]
        texts += [f"but not with {what}: {verification.refused[refused[0]]}"] if refused and good else []
    bad = bool(reasons or untried)
    batches = "no" if not good else "partly" if bad else "yes"
    return Finding(name, batches, "; ".join(texts), counts[name].calls, counts[name].forwards)

"""`sfumato generate` and `sfumato pull`: the engine in this process, with a progress bar."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sfumato import schedulers
from sfumato.config import ModelConfig
from sfumato.core import VAE_TILING, Done, ModelStatus, Recipe, Step
from sfumato.engine import environment
from sfumato.engine.local import Local
from sfumato.errors import InvalidRequest, StorageError
from sfumato.pictures import images, recipe
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service
from sfumato.settings import Settings

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How often the progress bar polls the model's status while it loads."""


def generate(given: Mapping[str, Any], like: Path | None, output: Path | None, settings: Settings) -> list[Path]:
    """Draw and write; returns the paths.

    `given` holds fields of `ImageRequest`; absent ones come from the recipe in `like`, if any.
    Raises what the service raises, and StorageError when a file cannot be written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    again = recipe.read(like) if like else None
    request = ImageRequest(**{**(_as_request(again) if again else {}), **given}, operator=True)
    if again:
        _check_sources(request, again, settings)
        request = _sized(request, again, settings)
    # One at a time: batching can change the last bits of a picture, and here nobody else waits.
    settings = replace(settings, max_batch=1)
    drawn = asyncio.run(_draw(request, settings))
    if again:
        _warn_of_differences(again, drawn[0].recipe)
    return [_write(done, index, len(drawn), output) for index, done in enumerate(drawn)]


def pull(name: str, settings: Settings) -> str:
    """Download what a model file (or a hub id) needs; returns its path."""
    environment.prepare()
    from sfumato.models import load

    config = Catalog.of(settings, open=True).get(name)
    with _bar() as (progress, task):

        def tell(status: ModelStatus) -> None:
            progress.update(task, description=f"{status.state} {status.detail}", completed=status.progress)

        dtype = load.choose_dtype(config, load.choose_device(config, settings.device))
        return str(load.fetch(config, dtype, tell).path)


def _as_request(made: Recipe) -> dict[str, Any]:
    ours = made.scheduler if made.scheduler in schedulers.names() else None
    return {
        "prompts": [made.prompt],
        "model": made.model,
        "negative_prompt": made.negative_prompt,
        "size": f"{made.width}x{made.height}",
        "steps": made.steps,
        "guidance_scale": made.guidance_scale,
        "seed": made.seed,
        "scheduler": ours,
        "clip_skip": made.clip_skip,
        "strength": made.strength if made.image_sha256 else None,
        # Only savings that change pixels; where modules wait depends on this machine.
        "savings": tuple(name for name in made.savings if name == VAE_TILING),
        "mask_padding": made.masked_area[0] if made.masked_area else None,
    }


def _check_sources(request: ImageRequest, made: Recipe, settings: Settings) -> None:
    masks = (request.mask,) if request.mask else ()
    needed = (made.mask_sha256,) if made.mask_sha256 else ()
    for flag, sources, digests in (("--image", request.images, made.image_sha256), ("--mask", masks, needed)):
        if len(sources) != len(digests):
            raise InvalidRequest(
                f"{flag}: the recipe was made from {len(digests)} such pictures, but {len(sources)} were passed. "
                "A recipe keeps the fingerprint of a source picture, not the picture itself; pass the same files."
            )
        for source, digest in zip(sources, digests, strict=True):
            assert isinstance(source, bytes)
            png, _ = images.normalise(source, flag, images.Bounds.of(settings))
            if images.fingerprint(images.as_mask(png) if flag == "--mask" else png) != digest:
                raise InvalidRequest(f"{flag}: not the picture that the recipe was made from (its pixels differ)")


def _sized(request: ImageRequest, made: Recipe, settings: Settings) -> ImageRequest:
    """An inpainted picture keeps its source's size, which a request might not be allowed to name."""
    if not made.mask_sha256:
        return request
    if made.masked_area:
        _, width, height = made.masked_area
        return replace(request, size=f"{width}x{height}")
    source = request.images[0]
    assert isinstance(source, bytes)
    _, size = images.normalise(source, "--image", images.Bounds.of(settings))
    return replace(request, size=None) if size == (made.width, made.height) else request


def _warn_of_differences(made: Recipe, now: Recipe) -> None:
    for name in ("source", "pipeline", "device", "dtype", "versions"):
        if getattr(made, name) != getattr(now, name):
            log.warning(
                "%s was %s, now it is %s: the pixels may differ",
                name,
                getattr(made, name),
                getattr(now, name),
            )


def _write(done: Done, index: int, count: int, output: Path | None) -> Path:
    path = output or Path(f"sfumato-{done.recipe.seed}.png")
    if output and count > 1:
        path = output.with_stem(f"{output.stem}-{index + 1}")
    try:
        path.write_bytes(done.png)
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror}") from error
    return path


async def _draw(request: ImageRequest, settings: Settings) -> list[Done]:
    service = Service(Catalog.of(settings, open=True), Local(settings), settings)
    config = service.catalog.get(request.model)
    await service.start()
    try:
        with _bar() as (progress, task):
            watch = asyncio.create_task(_show_loading(service, config, progress, task))

            def on_step(index: int, step: Step) -> None:
                watch.cancel()
                progress.update(
                    task,
                    description=f"drawing {index + 1}" if (request.n or 1) > 1 else "drawing",
                    completed=index + step.step / step.total,
                    total=request.n or 1,
                )

            try:
                return await service.draw(request, on_step)
            finally:
                watch.cancel()
                with suppress(asyncio.CancelledError):
                    await watch
    finally:
        await service.stop()


async def _show_loading(service: Service, config: ModelConfig, progress: Progress, task: TaskID) -> None:
    while True:
        status = service.engine.status(config.name)
        progress.update(task, description=f"{status.state} {config.name}", completed=status.progress or 0.0)
        await asyncio.sleep(POLL_S)


@contextmanager
def _bar() -> Iterator[tuple[Progress, TaskID]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task("starting", total=1.0)

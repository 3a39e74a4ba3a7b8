"""`sfumato generate`: the engine in this process, with a progress bar."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sfumato import schedulers
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.commands import kept_sources
from sfumato.config import ModelConfig
from sfumato.core import EAGER, VAE_TILING, Done, Recipe, Step
from sfumato.engine.local import Local
from sfumato.errors import InvalidRequest, StorageError, in_words
from sfumato.formats import AUDIO, CLIP, FORMATS, IMAGE, KINDS, PICTURE, VIDEO, WORDS, kind_of, of_kind
from sfumato.loras import Lora, not_named_by, read_tags
from sfumato.pictures import images
from sfumato.pictures import recipe as recipes
from sfumato.pictures.stores import folder_of
from sfumato.sampling import PARAMETERS, Hires, Sampling, merged
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest, size_of
from sfumato.serving.service import Service
from sfumato.settings import Settings

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How often the progress bar polls the model's status while it loads."""


def generate(fields: dict[str, Any], like: Path | None, output: Path | None, settings: Settings) -> list[Path]:
    """Draw and write; returns the paths.

    `fields` has fields of `ImageRequest`, and `size` as a string. Absent fields, also those of `sampling`, are taken
    from the recipe in `like`, if there is one.
    Raises what the service raises, and StorageError when a file cannot be written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    recipe = recipes.read(like) if like else None
    from_recipe = _as_request(recipe) if recipe else {}
    sampling = merged(fields.get("sampling", Sampling()), from_recipe.get("sampling", Sampling()))
    if "size" in fields:
        width, height = size_of(fields.pop("size"))
        sampling = replace(sampling, width=width, height=height)
    if "prompts" in fields:
        for name in ("split_prompt", "lora_tags"):
            from_recipe.pop(name, None)
        if recipe:
            texts = [*fields["prompts"], sampling.negative_prompt or ""]
            tags = [tag for text in texts for tag in read_tags(text)[1]]
            from_recipe["loras"] = not_named_by(from_recipe["loras"], tags)
    format = _named(output)
    if format in (None, "webp"):  # a WebP is a clip, or a picture: as the model or the length says
        source = next((kind for kind in (VIDEO, AUDIO) if fields.get(kind) is not None), IMAGE)
        made = _format(like, sampling, fields.get("model", recipe and recipe.model), settings, source)
        format = made if format is None or kind_of(made) == IMAGE else format
    request = ImageRequest(**{**from_recipe, **fields, "sampling": sampling, "format": format}, operator=True)
    if recipe and like:
        places = [like.parent, folder_of(settings)]
        bounds = images.Bounds.of(settings)
        request = replace(request, controls=kept_sources.controls(request.controls, recipe, places, bounds))
    if recipe:
        _check_sources(request, recipe, settings)
        request = _with_source_size(request, recipe, settings)
    # One at a time: batching can change the last bits of a picture, and here nobody else waits.
    settings = replace(settings, max_batch=1)
    results = asyncio.run(_draw(request, settings))
    if recipe:
        _warn_of_differences(recipe, results[0].recipe)
    return [_write(result, index, len(results), output) for index, result in enumerate(results)]


SUFFIXES: Mapping[str, str] = MappingProxyType(
    {**{name: name for name in FORMATS}, "ogg": "opus", "jpg": PICTURE, "jpeg": PICTURE}
)
"""A suffix of files -> the format of `formats.FORMATS`."""

CONVERTED: Mapping[str, str] = MappingProxyType({"jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"})
"""A suffix of files of pictures -> what `recipe.convert` makes of the PNG."""


def _named(output: Path | None) -> str | None:
    """The format that the suffix of the file to write says; None without one. Raises InvalidRequest for others."""
    suffix = output.suffix.removeprefix(".").lower() if output else ""
    if suffix and suffix not in SUFFIXES:
        valid = "; ".join(
            f"{WORDS[kind]} in {', '.join(f'.{each}' for each in SUFFIXES if kind_of(SUFFIXES[each]) == kind)}"
            for kind in KINDS
        )
        raise InvalidRequest(f"-o {output}: nothing is written as .{suffix}; {valid}")
    return SUFFIXES.get(suffix)


def _format(like: Path | None, sampling: Sampling, model: str | None, settings: Settings, source: str = IMAGE) -> str:
    """That of the recipe's file (a WebP is a clip if it has a length), or for what the model makes by its files, or for
    what is made from such a source: clips from clips, and sounds from sounds."""
    name = SUFFIXES.get(like.suffix.removeprefix(".").lower()) if like else None
    has_length = source == VIDEO or any(sampling[each] is not None for each in PARAMETERS if IMAGE not in each.of)
    if name:
        return PICTURE if name == "webp" and not has_length else name
    abilities = static_capabilities(Catalog.of(settings, open=True).get(model)).abilities
    if abilities and abilities.tasks:
        return of_kind(abilities.kind)[0]
    return of_kind(AUDIO)[0] if source == AUDIO else CLIP if has_length else PICTURE


def _as_request(recipe: Recipe) -> dict[str, Any]:
    return {
        "prompts": [recipe.prompt],
        "split_prompt": False,  # it was split when the picture was made, if at all
        "model": recipe.model,
        "seed": recipe.seed,
        "sampling": replace(
            recipe.sampling,
            scheduler=schedulers.canonical_name(recipe.sampling.scheduler),
            strength=recipe.sampling.strength if recipe.image_sha256 or recipe.video_sha256 else None,
            **_first_size(recipe),
        ),
        "hires": _second_pass(recipe),
        # Only savings that change pixels; where modules wait depends on this machine.
        "savings": tuple(name for name in recipe.savings if name == VAE_TILING),
        "runner": recipe.runner or EAGER,
        "weights": recipe.weights,
        "loras": [Lora(source, weight, text) for source, _, _, weight, text in recipe.loras],
        "replace_loras": bool(recipe.loras) or recipe.without_loras,
        "lora_tags": False,
        "crop": recipe.drawn_size is not None,
        "mask_padding": recipe.masked_area[0] if recipe.masked_area else None,
        "mask_from_alpha": recipe.mask_from_alpha,
    }


def _first_size(recipe: Recipe) -> dict[str, Any]:
    """Of the first of two passes; nothing for a picture drawn in one."""
    width, height = (recipe.hires and recipe.hires.first) or (None, None)
    return {"width": width, "height": height} if recipe.hires else {}


def _second_pass(recipe: Recipe) -> Hires | None:
    if not (hires := recipe.hires):
        return None
    scheduler = schedulers.canonical_name(hires.sampling.scheduler)
    return replace(hires, sampling=replace(hires.sampling, scheduler=scheduler), first=None)


def _check_sources(request: ImageRequest, recipe: Recipe, settings: Settings) -> None:
    masks = (request.mask,) if request.mask else ()
    needed = (recipe.mask_sha256,) if recipe.mask_sha256 else ()
    controls = tuple(control.image for control in request.controls)
    for flag, sources, digests in (
        ("--image", request.images, recipe.image_sha256),
        ("--mask", masks, needed),
        ("--control", controls, tuple(control.image_sha256 for control in recipe.controls)),
    ):
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
    _check_file("--video", request.video, recipe.video_sha256)
    _check_file("--audio", request.audio, recipe.audio_sha256)


def _check_file(flag: str, file: str | bytes | None, digest: str | None) -> None:
    if (hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else None) == digest:
        return
    why = "was made from none" if digest is None else "was made from one, and none was passed"
    if file is not None and digest:
        why = f"was made from another one (the SHA-256 of its file is {digest})"
    raise InvalidRequest(f"{flag}: the recipe {why}. A recipe keeps the digest of a source file, not the file itself.")


def _with_source_size(request: ImageRequest, recipe: Recipe, settings: Settings) -> ImageRequest:
    """An inpainted picture keeps its source's size, which a request might not be allowed to name."""
    if not recipe.mask_sha256 and not recipe.mask_from_alpha:
        return request
    if recipe.masked_area:
        _, width, height = recipe.masked_area
        return replace(request, sampling=replace(request.sampling, width=width, height=height))
    source = request.images[0]
    assert isinstance(source, bytes)
    _, size = images.normalise(source, "--image", images.Bounds.of(settings))
    unsized = replace(request.sampling, width=None, height=None)
    return replace(request, sampling=unsized) if size == recipe.size else request


def _warn_of_differences(recipe: Recipe, redrawn: Recipe) -> None:
    recipe = replace(recipe, runner=recipe.runner or EAGER)
    for name in (
        "source",
        "pipeline",
        "device",
        "dtype",
        "versions",
        "embeddings",
        "loras",
        "controls",
        "savings",
        "runner",
    ):
        if getattr(recipe, name) != getattr(redrawn, name):
            log.warning(
                "%s was %s, now it is %s: the pixels may differ",
                name,
                in_words(getattr(recipe, name)),
                in_words(getattr(redrawn, name)),
            )


def _write(result: Done, index: int, count: int, output: Path | None) -> Path:
    path = output or Path(f"sfumato-{result.recipe.seed}.{result.format}")
    if output and count > 1:
        path = output.with_stem(f"{output.stem}-{index + 1}")
    converted = CONVERTED.get(path.suffix.removeprefix(".").lower()) if result.format == PICTURE else None
    try:
        path.write_bytes(recipes.convert(result.file, converted) if converted else result.file)
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

"""The command `sfumato`. Each command imports what it needs when it runs, so `--help` is quick."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato import __version__
from sfumato.sampling import PARAMETERS, Sampling
from sfumato.settings import Settings, env_name, flag, python_type

app = typer.Typer(
    name="sfumato",
    help="A self-hosted image server on Hugging Face diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Models = Annotated[Path | None, typer.Option("--models", help="Folder of model files.")]
NewModels = Annotated[Path | None, typer.Option("--models", help="Folder of model files; made if there is none.")]


MOST_CLIENTS = 256
"""Of `sfumato bench`: each is a thread."""


def main() -> None:
    """Entry point: our own errors print one line on stderr and exit with code 1, without a traceback."""
    from sfumato.errors import SfumatoError

    try:
        app()
    except SfumatoError as error:
        typer.secho(f"error: {error.message}", fg="red", err=True)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"sfumato {__version__}")
        raise typer.Exit


def _option(name: str, kind: type, flag: str, help: str) -> inspect.Parameter:
    """An option of a command; None if it is not passed."""
    annotation = Annotated[kind | None, typer.Option(flag, help=help)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_options(command: Callable[..., None], options: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The command with these options in place of its `**` parameter."""
    declared = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [spec.replace(kind=spec.KEYWORD_ONLY) for spec in declared if spec.kind is not spec.VAR_KEYWORD]
    parameters += options
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of `Settings`, with its name, help and default."""

    def help(spec: Field[Any]) -> str:
        return f"{spec.metadata['help']} [{env_name(spec)}; default: {spec.default or 'none'}]"

    return _with_options(
        command, [_option(spec.name, python_type(spec), flag(spec), help(spec)) for spec in fields(Settings)]
    )


def _with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of `Sampling`, with its flag and help."""
    specs = [spec for spec in PARAMETERS if not spec.side]
    return _with_options(command, [_option(spec.name, spec.kind, spec.flag, f"{spec.help}.") for spec in specs])


@app.command()
@_with_settings
def serve(**options: Any) -> None:
    """Serve pictures over HTTP: OpenAI's Images API and LocalAI's fields."""
    from sfumato.commands.serve import serve as run

    run(_settings(**options))


@app.command()
@_with_sampling
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="A model file's name, or a hub id.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write: a picture (.png, .jpg, .webp), a clip (.mp4, .webm, .gif, .webp) or a sound (.wav, "
            ".flac, .mp3, .opus).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; absent: a random one.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Source picture; again for more.", exists=True, dir_okay=False)
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="Clip that a clip is drawn from.", exists=True, dir_okay=False)
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Sound that a sound is made from.", exists=True, dir_okay=False)
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask: white is redrawn.", exists=True, dir_okay=False)] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="Control picture, FILE or NAME=FILE with the name of a ControlNet; again for more."),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Pictures to draw, with seeds seed, seed + 1, ...")] = 1,
    like: Annotated[
        Path | None,
        typer.Option(help="Reproduce this picture from its recipe.", exists=True, dir_okay=False),
    ] = None,
    models: Models = None,
    **sampling: Any,
) -> None:
    """Make pictures, clips or sounds in this process, without a server; prints the path of each."""
    from sfumato.commands import kept_sources
    from sfumato.commands.generate import generate as run

    if prompt is None and like is None:
        raise typer.BadParameter("say what to draw, or pass --like FILE.png", param_hint="PROMPT")
    request_fields = {
        "prompts": [prompt] if prompt is not None else None,
        "model": model,
        "sampling": Sampling(**sampling),
        "size": size,
        "seed": seed,
        "images": [each.read_bytes() for each in image] if image else None,
        "video": video.read_bytes() if video else None,
        "video_field": "--video" if video else None,
        "audio": audio.read_bytes() if audio else None,
        "audio_field": "--audio" if audio else None,
        "mask": mask.read_bytes() if mask else None,
        "controls": [kept_sources.passed(text) for text in control] if control else None,
        "n": n,
    }
    request_fields = {name: value for name, value in request_fields.items() if value is not None}
    for path in run(request_fields, like, output, _reading(_settings(models=models))):
        typer.echo(path)


@app.command("models")
def list_models(models: Models = None) -> None:
    """List the models that requests can name, with their class, source, runner and size on this disk."""
    from sfumato.commands.models import table

    settings = _settings(models=models)
    catalog = _catalog(settings)
    for line in table(catalog, settings):
        typer.echo(line)
    for problem in catalog.problems():
        typer.secho(str(problem), fg="red", err=True)


@app.command()
def add(
    source: Annotated[str, typer.Argument(help="Hub id, folder, file, http(s) URL or huggingface://owner/name/file.")],
    name: Annotated[str | None, typer.Option(help="The model's name; absent: the source's.")] = None,
    base: Annotated[str | None, typer.Option(help="Of a denoiser alone (GGUF ...): where all else comes from.")] = None,
    models: NewModels = None,
) -> None:
    """Write a model file for a source, by looking at it. The weights are downloaded at first use, or by `pull`."""
    from sfumato.commands.add import add as run

    file, told = run(source, name, base, _settings(models=models))
    typer.echo(f"{file}: {told}")


@app.command()
def remove(
    model: Annotated[str, typer.Argument(help="Name of a model.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without a question.")] = False,
    models: Models = None,
) -> None:
    """Delete a model file, and what was downloaded into its folder for it alone."""
    from sfumato.checkpoints.stored import readable
    from sfumato.commands.remove import carry_out, plan

    removal = plan(model, _reading(_settings(models=models)))
    typer.echo(str(removal))
    if not yes:
        typer.confirm(f"Delete {readable(removal.size)}?", abort=True)
    carry_out(removal)


@app.command()
def check(
    folder: Annotated[Path | None, typer.Argument(help="Folder of model files; the same as --models.")] = None,
    models: Models = None,
) -> None:
    """Explain each model file: what is loaded and from where, which keys are ignored and why, what is wrong."""
    from sfumato.commands.check import check as run

    if folder and models and folder != models:
        raise typer.BadParameter(f"{folder} and --models {models} are two folders; write one", param_hint="FOLDER")
    reports = run(_catalog(_settings(models=folder or models)), ask=True)
    for report in reports:
        typer.echo(report)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


@app.command()
def pull(
    id: Annotated[str, typer.Argument(help="Hub id, or the name of a model file.")],
    models: Models = None,
) -> None:
    """Download a model before its first use."""
    from sfumato.commands.pull import pull as run

    typer.echo(run(id, _reading(_settings(models=models))))


@app.command()
def unload(
    model: Annotated[str | None, typer.Argument(help="Name of the model; absent: all models.")] = None,
    url: Annotated[str | None, typer.Option(help="The server; absent: where `sfumato serve` would listen.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="One of the server's keys; absent: the first in SFUMATO_API_KEYS, if any.")
    ] = None,
) -> None:
    """Free the memory of a model on a running server; one in use leaves when its requests have ended."""
    from sfumato.commands.unload import unload as run

    typer.echo(run(model, url, api_key, _settings()))


@app.command()
@_with_settings
def prove(
    model: Annotated[str, typer.Argument(help="A model file's name, or a hub id.")],
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT to draw for it; absent: the model's own. Results hold for all."),
    ] = None,
    **options: Any,
) -> None:
    """Find out what of a model batches, and why the rest does not, so that its first requests batch at once.

    Exit codes: 0 everything batches, 1 it cannot be loaded, or a task drawn, 3 some module runs alone.
    """
    from sfumato.commands.prove import prove as run

    if code := run(model, size, _reading(_settings(**options)), typer.echo):
        raise typer.Exit(code)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A model file's name.")],
    clients: Annotated[str, typer.Option(help="Numbers of clients, each a turn.")] = "1,2,4,8,16",
    pictures: Annotated[int, typer.Option(min=1, help="Pictures that each client asks for.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of a step, and of a picture against plain.")] = 3,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT; again for more. Absent: its own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the pictures under load; absent: its own.")] = None,
    against: Annotated[str | None, typer.Option(help="`plain`: also plain diffusers, in turns.")] = None,
    runners: Annotated[
        str | None, typer.Option(help="Compare them, in turns: eager,openvino,compile, or all that can run.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Its .json, .png, .svg are written.")] = Path("bench"),
    models: Models = None,
) -> None:
    """Measure a model on this machine: start, steps, clients at once, memory. Other settings from the environment."""
    from sfumato.commands.bench import runners as beside
    from sfumato.commands.bench.run import bench as run

    if against not in (None, "plain"):
        raise typer.BadParameter(f"{against!r}: only `plain` can be measured against", param_hint="--against")
    try:
        numbers = [int(each) for each in clients.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number <= MOST_CLIENTS for number in numbers):
        raise typer.BadParameter(
            f"{clients!r}: needs whole numbers from 1 to {MOST_CLIENTS}, with commas: 1,4,16", param_hint="--clients"
        )
    try:
        names = beside.chosen(runners) if runners else []
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--runners") from None
    able = beside.able(names, typer.echo) if names else []
    if runners and runners.strip().lower() != beside.EVERY and able != names:
        raise typer.BadParameter(f"{runners!r}: not all of these can run here, see above", param_hint="--runners")
    names = able
    run(
        model, _reading(_settings(models=models)), typer.echo, clients=numbers, pictures=pictures, repeats=repeats,
        sizes=size or [], steps=steps, against_plain=against is not None, runners=names, output=output,
    )  # fmt: skip


galleries = typer.Typer(help="The index of the pictures that were made.", no_args_is_help=True)
app.add_typer(galleries, name="gallery")


@galleries.command()
def rebuild(
    data: Annotated[Path | None, typer.Option("--data", help="Folder of the pictures.")] = None,
    gallery_url: Annotated[str | None, typer.Option("--gallery-url", help="Database of the index.")] = None,
    api_keys: Annotated[
        str | None, typer.Option("--api-keys", help="NAME:KEY pairs of the callers who may own pictures.")
    ] = None,
) -> None:
    """Rebuild the index from the recipes in the picture files; stars are kept."""
    from sfumato.api.http.auth import parse_keys
    from sfumato.pictures.gallery import Gallery
    from sfumato.pictures.stores import store_of

    settings = _settings(data=data, gallery_url=gallery_url, api_keys=api_keys)
    try:
        gallery = Gallery.of(settings, store_of(settings), parse_keys(settings.api_keys))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    count = gallery.rebuild()
    typer.echo(f"the gallery lists {count} {'picture' if count == 1 else 'pictures'}")


def _settings(**options: Any) -> Settings:
    try:
        return Settings.load(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _catalog(settings: Settings) -> Any:
    from sfumato.serving.catalog import Catalog

    return Catalog.of(_reading(settings))


def _reading(settings: Settings) -> Settings:
    """The settings of a command that reads the folder of model files, which must be there if it is not the default."""
    if settings.models != Settings().models and not settings.models.exists():
        raise typer.BadParameter(
            f"{settings.models} does not exist. Write the folder of the model files, or a model file",
            param_hint="--models (or SFUMATO_MODELS)",
        )
    return settings


if __name__ == "__main__":
    main()

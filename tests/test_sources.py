"""Source pictures: what is opened, when, and what of them is held."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.core import Limits, SourceClip
from sfumato.errors import Cancelled, InvalidPicture, RequestTooLarge, TooManyRequests
from sfumato.pictures import images
from sfumato.pictures.budget import Budget
from sfumato.pictures.fetch import PictureFetcher
from sfumato.pictures.images import Bounds
from sfumato.pictures.resolving import Resolver
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service
from sfumato.serving.source_files import sources
from sfumato.settings import Settings
from support.fake_engine import FakeEngine
from support.hostile import many_scans
from support.inside import DRAW, Inside
from support.moving import animated
from support.sites import PICTURE, DeadNames, Site

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")
OTHERS = ("TIFF", "PPM", "TGA", "PCX", "ICNS", "DDS", "SGI", "JPEG2000", "EPS", "MSP", "SPIDER", "ICO", "PDF")


@pytest.fixture
def service(tmp_path: Path) -> Service:
    (tmp_path / "m.yaml").write_text(
        "name: m\nparameters:\n  model: some/one\ndiffusers:\n  enable_parameters: image\n"
    )
    return Service(Catalog([tmp_path]), FakeEngine(), Settings(max_active=1, max_queue=1))


def saved(format: str, size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    mode = {"MSP": "1", "SPIDER": "F"}.get(format, "RGB")
    file = io.BytesIO()
    Image.new("L", size, 90).convert(mode).save(file, format, **options)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# What is opened.


@pytest.mark.parametrize("format", [*FORMATS, *OTHERS])
def test_only_some_formats_are_opened(tmp_path: Path, format: str) -> None:
    """As a source picture and by png-info alike."""
    data = text(saved(format))
    with Inside(tmp_path).client() as client:
        drawn = client.post("/v1/images/generations", json=DRAW["json"] | {"image": data})
        told = client.post("/sdapi/v1/png-info", json={"image": data})
    assert (drawn.status_code, told.status_code) == ((200, 200) if format in FORMATS else (400, 400))
    for answer in (drawn, told):
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] == "invalid_image"
            assert "PNG, JPEG" in answer.json()["error"]["message"]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_broken_is_refused(tmp_path: Path, format: str) -> None:
    """Cut off and with bytes turned over: an answer or a 400, as a source picture and by png-info alike."""
    whole = saved(format)
    with Inside(tmp_path).client() as client:
        for at in range(4, len(whole), max(1, len(whole) // 4)):
            turned = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
            for data in (whole[:at], turned):
                for url, body in (
                    ("/v1/images/generations", DRAW["json"] | {"image": text(data)}),
                    ("/sdapi/v1/png-info", {"image": text(data)}),
                ):
                    answer = client.post(url, json=body)
                    assert answer.status_code in (200, 400), answer.text
                    if answer.status_code == 400:
                        assert answer.json()["error"]["param"] == "image"


def test_pillow_opens_foreign_files_in_one_place() -> None:
    """`Image.open` without a list of formats tries every plugin that there is."""
    for path in Path(images.__file__).parent.rglob("*.py"):
        for line in path.read_text().splitlines():
            if "Image.open(" in line:
                assert "formats=" in line, f"{path}: {line}"


def test_a_large_picture_is_scaled_down_to_what_is_drawn() -> None:
    bounds = Bounds(pixels=10**6, aspect=8, kept_pixels=10_000, kept_side=200)
    png, came = images.normalise(saved("PNG", (1000, 500)), "image", bounds)
    assert came == (1000, 500)
    width, height = images.size(png)
    assert width * height <= 10_000
    assert width == pytest.approx(2 * height, abs=2)
    png, _ = images.normalise(saved("PNG", (640, 80)), "image", bounds)
    assert images.size(png) == (200, 25)
    small = saved("PNG", (100, 100))
    assert images.size(images.normalise(small, "image", bounds)[0]) == (100, 100)


@pytest.mark.parametrize(
    ("size", "words"),
    [((0, 8), "1 pixel"), ((65, 64), "max_side"), ((64, 64), "max_pixels"), ((64, 15), "max_aspect"), ((60, 15), "")],
)
def test_the_limits_of_a_size(size: tuple[int, int], words: str) -> None:
    limits = Limits(pixels=4000, side=64, aspect=4)
    for width, height in (size, size[::-1]):
        assert words in limits.violation(width, height)
        assert bool(words) == bool(limits.violation(width, height))


# When.


def test_a_full_line_refuses_before_anything_is_fetched_or_decoded(service: Service) -> None:
    engine = service.engine
    assert isinstance(engine, FakeEngine)
    service.fetcher = PictureFetcher(["127.0.0.1"])

    async def run(site: Site) -> None:
        engine.hold = asyncio.Event()
        held = [await service.submit(ImageRequest(prompts=["x"])) for _ in range(2)]
        for picture in (site.url, many_scans(side=64), "not base64!"):
            with pytest.raises(TooManyRequests, match="max_queue"):
                await service.submit(ImageRequest(prompts=["x"], images=[picture]))
        assert service.budget.used == 0
        assert service.decoders._free == []
        await service.cancel(held)
        await service.stop()

    with Site(lambda handler: handler.say(200, PICTURE)) as site:
        asyncio.run(run(site))
    assert site.seen == []


@pytest.fixture
def dead() -> Iterator[DeadNames]:
    names = DeadNames()
    yield names
    names.over.set()


def test_what_is_still_fetched_holds_no_place_and_keeps_its_place_in_the_line(
    service: Service, dead: DeadNames
) -> None:
    engine = service.engine
    assert isinstance(engine, FakeEngine)
    service.fetcher = PictureFetcher([], Resolver(dead, wait_s=60))

    async def run() -> None:
        slow = await service.submit(ImageRequest(prompts=["x"], images=["http://dead.example/x"], id="slow"))
        assert (service.queue.running, service.queue.waiting) == (0, 1)
        assert len(await service.draw(ImageRequest(prompts=["x"]))) == 1
        assert slow.progress().state == "queued"
        slow.cancel()
        with pytest.raises(Cancelled):
            await slow.pictures()
        assert (service.queue.running, service.queue.waiting) == (0, 0)
        await service.stop()

    asyncio.run(run())


def test_a_picture_is_decoded_once_for_all_pictures_of_its_request(service: Service) -> None:
    engine = FakeEngine()
    service = Service(service.catalog, engine, Settings())

    async def run() -> None:
        await service.draw(ImageRequest(prompts=["x", "y"], n=3, images=[PICTURE], mask=PICTURE))
        assert service.budget.used == 0
        await service.stop()

    asyncio.run(run())
    assert len(engine.seen) == 6
    assert len({id(generation.images) for generation in engine.seen}) == 1
    assert all(generation.mask for generation in engine.seen)


def test_what_is_wrong_with_a_picture_ends_the_job(service: Service) -> None:
    async def run() -> None:
        job = await service.submit(ImageRequest(prompts=["x"], images=[b"a text"], id="wrong"))
        with pytest.raises(InvalidPicture, match="not a picture"):
            await job.pictures()
        assert service.progress("wrong").state == "failed"
        assert (service.queue.running, service.queue.waiting, service.budget.used) == (0, 0, 0)
        await service.stop()

    asyncio.run(run())


def test_a_cancelled_arrival_is_not_drawn(service: Service) -> None:
    """Between its body and its job, and for its own caller only."""

    async def run() -> None:
        with service.register_arrival("x", "ann"), service.register_arrival("x", "bob"):
            assert service.progress("x", "ann").state == "queued"
            assert (await service.cancel_id("x", "ann")).state == "cancelled"
            with pytest.raises(Cancelled):
                await service.submit(ImageRequest(prompts=["x"], id="x", caller="ann"))
            assert len(await service.draw(ImageRequest(prompts=["x"], id="x", caller="bob"))) == 1
        assert service.progress("x", "ann").state == "cancelled"
        assert service.progress("x", "bob").state == "completed"

    asyncio.run(run())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_request_is_known_at_every_moment(service: Service, cancelled: bool) -> None:
    """Also while what its model takes is read from disk in a thread; it can be cancelled then."""

    async def run() -> None:
        with service.register_arrival("x", "ann"):
            submitted = asyncio.create_task(service.submit(ImageRequest(prompts=["x"], id="x", caller="ann")))
            await asyncio.sleep(0)  # it has begun
            assert not submitted.done()
            if cancelled:
                assert (await service.cancel_id("x", "ann")).state == "cancelled"
                with pytest.raises(Cancelled):
                    await submitted
                return
            while not submitted.done():
                assert service.progress("x", "ann").state == "queued"
                await asyncio.sleep(0)
            await submitted.result().pictures()
        assert service.progress("x", "ann").state == "completed"

    asyncio.run(run())


# How much.


def test_a_budget_is_shared_and_given_back() -> None:
    budget = Budget(100, lambda: 7)
    one, other = budget.share(), budget.share()
    one.take(60)
    with pytest.raises(TooManyRequests) as caught:
        other.take(41)
    assert caught.value.retry_after == 7
    with pytest.raises(RequestTooLarge):
        other.take(101)
    other.take(40)
    other.count(50)  # made of what is there: nobody is refused for it, but who comes next
    with pytest.raises(TooManyRequests):
        budget.share().take(1)
    other.give_back()
    other.give_back()
    budget.share().take(40)
    assert budget.used == 100


def test_the_frames_of_a_clip_leave_others_their_room(service: Service) -> None:
    """They are drawn for minutes, and their file is small."""
    film = animated("GIF", 40, (256, 256))
    service.budget.limit = len(film) + 1
    share, other = service.budget.share(), service.budget.share()
    request = ImageRequest(prompts=["x"], video=film, video_field="video", format="webp")

    async def run() -> SourceClip:
        files = sources(request, share, (), service.limits)
        assert files
        await files.fetch(service.fetcher, service.decoders, service._clip_decoders)
        clip = await files.decode_clip(service._clip_decoders, (0, 0), 1)
        await service.stop()
        return clip

    assert len(asyncio.run(run()).frames) > service.budget.limit
    other.take(1)
    with pytest.raises(TooManyRequests):
        other.take(1)


def test_a_file_that_is_no_sound_is_refused_before_its_turn(service: Service) -> None:
    request = ImageRequest(prompts=["x"], audio=PICTURE, audio_field="audio_reference", format="wav")
    files = sources(request, service.budget.share(), (), service.limits)
    assert files
    with pytest.raises(InvalidPicture, match="audio_reference: not a sound in a known format"):
        asyncio.run(files.fetch(service.fetcher, service.decoders, service._clip_decoders))


def test_what_a_url_brings_counts(service: Service) -> None:
    service.fetcher = PictureFetcher(["127.0.0.1"])
    service.budget.limit = len(PICTURE) - 1

    async def run(url: str) -> None:
        with pytest.raises(RequestTooLarge, match="max_waiting_mb"):
            await service.draw(ImageRequest(prompts=["x"], images=[url]))
        assert service.budget.used == 0
        await service.stop()

    with Site(lambda handler: handler.say(200, PICTURE)) as site:
        asyncio.run(run(site.url))

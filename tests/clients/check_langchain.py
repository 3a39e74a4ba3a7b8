"""LangChain's DALL-E wrapper, which reads `url` and sends no response format. Argument: the server's URL."""

from __future__ import annotations

import io
import os
import sys
import urllib.request
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

from PIL import Image

URL = sys.argv[1]


def sizes(wrapper: DallEAPIWrapper) -> list[tuple[int, int]]:
    urls = wrapper.run("a cat on a green background").split("\n")
    assert all(url.startswith(f"{URL}/") for url in urls), urls
    return [Image.open(io.BytesIO(urllib.request.urlopen(url).read())).size for url in urls]


def by_arguments() -> None:
    wrapper = DallEAPIWrapper(base_url=f"{URL}/v1", api_key="unused", n=2, size="64x64")
    assert sizes(wrapper) == [(64, 64)] * 2


def by_environment() -> None:
    os.environ["OPENAI_API_BASE"] = f"{URL}/v1"
    os.environ["OPENAI_API_KEY"] = "unused"
    assert sizes(DallEAPIWrapper(model="sfumato-tiny", size="auto")) == [(128, 128)]


def with_a_quality() -> None:
    wrapper = DallEAPIWrapper(
        base_url=f"{URL}/v1", api_key="unused", model="dall-e-3", size="64x64", quality="standard"
    )
    assert sizes(wrapper) == [(64, 64)]


for check in (by_arguments, by_environment, with_a_quality):
    check()
    print(check.__name__, "ok")

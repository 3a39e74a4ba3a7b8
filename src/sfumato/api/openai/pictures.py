"""How requests give pictures, in all the spellings that clients send."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator
from pydantic_core import from_json

from sfumato.errors import in_words
from sfumato.pictures.sources import uploaded

KEYS = ("image_url", "url", "image", "video_url", "audio_url")
"""Of an object that stands for a picture, a clip or a sound; one of them is there."""

MAX_ID = 100
"""Characters of a file's id."""

NO_PICTURE = 'there is no picture in it; send {"image_url": "data:..."}'


def url_of(value: Any) -> Any:
    """The picture itself of OpenAI's `{"image_url": ...}`, also as `{"image_url": {"url": ...}}`, and the name of
    `{"file_id": ...}` (`sources.uploaded`); others as they are.

    An object may be text, as forms have it. Raises ValueError for one that has none of the keys, and for one that has
    several: a mask or a clip would be left out.
    """
    if isinstance(value, str) and value[:16].lstrip().startswith("{"):
        try:
            value = from_json(value, allow_inf_nan=False)
        except ValueError:
            raise ValueError(NO_PICTURE) from None
    if not isinstance(value, dict):
        return value
    there = [key for key in (*KEYS, "file_id") if value.get(key) is not None]
    if len(there) > 1:
        raise ValueError(f"{' and '.join(there)} in one object: only one of them is valid; send an object for each")
    if there == ["file_id"]:
        id = value["file_id"]
        if not isinstance(id, str) or not 0 < len(id) <= MAX_ID:
            raise ValueError(f"file_id: {in_words(id)}; the id of an uploaded file is valid")
        return uploaded(id)
    url = value[there[0]] if there else None
    if value.keys().isdisjoint((*KEYS, "file_id")) or (isinstance(url, dict) and "url" not in url):
        raise ValueError(NO_PICTURE)
    return url.get("url") if isinstance(url, dict) else url


def _listed(value: Any) -> Any:
    """One picture or several."""
    values = value if isinstance(value, list) else [] if value in (None, "") else [value]
    return [url_of(each) for each in values]


Picture: TypeAlias = str | bytes
"""Base64, `data:` URI, http(s) URL or the name of an uploaded file; in a form, a file."""
OnePicture: TypeAlias = Picture | dict[str, Any]
Pictures: TypeAlias = Annotated[
    list[Picture], BeforeValidator(_listed, json_schema_input_type=OnePicture | list[OnePicture])
]
Mask: TypeAlias = Annotated[Picture | None, BeforeValidator(url_of, json_schema_input_type=OnePicture | None)]

"""What a conversation asks for: the prompt, and the pictures that it is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from sfumato.api.openai.pictures import Picture, url_of
from sfumato.errors import InvalidRequest

MAX_MESSAGES = 2000
"""Far more than a chat client keeps."""

PICTURE_STARTS = ("data:image/", "http://", "https://")
"""What a picture's address in Markdown begins with; others are the client's own."""


class Message(BaseModel):
    """Of a conversation. Other fields, such as `tool_calls`, are not read."""

    role: str = Field(max_length=100, description="user and assistant are read; others have no effect.")
    content: str | list[dict[str, Any]] | None = Field(
        None,
        description="Text, or parts: `{type: text, text}` and `{type: image_url, image_url: {url}}`. A picture is a "
        "data: URI, base64, a URL of a picture of this server, or an http(s) URL.",
    )
    images: list[str | dict[str, Any]] | None = Field(
        None, description="Pictures of an earlier answer, as it had them."
    )


@dataclass(frozen=True, slots=True)
class Named:
    """A picture, and the field of the request that has it."""

    name: str
    picture: Picture


@dataclass(frozen=True, slots=True)
class Conversation:
    """The last text of the user, and pictures."""

    prompt: str
    pictures: tuple[Named, ...] = ()
    """Of the user's last message."""
    previous: Named | None = None
    """The last picture before that message, mostly of the last answer."""


def read(messages: Sequence[Message]) -> Conversation:
    """Only the pictures that it is about are looked at. Raises InvalidRequest if the user says nothing."""
    places = [place for place, message in enumerate(messages) if message.role == "user"]
    prompt = next((text for place in reversed(places) if (text := _text(messages[place]))), "")
    if not prompt:
        raise InvalidRequest(
            "messages: no message of the role user has a text; it is the prompt: "
            '[{"role": "user", "content": "a cat"}]',
            param="messages",
        )
    pictures = _pictures(messages[places[-1]], places[-1])
    earlier = (_pictures(messages[place], place) for place in range(places[-1] - 1, -1, -1))
    previous = next((found[-1] for found in earlier if found), None) if not pictures else None
    return Conversation(prompt, tuple(pictures), previous)


def _text(message: Message) -> str:
    if not isinstance(message.content, list):
        return (message.content or "").strip()
    texts = [part["text"] for part in message.content if isinstance(part.get("text"), str)]
    return "\n".join(texts).strip()


def _pictures(message: Message, place: int) -> list[Named]:
    """Of a message of the user or the assistant, in order."""
    if message.role not in ("user", "assistant"):
        return []
    found: list[Named] = []
    parts = message.content if isinstance(message.content, list) else []
    for index, part in enumerate(parts):
        named = part.get("type") in ("image_url", "input_image")
        if named or any(part.get(key) is not None for key in ("image_url", "image", "file_id")):
            found.append(_checked(part, f"messages[{place}].content[{index}]"))
    for index, image in enumerate(message.images or ()):
        found.append(_checked(image, f"messages[{place}].images[{index}]"))
    if not found and message.role == "assistant":
        found += [Named(f"messages[{place}].content", address) for address in in_markdown(_text(message))]
    return found


def _checked(value: Any, name: str) -> Named:
    try:
        url = url_of(value)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from None
    if not isinstance(url, str) or not url.strip():
        raise InvalidRequest(
            f'{name}: there is no picture in it; send {{"type": "image_url", "image_url": {{"url": "data:..."}}}}',
            param=name,
        )
    return Named(name, url)


def in_markdown(text: str) -> Iterator[str]:
    """Addresses of the pictures in a text, `![a cat](address)`; in time linear in its length."""
    position = 0
    while (middle := text.find("](", position)) >= 0:
        opening = text.rfind("[", position, middle)
        position = middle + 2
        if opening < 1 or text[opening - 1] != "!":
            continue
        end = text.find(")", position)
        words = text[position:end].split(maxsplit=1) if end >= 0 else []  # a title may follow
        address = words[0].strip("<>") if words else ""
        if address.startswith(PICTURE_STARTS):
            yield address
            position = end

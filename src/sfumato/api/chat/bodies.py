"""The request body of chat completions: the fields of generations, with a conversation in place of the prompt."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from sfumato.api.chat.conversation import MAX_MESSAGES, Conversation, Message, read
from sfumato.api.chat.sizes import ImageConfig
from sfumato.api.fields import BLANK
from sfumato.api.openai.bodies import DrawBody
from sfumato.errors import InvalidRequest

ADDED_BY_SDKS = "extra_body"
"""OpenAI's SDKs put its fields beside the others; some clients send it as it is."""


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = Field(None, description="The last event has `usage`.")


class ChatBody(DrawBody):
    """Of `POST /v1/chat/completions`."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*DrawBody.WITHOUT_EFFECT, "partial_images")

    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation. The last text of the user is the prompt. The pictures of that message are "
        "the sources, or if it has none and the model edits, the last picture before it.",
        examples=[[{"role": "user", "content": "a rocket on a blue background"}]],
    )
    modalities: list[str] | None = Field(None, description='Must contain "image", if it is sent.')
    image_config: ImageConfig | None = Field(None, description="Size as in OpenRouter; `size` takes precedence.")
    response_format: Any = Field(
        None, description='"url": URLs of the pictures in place of data: URIs; others, such as objects, have no effect.'
    )
    stream: Annotated[bool | None, BLANK] = Field(
        None,
        description="Answer with server-sent events: progress as comments, then each picture in `delta.images`.",
    )
    stream_options: StreamOptions | None = Field(None, description="Of a stream.")
    content_images: Annotated[bool | None, BLANK] = Field(
        None,
        description="Whether `content` has the pictures, too, as Markdown with their URLs, for clients that do not "
        "read `images`. Absent: as the setting content_images says.",
    )

    _conversation: Conversation = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _with_extra_body(cls, data: Any) -> Any:
        more = data.get(ADDED_BY_SDKS) if isinstance(data, dict) else None
        if not isinstance(more, dict):
            return data
        return more | {name: value for name, value in data.items() if name != ADDED_BY_SDKS}

    @model_validator(mode="after")
    def _read_messages(self) -> ChatBody:
        """Here, as it takes time, and so that earlier pictures are not kept while the request waits."""
        if self.modalities is not None and "image" not in self.modalities:
            raise InvalidRequest(
                f"modalities: {str(self.modalities)[:100]}; this model answers with pictures: send "
                '["image"] or ["image", "text"], or leave it out',
                param="modalities",
            )
        self._conversation = read(self.messages)
        self.messages = []
        return self

    @property
    def conversation(self) -> Conversation:
        return self._conversation

    def release_pictures(self) -> None:
        super().release_pictures()
        self._conversation = Conversation(self._conversation.prompt)

    def wants_b64(self) -> bool:
        return bool(self.response_format != "url")

    def ignored(self) -> list[str]:
        known = self.response_format in (None, "", "url", "b64_json")
        within = [f"image_config.{name}" for name in (self.image_config and self.image_config.model_extra) or ()]
        return [*super().ignored(), *within, *([] if known else ["response_format"])]

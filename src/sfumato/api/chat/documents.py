"""Shapes of the answers of chat completions, for the API description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from sfumato.api.http.documents import DRAWING


class PictureAddress(BaseModel):
    url: str = Field(description="A data: URI, or a URL if `response_format` says so.")


class AnswerPicture(BaseModel):
    """One picture of an answer."""

    type: str
    image_url: PictureAddress
    index: int
    seed: int = Field(description="Reproduces this picture.")


class Answer(BaseModel):
    role: str
    content: str = Field(description="Empty; or what was not done as asked; or the pictures as Markdown.")
    images: list[AnswerPicture]


class Choice(BaseModel):
    """Always one, with all `n` pictures."""

    index: int
    message: Answer
    finish_reason: str
    logprobs: None


class ChatUsage(BaseModel):
    """A picture counts one token per 16x16 pixels."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class ChatCompletion(BaseModel):
    """OpenAI's, with the pictures where OpenRouter has them."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage


CHAT: dict[int | str, dict[str, Any]] = {
    **DRAWING,
    200: {
        "model": ChatCompletion,
        "description": "The pictures; with `stream: true` server-sent events, each `data:` line a JSON object",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}

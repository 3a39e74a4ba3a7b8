"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from sfumato.api.chat.answers import answer
from sfumato.api.chat.bodies import ChatBody
from sfumato.api.chat.documents import CHAT
from sfumato.api.dependencies import TheContext
from sfumato.api.http.forms import openapi_body, reader

routes = APIRouter(tags=["Chat"])


@routes.post(
    "/chat/completions",
    summary="Draw what a conversation asks for",
    description="One choice with all pictures in `message.images`. The last text of the user is the prompt; a model "
    "that edits starts from the pictures of that message, or from the last one before it. Models that draw no "
    "pictures are unknown.",
    openapi_extra=openapi_body(ChatBody),
    responses=CHAT,
)
async def completions(body: Annotated[ChatBody, Depends(reader(ChatBody))], context: TheContext) -> Response:
    return await answer(context, body)

"""Answers of chat completions: one choice with all pictures, at once or as a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import JSONResponse, Response

from sfumato.api.chat.bodies import ChatBody
from sfumato.api.chat.drawing import Plan, plan
from sfumato.api.dependencies import Context
from sfumato.api.http import urls
from sfumato.api.http.auth import caller_of
from sfumato.api.keeping import keeper
from sfumato.api.openai import answers
from sfumato.api.openai.answers import OutputFormat
from sfumato.core import Done, Step
from sfumato.pictures.store import MEDIA_TYPES
from sfumato.serving.job import Job

EVERYBODY = "*"
OF_MARKDOWN = str.maketrans("[]\\", "()/")
"""What would end the text of a picture, or keep its bracket from ending it."""


def parse_callers(text: str, keys: Mapping[str, str]) -> frozenset[str]:
    """The setting content_images. Raises ValueError for a name that no key has."""
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if unknown := sorted(names - {EVERYBODY} - keys.keys()):
        raise ValueError(
            f"content_images: no API key has the name {unknown[0]!r}; names of the setting api_keys are valid"
        )
    return names


@dataclass(frozen=True, slots=True)
class _Form:
    """How the pictures of one answer are returned."""

    output: OutputFormat
    urls: bool
    """In `images`, too; otherwise these have data: URIs."""
    markdown: bool
    """Whether `content` has them."""
    prompt: str
    notice: str
    """What the answer says first; empty: nothing."""
    usage: bool
    """Whether a stream ends with the usage."""

    async def image(self, job: Job, index: int) -> dict[str, Any]:
        part = job.parts[index]
        assert part.done
        assert self.output.base
        if self.urls:
            url = answers.picture_url(self.output.base, part.name)
        else:
            url = f"data:{MEDIA_TYPES[self.output.format]};base64,{await answers.b64(part.done, self.output)}"
        address = {"type": "image_url", "image_url": {"url": url}}
        return address | {"index": index, "seed": part.done.recipe.seed}

    def content(self, job: Job, index: int) -> str:
        """The picture as Markdown, if it is wanted."""
        assert self.output.base
        text = " ".join(self.prompt.translate(OF_MARKDOWN).split())
        return f"![{text}]({answers.picture_url(self.output.base, job.parts[index].name)})" if self.markdown else ""


async def answer(context: Context, body: ChatBody) -> Response:
    """Draw what the conversation asks for, and answer with the pictures or, if requested, a stream."""
    request, service, gallery = context.request, context.service, context.gallery
    base = urls.base_url(request, service.settings)
    planned = await plan(service, body, base)
    form = _form(context, body, planned, base)
    output = form.output
    needed = form.urls or form.markdown
    keep = keeper(gallery, caller_of(request), output.format, output.encode, required=needed)
    more = planned.fields | context.origin | {"keep": keep, "previews": 0}
    ignored = [*body.ignored(), *planned.ignored]
    if body.stream:
        job = await answers.unless_gone(request, answers.started_job(service, body, more))
        return answers.Stream(job, _events(job, form), ignored)
    return await answers.unless_gone(request, _completion(context, body, more, form, ignored))


def _form(context: Context, body: ChatBody, planned: Plan, base: str) -> _Form:
    request = context.request
    wanted: frozenset[str] = request.app.state.content_images
    of_setting = EVERYBODY in wanted or caller_of(request) in wanted
    return _Form(
        replace(answers.output_format(body, base), base=base),
        urls=not body.wants_b64(),
        markdown=of_setting if body.content_images is None else body.content_images,
        prompt=body.conversation.prompt,
        notice=planned.notice,
        usage=bool(body.stream_options and body.stream_options.include_usage),
    )


async def _completion(
    context: Context, body: ChatBody, more: Mapping[str, Any], form: _Form, ignored: Sequence[str]
) -> Response:
    job = await answers.submit(context.service, body, more)
    more["images"].clear()  # the job has its own: those here would be kept until the answer
    results = await answers.all_pictures(job, context.gallery)
    places = range(len(results))
    content = "\n\n".join(text for text in (form.notice, *(form.content(job, index) for index in places)) if text)
    message = {"role": "assistant", "content": content, "images": [await form.image(job, index) for index in places]}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    completion = _object("chat.completion", job) | {"choices": [choice], "usage": usage(results)}
    return JSONResponse(completion, headers=answers.warning_headers(ignored, results))


async def _events(job: Job, form: _Form) -> AsyncGenerator[str, None]:
    """OpenAI's chunks, with each picture in a `delta.images` as soon as it and those before it are done."""
    completed = 0

    def chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event(_object("chat.completion.chunk", job) | {"choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": f"{form.notice}\n\n" if form.notice else ""})
        async with aclosing(job.events()) as events:
            async for _, happened in events:
                if isinstance(happened, Step):
                    progress = job.progress()
                    yield f": step {progress.step} of {progress.total}\n\n"
                while completed < len(job.parts) and job.parts[completed].done:
                    delta: dict[str, Any] = {"images": [await form.image(job, completed)]}
                    if text := form.content(job, completed):
                        delta["content"] = f"\n\n{text}" if completed else text
                    yield chunk(delta)
                    completed += 1
        yield chunk({}, "stop")
        if form.usage:
            results = [part.done for part in job.parts if part.done]
            yield _event(_object("chat.completion.chunk", job) | {"choices": [], "usage": usage(results)})
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status was already sent, so any error goes into the stream
        yield answers.failure(error)


def usage(results: Sequence[Done]) -> dict[str, Any]:
    """The token counts of the image routes, by the names of chat completions."""
    counted = answers.usage(results)
    return {
        "prompt_tokens": counted["input_tokens"],
        "completion_tokens": counted["output_tokens"],
        "total_tokens": counted["total_tokens"],
        "prompt_tokens_details": dict(counted["input_tokens_details"]),
        "completion_tokens_details": {"image_tokens": counted["output_tokens"]},
    }


def _object(kind: str, job: Job) -> dict[str, Any]:
    return {"id": f"chatcmpl-{job.id}", "object": kind, "created": int(job.created), "model": job.config.name}


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"

"""`sfumato unload`: ask a running server to free memory."""

from __future__ import annotations

import httpx

from sfumato.errors import SfumatoError
from sfumato.settings import Settings


def unload(model: str | None, url: str | None, key: str | None, settings: Settings) -> str:
    """Unload a model of the server at `url` (None: the model; all models); returns what was done, in words.

    Raises SfumatoError with the server's message, or if no server answers there.
    """
    base = (url or _own_url(settings)).rstrip("/")
    key = key or settings.api_keys.partition(",")[0].partition(":")[2].strip()
    try:
        answer = httpx.post(
            f"{base}/v1/models/unload",
            json={"model": model} if model is not None else {},
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=settings.time_limit_s,
        )
    except httpx.HTTPError as error:
        raise SfumatoError(f"{base} does not answer ({error}); --url says where the server is") from None
    if answer.is_error:
        raise SfumatoError(_message(answer))
    return answer.headers.get("x-sfumato-warning") or f"{'every model' if model is None else model} is unloaded"


def _own_url(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    return f"http://{host}:{settings.port}"


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.url} answered {answer.status_code}; is it a Sfumato server?"

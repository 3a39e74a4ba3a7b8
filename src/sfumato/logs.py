"""Logging of all processes: text or JSON lines on stderr, each with its request's id.

Prompts, pictures, keys and query strings are not logged. Other libraries log them at lower levels (HTTP headers, the
truncated end of a prompt), so only their warnings are passed on, and only errors from diffusers' pipelines.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from sfumato.settings import Settings

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that this task serves; empty outside a request."""

OURS = ("sfumato", "uvicorn")
"""Loggers that follow the setting log_level."""

QUOTE_PROMPTS = ("diffusers.pipelines", "diffusers.modular_pipelines")
"""Their warnings quote the part of a prompt that did not fit."""

FORM_PARSERS = ("python_multipart",)
"""They warn about each form they cannot parse; its sender gets an error anyway."""

LIBRARIES = ("diffusers", "transformers", "huggingface_hub")
"""They install their own handlers."""

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def configure(settings: Settings) -> None:
    """Send this process's log to stderr, as the settings say. Call it once, before anything logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FORMATS[settings.log_format]())
    handler.addFilter(RepeatFilter())
    level = settings.log_level.upper()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelName(level)))
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    if not settings.log_prompts:
        for name in QUOTE_PROMPTS:
            logging.getLogger(name).setLevel(logging.ERROR)
    for name in FORM_PARSERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)


def route_libraries() -> None:
    """Make libraries log through our handler instead of their own. Call it once they are imported."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def error_location(error: BaseException) -> str:
    """Type of an error and where it was raised, without its message, which may quote a caller."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__} at\n{''.join(traceback.format_tb(error.__traceback__)).rstrip()}"


class RepeatFilter(logging.Filter):
    """Passes a warning or error `MAX_REPEATS` times in `WINDOW_S` seconds; the next one says how many were suppressed.

    For our own loggers two messages are the same if their text is; for others, which insert what a client sent, if
    their template is. The access log is not affected: its lines are level info.
    """

    MAX_REPEATS = 20
    WINDOW_S = 60.0
    MAX_MESSAGES = 1000
    """Maximum number of distinct messages to track."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: OrderedDict[tuple[str, int, str], tuple[float, int]] = OrderedDict()
        """Message → when its window began, and how often it occurred in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        ours = record.name.split(".")[0] == "sfumato"
        message = record.name, record.levelno, record.getMessage() if ours else str(record.msg)
        now = self._clock()
        began, count = self._windows.pop(message, (now, 0))
        suppressed = 0
        if now - began > self.WINDOW_S:
            suppressed, began, count = max(0, count - self.MAX_REPEATS), now, 0
        self._windows[message] = began, count + 1
        if len(self._windows) > self.MAX_MESSAGES:
            self._windows.popitem(last=False)
        if suppressed:
            record.msg, record.args = f"{record.getMessage()} ({suppressed} similar messages suppressed)", None
        return count < self.MAX_REPEATS


class TextLines(logging.Formatter):
    """`time LEVEL logger: message`, and the request's id in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        id = request_id.get()
        line = super().formatMessage(record) + (f" [{id}]" if id else "")
        # Client-supplied text must not look like a separate log line.
        return line.replace("\n", "\n    ").translate(_CONTROL)


class JsonLines(logging.Formatter):
    """One object per line: time (UTC), level, logger, message, request_id, the items of `fields`, and error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if id := request_id.get():
            line["request_id"] = id
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0]:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


_FORMATS: dict[str, type[TextLines] | type[JsonLines]] = {"text": TextLines, "json": JsonLines}

"""Every error a caller can get, each with its HTTP status and OpenAI error type and code.

    SfumatoError                      500 internal_error
    ├── InvalidRequest                400 invalid_value          the caller can fix it
    │   ├── InvalidPicture            400 invalid_image
    │   ├── RequestTooLarge           413 request_too_large
    │   ├── RequestTimeout            408 request_timeout        the request arrived too slowly
    │   ├── UnsupportedMedia          415 unsupported_media_type
    │   └── ContentFiltered           400 content_policy_violation
    ├── Unauthorized                  401 invalid_api_key
    ├── Forbidden                     403 forbidden              the request came from a web page of another origin
    ├── ModelNotFound                 404 model_not_found
    ├── RequestNotFound               404 request_not_found      no such request is queued or running
    ├── PictureNotFound               404 picture_not_found      the gallery has no picture of that name
    ├── JobNotFound                   404 job_not_found          no such stored request
    ├── FileNotStored                 404 file_not_found         no such file of /v1/files
    ├── BatchNotFound                 404 batch_not_found
    ├── KeyReused                     422 idempotency_key_reused the key came with another request before
    ├── TooManyRequests               429 rate_limit_exceeded    carries retry_after seconds
    ├── TooManyConnections            503 too_many_connections
    ├── Cancelled                     499 cancelled              the caller disconnected or cancelled
    ├── ModelFileError                500 model_file_invalid     the YAML file must be fixed
    ├── LoadError                     500 model_load_failed
    │   ├── DownloadError             503 model_download_failed  the next request tries again
    │   ├── ModelTooLarge             507 model_too_large        more than the memory budget of its device
    │   │   └── AdditionTooLarge      507 model_too_large        so is what a request adds to a model
    │   ├── DeviceUnavailable         500 device_unavailable
    │   └── UnfitPipeline             400 pipeline_unfit         also a ModelFileError; told before the download
    ├── DrawError                     500 generation_failed      the pipeline raised, or drew NaN
    │   └── OutOfMemory               500 out_of_memory          nor will it fit the next time
    ├── StorageError                  507 storage_failed         a picture could not be written
    ├── JobsUnavailable               503 jobs_unavailable       their database cannot be used; carries retry_after
    ├── TimedOut                      504 timeout
    │   └── DeadlineExceeded          504 deadline_exceeded      nothing of it had begun by its own deadline
    ├── NotInstalled                  501 not_installed          the route needs an extra of the package
    ├── ServerStops                   503 server_stopping        the server was stopped before the answer was ready
    └── WorkerDied                    503 worker_died
        └── NoWorker                  503 worker_died            its device has no worker; another device may draw it

A message names the field at fault, its value, what is valid and what to do. Errors cross the
pipe between the processes, so each can be pickled with all its attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar


class SfumatoError(Exception):
    """Base of the tree. `param` names the request field or model-file key at fault, if any."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retry: ClassVar[bool] = False
    """Whether the same request may succeed if it is sent again unchanged."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[SfumatoError], args: tuple[Any, ...], state: dict[str, Any]) -> SfumatoError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidRequest(SfumatoError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidPicture(InvalidRequest):
    code = "invalid_image"


class RequestTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"
    retry = True


class UnsupportedMedia(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class ContentFiltered(InvalidRequest):
    code = "content_policy_violation"


class Unauthorized(SfumatoError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(SfumatoError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class ModelNotFound(SfumatoError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestNotFound(SfumatoError):
    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class PictureNotFound(SfumatoError):
    status = 404
    type = "invalid_request_error"
    code = "picture_not_found"


class JobNotFound(SfumatoError):
    status = 404
    type = "invalid_request_error"
    code = "job_not_found"


class FileNotStored(SfumatoError):
    status = 404
    type = "invalid_request_error"
    code = "file_not_found"


class BatchNotFound(SfumatoError):
    status = 404
    type = "invalid_request_error"
    code = "batch_not_found"


class KeyReused(SfumatoError):
    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class TooManyRequests(SfumatoError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry = True

    def __init__(self, message: str, *, retry_after: int, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class TooManyConnections(SfumatoError):
    status = 503
    code = "too_many_connections"
    retry = True


class Cancelled(SfumatoError):
    status = 499
    type = "cancelled"
    code = "cancelled"


class ModelFileError(SfumatoError):
    code = "model_file_invalid"


class LoadError(SfumatoError):
    code = "model_load_failed"


class DownloadError(LoadError):
    status = 503
    code = "model_download_failed"
    retry_after: int | None = None
    """Seconds after which the hub or server wants to be asked again, if it said so."""

    def after(self, seconds: int | None) -> DownloadError:
        """The same error, with what the server said of when to ask again."""
        self.retry_after = seconds
        return self


class ModelTooLarge(LoadError):
    status = 507
    code = "model_too_large"


class AdditionTooLarge(ModelTooLarge):
    """What a request adds to a model, a LoRA or a ControlNet, has no room beside it."""


class DeviceUnavailable(LoadError):
    code = "device_unavailable"


class UnfitPipeline(ModelFileError, LoadError):
    """The class that draws does not fit the model: the request is answered as soon as that is known."""

    status = 400
    type = "invalid_request_error"
    code = "pipeline_unfit"


class DrawError(SfumatoError):
    code = "generation_failed"


class OutOfMemory(DrawError):
    """The picture does not fit into memory; the same request will not fit the next time either."""

    code = "out_of_memory"


class StorageError(SfumatoError):
    status = 507
    code = "storage_failed"


class JobsUnavailable(SfumatoError):
    """Nothing was accepted: the request may be sent again, unchanged."""

    status = 503
    code = "jobs_unavailable"
    retry = True
    retry_after = 10


class TimedOut(SfumatoError):
    status = 504
    code = "timeout"


class DeadlineExceeded(TimedOut):
    code = "deadline_exceeded"


class NotInstalled(SfumatoError):
    status = 501
    code = "not_installed"


class ServerStops(SfumatoError):
    status = 503
    code = "server_stopping"
    retry = True


class WorkerDied(SfumatoError):
    status = 503
    code = "worker_died"
    retry = True


class NoWorker(WorkerDied):
    """`deaths`: workers that died while the request was drawn, each perhaps of it."""

    def __init__(self, message: str, *, deaths: int = 0) -> None:
        super().__init__(message)
        self.deaths = deaths


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known word, or an empty string if none is close."""
    near = difflib.get_close_matches(word[:100], list(choices), n=1, cutoff=0.6)  # quadratic in the word's length
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """What a library's error says, in at most 200 characters; its class, if it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__


def told(error: BaseException) -> str:
    """The class of a library's error, and its first line."""
    return f"{type(error).__name__}: {first_line(error)}"


MAX_ITEMS, MAX_DEPTH, MAX_TEXT = 4, 2, 80
_WORDS = {None: "null", True: "true", False: "false"}


def printable(text: str) -> str:
    """The text with what is no character (bytes of a file's name that are not UTF-8, half a surrogate pair) escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def in_words(value: object, depth: int = MAX_DEPTH) -> str:
    """A value for a message, as JSON and YAML write it (`true`, `null`, `[1, 'a']`); short, and never raises."""
    match value:
        case None | bool():
            return _WORDS[value]
        case str():
            half = MAX_TEXT // 2 - 2
            return repr(value if len(value) <= MAX_TEXT else f"{value[:half]}...{value[-half:]}")
        case bytes():
            return f"a file of {len(value)} bytes"
        case dict():
            pairs = (f"{in_words(key, 0)}: {in_words(each, depth - 1)}" for key, each in value.items())
            return "{" + _several(pairs, len(value), depth) + "}"
        case list() | tuple() | set() | frozenset():
            return "[" + _several((in_words(each, depth - 1) for each in value), len(value), depth) + "]"
    try:
        return str(value)[:MAX_TEXT]
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"


def _several(items: Iterator[str], count: int, depth: int) -> str:
    shown = list(islice(items, MAX_ITEMS)) if depth > 0 else []  # aliases can turn lines of YAML into gigabytes
    return ", ".join(shown + (["..."] if count > len(shown) else []))

"""What requests need and that is loaded for itself: an error of its load is the request's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sfumato.checkpoints.remote_limits import TooLarge
from sfumato.errors import DownloadError, InvalidRequest, LoadError, TooManyRequests


@contextmanager
def as_of_request(what: str, param: str, there: Callable[[], str] = lambda: "") -> Iterator[None]:
    """What cannot be loaded is the request's mistake, unless memory or the network is short.

    `what` it is, in words; `there`: what would work, in words.
    """
    try:
        yield
    except DownloadError as error:
        error.message, error.param = f"{param}: {error.message} {there()}".rstrip(), param
        raise
    except LoadError as error:
        if type(error) in (LoadError, TooLarge):
            known = there()
            message = f"{param}: {what}: {error.message}{'. ' * bool(known)}{known}"
            raise InvalidRequest(message, param=param) from error
        error.param = param
        raise
    except TooManyRequests as error:  # there is no room for it now
        error.param = param
        raise

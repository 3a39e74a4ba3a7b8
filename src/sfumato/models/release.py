"""An error holds the frames that it came through, and they hold every tensor of the run that failed."""

from __future__ import annotations

import traceback


def let_go(error: BaseException | None) -> None:
    """Empty the frames that have ended, of `error` and of what led to it; its words and lines stay.

    An error that is kept, in an answer or by a frame that it passed, is part of a cycle: without this the latents of
    a failed or cancelled run stay in memory until Python's collector comes by.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

"""Release the memory an error keeps: its traceback's frames hold every tensor of the failed run."""

from __future__ import annotations

import traceback


def release_frames(error: BaseException | None) -> None:
    """Clear the finished frames of `error` and of its causes; its message and line numbers stay.

    A stored error (in an answer, or in a frame it passed through) is part of a reference cycle: without this the
    latents of a failed or cancelled run stay in memory until Python's garbage collector runs.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

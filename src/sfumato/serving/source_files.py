"""The files that a request brings: which of them is a clip, and all of them as `Sources`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sfumato.core import Limits
from sfumato.pictures.budget import Share
from sfumato.pictures.source_clips import Drawn, is_clip
from sfumato.pictures.sources import EncodedClip, EncodedSound, Sources
from sfumato.serving.planning import ImageRequest
from sfumato.status import Abilities


def told_apart(request: ImageRequest, can: Abilities | None) -> ImageRequest:
    """A request for a clip with its source clip apart from its pictures: vLLM-Omni's clients send both in one field.

    What may be both (a GIF, a URL) is what the model takes, and a picture if it takes both or is not known.
    """
    if request.video is not None or not request.images:
        return request
    needs = bool(can and can.input("video") and not can.input("image"))
    moving = is_clip(request.images[0])
    if not (needs if moving is None else moving):
        return request
    field = (*request.image_names, *request.image_fields)[0]
    return replace(
        request,
        video=request.images[0],
        video_field=field,
        images=request.images[1:],
        image_names=request.image_names[1:],
    )


def sources(request: ImageRequest, share: Share, whole: Sequence[str], limits: Limits) -> Sources | None:
    """None: it brings none. Raises RequestTooLarge or TooManyRequests if they exceed the budget."""
    if not request.has_sources:
        return None
    sampling = request.sampling
    clip = None
    if request.video is not None:
        drawn = Drawn(
            limits.frames, limits.clip_pixels, sampling.num_frames, sampling.seconds, sampling.fps, sampling.size
        )
        clip = EncodedClip(request.video, request.video_field, drawn)
    return Sources(
        request.images,
        request.mask,
        request.controls,
        whole=whole,
        share=share,
        limits=limits,
        fitting=request.fitting,
        scale=(request.upscale or 1) if sampling.size is None else None,
        caller=request.caller,
        names=request.image_names,
        clip=clip,
        sound=EncodedSound(request.audio, request.audio_field) if request.audio is not None else None,
    )

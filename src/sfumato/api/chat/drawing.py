"""What is drawn for a conversation: with which sources, and at which size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from sfumato.api.chat.bodies import ChatBody
from sfumato.api.chat.conversation import Named
from sfumato.api.chat.sizes import SIDE
from sfumato.config import ModelConfig
from sfumato.errors import ModelNotFound
from sfumato.formats import IMAGE
from sfumato.pipelines import inputs
from sfumato.sampling import Sampling
from sfumato.serving.own_size import own_size
from sfumato.serving.planning import refuse_size, size_of
from sfumato.serving.service import Service
from sfumato.status import Abilities

EDITS = "image-to-image"


@dataclass(frozen=True, slots=True)
class Plan:
    """Fields of the request that the conversation decides."""

    fields: dict[str, Any]
    ignored: tuple[str, ...]
    """Fields of the body that have no effect here."""
    notice: str
    """What the answer must say; empty: nothing."""


async def plan(service: Service, body: ChatBody, base: str) -> Plan:
    """`base`: this server's URL.

    Raises ModelNotFound for a model that draws no pictures, as for one that is not there.
    """
    service.catalog.refresh()
    config = service.catalog.get(body.model)
    abilities = await service.abilities(config)
    if abilities and (abilities.problem or abilities.kind != IMAGE):
        why = abilities.problem or f"it makes {inputs.made_by(abilities)}"
        raise ModelNotFound(f"There is no picture model {config.name!r}: {why}.", param="model")
    conversation = body.conversation
    own = [Named("image", picture) for picture in body.all_pictures]
    pictures = [*own, *conversation.pictures]
    edits = _takes_pictures(config, abilities)
    notice = ""
    if not edits and (conversation.pictures or conversation.previous):
        pictures = own
        notice = f"{config.name} does not edit pictures: this one is drawn from the text alone."
    elif not pictures and conversation.previous:
        if await service.fetcher.has_expired(conversation.previous.picture, urlsplit(base).hostname or ""):
            notice = "The earlier picture has expired: this one is drawn from the text alone."
        else:
            pictures = [conversation.previous]
    sampling = body.sampling()
    ignored = []
    if sampling.strength is not None and not pictures:  # clients set it once for all messages
        sampling = replace(sampling, strength=None)
        ignored.append("strength")
    sampling, used = await _sized(service, config, body, sampling, with_source=bool(pictures))
    if body.image_config and (body.image_config.aspect_ratio or body.image_config.image_size) and not used:
        ignored.append("image_config")
    fields = {
        "prompts": [conversation.prompt],
        "images": [each.picture for each in pictures],
        "image_names": [each.name for each in pictures],
        "sampling": sampling,
    }
    return Plan(fields, tuple(ignored), notice)


def _takes_pictures(config: ModelConfig, abilities: Abilities | None) -> bool:
    """Whether a picture of the conversation can be its source; if that is not known, it is tried."""
    return config.enables("image") and (abilities is None or EDITS in abilities.tasks)


async def _sized(
    service: Service, config: ModelConfig, body: ChatBody, sampling: Sampling, *, with_source: bool
) -> tuple[Sampling, bool]:
    """The parameters with the size of `image_config`, and whether it has an effect."""
    asked = body.image_config
    if asked is None or size_of(body.size) != (None, None):
        return sampling, False
    if asked.aspect_ratio is None and (with_source or asked.image_size is None):
        return sampling, False  # a picture keeps its size
    own, multiple = await own_size(service, config, SIDE)
    width, height = asked.size(own, multiple)
    refuse_size(service.limits, width, height, "image_config")
    return replace(sampling, width=width, height=height), True

"""Tiny autoencoders for `vae: tiny`: which decodes the latents of a model is told from its own VAE's configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from sfumato.checkpoints import diffusers_source
from sfumato.config import ModelConfig
from sfumato.errors import ModelFileError

TINY = "tiny"
"""The value of `vae` and `diffusers.preview_vae`."""

REPOSITORIES: Mapping[tuple[int, float], str] = MappingProxyType(
    {
        (4, 0.18215): "madebyollin/taesd",
        (4, 0.13025): "madebyollin/taesdxl",
        (16, 1.5305): "madebyollin/taesd3",
        (16, 0.3611): "madebyollin/taef1",
    }
)
"""Latent channels and `scaling_factor` of a VAE (Stable Diffusion 1 and 2; XL; 3; Flux.1) → its tiny autoencoder."""

UNWRITTEN = (4, 0.18215)
"""What AutoencoderKL takes where its configuration says nothing."""

SAMPLED = "latent_dist"
"""The attribute of an encoded picture that a tiny autoencoder, which has no distribution, does not have."""


def resolve(config: ModelConfig, vae: Mapping[str, Any]) -> ModelConfig:
    """The model file with repositories in place of `tiny`. `vae`: the configuration of the model's own VAE.

    Raises ModelFileError if there is none for its latents.
    """
    keys = {"vae": "vae", "preview_vae": "diffusers.preview_vae"}
    chosen = {field: key for field, key in keys.items() if getattr(config, field) == TINY}
    if not chosen:
        return config
    channels = vae.get("latent_channels", UNWRITTEN[0])
    scale = vae.get("scaling_factor", UNWRITTEN[1])
    repository = REPOSITORIES.get((channels, scale)) if vae.get("_class_name") == "AutoencoderKL" else None
    if repository is None:
        key = next(iter(chosen.values()))
        raise ModelFileError(
            f"{config.name}: {key}: tiny: there is no tiny autoencoder known for the latents of this model "
            f"({vae.get('_class_name', 'no VAE')}); there are for Stable Diffusion 1 to 3, XL and Flux.1, and all that "
            "use their VAEs. Name a repository, or leave it out",
            param=key,
        )
    return replace(
        config,
        vae=repository if "vae" in chosen else config.vae,
        preview_vae=repository if "preview_vae" in chosen else config.preview_vae,
    )


def check(config: ModelConfig, name: str, vae: Mapping[str, Any]) -> None:
    """Raises ModelFileError for a `tiny` that the pipeline class `name` cannot use. `vae`: empty if not known yet."""
    if config.vae == TINY:
        refuse(config, name)
    if vae:
        resolve(config, vae)


def refuse(config: ModelConfig, name: str) -> None:
    """Raises ModelFileError if the class `name` cannot draw with the tiny autoencoder that the file names."""
    if keeps_from(name):
        raise ModelFileError(
            f"{config.name}: vae: {name} cannot encode pictures with a tiny one; leave it out", param="vae"
        )


@functools.cache
def keeps_from(name: str) -> bool:
    """Whether a pipeline class reads of an encoded picture what a tiny autoencoder does not have."""
    return SAMPLED in diffusers_source.attributes(name)

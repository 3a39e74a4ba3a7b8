"""Environment variables to set in a process before it imports torch."""

from __future__ import annotations

import logging
import os
import warnings

ENVIRONMENT = {
    # Waiting OpenMP threads spin by default. On a machine with other load, a picture of the built-in
    # model then takes 16 s instead of 0.7 s (2 cores, both busy); on an idle one this costs nothing.
    "OMP_WAIT_POLICY": "passive",
    # transformers logs at length which image processors have an equivalent in torchvision.
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Applied unless the operator set them."""


QUIET = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers of what diffusers imports whether or not a model is quantised: they tell of kernels for other hardware and of
what a later torch will do otherwise."""


def prepare() -> None:
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings(
        "ignore", "Should have t[ab]", UserWarning
    )  # torchsde, about rounding of its last time step

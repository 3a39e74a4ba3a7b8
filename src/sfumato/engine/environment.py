"""Environment variables to set in a process before it imports torch."""

from __future__ import annotations

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


def prepare() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings(
        "ignore", "Should have t[ab]", UserWarning
    )  # torchsde, about rounding of its last time step

"""What has to be set in a process before torch is imported into it."""

from __future__ import annotations

import os
import warnings

ENVIRONMENT = {
    # Waiting OpenMP threads spin by default. On a machine that does anything else beside, a picture of the
    # embedded model then takes 16 s instead of 0.7 s (2 cores, both busy); on an idle one nothing is lost.
    "OMP_WAIT_POLICY": "passive",
    # It tells at length which image processors have a twin in torchvision.
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Set unless the operator has set them."""


def prepare() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "Should have t[ab]", UserWarning)  # torchsde, on rounding of its last time

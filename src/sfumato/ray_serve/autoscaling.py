"""How many replicas a deployment should have: by the denoising steps that they have left."""

from __future__ import annotations

from typing import Any

from sfumato.process.devices import UNKNOWN_STEPS


class StepsToDo:
    """A policy of Ray Serve; called by its controller with an `AutoscalingContext`.

    It says what would be right now. Delays, bounds and the start of the first replica are Ray's.
    """

    def __init__(self, steps: int, places: int) -> None:
        """`steps`: that one replica should have left at most; `places`: pictures that it draws at a time."""
        self._steps = steps
        self._places = places

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The number of replicas, and no state."""
        metrics = context.aggregated_metrics or {}
        steps = sum(metrics.get("steps", {}).values())
        pictures = sum(metrics.get("pictures", {}).values())
        waiting = context.total_queued_requests or 0.0
        each = steps / pictures if pictures else UNKNOWN_STEPS
        # Short pictures fill the places of a replica before they add up to many steps.
        return max((steps + waiting * each) / self._steps, (pictures + waiting) / self._places), {}

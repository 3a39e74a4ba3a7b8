"""Muon for matrices, AdamW for everything else, and a running average of the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NS = (3.4445, -4.7750, 2.0315)


def _orthogonal(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices to a stack (n, rows, columns), by Newton-Schulz."""
    a, b, c = _NS
    x: Tensor = stack.bfloat16()
    transposed = x.size(-2) > x.size(-1)
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.to(stack.dtype) if transposed else x.to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Convolutions count as (out, in * height * width) matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, decay: float = 0.01) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": 0.95, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights; equal shapes are orthogonalised in one batch."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"]).flatten(1)
                shapes.setdefault((update.size(0), update.size(1)), []).append((weight, update))
            for (rows, columns), members in shapes.items():
                stack = _orthogonal(torch.stack([update for _, update in members]))
                scale = max(1.0, rows / columns) ** 0.5
                for (weight, _), update in zip(members, stack, strict=True):
                    weight.mul_(1 - group["lr"] * group["decay"])
                    weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)


class Optimisers:
    """Both optimisers of a model under one learning rate.

    ``lr`` is AdamW's; Muon's is ``muon`` times that. Embeddings and all vectors go to AdamW.
    """

    def __init__(self, model: nn.Module, muon: float) -> None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        weights = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in weights if p.ndim >= 2 and id(p) not in embeddings]
        chosen = {id(p) for p in matrices}
        self._ratio = muon
        self._muon = Muon(matrices, lr=0.0)
        self._adam = torch.optim.AdamW(
            [p for p in weights if id(p) not in chosen],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )

    def step(self, lr: float) -> None:
        """One update at learning rate ``lr``, then clear the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for group in self._muon.param_groups:
            group["lr"] = lr * self._ratio
        self._adam.step()
        self._muon.step()
        self._adam.zero_grad(set_to_none=True)
        self._muon.zero_grad(set_to_none=True)


class Average:
    """An exponential running average of a model's weights, warmed up over the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay, self._steps = model, decay, 0
        self.weights = {name: p.detach().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present weights."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, value in self._model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50, hold: float = 0.3) -> float:
    """Warm up linearly, hold ``peak`` for a share ``hold`` of the run, then fall linearly to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    falling = steps * (1 - hold)
    return peak if step < steps - falling else peak * (steps - step) / falling

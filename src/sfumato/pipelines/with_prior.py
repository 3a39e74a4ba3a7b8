"""A pipeline and a prior for it: another pipeline, which turns pictures into the embeddings that it draws from.

diffusers has classes for both stages of Kandinsky and Stable Cascade, and none for FLUX.1 Redux: there the caller hands
what `FluxPriorReduxPipeline` returns to a `FluxPipeline`. `joined` makes such a class of any two that fit: the fields
of the prior's output are arguments of the other's call. Both run unmodified.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

PREFIX = "image_prior_"
"""Begins the names of the prior's components among those of the joined pipeline."""

TASKS = ("image-to-image",)

OF_PRIOR = frozenset({"max_sequence_length"})
"""Arguments about the prompt, which the prior reads in place of the pipeline, at lengths of its own."""


def class_name(base: str) -> str:
    """The name of the class that is made of `base` and a prior."""
    return f"{base}WithPrior"


def joined(pipeline: Any, prior: Any) -> Any:
    """A pipeline of both, over their modules. The prior reads prompts with the text encoders and tokenizers of
    `pipeline`, where it takes such and has none."""
    own = {name: part for name, part in prior.components.items() if part is not None}
    lent = {name: part for name, part in pipeline.components.items() if name in prior.components.keys() - own.keys()}
    prior.register_modules(**lent)
    if (tokenizer := lent.get("tokenizer")) is not None:
        prior.tokenizer_max_length = tokenizer.model_max_length  # as its constructor has it
    kinds: list[Any] = [type(pipeline), type(prior)]
    made: Any = object.__new__(_class(*kinds, tuple(own)))
    vars(made).update(vars(pipeline))
    made.register_modules(**{f"{PREFIX}{name}": part for name, part in own.items()})
    made.prior_pipe = prior
    return made


@functools.cache
def _class(base: Any, prior: Any, own: tuple[str, ...]) -> type:
    returned = inspect.signature(prior.__call__).parameters
    of_prior = {name: each for name, each in returned.items() if name not in ("self", "return_dict")}
    names = frozenset(f"{PREFIX}{name}" for name in own)

    def call(self: Any, **kwargs: Any) -> Any:
        asked = {name: kwargs.pop(name) for name in of_prior.keys() & kwargs.keys()}
        return base.__call__(self, **self.prior_pipe(**asked), **kwargs)

    kept = {
        name: each
        for name, each in inspect.signature(base.__call__).parameters.items()
        if name not in {"self", *of_prior, *OF_PRIOR}
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(each.replace(kind=keyword) for each in (of_prior | kept).values()),
        ]
    )
    call.__wrapped__ = base.__call__  # type: ignore[attr-defined]  # whoever reads what a call does reads this one

    def signature_keys(kind: Any, pipeline: Any) -> Any:
        expected, optional = base._get_signature_keys(pipeline)
        return sorted({*expected, *names}), optional

    order = [f"{PREFIX}{name}" for name in prior.model_cpu_offload_seq.split("->") if name in own]
    attributes = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")} | {
        "__call__": call,
        "_get_signature_keys": classmethod(signature_keys),
        "model_cpu_offload_seq": "->".join([*order, base.model_cpu_offload_seq]),
        "tasks": TASKS,
    }
    return type(class_name(base.__name__), (base,), attributes)

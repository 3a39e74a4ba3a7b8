"""`python -m sfumato.config.reference` prints docs/reference/model-files.md."""

from __future__ import annotations

from itertools import groupby

from sfumato.config.keys import IGNORED, KEYS

HEAD = """\
# Model files

A model file is a `.yaml` file in the models folder that describes one model, or a list of them. LocalAI's files
work unchanged. Files are read again when they change; `sfumato check` explains each of them.

```yaml
name: ghibli
parameters:
  model: nitrosocke/Ghibli-Diffusion
diffusers:
  enable_parameters: negative_prompt,num_inference_steps,image
```

If two keys set the same thing, the one under `diffusers:` wins. An empty value counts as absent. An unknown key is an
error, and so is a value of the wrong type; the message says what is valid.

This page is generated: `python -m sfumato.config.reference > docs/reference/model-files.md`.
"""

IGNORED_HEAD = """
## LocalAI keys without effect

They are accepted and log one warning each.

| Key | Why it has no effect |
| --- | --- |
"""


def markdown() -> str:
    """The reference page."""
    text = HEAD
    for group, keys in groupby(KEYS, key=lambda key: key.group):
        rows = "".join(f"| `{key.path}` | {key.help.replace('|', '&#124;')} |\n" for key in keys)
        text += f"\n## {group}\n\n| Key | Meaning |\n| --- | --- |\n{rows}"
    return text + IGNORED_HEAD + "".join(f"| `{key}` | {reason} |\n" for key, reason in sorted(IGNORED.items()))


if __name__ == "__main__":
    print(markdown(), end="")

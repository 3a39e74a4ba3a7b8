"""Model files: one YAML mapping -> one `ModelConfig`.

model       the resulting value, and the defaults
keys        every key: those with an effect here, and LocalAI's without one, each with the reason
readers     one function per type of value
document    YAML text -> plain mappings with line numbers
parse       a mapping -> ModelConfig
reference   the tables above as documentation
"""

from sfumato.config.model import DEFAULTS, Adapter, Download, ModelConfig
from sfumato.config.parse import Broken, ParsedFile, Redirect, Skipped, load, outcomes

__all__ = [
    "DEFAULTS",
    "Adapter",
    "Broken",
    "Download",
    "ModelConfig",
    "ParsedFile",
    "Redirect",
    "Skipped",
    "load",
    "outcomes",
]

"""Model files: one YAML mapping -> one `ModelConfig`.

model       the value that comes out, and the defaults
keys        every key: the ones that mean something here, and LocalAI's that do not, each with why
readers     one function per kind of value
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

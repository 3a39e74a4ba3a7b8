"""What a worker imports: counted, not timed, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(code: str) -> Any:
    """What `code` prints last, as JSON."""
    lean = (
        "from sfumato.engine import environment\nfrom sfumato.process import lean_imports\n"
        "environment.prepare()\nlean_imports.install()\nimport sys, json\n"
    )
    done = subprocess.run([sys.executable, "-c", lean + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


DRAW = """
import asyncio
from sfumato.serving.catalog import EMBEDDED
from sfumato.config import load
from sfumato.core import Done, Generation
from sfumato.sampling import Sampling
from sfumato.engine.local import Local
from sfumato.settings import Settings

async def draw():
    engine = Local(Settings(device="cpu"))
    await engine.start()
    (config,) = load(EMBEDDED / "sfumato-tiny.yaml")
    async for event in engine.submit(config, Generation("a", "a red circle", 1, Sampling(steps=2))):
        last = event
    assert isinstance(last, Done), last
    await engine.stop()

asyncio.run(draw())
print(json.dumps(sorted(sys.modules)))
"""


def test_the_embedded_model_is_drawn_without_the_models_of_others() -> None:
    modules = run(DRAW)

    def below(package: str) -> int:
        return sum(name.startswith(f"{package}.") for name in modules)

    assert below("diffusers.models.transformers") <= 4
    assert below("diffusers.models.autoencoders") <= 6
    assert below("diffusers.models.controlnets") <= 3
    assert below("diffusers.pipelines") <= 10
    assert below("transformers.models") <= 40
    assert below("torch._dynamo") <= 4
    assert below("torchao") == 0
    for package in ("torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "scipy.optimize"):
        assert below(package) == 0, package
    assert "scipy.stats._stats_py" not in modules
    others = [name for name in modules if name.partition(".")[0] != "sfumato"]
    assert len(others) < 2900  # 3700 without `lean_imports`


def test_what_waits_is_there_when_it_is_asked_for() -> None:
    missing = run("""
import ast
from importlib import import_module, util
missing = []
for package in sorted(lean_imports.LAZY_PACKAGES):
    module = import_module(package)
    names = [alias.asname or alias.name for node in ast.walk(ast.parse(open(module.__file__).read()))
             if isinstance(node, ast.ImportFrom) and node.level == 1 for alias in node.names]
    assert names, package
    missing += [f"{package}.{name}" for name in names if not hasattr(module, name)]
from diffusers.models.transformers import *
from diffusers.models.transformers import transformer_flux
assert FluxTransformer2DModel is transformer_flux.FluxTransformer2DModel
assert not hasattr(import_module("diffusers.hooks"), "nothing")
print(json.dumps(missing))
""")
    assert missing == []


@pytest.mark.parametrize(
    "code",
    [
        "from diffusers import EulerDiscreteScheduler as S; S(use_beta_sigmas=True).set_timesteps(5)",
        "from diffusers import LMSDiscreteScheduler as S; s = S(); s.set_timesteps(5); s.get_lms_coefficient(1, 0, 0)",
        "import scipy.stats; assert scipy.stats.norm.cdf(0) == 0.5",
        "from scipy.stats import norm; assert norm.cdf(0) == 0.5",
        "import torch; f = torch.compile(lambda x: x + 1, backend='eager'); assert f(torch.ones(1)) == 2",
        "import torch; f = torch.compile(torch.nn.Linear(1, 1), backend='eager'); f(torch.ones(1))",
        "from torch._dynamo.backends.registry import list_backends as f; f()",
        "import torch._dynamo.variables.base as m; assert m.__spec__.loader.path == m.__file__",
        "from scipy.stats._qmc import Sobol as S; import scipy.stats.qmc as q; assert S is q.Sobol",
        "from scipy.optimize import linear_sum_assignment as f; assert f([[2, 1], [1, 2]])[1].tolist() == [1, 0]",
        "from transformers.loss import loss_for_object_detection as m; m.linear_sum_assignment([[1.0]])",
        "import scipy.optimize as o; assert o.linear_sum_assignment([[1.0]])[0] == 0; o.minimize",
        "import torch.distributed.tensor; assert not torch.distributed.is_initialized()",
        "import diffusers.models.transformers as t; assert t.transformer_flux.FluxPosEmbed",
        "import torch._dynamo.config; assert torch._dynamo.config.verbose is not None; torch._dynamo.reset()",
        "from diffusers import TorchAoConfig as C; from diffusers.quantizers.auto import DiffusersAutoQuantizer as Q;"
        "from torchao.quantization import Int8WeightOnlyConfig as I; Q.from_config(C(I())).validate_environment()",
        "from transformers import TorchAoConfig as C; from transformers.quantizers.auto import AutoHfQuantizer as Q;"
        "from torchao.quantization import Int8WeightOnlyConfig as I; Q.from_config(C(I())).validate_environment()",
    ],
)
def test_it_works_then(code: str) -> None:
    assert run(code + "\nprint(json.dumps(True))")


def test_two_threads_may_use_a_deferred_module_first(tmp_path: Path) -> None:
    """One executes it; the other waits for all of it."""
    (tmp_path / "slow_module.py").write_text(
        "import gate\nfirst = 1\ngate.entered.set()\nassert gate.go.wait(60)\nsecond = 2\n"
    )
    (tmp_path / "gate.py").write_text("import threading\nentered, go = threading.Event(), threading.Event()\n")
    assert run(f"""
import threading
sys.path.insert(0, {str(tmp_path)!r})
lean_imports.DEFERRED["slow_module"] = {{}}
import gate, slow_module
seen = []
def use(name):
    seen.append(getattr(slow_module, name))
threads = [threading.Thread(target=use, args=(name,)) for name in ("first", "second")]
threads[0].start()
assert gate.entered.wait(60)
threads[1].start()
threads[1].join(0.2)
assert seen == []  # neither has it before all of it was executed
gate.go.set()
for each in threads:
    each.join(60)
print(json.dumps(sorted(seen)))
""") == [1, 2]


def test_a_deferred_module_that_fails_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "first_time.py").write_text("tries = globals().get('tries', 0) + 1\nassert tries > 1\nvalue = 5\n")
    assert (
        run(f"""
sys.path.insert(0, {str(tmp_path)!r})
lean_imports.DEFERRED["first_time"] = {{}}
import first_time
try:
    first_time.value
except AssertionError:
    print(json.dumps(first_time.value))
""")
        == 5
    )

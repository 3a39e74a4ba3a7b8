"""Where the training keeps its files; every other module imports its paths from here."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
DATA = HERE / ".data"
RUNS = HERE / ".runs"
PIPELINE = REPOSITORY / "src" / "sfumato" / "models" / "sfumato-tiny"
RESULTS = HERE / "results.json"
JUDGE = HERE / "judge.safetensors"
GRID = REPOSITORY / "docs" / "images" / "grid.png"

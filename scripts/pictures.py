"""Make docs/img/.

python scripts/pictures.py plots      # from stored figures, in seconds
python scripts/pictures.py demo       # runs scripts/demo's race and records it
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from echo_trt.bundle.calibration import Calibration
from echo_trt.engine.options import DEFAULTS, run_alone
from echo_trt_lab.calibration.plots import gates

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
HEAD = ROOT / "build" / "heads" / "smollm2-135m-eagle3" / "calibration.json"

app = App(help_flags=["--help"], version_flags=[], default_parameter=DEFAULTS)


@app.command
def plots(folder: Annotated[Path, Parameter(help="Where they are written.")] = IMAGES) -> None:
    """Draw what docs/benchmarks.json and the default head's calibration hold."""
    run = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    publish = runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "publish.py"))
    calibration = Calibration.model_validate_json(HEAD.read_text())
    for name, plot in (publish["plots"](run) | {"gates.svg": gates(calibration).file()}).items():
        (folder / name).write_text(plot)


@app.command
def demo(folder: Annotated[Path, Parameter(help="Where it is written.")] = IMAGES) -> None:
    """Run the demo's race on the real bundles, and record it."""
    from echo_trt_lab.images.recording import record

    (folder / "demo.svg").write_text(record())


if __name__ == "__main__":
    run_alone(app)

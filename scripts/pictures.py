"""Draw the pictures of docs/img/ that come from stored figures, in seconds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.bundle.calibration import Calibration
from echo_trt.engine.options import run_alone
from echo_trt_lab.calibration.plots import gates

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
HEAD = ROOT / "build" / "heads" / "smollm2-135m-eagle3" / "calibration.json"


def main(folder: Annotated[Path, Parameter(help="Where they are written.")] = IMAGES) -> None:
    """Draw what docs/benchmarks.json and the default head's calibration hold."""
    run = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    publish = runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "publish.py"))
    calibration = Calibration.model_validate_json(HEAD.read_text())
    for name, plot in (publish["plots"](run) | {"gates.svg": gates(calibration).file()}).items():
        (folder / name).write_text(plot)


if __name__ == "__main__":
    run_alone(main)

"""Make docs/img/.

python scripts/pictures.py plots                             # from stored figures, in seconds
python scripts/pictures.py demo                              # runs scripts/demo's race and records it
python scripts/pictures.py dashboard bundles/smollm2-135m    # a server and a Prometheus, for four minutes
python scripts/pictures.py dashboard --from docs/img/dashboard.json
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from echo_trt.bundle.calibration import Calibration
from echo_trt.engine.options import DEFAULTS, run_alone
from echo_trt.errors import UserError
from echo_trt_lab.calibration.plots import gates

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
HEAD = ROOT / "build" / "heads" / "smollm2-135m-eagle3" / "calibration.json"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "echo.json"

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


@app.command
def dashboard(
    bundle: Annotated[Path | None, Parameter(help="The bundle to serve.")] = None,
    stored: Annotated[Path | None, Parameter("--from", help="Draw these answers, and measure nothing.")] = None,
    seconds: Annotated[float, Parameter(help="Of load.")] = 240.0,
    folder: Annotated[Path, Parameter(help="Where it is written.")] = IMAGES,
) -> None:
    """Draw the Grafana dashboard from its own queries to a real Prometheus."""
    from echo_trt_lab.images.monitored import measure
    from echo_trt_lab.images.panels import draw, empty

    panels = json.loads(DASHBOARD.read_text())
    if (bundle is None) == (stored is None):
        raise UserError("give a bundle to serve, or --from with stored answers.")
    if bundle and not shutil.which("prometheus"):
        raise UserError("prometheus is not on PATH; install it (apt-get install prometheus).")
    answers = json.loads(stored.read_text()) if stored else measure(bundle, panels, seconds)
    if not stored:
        (folder / "dashboard.json").write_text(json.dumps(answers, separators=(",", ":")) + "\n")
    for query in empty(panels, answers):
        print(f"no data: {query}", file=sys.stderr)
    (folder / "dashboard.png").write_bytes(draw(panels, answers))


if __name__ == "__main__":
    run_alone(app)

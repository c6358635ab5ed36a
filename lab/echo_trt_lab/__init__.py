"""What makes figures beside the server: benchmark, simulation, calibration, pictures, training.

It imports ``echo_trt``, which never imports it: its commands are entry points of the group ``echo_trt.commands``.
"""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"  # of the wheel, with the heads that they name

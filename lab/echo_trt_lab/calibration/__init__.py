"""Calibration: acceptance rates and gates of a bundle, and the costs of passes on a machine."""

"""OpenVINO: the embedded default, on any CPU."""

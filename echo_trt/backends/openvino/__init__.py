"""OpenVINO, for CPUs that the default engine, ``cpu``, does not run on."""

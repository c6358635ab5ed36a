"""The launcher: processes of Triton and the gateway, probes, restarts and signals."""

"""The launcher: Triton's process, the gateway's, probes, restarts, and signals."""

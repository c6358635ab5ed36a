"""The engines that scripts/benchmarks/cpu_peers.py measures, and its table."""

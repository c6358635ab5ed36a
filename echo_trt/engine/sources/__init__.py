"""Sources of draft tokens that take no pass of a network: a file here, and a row of ``speculation.sources``."""

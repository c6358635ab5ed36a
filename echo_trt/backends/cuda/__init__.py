"""The common parts of GPU engines: device memory, staged calls, rows that stay on the device."""

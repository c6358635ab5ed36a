"""What GPU engines share: device memory, staged calls, rows that stay on the device."""

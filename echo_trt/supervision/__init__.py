"""Child processes: starting, watching, restarting and stopping them."""

"""Files that users name, read within bounds: prompts and other inputs."""

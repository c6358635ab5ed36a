"""Files that users name: prompts, inputs and outputs."""

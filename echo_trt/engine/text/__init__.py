"""Text at the doors: prompts become token ids, and tokens become text as they come."""

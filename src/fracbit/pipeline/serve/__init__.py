"""Running a checkpoint: text from prompts, conversations, and how fast it goes."""

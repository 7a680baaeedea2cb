"""Running a checkpoint: generation from prompts, chat, and speed."""

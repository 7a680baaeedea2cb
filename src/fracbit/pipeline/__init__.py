"""The pipeline: schedule, the loop, the end of a run. Everything below meets here."""

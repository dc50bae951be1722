"""Training: configuration, schedules, the loop, checkpoints, ranks."""

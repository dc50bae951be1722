"""Training: the loop, the step, schedules, resume, log."""

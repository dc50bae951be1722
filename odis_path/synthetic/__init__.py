"""The demo: a synthetic cohort with annotations and the whole chain run on it."""

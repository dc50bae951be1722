"""`propose`: class-agnostic boxes where there are no annotations."""

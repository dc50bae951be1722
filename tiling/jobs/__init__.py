"""A cohort's work over executors: outcomes, process pool, Dask, progress and summary."""

"""The slides of a cohort: find them, list them in a manifest, `scan`."""

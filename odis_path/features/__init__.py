"""Feature files: read and write."""

"""What is seen of a run: the rows of its log, the live table, trackers."""

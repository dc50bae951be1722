"""The log of a run: its rows, the live table, trackers."""

"""Style and score figures, shared by evaluation and reporting."""

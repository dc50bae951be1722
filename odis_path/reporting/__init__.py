"""One self-contained HTML page about everything a folder holds: slides, runs, embeddings, evaluations."""

"""Evaluation of frozen embeddings: k-NN, linear probe, prototypes, retrieval; patients kept apart, baselines beside."""

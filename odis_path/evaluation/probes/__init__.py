"""The probes: nearest neighbours, linear, prototypes, retrieval, and how features are standardised for them."""

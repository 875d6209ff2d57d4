"""Callbacks of the training. Their hooks take a `ConsistencyModule`, which mypy counts as an override that is too narrow."""

"""Datasets, the resumable sampler and the batch type."""

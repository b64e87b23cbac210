"""Metrics of samples and reconstructions."""

"""Builders of TensorFlow Datasets that need no TensorFlow."""

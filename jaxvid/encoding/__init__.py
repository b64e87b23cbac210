"""Captions as embeddings of a text encoder that is not trained here."""

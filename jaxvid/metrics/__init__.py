"""Numbers that say how good samples and reconstructions are."""

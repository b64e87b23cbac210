"""Tools beside training: what brings others' work in and takes ours out."""

"""Whole networks: arrays in, arrays out; no loss, no config object, no mesh."""

"""Benchmarks of this machine; `python -m jaxvid.bench --help` names them."""

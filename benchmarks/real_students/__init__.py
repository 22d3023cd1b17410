"""The comparison of methods on real small students; see `benchmarks/real.py`."""

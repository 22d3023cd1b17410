"""The parts of `benchmarks/miniature.py`: the paper's experiments on the testbed."""

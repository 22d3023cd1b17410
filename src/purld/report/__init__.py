"""What a run has to show: one self-contained page, and its figures."""

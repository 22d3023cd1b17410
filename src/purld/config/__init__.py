"""The configuration of a run: what a user may say, and how it is loaded and checked.

from purld.config.load import load_config

config = load_config("run.yaml", ["align.tau=0.9"])
config.align.method  # "ldl_grpo"
"""

"""Whole runs: prompt pools, checks before money is spent, the plan, the stages in order, sweeps, comparison, export.

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.pipeline.pipeline import Pipeline
from purld.runs.run_dir import RunDir

Pipeline(load_config("run.yaml"), RunDir("runs/run"), Reporter()).execute()
"""

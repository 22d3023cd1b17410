"""Show a run on the terminal: progress, results, and the names of models and metrics.

from purld.display.progress import Reporter
from purld.display.results import print_results
from purld.runs.run_dir import RunDir

with Reporter().progress("prompts answered") as progress:
    progress(10, 200, "")
print_results(RunDir("runs/demo-counting"))
"""

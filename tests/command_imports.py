"""Import what purld's commands import when they run: a fork of a process that has begins at once."""

import gc
import threading
from importlib import import_module

import torch

for module in (
    *("purld.cli", "purld.pipeline.pipeline", "purld.pipeline.export", "purld.report.page", "purld.training.sft"),
    *("purld.training.align", "purld.display.results", "httpx2", "peft"),
    "transformers.models.qwen2.modeling_qwen2",
):
    import_module(module)  # as the commands do, which import what they need when they need it

torch.set_num_threads(1)
assert threading.active_count() == 1, f"a fork would lose the other threads: {threading.enumerate()}"
gc.collect()
gc.freeze()  # the collector would write to every page that the forks share

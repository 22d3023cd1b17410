"""purld: reinforcement-learning alignment for small on-premise models from one teacher answer per prompt.

    import purld

    config = purld.load_config("run.yaml", ["align.steps=100"])
    print(purld.check(config).sections)  # the plan; nothing is sent
    results = purld.run(config, run_dir="runs/first")
    print(results.models["ldl_grpo"].accuracy)

Names are imported when they are first used, so `import purld` loads neither torch nor transformers. The import switches
the telemetry of the Hugging Face libraries and their access to the hub off in this process: see `purld.hub_offline`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from purld.hub_offline import forbid_hub_access

if TYPE_CHECKING:
    from purld.api import align, anchors, check, evaluate, run, sft, write_report
    from purld.config.load import load_config
    from purld.config.schema import Config
    from purld.errors import UserError
    from purld.methods.losses import GroupLoss, GroupTokens
    from purld.methods.table import METHODS, GroupEvidence, Method, StageTwoMethod
    from purld.model.sample import Completion, Decoding, Sampler
    from purld.model.samplers import SAMPLERS
    from purld.model.self_evaluation import GroupScores
    from purld.pipeline.plan_sheet import Plan
    from purld.records import Anchor, Prompt
    from purld.runs.results import Estimate, ModelResult, RunResults, load_results
    from purld.training.scoring import SCORERS, GroupToScore, Scorer, ScorerContext

__version__ = "0.1.0"

_MODULES = {
    "align": "purld.api",
    "anchors": "purld.api",
    "check": "purld.api",
    "evaluate": "purld.api",
    "run": "purld.api",
    "sft": "purld.api",
    "write_report": "purld.api",
    "load_config": "purld.config.load",
    "Config": "purld.config.schema",
    "UserError": "purld.errors",
    "GroupLoss": "purld.methods.losses",
    "GroupTokens": "purld.methods.losses",
    "METHODS": "purld.methods.table",
    "GroupEvidence": "purld.methods.table",
    "Method": "purld.methods.table",
    "StageTwoMethod": "purld.methods.table",
    "Completion": "purld.model.sample",
    "Decoding": "purld.model.sample",
    "Sampler": "purld.model.sample",
    "SAMPLERS": "purld.model.samplers",
    "GroupScores": "purld.model.self_evaluation",
    "Plan": "purld.pipeline.plan_sheet",
    "Anchor": "purld.records",
    "Prompt": "purld.records",
    "Estimate": "purld.runs.results",
    "ModelResult": "purld.runs.results",
    "RunResults": "purld.runs.results",
    "load_results": "purld.runs.results",
    "SCORERS": "purld.training.scoring",
    "GroupToScore": "purld.training.scoring",
    "Scorer": "purld.training.scoring",
    "ScorerContext": "purld.training.scoring",
}

__all__ = [
    "METHODS",
    "SAMPLERS",
    "SCORERS",
    "Anchor",
    "Completion",
    "Config",
    "Decoding",
    "Estimate",
    "GroupEvidence",
    "GroupLoss",
    "GroupScores",
    "GroupToScore",
    "GroupTokens",
    "Method",
    "ModelResult",
    "Plan",
    "Prompt",
    "RunResults",
    "Sampler",
    "Scorer",
    "ScorerContext",
    "StageTwoMethod",
    "UserError",
    "align",
    "anchors",
    "check",
    "evaluate",
    "load_config",
    "load_results",
    "run",
    "sft",
    "write_report",
]

forbid_hub_access()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'purld' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Keep the Hugging Face libraries off the network: no telemetry, no look-ups on the hub, no downloads.

trl reports every trainer it builds (architecture, device, versions), and peft and transformers look files up on the
hub. What leaves a run is what its ledger shows, so `import purld` switches all of that off, whether these libraries are
imported before or after. Models and data sets in the local cache still load.
"""

from __future__ import annotations

import os
import sys

_VARIABLES = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")

# The same settings in modules that read the variables when they were imported.
_CONSTANTS = (
    ("huggingface_hub.constants", ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE")),
    ("datasets.config", ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")),
)


def forbid_hub_access() -> None:
    """Switch telemetry and every access to the hub off, in this process and in those that it starts."""
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    for module, names in _CONSTANTS:
        if module in sys.modules:
            for name in names:
                setattr(sys.modules[module], name, True)


def is_hub_model_cached(hub_id: str) -> bool:
    """Return whether the configuration of a hub's model is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    except ValueError:  # no hub id at all
        return False

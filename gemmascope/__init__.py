"""gemmascope: look inside Gemma 4.

    import gemmascope as gs
    model = gs.load("nano-moe")
    logits, cache = model.run_with_cache("The capital of France is")
    cache["pattern", 3]

This file is the table of contents. A name is imported when it is first used, so `import gemmascope` loads neither torch
nor any other heavy library.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "gemmascope.weights",
    "HookedGemma4": "gemmascope.model.text",
    "Gemma4Config": "gemmascope.config",
    "PRESETS": "gemmascope.config",
    "SITES": "gemmascope.hooks",
    "OnHeads": "gemmascope.hooks",
    "ActivationCache": "gemmascope.cache",
    "RoutingTrace": "gemmascope.cache",
    "Result": "gemmascope.results",
    "Intervention": "gemmascope.interventions",
    **dict.fromkeys(
        "zero scale add replace patch mean resample knockout drop_expert force_expert freeze_routing freeze_norms "
        "save_interventions load_interventions".split(),
        "gemmascope.interventions",
    ),
    **dict.fromkeys("logit logit_difference log_prob prob kl_divergence".split(), "gemmascope.metrics"),
    "Prompts": "gemmascope.readout.activations",
    "collect": "gemmascope.readout.activations",
    "probe": "gemmascope.readout.probing",
    "probe_layers": "gemmascope.readout.probing",
    "sparse_probe": "gemmascope.readout.probing",
    "contrast_direction": "gemmascope.experiments.steering",
    "steer_sweep": "gemmascope.experiments.steering",
    "causal_check": "gemmascope.experiments.steering",
    "fit_das": "gemmascope.experiments.das",
    "interchange": "gemmascope.experiments.das",
}
"""Public name -> the module it lives in."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name, once (PEP 562)."""
    if name not in _HOME:
        from difflib import get_close_matches

        near = get_close_matches(name, __all__, n=3, cutoff=0.4) or sorted(_HOME)
        raise AttributeError(f"gemmascope has no {name!r}; the nearest names are {', '.join(near)}.")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

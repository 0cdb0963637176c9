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
    "attribution_patching": "gemmascope.experiments.attribution",
    "edge_attribution": "gemmascope.experiments.circuits",
    "edge_patching": "gemmascope.experiments.edges",
    "ActivationCache": "gemmascope.cache",
    "RoutingTrace": "gemmascope.cache",
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

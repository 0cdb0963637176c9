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

_CONTENTS = {
    "weights": "load",
    "config": "Gemma4Config PRESETS",
    "model.text": "HookedGemma4",
    "sites": "SITES",
    "hooks": "OnHeads",
    "cache": "ActivationCache",
    "interventions": "Intervention zero scale add replace patch mean resample knockout drop_expert force_expert "
    "freeze_routing freeze_norms save_interventions load_interventions",
    "metrics": "logit logit_difference log_prob prob kl_divergence",
    "results": "Result",
    "experiments.sweep": "sweep",
    "experiments.patching": "activation_patching aligned",
    "experiments.knockouts": "attention_knockout attention_to",
    "experiments.edges": "edge_patching",
    "experiments.paths": "path_patching",
    "experiments.attribution": "attribution_patching",
    "experiments.circuits": "edge_attribution",
    "experiments.steering": "contrast_direction steer_sweep causal_check",
    "experiments.das": "fit_das interchange",
    "readout.activations": "Prompts collect",
    "readout.probing": "probe probe_layers sparse_probe",
    "readout.lens": "logit_lens",
    "readout.tuned_lens": "TunedLens",
    "readout.attribution": "direct_logit_attribution",
    "readout.heads": "head_table detect_heads repeated_tokens",
    "readout.circuits": "copying_score ov_scores qk_scores",
    "routing.causal": "expert_ablation fewer_experts branch_ablation silencing_estimate",
    "routing.swaps": "swap_routing frozen_routing routing_regret",
    "routing.steering": "localise risk_difference steering_hooks expert_npmi reweight_experts",
    "routing.trace": "RoutingTrace trace_routing",
    "routing.counts": "RoutingCounts count_routing",
    "routing.report": "RoutingReport report",
    "widgets.base": "Selection",
    "views.tokens": "token_strip",
    "views.attention": "attention_view",
    "views.lens": "lens_view",
    "views.router": "router_view",
    "views.patching": "patch_grid",
    "views.ablation": "ablation_bench",
    "views.attribution": "attribution_view",
    "views.probing": "probe_view",
    "views.units": "unit_view",
    "views.model_map": "model_map",
    "views.dashboard": "dashboard",
}
_HOME = {name: f"gemmascope.{module}" for module, names in _CONTENTS.items() for name in names.split()}
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

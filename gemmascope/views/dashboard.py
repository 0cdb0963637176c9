"""Several views on one page: of one prompt, run once, or any that there are."""

from collections.abc import Sequence
from importlib import import_module

from gemmascope.model.text import HookedGemma4
from gemmascope.views.run import Run, run_of
from gemmascope.widgets.base import Selection, View
from gemmascope.widgets.dashboard import Dashboard

OF_A_PROMPT = {
    "token_strip": "tokens",
    "lens_view": "lens",
    "attention_view": "attention",
    "router_view": "router",
    "attribution_view": "attribution",
    "ablation_bench": "ablation",
}
"""The views of model and prompt, in the order of a page, and their modules."""


def dashboard(
    *shown, views: Sequence[str] | None = None, title: str | None = None, selection: Selection | None = None
) -> Dashboard:
    """Lays linked views out below one another.

        gs.dashboard(model, "When Mary and John went to the store, John gave a book to")
        gs.dashboard(lens, heads, result)      # views, and results that have one

    Args:
        shown: a model and a prompt (text, token ids, a cache of one prompt); or views, and what has a `.view()`.
        views: which of the views of a prompt: "token_strip", "lens_view", "attention_view", "router_view",
            "attribution_view", "ablation_bench"; all by default, without the router's where nothing routes.
        title: the heading; the model's name by default.

    Raises:
        ValueError: for nothing to show, a view that is not among them, or something that has none.
    """
    if len(shown) == 2 and isinstance(shown[0], HookedGemma4):
        model, prompt = shown
        run = run_of(model, prompt)
        selection = Selection() if selection is None else selection
        names = views_of(model) if views is None else list(views)
        unknown = next((name for name in names if name not in OF_A_PROMPT), None)
        if unknown is not None:
            raise ValueError(f"A prompt has no view {unknown!r}; its views are {', '.join(OF_A_PROMPT)}.")
        children = [_view_of(name, model, run, selection) for name in names]
        return Dashboard(children, title or model.cfg.model_name, _facts(run), selection)
    if views is not None:
        raise ValueError("views= chooses among those of a prompt: give a model and a prompt with it.")
    return Dashboard([_view(one) for one in shown], title or "gemmascope", selection=selection)


def views_of(model) -> list[str]:
    """The views that a prompt of this model has."""
    return [name for name in OF_A_PROMPT if name != "router_view" or model.cfg.n_experts]


def _view_of(name: str, model, run: Run, selection: Selection) -> View:
    return getattr(import_module(f"gemmascope.views.{OF_A_PROMPT[name]}"), name)(model, run, selection=selection)


def _view(one) -> View:
    if isinstance(one, View):
        return one
    if not callable(getattr(one, "view", None)):
        raise ValueError(f"A {type(one).__name__} has no view: give views, results, or a model and a prompt.")
    return one.view()


def _facts(run: Run) -> list[str]:
    cfg = run.model.cfg
    experts = [f"{cfg.n_experts} experts, {cfg.experts_per_token} a token"] if cfg.n_experts else []
    return [f"{cfg.n_layers} layers", f"{cfg.n_heads} heads", *experts, f"{run.n} token{'s' * (run.n != 1)}"]

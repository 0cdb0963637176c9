"""A view live in a page without Jupyter: what the page selects or keeps is set on the view, what it asks is answered by
it, in this process."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

from gemmascope.widgets import assets
from gemmascope.widgets.arrays import apart
from gemmascope.widgets.base import View

LIVE = Path(__file__).with_name("live.js")


def opened_live(view: View, open_html: Callable):
    """The page of a live view. `open_html(html, prepare)` opens one, and calls `prepare(page)` before."""
    widgets: dict[str, object] = {}

    def from_page(message: dict):
        widget = widgets[message["ref"]]
        if "question" in message:
            if getattr(widget, "kernel_is_gone", False):
                return {"gone": True}
            response, buffers = widget.ask(message["question"], [])
            return {"response": response, "buffers": list(map(_text, buffers))}
        for name, value in message["changed"].items():
            setattr(widget, name, value)
        return None

    html = live_page(view, widgets)
    page = open_html(html, lambda page: page.expose_function("toPython", from_page))
    for ref, widget in widgets.items():
        names = [name for name in widget.keys if name in ("data", "state") or name in getattr(widget, "NAMES", ())]
        widget.observe(lambda change, ref=ref: _to_page(page, ref, change), names)
    return page


def live_page(view: View, widgets: dict[str, object]) -> str:
    """The page of a live view; fills `widgets` by reference."""
    models, scripts = {}, {}

    def add(widget) -> None:
        ref = f"anywidget:{widget.model_id}"
        if ref in widgets:
            return
        widgets[ref] = widget
        traits = {}
        for name in ("data", "state", "selection", "children", *getattr(widget, "NAMES", ())):
            if not widget.has_trait(name):
                continue
            value = getattr(widget, name)
            for one in value if isinstance(value, list) else [value]:
                if hasattr(one, "model_id"):
                    add(one)
            traits[name] = _refs(value)
        plain, buffers = apart(traits)
        models[ref] = {"traits": plain, "buffers": list(map(_text, buffers))}
        if isinstance(widget, View):
            models[ref]["render"] = assets.renderer(widget.SCRIPT)
            scripts[assets.renderer(widget.SCRIPT)] = widget.SCRIPT

    add(view)
    script = assets.joined(*scripts.values(), "local_model.js") + LIVE.read_text()
    page = json.dumps({"models": models, "shown": f"anywidget:{view.model_id}"}).replace("<", "\\u003c")
    style = assets.css(*scripts.values())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>live</title><style>{style}</style>'
        f'<body class="gsc-page"><script type="module">{script}\nshowLive({{ {", ".join(scripts)} }}, {page});</script>'
    )


def _refs(value):
    if isinstance(value, list):
        return [_refs(one) for one in value]
    return f"anywidget:{value.model_id}" if hasattr(value, "model_id") else value


def _text(buffer: bytes) -> str:
    return base64.b64encode(buffer).decode("ascii")


def _to_page(page, ref: str, change) -> None:
    """What Python set reaches the page; what the page set does not come back to it as a change."""
    plain, buffers = apart(change["new"])
    script = "([ref, name, value, buffers]) => models[ref].receive(name, value, buffers)"
    page.evaluate(script, [ref, change["name"], plain, list(map(_text, buffers))])

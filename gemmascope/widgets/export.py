"""Views as one HTML file that needs neither kernel nor network.

The page carries one script (the views it shows, and `host.js`, which is to them what Jupyter's widget manager is in a
notebook), one style and its numbers. Its Content-Security-Policy lets only these two texts, named by their hashes, run
or style. Every string travels as JSON and reaches the document as text, never as markup.
"""

import base64
import hashlib
import html
import json
from typing import Any

from gemmascope.widgets import assets
from gemmascope.widgets.arrays import deflated, whole
from gemmascope.widgets.base import View


def page(view: View, title: str = "gemmascope") -> str:
    """The page as HTML. What `view.exported` names is asked now."""
    models: dict[str, Any] = {}
    scripts: set[str] = set()

    def ref(one: Any) -> str:
        """The place of a widget in the page, which it takes with all that it refers to."""
        if f"anywidget:{one.model_id}" not in models:
            models[f"anywidget:{one.model_id}"] = None  # its place, before those it refers to
            traits = {name: plain(getattr(one, name)) for name in one.keys if not _of_jupyter(name)}
            model = {"traits": traits}
            if isinstance(one, View):
                scripts.add(one.SCRIPT)
                answers = {
                    canonical([question, given]): one.answer(question, given) for question, given in one.exported()
                }
                model |= {"render": assets.renderer(one.SCRIPT), "answers": deflated(answers)}
            models[f"anywidget:{one.model_id}"] = model
        return f"anywidget:{one.model_id}"

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return ref(value) if hasattr(value, "model_id") else deflated(value)

    shown = ref(view)
    modules = sorted(scripts)
    script = assets.joined(*modules, "host.js")
    script += f"\nshowPage({{ {', '.join(map(assets.renderer, modules))} }});\n"
    data = json.dumps({"models": models, "shown": shown}, separators=(",", ":")).replace("<", "\\u003c")
    style = assets.css(*modules) + "\nbody { margin: 0; }\n"
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(whole(title))}</title>
<style>{style}</style>
</head>
<body class="gsc-page">
<noscript>This page draws itself with the script it carries; allow scripts to see it.</noscript>
<script type="application/json" id="gsc-page">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def canonical(value: Any) -> str:
    """A question as one text, the same as `canonical` of numbers.js gives."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _of_jupyter(name: str) -> bool:
    return name.startswith("_") or name in ("layout", "tabbable", "tooltip", "comm")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"

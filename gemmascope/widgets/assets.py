"""The scripts and styles of the views. A page takes one text, so modules are joined, without a bundler.

A module imports by `import { a, b } from "./other.js";` and exports declarations. Joining puts what is imported first
and drops both words, so top-level names are unique over all modules, which is checked.
"""

import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?function|const|class|let)", re.MULTILINE)
_NAME = re.compile(r"^(?:async )?(?:function\*?|const|let|class) ([\w$]+)", re.MULTILINE)


@cache
def joined(*modules: str) -> str:
    """The text of modules and of all they import, each once.

    Raises:
        ValueError: for a top-level name that two modules have.
    """
    texts: dict[str, str] = {}

    def add(module: str) -> None:
        if module in texts:
            return
        source = (HERE / module).read_text("utf-8")
        for imported in _IMPORT.findall(source):
            add(imported)
        texts[module] = _EXPORT.sub("", _IMPORT.sub("", source))

    for module in modules:
        add(module)
    homes: dict[str, str] = {}
    for module, text in texts.items():
        for name in _NAME.findall(text):
            if name in homes:
                raise ValueError(f"{name} stands in {homes[name]} and in {module}: joined modules share their names.")
            homes[name] = module
    return "\n".join(texts.values())


def renderer(module: str) -> str:
    """The function that a view's module exports: token_strip.js has tokenStrip."""
    first, *rest = module.removesuffix(".js").split("_")
    return first + "".join(map(str.capitalize, rest))


def esm(module: str) -> str:
    """A view's module as anywidget takes it."""
    return f"{joined(module)}\nexport default {{ render: {renderer(module)} }};\n"


@cache
def css(*modules: str) -> str:
    """The style that every view has, and what those of these modules add: token_strip.css beside token_strip.js."""
    own = (HERE / module.replace(".js", ".css") for module in modules)
    return "\n".join(path.read_text("utf-8") for path in (HERE / "view.css", *own) if path.is_file())

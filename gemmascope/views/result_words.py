"""What a result says of itself in a view: a title that tells it from its neighbours, and what a cell of it is."""

import re
from typing import Any

from gemmascope.results import Result

_TITLED = ("site", "by", "pattern", "direction", "method", "receivers", "kind", "prompts")
"""Settings that the title or the note says in its own words."""
_SAID = {"pos": "position"}


def title_of(result: Result) -> str:
    """The experiment and what sets it apart: site, direction, method, the axes that were narrowed to one, the model."""
    settings, sites = _settings(result), _sites(result)
    of = sites or _words(settings.get("by")) or _words(settings.get("pattern"))
    of = "" if _in(result.experiment, of) else of
    receivers = _words(settings.get("receivers"))
    parts = [
        result.experiment + (f" of {of}" if of else "") + (f" into {receivers}" if receivers else ""),
        *(_words(settings.get(name)) for name in ("direction", "method", "kind")),
        *(f"{_SAID.get(axis, axis)} {value}" for axis, value in _narrowed(result).items()),
        result.about.get("model", ""),
    ]
    return ", ".join([parts[0], *(part for part in parts[1:] if part and not _in(result.experiment, part))])


def note_of(result: Result) -> str:
    """What a cell is, how many samples its figure is the mean of, and the settings that the title leaves out."""
    axes = [_SAID.get(axis, axis) for axis in result.pictured]
    one, n = f"Each cell is one {_joined(axes)}", result.values.shape[1]
    settings, direction = _settings(result), _settings(result).get("direction")
    if direction and _sites(result) and result.base in ("clean", "corrupted"):
        other = "clean" if result.base == "corrupted" else "corrupted"
        what = f"{one}: {_sites(result)} there, taken from the {other} run and put into the {result.base} run."
    elif result.base is not None:
        what = f"{one}; its colour says what was measured in the {result.base} run with that changed ({result.unit})."
    else:
        what = f"{one}; its colour says what was measured there ({result.unit})."
    mean = f" Figures are means over {n} {'prompts' if _of_prompts(result) else 'samples'}." if n > 1 else ""
    rest = [_setting(name, value) for name, value in settings.items() if name not in _TITLED]
    rest = ", ".join(filter(None, rest))
    return what + mean + (f" Settings: {rest}." if rest else "")


def tokens_of(result: Result) -> str:
    """Whose tokens `Result.token_at` gives."""
    n = result.values.shape[1]
    name = f"{result.base} prompt" if result.base in ("clean", "corrupted") else "prompt"
    return f"the first of {n} {name}s" if n > 1 else f"the {name}"


def _in(text: str, words: str) -> bool:
    """Whether a text has these words as words."""
    return re.search(rf"(?<![\w.]){re.escape(words)}(?![\w.])", text) is not None


def _of_prompts(result: Result) -> bool:
    return result.base in ("clean", "corrupted") or "prompts" in _settings(result)


def _settings(result: Result) -> dict[str, Any]:
    return result.about.get("settings", {})


def _sites(result: Result) -> str:
    """Those of its cells where they say it, else those it was asked for."""
    named = list(result.cells["site"].unique()) if "site" in result.axes else _settings(result).get("site")
    return _words(named)


def _narrowed(result: Result) -> dict[str, Any]:
    """The axes along which all cells are one, with what they are."""
    firsts = {axis: result.cells[axis].iloc[0] for axis in result.axes if result.cells[axis].nunique(dropna=False) == 1}
    return {axis: value for axis, value in firsts.items() if axis != "site" and axis not in result.pictured}


def _words(value: Any) -> str:
    """A name, or a few; nothing for what is neither."""
    names = [value] if isinstance(value, str) else value
    return _joined(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ""


def _joined(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _setting(name: str, value: Any) -> str:
    """One plain setting; nothing for one that is off or too long to say."""
    name = name.replace("_", " ")
    if value is None or value is False or isinstance(value, list | dict):
        return ""
    if value is True:
        return name
    if isinstance(value, float):
        return f"{name} {value:.4g}"
    return f"{name} {value!r}" if isinstance(value, str) and value != value.strip() else f"{name} {value}"

"""What every view stands on: the shared selection, the small synced state, questions and answers, a still for readers
without a kernel.

A view holds three kinds of data. `data` is what it shows at once, a few kilobytes. `state` is what the user chose in
it, small and plain, so that it survives a re-run and an export. Everything large is an answer: the page asks a question
when somebody looks, a function of `answers` says what is there, and `to_html` asks those of `exported` beforehand.
"""

import difflib
import html
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import pandas
import traitlets
from anywidget.experimental import command

from gemmascope.widgets import assets
from gemmascope.widgets.arrays import apart, packed, whole

Answers = Mapping[str, Callable[..., Mapping[str, Any]]]
"""Question -> the function that answers it: arguments by name (numbers, strings, lists); a mapping, with arrays."""
Question = tuple[str, dict[str, Any]]
"""A question with its arguments."""
MAX_ROWS = 12
"""Rows of the table in a still."""


class Selection(anywidget.AnyWidget):
    """What is selected, shared by every view of a prompt: in the browser, without a way through Python, which hears of
    it all the same.

        selection = gs.Selection()
        lens = gs.lens_view(model, prompt, selection=selection)
        heads = gs.attention_view(model, prompt, selection=selection)
        selection.pos = 4        # both go there
    """

    _esm = "export default {};"
    pos = traitlets.Int(None, allow_none=True, help="position: of the query, where there are keys").tag(sync=True)
    key = traitlets.Int(None, allow_none=True, help="position that is read").tag(sync=True)
    layer = traitlets.Int(None, allow_none=True).tag(sync=True)
    head = traitlets.Int(None, allow_none=True).tag(sync=True)
    expert = traitlets.Int(None, allow_none=True, help="numbered within its layer").tag(sync=True)
    neuron = traitlets.Int(None, allow_none=True).tag(sync=True)
    token = traitlets.Int(None, allow_none=True, help="id in the vocabulary").tag(sync=True)
    site = traitlets.Unicode(None, allow_none=True, help="name of a hook point").tag(sync=True)

    NAMES: ClassVar[tuple[str, ...]] = ("pos", "key", "layer", "head", "expert", "neuron", "token", "site")

    def __init__(self, **selected: int | str | None):
        _check_names(selected, self.NAMES, "A selection")
        super().__init__(**selected)

    def __repr__(self) -> str:
        chosen = ((name, getattr(self, name)) for name in self.NAMES)
        return f"Selection({', '.join(f'{name}={value!r}' for name, value in chosen if value is not None)})"


class View(anywidget.AnyWidget):
    """One view. A subclass names its script, `class TokenStrip(View, script="token_strip.js")`, and its state."""

    data = traitlets.Dict().tag(sync=True)
    """What is shown at once, as `packed` leaves it."""
    state = traitlets.Dict().tag(sync=True)
    """What the user chose in this view. Set the whole of it: `view.state = {**view.state, "scale": "log"}`."""
    selection = anywidget.WidgetTrait().tag(sync=True)
    """The Selection it follows. Give two views one of them, and they are linked."""

    STATE: ClassVar[Mapping[str, Any]] = {}
    """Every entry of `state`, with what it is at first."""
    SCRIPT: ClassVar[str]

    def __init_subclass__(cls, script: str | None = None, **kwargs):
        if script is not None:
            cls.SCRIPT, cls._esm, cls._css = script, assets.esm(script), assets.css(script)
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        answers: Answers | None = None,
        exported: Callable[[], Iterable[Question]] = tuple,
        selection: Selection | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        self.answers = dict(answers or {})
        self.exported = exported
        """The questions whose answers an exported page carries."""
        selection = Selection() if selection is None else selection
        super().__init__(data=packed(data), state=dict(state or {}), selection=selection)

    @traitlets.validate("state")
    def _state_is_known(self, proposal: traitlets.Bunch) -> dict:
        given, what = proposal["value"], f"The state of a {type(self).__name__}"
        _check_names(given, self.STATE, what)
        for name, value in given.items():
            usual = type(self.STATE[name])
            sort = list if isinstance(value, tuple) else type(value)
            if self.STATE[name] is not None and sort is not usual:
                raise ValueError(f"{what} has a {usual.__name__} as {name!r}, and {value!r} came.")
        return {**deepcopy(dict(self.STATE)), **given}

    @traitlets.validate("selection")
    def _selection_is_one(self, proposal: traitlets.Bunch) -> Selection:
        if not isinstance(proposal["value"], Selection):
            raise traitlets.TraitError(f"selection is a {type(proposal['value']).__name__}; it is a gs.Selection.")
        return proposal["value"]

    # Questions

    def answer(self, question: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a question is answered, packed. Raises what the answer raises, and ValueError for another question."""
        if question not in self.answers:
            raise ValueError(f"This {type(self).__name__} has no answer to {question!r}.")
        return packed(self.answers[question](**arguments))

    @command
    def ask(self, message: dict[str, Any], buffers: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        """A question from the page. Whatever goes wrong is said in the page: raised here, nobody would hear of it."""
        try:
            return apart(self.answer(message["question"], message["arguments"]))
        except Exception as error:
            said = error.args[0] if isinstance(error, KeyError) and error.args else error
            return {"error": str(said) or type(error).__name__}, []

    # Without a kernel

    def to_html(self, path: str | Path) -> Path:
        """Writes one file that shows the view without kernel or network. Views of a dashboard stay linked; what needs
        the model to run is not in it, and says so."""
        from gemmascope.widgets.export import page

        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path

    def still(self) -> tuple[str, pandas.DataFrame | None]:
        """A sentence on what is shown, and the most telling rows of it: what a reader sees where nothing runs."""
        return repr(self), None

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        sentence, table = self.still()
        rows = "" if table is None else table.head(MAX_ROWS).to_html(index=False, border=0)
        note = "<small>Run this cell to make it live.</small>"
        return bundle | {
            "text/plain": whole(sentence),
            "text/html": whole(f"<p>{html.escape(sentence)}</p>{rows}{note}"),
        }, metadata

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _check_names(given: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, list(known), n=3) or list(known)
        raise ValueError(f"{what} has no {unknown!r}; the nearest are {', '.join(near) or 'none'}.")

"""Several views on one page, linked."""

from collections.abc import Sequence

import traitlets

from gemmascope.widgets.base import Selection, View


class Dashboard(View, script="dashboard.js"):
    """Views below one another, with one selection and one heading. `dashboard.views` holds them."""

    children = traitlets.List(trait=traitlets.Instance(View)).tag(
        sync=True, to_json=lambda views, _: [f"anywidget:{view.model_id}" for view in views]
    )

    def __init__(
        self, views: Sequence[View], title: str, facts: Sequence[str] = (), selection: Selection | None = None
    ):
        """
        Args:
            title: the heading.
            facts: what else is said of the whole, a few words each.
            selection: the one they all follow from now on; that of the first view by default.

        Raises:
            ValueError: without a view.
        """
        if not views:
            raise ValueError("There are no views to lay out: give one at least.")
        selection = views[0].selection if selection is None else selection
        for view in views:
            view.selection = selection
        super().__init__({"title": title, "facts": facts}, selection=selection)
        self.children = list(views)

    @property
    def views(self) -> dict[str, View]:
        """The views by the name of their kind, `dashboard.views["LensView"].state`; a second of one is "LensView 2"."""
        named: dict[str, View] = {}
        for view in self.children:
            kind = type(view).__name__
            count = sum(type(other) is type(view) for other in named.values())
            named[f"{kind} {count + 1}" if count else kind] = view
        return named

    def still(self):
        stills = "; ".join(view.still()[0] for view in self.children)
        return f"{self.data['title']}: {stills}", None

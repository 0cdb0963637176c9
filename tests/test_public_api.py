import pytest

import gemmascope as gs

HEAVY = {"torch", "transformers", "transformer_lens", "numpy", "anywidget", "plotly", "sklearn", "huggingface_hub"}


def test_import_loads_nothing_heavy(modules_after):
    loaded = modules_after("import gemmascope; dir(gemmascope)")
    assert "gemmascope" in loaded
    assert not loaded & HEAVY


def test_a_name_loads_only_when_used(modules_after):
    assert "torch" in modules_after("import gemmascope; gemmascope.load")


@pytest.mark.parametrize("name", gs.__all__)
def test_export_resolves(name):
    value = getattr(gs, name)
    assert value is getattr(gs, name)
    assert name in dir(gs)


def test_star_import_gives_exactly_the_contents():
    names: dict[str, object] = {}
    exec("from gemmascope import *", names)
    assert set(names) - {"__builtins__"} == set(gs.__all__)


def test_unknown_name_lists_the_nearest():
    with pytest.raises(AttributeError, match="no 'ActivationCashe'; the nearest names are ActivationCache"):
        _ = gs.ActivationCashe
    assert not hasattr(gs, "zzz")

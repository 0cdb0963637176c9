"""The oracle: transformers' own Gemma 4, given the weights of one of our models."""

from collections.abc import Callable

import pytest

from gemmascope import testing


@pytest.fixture
def transformers_twin() -> Callable:
    return testing.transformers_twin

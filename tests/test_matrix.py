"""Every family with every layout in every operation."""

import pytest
from matrix import LAYOUTS, OPERATIONS, execute
from tiny_families import FAMILIES


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell(family, layout, operation):
    execute(family, layout, operation)

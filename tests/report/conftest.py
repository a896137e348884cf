"""Runs in these tests draw their charts."""

import pytest


@pytest.fixture
def charts():
    pass

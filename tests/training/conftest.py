"""Toy task and toy clips for every test of this room."""

import pytest
import toy


@pytest.fixture(scope="session", autouse=True)
def installed_toy():
    toy.install()

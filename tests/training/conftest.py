"""Toy task and toy clips for every test of this room."""

import jax
import pytest
import toy


@pytest.fixture(scope="session", autouse=True)
def installed_toy():
    jax.devices()  # too late now for jax.distributed, which would make pytest deaf to SIGTERM
    toy.install()
    yield
    jax.config.update("jax_compilation_cache_dir", None)  # every run sets its own

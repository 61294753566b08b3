"""Golden folders converted there and back, once for all tests."""

from functools import cache

import pytest

from research.interop.exporter import export_workdir
from research.interop.importer import import_folder
from tests.interop.test_huggingface import GOLDEN


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """made(name): a golden folder's workdir, and what became of that again; each is converted once."""
    base = tmp_path_factory.mktemp("made")

    @cache
    def make(name):
        import_folder(GOLDEN / name, base / name, None, None)
        export_workdir(base / name, base / f"{name}_again", None, None)
        return base / name, base / f"{name}_again"

    return make

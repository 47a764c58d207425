"""Requests made from /openapi.json by schemathesis: nothing crashes, and every answer is as documented."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from serve.settings import ServeSettings
from tests.serve.conftest import Running, eventually, serving
from tests.serve.fakes import FakeTranslator

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = tmp_path_factory.mktemp("models") / "fake"
    model.mkdir()
    (model / "package.json").write_text('{"languages": ["de"]}')
    with serving(ServeSettings(models=(str(model),)), lambda *_: FakeTranslator()) as running:
        yield running
        eventually(running.nothing_left)


@pytest.fixture(scope="module")
def document(server: Running):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_operation(case) -> None:
    case.call_and_validate()

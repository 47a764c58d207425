"""Requests made from /openapi.json by schemathesis: nothing crashes, and every answer is as documented."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from serve.settings import ServeSettings
from tests.serve.conftest import eventually, serving
from tests.serve.fakes import FakeTranslator

pytestmark = pytest.mark.slow
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
OPERATIONS = 7
# A schema cannot say which bytes are speech, nor that only one temperature is served.
accepts_all_valid = checks.positive_data_acceptance
"""Documented ones, at least."""


def test_every_operation(tmp_path: Path) -> None:
    model = tmp_path / "fake"
    model.mkdir()
    (model / "package.json").write_text('{"languages": ["de"]}')
    with serving(ServeSettings(models=(str(model),)), lambda *_: FakeTranslator()) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= OPERATIONS
        sent = 0

        for operation in operations:

            @MANY
            @given(case=operation.as_strategy())
            def check(case) -> None:
                nonlocal sent
                sent += 1
                case.call_and_validate(excluded_checks=[accepts_all_valid])

            check()
        eventually(server.nothing_left)
    assert sent > 10 * OPERATIONS

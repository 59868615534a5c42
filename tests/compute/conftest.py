"""Fixtures of the tests of computing with factors."""

from collections import defaultdict

import pytest

from paramlora.compute import plan as paths


@pytest.fixture(params=["function", "plain", "native"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        request.getfixturevalue("native_module")
    else:
        monkeypatch.setattr("paramlora.native.load.module", lambda: None)
        below = 0 if request.param == "function" else 2**62
        monkeypatch.setattr(paths, "PLAIN_BELOW", defaultdict(lambda: below))
    return request.param

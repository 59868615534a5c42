"""Fixtures of the tests of factored layers."""

from collections import defaultdict

import pytest

from paramlora.compute import plan


@pytest.fixture(params=["function", "plain", "native"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute a factored Linear by plain operations, our autograd Function or the extension."""
    if request.param == "native":
        request.getfixturevalue("native_module")
    else:
        monkeypatch.setattr("paramlora.native.load.module", lambda: None)
        plain_below = 0 if request.param == "function" else 2**62
        monkeypatch.setattr(plan, "PLAIN_BELOW", defaultdict(lambda: plain_below))
    return request.param

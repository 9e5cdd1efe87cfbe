"""For tests that speak of all the tests before them in their file."""

import pytest


def only_after_the_whole_module(request: pytest.FixtureRequest) -> None:
    """Skip where only a part of the module was asked for."""
    module = request.module
    wanted = {name for name in vars(module) if name.startswith("test_")}
    asked = {item.originalname for item in request.session.items if item.module is module}  # type: ignore[attr-defined]
    if wanted - asked:
        pytest.skip("only a part of this file was run")

"""What ranks of training import late is here before they are forked."""

import pytest

from tests.reliability.harness import warm_up


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    warm_up()

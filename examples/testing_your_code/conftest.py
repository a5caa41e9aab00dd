import pytest


@pytest.fixture(autouse=True)
def _no_test_reaches_the_real_service(evolink_emulator):
    """Every test has an emulator, whether it asks for one or not."""

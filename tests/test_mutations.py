"""The suite notices planted errors."""

import mutations
import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.name)
def test_a_planted_error_turns_a_test_red(mutation):
    assert mutations.survives(mutation) == ""

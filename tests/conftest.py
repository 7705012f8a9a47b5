"""What holds for every test: a property is not false because a busy machine took long to check one example."""

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.training_cases")

settings.register_profile("sage3", deadline=None)
settings.load_profile("sage3")

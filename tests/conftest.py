"""What holds for every test: a property is not false because a busy machine took long to check one example; and nothing that
an earlier version compiled is taken for this one's.
"""

import os
import tempfile

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.training_cases")

_compiled = tempfile.TemporaryDirectory(prefix="sage3-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

settings.register_profile("sage3", deadline=None)
settings.load_profile("sage3")

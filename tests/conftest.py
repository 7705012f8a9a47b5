"""What holds for every test: a property is not false because a busy machine took long to check one example, and is checked
on the same examples in every run (SAGE3_FUZZ=2000 looks for others, that many of each); and nothing that an earlier
version compiled is taken for this one's.
"""

import os
import tempfile

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.training_cases")

_compiled = tempfile.TemporaryDirectory(prefix="sage3-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

_examples = int(os.environ.get("SAGE3_FUZZ") or 0)
settings.register_profile("sage3", deadline=None, derandomize=not _examples, max_examples=_examples or 100)
settings.load_profile("sage3")

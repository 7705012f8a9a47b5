"""What holds for every test: a property is not false because a busy machine took long to check one example."""

from hypothesis import settings

settings.register_profile("sage3", deadline=None)
settings.load_profile("sage3")

"""Puts csrc, which stands beside the package in the checkout, inside it in a wheel. The rest is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithSources(build_py):
    """The kernels are compiled on the user's machine, so their sources travel with the package."""

    def run(self):
        super().run()
        source = Path(__file__).parent / "csrc"
        if source.is_dir() and not self.editable_mode:
            target = Path(self.build_lib) / "comfy_sage3" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)


setup(cmdclass={"build_py": WithSources})

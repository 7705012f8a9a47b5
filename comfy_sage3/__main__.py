"""``python -m comfy_sage3``."""

import sys

from .cli import main

sys.exit(main())

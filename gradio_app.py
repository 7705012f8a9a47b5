"""The app: ``python gradio_app.py`` opens 4-bit against exact attention at http://127.0.0.1:7860. See --help."""

import sys

from comfy_sage3.app.launch import main

if __name__ == "__main__":
    sys.exit(main())

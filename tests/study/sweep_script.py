"""A headless sweep with the stand-in engine, for tests that kill it: FOLDER JOURNAL NAP."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from study_fake import FakeEngine

from comfy_sage3.compare import output
from comfy_sage3.study.run import run
from comfy_sage3.study.store import Store

for name in ("psnr_plot", "error_plot"):
    setattr(output, name, lambda metrics: b"")
output.report_html = lambda metrics, videos: ""
output._animate = lambda path, video: None

folder, journal, nap = sys.argv[1:]
store = Store.open(Path(folder))
found = run(store, lambda name: FakeEngine(Path(journal), float(nap)))
print(found.sentence)

"""The app with the stand-in engine, for a test that kills it: OUT JOURNAL NAP. Prints its address."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from study_fake import FakeEngine

from comfy_sage3.app.launch import private_folder, start
from comfy_sage3.app.services import Services
from comfy_sage3.compare import output

torch.set_num_threads(1)
for name in ("psnr_plot", "error_plot"):
    setattr(output, name, lambda metrics: b"")
output.report_html = lambda metrics, videos: ""
output._animate = lambda path, video: None

out, journal, nap = sys.argv[1:]
services = Services(out=Path(out), open_engine=lambda name: FakeEngine(Path(journal), float(nap)))
with private_folder():
    page, address = start(services, host="127.0.0.1", port=0)
    print(address, flush=True)
    page.block_thread()

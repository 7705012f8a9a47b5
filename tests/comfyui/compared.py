"""The frames that Sage3 Compare shows, fetched from the server as the browser does."""

import io

import numpy as np
from PIL import Image

from comfy_sage3.workflow import OutputFile


def frames(client, node, found, side):
    """Side "a" or "b" of what Compare (``found``) shows -> (F, H, W, 3), 0 to 255."""
    where = found["files"]
    names = [OutputFile(node, name, where["subfolder"], where["type"]) for name in where[side]]
    return np.stack([np.asarray(Image.open(io.BytesIO(client.download(name))).convert("RGB"), float) for name in names])


def are_videos(client, node, found):
    """Both sides are finite, of the size and length that are told, and neither one colour nor one still."""
    assert not [note for note in found["notes"] if "NaN" in note]
    for side in ("a", "b"):
        shown = frames(client, node, found, side)
        assert shown.shape == (found["frames"], found["height"], found["width"], 3)
        assert (shown.std(axis=(1, 2, 3)) > 3).all()
        assert (np.abs(np.diff(shown, axis=0)).mean(axis=(1, 2, 3)) > 0.1).all()

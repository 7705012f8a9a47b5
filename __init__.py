"""ComfyUI's entry to the pack; everything else lives in comfy_sage3."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension ComfyUI registers. Imported late, so that this file can be imported without ComfyUI."""
    from .comfy_sage3.comfyui import extension

    return extension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

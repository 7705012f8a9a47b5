"""Start the app: flags, what they may be together, a private temporary folder, and gradio with its doors closed."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import InputError, Sage3Error
from .memory import one_heap
from .services import EMBEDDED, Limits, Services

LEAST = (6, 31)
GET_GRADIO = "pip install 'gradio>=6.31,<7'"
OUT = "runs/app"
PREFIX = "sage3-app-"  # of the temporary folder; the process's number follows
SESSIONS = 100  # whose state is remembered; gradio would keep 10,000
# No word to anyone; and no table, made anew after each event, of the last ten thousand ones.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000",
}
SPARE = 2  # places in gradio's own queue beyond those the page gives out, with words: for the API
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")  # the visitor's own: none is fetched
COLOURS = {  # white words on each are read at 4.5 to 1 or better
    f"button_{kind}_background_fill{state}{theme}": colour
    for kind, state, colour in (
        ("primary", "", "#1d4ed8"),
        ("primary", "_hover", "#1e40af"),
        ("cancel", "", "#b91c1c"),
        ("cancel", "_hover", "#991b1b"),
    )
    for theme in ("", "_dark")
}
MONO = ("ui-monospace", "Consolas", "monospace")


def check_gradio() -> None:
    """Raise InputError, with the command that mends it, where gradio is missing or not the one the app is made for."""
    try:
        found = version("gradio")
    except PackageNotFoundError:
        raise InputError(f"The app needs gradio, which is not installed here: {GET_GRADIO}.") from None
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if not LEAST <= numbers < (7,):
        raise InputError(f"The app needs gradio 6.31 or a later 6, and here is {found}: {GET_GRADIO}.")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags. Raises InputError for those that do not go together."""
    parser = argparse.ArgumentParser(prog="gradio_app.py", description="Compare 4-bit with exact attention in a browser.")
    parser.add_argument("--engine", default=EMBEDDED, metavar="embedded|URL", help="the bundled model, or a ComfyUI server")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: 7860; 0: any free one)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for this name and password")
    parser.add_argument("--without-password", action="store_true", help="listen on another address without --auth")
    parser.add_argument("--name", action="append", default=[], metavar="NAME", help="a host name the app answers to")
    parser.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR", help=f"where runs are kept (default: {OUT})")
    args = parser.parse_args(argv)
    args.local = is_local(args.host)
    args.login = None
    if args.auth is not None:
        user, colon, password = args.auth.partition(":")
        if not (user and colon and password):
            raise InputError("--auth is not of the form USER:PASSWORD: give both, with a colon between.")
        args.login = (user, password)
    if not args.local and not args.login and not args.without_password:
        raise InputError(
            f"At {args.host} others can use this machine: add --auth USER:PASSWORD, or --without-password if that is meant."
        )
    if not 0 <= args.port <= 65535:
        raise InputError(f"The port is {args.port}: give 0 to 65535.")
    if args.engine != EMBEDDED and not args.engine.startswith(("http://", "https://")):
        raise InputError(f"{args.engine!r} is not an engine: give embedded, or an address like http://127.0.0.1:8188.")
    return args


def is_local(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder of ours alone (mode 0700) that gradio keeps its files in; gone at the end.

    Those of apps that were killed go too.
    """
    remove_orphans(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    earlier = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield folder
    finally:
        if earlier is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = earlier
        shutil.rmtree(folder, ignore_errors=True)


def remove_orphans(among: Path) -> None:
    """Remove the folders that this user's apps left when they were killed: those whose process is no more."""
    if os.name != "posix":  # elsewhere there is no harmless way to ask for a process
        return
    for folder in among.glob(f"{PREFIX}*-*"):
        number = folder.name.removeprefix(PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if number.isdecimal() and folder.lstat().st_uid == os.getuid() and not _alive(int(number)):
                shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as Ctrl+C, so that a stopped app cleans up like a closed one."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def start(
    services: Services, *, host: str, port: int, login: tuple[str, str] | None = None, names: list[str] | None = None
) -> Any:
    """Launch and return (page, address) without waiting. The caller closes the page."""
    os.environ.update(QUIET)
    one_heap()
    import gradio as gr
    from starlette.middleware import Middleware

    from .closing import EndStreams
    from .page import build
    from .safety import Guard
    from .widgets import style

    page = build(services)
    page.queue(max_size=services.limits.queue + SPARE, default_concurrency_limit=4, api_open=False)
    allowed = [*(names or ()), *([] if is_local(host) else [host])]
    guards = [Middleware(EndStreams, running=lambda: page.is_running), Middleware(Guard, names=allowed)]
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or free_port(host),
        auth=login,
        prevent_thread_lock=True,
        share=False,
        inbrowser=False,
        quiet=True,
        show_error=False,
        run_history=False,
        footer_links=[],
        allowed_paths=[],
        blocked_paths=[str(services.out.absolute())],
        max_file_size=services.limits.upload_bytes,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        strict_cors=True,
        state_session_capacity=SESSIONS,
        app_kwargs={"middleware": guards},
        css=style(),
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO).set(**COLOURS),
    )
    return page, address


def free_port(host: str) -> int:
    """A port nobody listens on now."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def main(argv: list[str] | None = None) -> int:
    """``gradio_app.py``: 0 when closed, 2 for what cannot be, in one sentence."""
    try:
        args = arguments(argv)
        check_gradio()
        services = Services(out=args.out, engine=args.engine, mask_errors=not args.local, limits=Limits())
        with terminable(), private_folder():
            try:
                page, address = start(services, host=args.host, port=args.port, login=args.login, names=args.name)
            except OSError as error:
                raise InputError(
                    f"The app cannot listen at {args.host}:{args.port} ({error}): give another --port."
                ) from None
            print(f"The app is at {address} (Ctrl+C closes it); runs are kept in {args.out}.", flush=True)
            try:
                page.block_thread()
            finally:
                page.close(verbose=False)
    except Sage3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

"""`moa watch`: a page that shows a run while it goes on."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import typer

from moa.cli.terminal import terminal
from moa.files import write_text


def watch(
    run: Annotated[Path, typer.Argument(help="Output folder of `moa train`.", metavar="RUN")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page on this machine; 0: any free one.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the page into this file once, and serve nothing.")] = None,
) -> None:
    """Show a run in the browser while it goes on: loss, learning rate, gates by block.

    The page is served on this machine alone until Ctrl-C, and asks for itself again every few seconds. From elsewhere,
    forward the port: `ssh -L 8000:localhost:8000 HOST`, and there `moa watch RUN --port 8000`.
    """
    from moa.report.watch import page_of

    console = terminal()
    first = page_of(run, refresh=None)
    if output is not None:
        write_text(output, first)
        console.print(f"page: {output}", soft_wrap=True)
        return
    with server(run, port) as serving:
        console.print(f"http://localhost:{serving.server_address[1]}/ (Ctrl-C ends)")
        serving.serve_forever()


def server(run: Path, port: int) -> ThreadingHTTPServer:
    """Answers every request with the page of the run as it stands.

    Raises:
        OSError: the port is taken; names it.
    """
    from moa.report.watch import page_of

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                status, kind, content = 200, "html", page_of(run).encode()
            except (OSError, ValueError) as error:  # a run that is replaced has no files for a moment
                status, kind, content = 503, "plain", str(error).encode()
            self.send_response(status)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            if status != 200:
                self.send_header("Refresh", "5")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: every refresh would be a line."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        raise OSError(f"--port={port} cannot be had ({error.strerror}); 0 takes any free one") from None

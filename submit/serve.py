"""``python -m submit report RUN --serve``: the page of a running job, written anew at every look.

Only this one page is served, at any address below the server's, and nothing is read from the request but its method.
The served page fetches itself now and then and takes over what has changed; what is opened stays open.
"""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.console import Console
from common.errors import UserError
from submit.run import Run

SECONDS = 10
"""Between two looks."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"

SCRIPT = """<script>
setInterval(async () => {
  let text;
  try { text = await (await fetch(location.href)).text(); } catch { return; }
  const now = document.querySelector("main");
  const next = new DOMParser().parseFromString(text, "text/html").querySelector("main");
  const open = [...now.querySelectorAll("details")].map(one => one.open);
  const fresh = next.querySelectorAll("details");
  if (open.length === fresh.length) fresh.forEach((one, number) => { one.open = open[number]; });
  now.replaceWith(next);
}, SECONDS * 1000);
</script>""".replace("SECONDS", str(SECONDS))


def serve(run: Path, host: str, port: int, console: Console) -> None:
    """Serve the page of a run until Ctrl-C.

    Raises:
        UserError: the address or port cannot be listened on.
    """
    try:
        server = make_server(run, host, port)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on: {error.strerror}; choose another --port") from error
    console.say(f"report: http://{host}:{server.server_port}/  (Ctrl-C ends it)")
    with server:
        server.serve_forever()


def make_server(run: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page, listening."""

    class Handler(BaseHTTPRequestHandler):
        """Answers with the page as it is now."""

        def do_GET(self) -> None:
            """The page, or what is wrong with the run."""
            from submit.report import report

            try:
                status, text, kind = 200, report(Run(run), policy=POLICY, script=SCRIPT), "text/html"
            except UserError as error:
                status, text, kind = 503, f"{error}\n", "text/plain"
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a line for every look would bury the address."""

    return ThreadingHTTPServer((host, port), Handler)

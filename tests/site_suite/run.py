"""The site in a real browser: every page, on a telephone and a desktop, light and dark.

    make test-site                       or   make test-site ARGS="--only guide"

It needs the site (``make docs``), the system's Chromium and Node.js, and what ``make test-page``
installs. ``--pictures FOLDER`` keeps a screenshot of every page.
"""

import argparse
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from docs import site
from tests.page_suite.run import missing

CHECKS = Path(__file__).parent / "check.mjs"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def addresses(folder: Path, only: str | None) -> list[str]:
    """The pages of the navigation whose name has ``only`` in it, by their addresses in the site."""
    files = sorted(page.relative_to(folder).as_posix() for page in folder.rglob("*.html"))
    named = {address_of(name) for name in site.navigation()}
    return [name for name in files if name in named and (only or "") in name]


def address_of(page: str) -> str:
    """Where a page of Markdown lies in the site."""
    folder, _, name = page.rpartition("/")
    name = "index.html" if name == "README.md" else name.removesuffix(".md") + ".html"
    return f"{folder}/{name}".removeprefix("/")


def main() -> int:
    """Serve the site and let the browser in; the status of the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--packages", type=Path, default=Path(".page"))
    parser.add_argument("--only", help="pages whose address has this in it")
    parser.add_argument("--pictures", type=Path, help="keep screenshots in this folder")
    options = parser.parse_args()
    folder = site.ROOT / site.project()["site_dir"]
    reason = missing(options.chromium, options.packages)
    if reason is None and not folder.is_dir():
        reason = "there is no site; run: make docs"
    if reason:
        print(f"not run: {reason}", file=sys.stderr)
        return 1
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    with served(folder) as url:
        given = {
            "url": url,
            "pages": addresses(folder, options.only),
            "chromium": shutil.which(options.chromium),
            "packages": str(options.packages.resolve()),
            "pictures": options.pictures and str(options.pictures.resolve()),
        }
        return subprocess.run(["node", str(CHECKS), json.dumps(given)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""`make audit` against a local server that answers as OSV, the service of advisories, does."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from conftest import ROOT

ADVISORY = {
    "id": "TEST-1",
    "modified": "2026-01-01T00:00:00Z",
    "summary": "a test",
    "affected": [{"package": {"ecosystem": "PyPI", "name": "pillow"}}],
}


class Advisories(http.server.BaseHTTPRequestHandler):
    """The part of OSV's service that an audit uses: the advisories of packages, and their texts."""

    bad: ClassVar[str] = ""

    def answer(self, reply: object) -> None:
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        self.answer(
            {"results": [{"vulns": [ADVISORY]} if q["package"]["name"] == self.bad else {} for q in queries]}
        )  # fmt: skip

    def do_GET(self) -> None:
        self.answer(ADVISORY)

    def log_message(self, *_: object) -> None:
        pass


def audited(folder: Path, service: str) -> subprocess.CompletedProcess[str]:
    """Run `make audit` with the tools of this environment."""
    tools = [f"BIN={Path(sys.executable).parent}", f"VENV={folder}", "READY="]
    return subprocess.run(
        ["make", "audit", *tools, f"ARGS=--service-url {service}"],
        cwd=ROOT,
        env=os.environ | {"UV_HTTP_RETRIES": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "status", "message"),
    [("pillow", 2, "TEST-1"), ("", 0, "no known vulnerabilities"), (None, 0, "not checked: error")],
)
def test_an_audit_fails_only_for_an_advisory(
    bad: str | None, status: int, message: str, tmp_path: Path
) -> None:
    """The audit covers every package of the lock; without an answer it prints that it has not checked."""
    handler = type("Handler", (Advisories,), {"bad": bad})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port if bad is not None else 9}"
    done = audited(tmp_path, address)
    server.shutdown()
    server.server_close()
    if bad is not None and "not checked: error: Failed to fetch" in done.stdout:
        pytest.skip("no package index within reach")
    assert done.returncode == status, done
    assert message in done.stdout
    if bad is not None:
        pins = re.findall(r"^[a-z0-9].*==", (ROOT / "requirements.lock").read_text(), re.M)
        assert f"in {len(pins)} packages" in done.stdout

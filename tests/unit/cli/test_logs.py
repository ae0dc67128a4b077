"""No token of anybody in what is logged or shown."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from quantkit.cli import main as main_module
from quantkit.cli.logs import keep_secret, masked, set_up
from quantkit.errors import HubError, RecipeError

SHAPED = "hf_" + "aBcDeFgHiJ" * 3
ODD = "an-odd-secret.of.the-company"


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    yield
    set_up(0, False, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token={SHAPED}.", "token=hf_***."),
        ("hf_oauth_eyJhbGci.eyJzY29w-x", "hf_***"),
        ("{'authorization': 'Bearer abcdefghijk'}", "{'authorization': 'Bearer ***'}"),
        ("authorization: bearer abcdefghijk", "authorization: bearer ***"),
        ("api_org_abcdefghijkl", "api_org_***"),
        ("https://me:s3cr3t-value@x.org/y", "https://***@x.org/y"),
        ("hf_hub hf_xet a Bearer of news", "hf_hub hf_xet a Bearer of news"),
    ],
)
def test_shapes(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(masked(text)) == expected


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_values_of_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, f" {ODD}\n")
    assert masked(f"x {ODD} y") == "x *** y"
    monkeypatch.setenv(variable, "yes")
    assert masked("yes, eyes") == "yes, eyes"


def test_values_of_files(tmp_path: Path) -> None:
    log = tmp_path / "a" / "log.txt"
    set_up(2, False, str(log))
    assert masked(ODD) == ODD
    keep_secret(ODD)
    assert masked(f"x {ODD} y") == "x *** y"
    thread = threading.Thread(target=lambda: logging.getLogger("quantkit.x").error("said %s", ODD))
    thread.start()
    thread.join()
    assert "said ***" in log.read_text()
    set_up(0, False, None)
    assert masked(ODD) == ODD


def test_tracebacks_in_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    set_up(2, False, str(log))
    keep_secret(ODD)
    try:
        raise ValueError(f"{SHAPED} {ODD}")
    except ValueError:
        logging.getLogger("quantkit").exception("failed")
    with pytest.warns(UserWarning, match="plain"):
        warnings.warn("plain", stacklevel=1)
    for text in (log.read_text(), capsys.readouterr().err):
        assert "hf_*** ***" in text and SHAPED not in text and ODD not in text


def test_handlers_are_replaced(tmp_path: Path) -> None:
    for _ in range(3):
        set_up(1, False, str(tmp_path / "log.txt"))
    assert len(logging.getLogger("quantkit").handlers) == 2
    assert len(logging.getLogger("py.warnings").handlers) == 1
    set_up(1, False, None)
    assert len(logging.getLogger("quantkit").handlers) == 1
    assert logging.getLogger("py.warnings").handlers == []


@pytest.mark.parametrize(
    "arguments", [["push"], ["push", "-vv"], ["push", "--json"], ["push", "--json", "-vv"]]
)
@pytest.mark.parametrize(
    "error",
    [
        HubError(f"refused {SHAPED} and {ODD}", remedy=f"not with {ODD}"),
        RecipeError([f"a {SHAPED}", f"b {ODD}"]),
        click.ClickException(f"c {ODD} {SHAPED}"),
        RuntimeError(f"d {{'Authorization': 'Bearer {ODD}'}} {SHAPED}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors(
    quantkit: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    error: Exception,
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setenv("HF_TOKEN", ODD)
    monkeypatch.setattr(main_module.cli, "main", fail)
    shown = quantkit(*arguments, "--token", SHAPED)
    assert shown.code != 0 and "***" in shown.err
    if "--json" in arguments:
        assert "***" in json.loads(shown.out)["error"]["message"]
    reports = "".join(path.read_text() for path in tmp_path.glob("quantkit-crash-*.txt"))
    assert bool(reports) == isinstance(error, RuntimeError)
    for text in (shown.out, shown.err, reports):
        assert SHAPED not in text and ODD not in text


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers everything with 401, and remembers what it was sent."""

    def do_GET(self) -> None:
        self.server.sent.append(self.headers["authorization"])  # type: ignore[attr-defined]
        body = b'{"error": "Invalid credentials"}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def test_the_client_of_the_hub_logs_no_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    from quantkit.hub.client import connect

    log = tmp_path / "log.txt"
    set_up(2, False, str(log))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        sent = server.sent = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            with pytest.raises(HfHubHTTPError) as caught:
                connect(f"http://127.0.0.1:{server.server_address[1]}", SHAPED).whoami()
        finally:
            server.shutdown()
            thread.join()
    assert sent == [f"Bearer {SHAPED}"]
    logging.getLogger("quantkit.hub").warning("refused: %s", caught.value, exc_info=caught.value)
    for name in ("httpx2", "httpcore", "huggingface_hub", "urllib3"):
        logging.getLogger(name).debug("headers: Bearer %s", SHAPED)
    captured = capsys.readouterr()
    for text in (log.read_text(), captured.out, captured.err):
        assert SHAPED not in text and "headers:" not in text
    assert "refused:" in log.read_text()

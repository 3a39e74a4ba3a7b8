"""Debian's Chromium, driven by Playwright, and what every page of ours must hold to."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from clients import environment

HERE = Path(__file__).parent.parent
AXE = HERE.parent / ".venv-axe"
CHROMIUM = shutil.which("chromium")
ARGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE_MS = 180_000
"""What a page may take on a busy machine."""

AWAY = re.compile(r"net::ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE|INCOMPLETE_CHUNKED_ENCODING|ABORTED)")
"""What the console says while a server is away on purpose."""


@contextmanager
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        told = "there is no chromium: `apt-get install chromium`"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGS))
        yield browser
        browser.close()


class Watch:
    """What a context's pages did that none of ours may do."""

    def __init__(self, context: BrowserContext) -> None:
        self.faults: list[str] = []
        self.sent: list[str] = []
        """URLs of all requests."""
        context.on("request", lambda request: self._sent(request.url))
        context.on("console", lambda message: self._said(message.type, f"{message.text} {message.location['url']}"))
        context.on("weberror", lambda error: self.faults.append(f"error: {error.error}"))
        context.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _sent(self, url: str) -> None:
        self.sent.append(url)
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname not in ("127.0.0.1", "localhost"):
            self.faults.append(f"leaves this machine: {url}")

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.faults.append(f"console: {text}")

    def forgive(self, pattern: re.Pattern[str]) -> None:
        """Faults that a test has made on purpose."""
        self.faults = [fault for fault in self.faults if not pattern.search(fault)]


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[tuple[Page, Watch]]:
    """A page of an empty profile; fails for what `Watch` has seen."""
    context = browser.new_context(base_url=url, **({"viewport": {"width": 1440, "height": 900}} | options))
    context.set_default_timeout(PATIENCE_MS)
    watch = Watch(context)
    page = context.new_page()
    page.goto("/")
    try:
        yield page, watch
    finally:
        context.close()
    assert not watch.faults, watch.faults


def axe() -> str:
    """The source of axe-core, as npm has it."""
    lock = HERE / "axe" / "package-lock.json"
    stamp, digest = AXE / ".made-of", hashlib.sha256(lock.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.copytree(HERE / "axe", AXE, dirs_exist_ok=True)
        if shutil.which("npm") is None:
            environment.make()  # Node.js is among the packages there
        done = environment.run("npm", "ci", "--ignore-scripts", cwd=AXE)
        assert done.returncode == 0, done.stderr
        stamp.write_text(digest)
    return (AXE / "node_modules" / "axe-core" / "axe.min.js").read_text()


def violations(page: Page, source: str) -> list[str]:
    """What axe finds wrong with the page as it stands: the rule, the elements, why."""
    page.evaluate(source)
    found = page.evaluate(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})"
    )
    return [
        f"{each['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for each in found["violations"]
        for node in each["nodes"]
    ]

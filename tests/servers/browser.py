"""Chromium without a window: a page as it is after its scripts ran, and as it looks."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

TIMEOUT = 60  # seconds for a page, on a machine that is busy
SCRIPT_TIME = 1_500  # milliseconds that pass for the page's scripts, in no time
VOID = {"meta", "link", "br", "img", "input"}


def chromium() -> str:
    """Return the browser; skips the test where there is none."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("Chromium is not there: apt-get install chromium")
    return found


def dom(url: str, *, width: int = 1200, milliseconds: int = SCRIPT_TIME, picture: Path | None = None) -> "Dom":
    """Return what is on a page; a picture is of its beginning."""
    arguments = [f"--window-size={width},1400", f"--virtual-time-budget={milliseconds}", "--dump-dom"]
    made = Dom()
    made.feed(_run(url, *arguments, *([f"--screenshot={picture}"] if picture else [])))
    return made


@dataclass
class Element:
    """One element: its tag, its classes, the tags around it, and all text in it."""

    tag: str
    classes: list[str]
    attributes: dict[str, str | None]
    within: list[str]
    text: str = ""


@dataclass
class Dom(HTMLParser):
    """The elements of a page, in order."""

    elements: list[Element] = field(default_factory=list)
    _open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the parser."""
        super().__init__()

    def texts(self, tag: str, css_class: str = "", *, outside: str = "") -> list[str]:
        """Return the texts of elements with a tag and a class, outside of another tag."""
        return [
            each.text
            for each in self.elements
            if each.tag == tag and (not css_class or css_class in each.classes) and outside not in each.within
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        given = dict(attrs)
        element = Element(tag, (given.get("class") or "").split(), given, [each.tag for each in self._open])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        """Close elements up to one with this tag."""
        while self._open and self._open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Note text for all that it is in."""
        for element in self._open:
            element.text += data


def _run(url: str, *arguments: str) -> str:
    with tempfile.TemporaryDirectory(prefix="consumerd-chromium-", ignore_cleanup_errors=True) as profile:
        command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", "--no-first-run", *arguments, url]
        done = subprocess.run(
            command, env={**os.environ, "HOME": profile}, capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
    return done.stdout

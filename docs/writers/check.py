"""What a built page must not do: ask somebody else for a file, weigh too much, or lead nowhere."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Bytes of a page without the pictures inside it.
HEAVIEST = 300_000
_FETCHED = {
    "script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",), "video": ("src", "poster"),
    "audio": ("src",), "embed": ("src",), "object": ("data",), "track": ("src",), "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}  # fmt: skip
# Relations that make a browser fetch; others, such as "next", only tell.
_RELATIONS = {
    "stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest", "apple-touch-icon",
}  # fmt: skip
_ELSEWHERE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.I)
_IN_STYLE = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])\s*((?:[a-z]+:)?//[^'\")\s]+)", re.I)


class Page(HTMLParser):
    """Links, fetched addresses and names of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.names: set[str] = set()
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.names |= {found[k] for k in ("id", "name") if k in found}
        self.fetched += [found[name] for name in _FETCHED.get(tag, ()) if name in found]
        if tag == "link" and _RELATIONS.intersection(found.get("rel", "").lower().split()):
            self.fetched.append(found.get("href", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.fetched += _IN_STYLE.findall(found.get("style", ""))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if self._style:
            self.fetched += _IN_STYLE.findall(data)


def faults(folder: Path) -> list[str]:
    """One line a fault over all pages and style sheets under `folder`; empty where there is none."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found: list[str] = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        found += [f"{name}: fetches {address}" for address in page.fetched if _ELSEWHERE.match(address)]
        found += [f"{name}: {target} leads nowhere" for target in dead(path, page, pages)]
        size = weight(path)
        if size >= HEAVIEST:
            found.append(f"{name}: {size:,} bytes without pictures, allowed are {HEAVIEST:,}")
    for path in sorted(folder.rglob("*.css")):
        for address in _IN_STYLE.findall(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(folder)}: fetches {address}")
    return found


def weight(path: Path) -> int:
    """Bytes of a page without pictures that are written into it."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+", "", text)
    text = re.sub(r"<svg\b.*?</svg>", "", text, flags=re.S)
    return len(text.encode("utf-8"))


def dead(path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    """Targets of links and pictures that are not in the site."""
    for target in dict.fromkeys((*page.links, *page.fetched)):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or not target:
            continue
        place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        place = place / "index.html" if place.is_dir() else place
        missing = not place.exists()
        unnamed = parts.fragment and place in pages and unquote(parts.fragment) not in pages[place].names
        if missing or unnamed:
            yield target

"""What a page holds, read without a browser, and what a headless Chromium makes of it."""

import time
from html.parser import HTMLParser


class Read(HTMLParser):
    """Tables by their caption: header cells, and rows of (text, what it is sorted by); and all links and sources."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.heads, self.urls, self.ids, self.text = {}, {}, [], [], ""
        self._cell = self._skipped = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.urls += [(tag, attributes[name]) for name in ("src", "href", "srcset", "action") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag in ("script", "style"):
            self._skipped = tag
        if tag == "tr":
            self._row = []
        if tag in ("td", "th", "caption"):
            self._cell, self._order = "", attributes.get("data-order")

    def handle_data(self, data):
        if self._skipped is None:
            self.text += data
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag == self._skipped:
            self._skipped = None
        if tag == "caption":
            self._rows = self.tables[self._cell.rpartition(":")[0]] = []
            self._cell = None
        if tag in ("td", "th"):
            self._row.append((self._cell, self._order))
            self._cell = None
        if tag == "tr" and self._row:
            self._rows.append(self._row)


def opened(chrome, path, width=1280, scheme="light"):
    """A page in a window of this width."""
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # else clicks wait for scrolling
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    chrome.get(path.as_uri())
    return chrome


def problems(chrome):
    """Of the open page: messages of the console, images that are broken, what was loaded, and a scroll bar below it."""
    found = [entry["message"] for entry in chrome.get_log("browser")]
    found += chrome.execute_script(
        """
        const broken = [...document.images].filter((image) => !image.complete || !image.naturalWidth);
        const loaded = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:"));
        const wide = document.documentElement.scrollWidth > innerWidth;
        return [...broken.map((image) => "broken: " + image.alt), ...loaded.map((entry) => "loaded: " + entry.name),
                ...(wide ? ["scrolls sideways"] : [])];
        """
    )
    return found


def becomes(wanted, look):
    """Whether what is looked at is soon as wanted: tables are drawn a moment after they are asked to."""
    until = time.monotonic() + 10
    while look() != wanted and time.monotonic() < until:
        time.sleep(0.02)
    return look() == wanted

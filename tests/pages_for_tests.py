"""What a page holds, read without a browser, and what a headless Chromium makes of it."""

from contextlib import contextmanager
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


@contextmanager
def opened(browser, path, width=1280, scheme="light"):
    """A page in a window of this width; `problems` tells what was wrong with it until then."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce", offline=True
    )
    with context, context.new_page() as page:
        page.heard = []
        page.on("console", lambda message: page.heard.append(message.text))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("request", lambda request: page.heard.append(f"loads {request.url[:80]}"))
        page.goto(path.as_uri())
        yield page


def problems(page):
    """Messages of the console, what is loaded but the page itself, broken images, and whether it scrolls sideways."""
    found = [text for text in page.heard if not text.startswith(("loads data:", f"loads {page.url[:80]}"))]
    broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.alt)"
    is_wide = "document.documentElement.scrollWidth > innerWidth"
    return [*found, *page.evaluate(broken), *["scrolls sideways"] * page.evaluate(is_wide)]


def open_all(page):
    """All that is folded, and all columns."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.evaluate("document.querySelectorAll('.choices input').forEach((box) => box.checked || box.click())")

"""What a page of the site has beyond its Markdown: its place in the sidebar, and the same page in the other language."""

import re

ENGLISH, CHINESE = "docs/", "docs/zh-TW/"


def add_sidebar(app, docname, source):
    """Lists all pages in the index, where Markdown that GitHub shows cannot."""
    if docname != app.config.root_doc:
        return
    for caption, pages in app.config.sections.items():
        listed = "\n".join(pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def lead_to_the_same_language(app, docname, source):
    """On the Chinese site, links of an English page to the tutorial lead to the Chinese chapters."""
    if app.config.language == "zh_TW" and not docname.startswith(CHINESE):
        up = "" if docname.count("/") == 1 else "../"
        source[0] = re.sub(rf"\]\({re.escape(up)}(?=tutorial/)", f"]({up}zh-TW/", source[0])


def other_language(app, pagename, templatename, context, doctree):
    """The address of this page on the other site, and the language that it is written in."""
    if app.config.language == "zh_TW":
        name, site = re.sub(f"^{CHINESE}", ENGLISH, pagename), "../"
        context["language"] = "zh-TW" if pagename.startswith(CHINESE) or doctree is None else "en"
    else:
        translated = re.match(rf"{ENGLISH}(index$|tutorial/)", pagename)
        name, site = (pagename.replace(ENGLISH, CHINESE, 1) if translated else pagename), "zh-TW/"
    context["other_language"] = "../" * pagename.count("/") + site + name + ".html"


def setup(app):
    """Called by Sphinx."""
    app.add_config_value("sections", {}, "env")
    app.connect("source-read", add_sidebar)
    app.connect("source-read", lead_to_the_same_language)
    app.connect("html-page-context", other_language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

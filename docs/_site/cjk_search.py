"""Search for Chinese words without a dictionary: a run of Han characters is indexed by its pairs.

Sphinx's own splitter asks a list of simplified Chinese words when it indexes, and does not split what is searched for.
"""

import re

from sphinx.search.en import SearchEnglish

HAN = "\u3400-\u9fff"


def terms(text: str) -> list[str]:
    """The words of a text; for Han characters each one, and each pair of neighbours."""
    found = []
    for word in re.findall(rf"[{HAN}]+|[^\W{HAN}]+", text):
        if re.match(f"[{HAN}]", word):
            found += [*word, *(word[i : i + 2] for i in range(len(word) - 1))]
        else:
            found.append(word)
    return found


class SearchChinese(SearchEnglish):
    """English as ever, and Chinese by pairs."""

    lang = "zh"
    language_name = "English"  # that of the stemmer in the browser
    # What is searched for is cut the same way; all pairs must be on the page. One character alone is looked up itself.
    js_splitter_code = f"""
function splitQuery(query) {{
  const words = query.match(/[{HAN}]+|[^\\s{HAN}\\p{{P}}\\p{{S}}]+/gu) || [];
  return words.flatMap((word) => /[{HAN}]/.test(word) && word.length > 1
    ? Array.from({{ length: word.length - 1 }}, (_, i) => word.slice(i, i + 2)) : [word]);
}}
"""

    def split(self, input):
        """The terms by which a page is found."""
        return terms(input)


def setup(app):
    """Called by Sphinx."""
    app.add_search_language(SearchChinese)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

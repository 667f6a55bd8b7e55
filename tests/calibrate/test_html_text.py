"""What a reader reads of a page, by hand."""

import gzip
from pathlib import Path

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate import html_text
from kvcal.calibrate.data import open_data
from kvcal.calibrate.html_text import page_text

PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE html>
<html><head><title>Manual: pumps</title><script>if (a < b) document.write("<p>no</p>")</script>
<style>p { color: red }</style></head>
<body class="menu">
<div id="banner"><a href="/">Get the book</a></div>
<nav><ul><li>Home<li>Next<nav>inner</nav></ul></nav>
<ul class="docnav top"><li>Prev</li></ul>
<h1>Pumps<a class="headerlink" href="#pumps">¶</a></h1>
<p>A <b>pump</b> moves&nbsp;water,
   caf&eacute; &amp; all.<br/>It hums.
<p>Unclosed paragraphs <!-- and <p>comments --> are fine.
<div class="sidebar"><p>NOTE</p> Keep it dry.</div>
<table><tr><th>part<th>price</tr><tr><td>seal</td><td>2</td></tr></table>
<pre class="screen">
$ pump  --on
<span>ok</span>

  done
</pre>
<p>The end.</p>
<div hidden>secret</div><footer role="navigation">links</footer>
<svg><text>drawn</text></svg><select><option>1<option>2</select>
</body></html>
"""
READ = """Pumps

A pump moves water, café & all.
It hums.

Unclosed paragraphs are fine.

NOTE

Keep it dry.

part price
seal 2

$ pump  --on
ok

  done

The end."""


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_what_is_read_of_a_page(size):
    pieces = list(page_text("x", (PAGE[at : at + size] for at in range(0, len(PAGE), size))))
    assert "".join(pieces) == READ and all(pieces)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("no markup < at all & so on", "no markup < at all & so on"),
        ("soft&shy;ware &#233; &lt;b&gt;", "software é <b>"),
        ("<![if !IE]>a<![endif]><![odd[ x ]]>b", "ab"),  # of Word, and of nobody
        ("a<nav>x</nav>b", "a\n\nb"),
        ("</nav></div></p>a</script>b", "ab"),  # ends without beginnings
        ('<p class="nav">a<p>b', "a\n\nb"),  # whose end may be left out: not to swallow the page
        ('<div class="toc"><div>x</div>y</div>z', "z"),
        ('<div class="tocsin">x</div>', "x"),
        ("<p>&nbsp;</p><script>x", ""),
        ("<pre>a<br>b\n</pre>\n\n c", "a\nb\n\nc"),
    ],
)
def test_pieces_of_pages(page, text):
    assert "".join(page_text("x", [page])) == text == "".join(page_text("x", page))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<meta charset='iso-8859-1'>caf\xe9 \x93so\x94".encode("latin-1"), "café “so”"),  # as browsers read Latin-1
        ("<?xml version='1.0' encoding='koi8-r'?><p>мир".encode("koi8-r"), "мир"),
        ('<meta content="text/html; charset=Shift_JIS">日本'.encode("shift_jis"), "日本"),
        (b"\xef\xbb\xbf<meta charset=latin1>caf\xc3\xa9", "café"),  # the mark at the beginning is right
        ("<p>café".encode(), "café"),
    ],
)
def test_encodings(tmp_path: Path, content: bytes, text: str):
    (tmp_path / "a.html").write_bytes(content)
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(content))
    assert list(open_data(tmp_path / "a.html")) == list(open_data(tmp_path / "b.htm.gz")) == [text]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<p>caf\xe9", "a.html: not UTF-8 text"),
        (b"<meta charset=koi8-r><p>\x00", "a.html: binary data"),
        (b"<meta charset=euc-jp>\xff", "a.html: not euc-jp text"),
        (b"<meta charset=utf-7>x", "a.html: its charset 'utf-7' is not known: convert it to UTF-8"),
        (b"<meta charset=unicode_escape>x", "a.html: its charset 'unicode_escape' is not known"),
        (b"<meta charset=windows-9999>x", "a.html: its charset 'windows-9999' is not known"),
        (b"<nav>only menus</nav>", "contains no text"),
        (b"", "contains no text"),
    ],
)
def test_pages_that_are_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.html").write_bytes(content)
    with pytest.raises(KvcalError, match=message) as caught:
        list(open_data(tmp_path / "a.html"))
    assert "\n" not in str(caught.value)


def test_a_tag_without_an_end_does_not_take_the_memory(monkeypatch):
    monkeypatch.setattr(html_text, "MOST_CHARS", 1000)
    for beginning in ("<!-- ", "<p title='", "<script>"):
        with pytest.raises(KvcalError, match="more than 1000 characters: no HTML"):
            list(page_text("x", ["y", beginning, *["more " * 20] * 50]))


def test_a_long_page_comes_in_pieces(tmp_path: Path):
    (tmp_path / "a.html").write_text("<p>" + "word " * 200_000)
    pieces = list(open_data(tmp_path / "a.html"))
    assert len(pieces) > 1 and max(map(len, pieces)) <= 1 << 19
    assert "".join(map(str, pieces)) == ("word " * 200_000).strip()

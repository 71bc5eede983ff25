"""What can be said of the page's files without a browser."""

import re

import pytest

from unimed_jax.serve.app import HEADERS, page_files

FILES = page_files()
TEXTS = {name: content.decode() for name, (content, _) in FILES.items()}


def test_the_page_is_small_and_each_file_short():
    assert sum(len(content) for content, _ in FILES.values()) < 100_000
    assert {name: text.count("\n") for name, text in TEXTS.items() if text.count("\n") > 450} == {}


def test_every_file_that_is_named_is_there():
    named = {name for text in TEXTS.values() for name in re.findall(r'from "\./(\S+)"', text)}
    named |= set(re.findall(r'"page/([^"]+)"', TEXTS["index.html"]))
    assert named | {"index.html"} == set(FILES)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_no_outside_address_and_nothing_that_stores(name):
    text = TEXTS[name].replace("http://www.w3.org/2000/svg", "")  # a namespace, which is not fetched
    assert not re.search(r"(https?:)?//[\w-]+\.[\w.]+", re.sub(r"(?m)(^|\s)//.*$", "", text))
    assert not re.search(r"localStorage|sessionStorage|indexedDB|caches\.|document\.cookie", text)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|createObjectURL", text)


def test_nothing_is_inline_that_the_policy_forbids():
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; img-src 'self' data: blob:")
    html = TEXTS["index.html"]
    assert re.findall(r"<script[^>]*>", html) == ['<script type="module" src="page/main.js">']
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)


def test_what_is_typed_is_kept_by_no_browser():
    for field in re.findall(r"<form[^>]*>|<textarea[^>]*>", TEXTS["index.html"]):
        assert 'autocomplete="off"' in field


def test_every_field_has_a_label():
    html = TEXTS["index.html"]
    labelled = set(re.findall(r'<label for="([^"]+)"', html))
    for field in re.findall(r"<(?:input|textarea|select)[^>]*>", html):
        name = re.search(r'id="([^"]+)"', field)
        wrapped = 'type="checkbox"' in field or 'type="radio"' in field  # inside their label
        assert wrapped or "hidden" in field or (name and name[1] in labelled), field

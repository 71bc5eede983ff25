"""What a person does with the page, in a headless Chromium."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from support import chromium
from support.dicom_files import dicom_file
from support.page_server import BYTES, FULL, SAID, SLOW, PageServer

from unimed_jax.config import TASKS, ImageConfig
from unimed_jax.data import fitting, images
from unimed_jax.data.box_text import box_to_text

pytestmark = pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing())
WIDTH, HEIGHT = 80, 60  # of the image; not square, so that mixing them up shows
TABS = "document.querySelectorAll('[role=tab]').length === 6"
SHOWN = "document.querySelector('#canvas image')?.getAttribute('href')"
CELLS = (
    "[...{}.querySelectorAll('.cell')].map(cell => ['x', 'y', 'width', 'height']"
    ".map(name => +cell.getAttribute(name)))"
)


def png(width=WIDTH, height=HEIGHT) -> bytes:
    rows, columns = np.mgrid[:height, :width]
    file = io.BytesIO()
    Image.fromarray(((rows + columns) % 256).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def scan() -> bytes:
    """A CT film of three frames [24, 32], in Hounsfield units."""
    frames = np.stack([np.arange(24 * 32).reshape(24, 32) + 100 * frame for frame in range(3)])
    stored = frames.astype(np.int16)
    return dicom_file(
        stored[0], Modality="CT", RescaleSlope="1", RescaleIntercept="-300", RescaleType="HU",
        NumberOfFrames=3, PixelData=stored.tobytes(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(live):
    with PageServer(live.run) as found:
        yield found


@pytest.fixture
def opened(browser):
    """Gives opened(url, ...) -> a page; whatever it did, it asked nobody else and nothing failed."""
    pages = []

    def one(url, **size):
        page = browser.page(**size)
        pages.append((page, url))
        page.open(url)
        return page

    yield one
    for page, url in pages:
        page.run("1")  # reads what came last
        assert [found for found in page.requests if not found.startswith((url, "data:image/"))] == []
        refused = "Failed to load resource"  # the browser's words for an API's 4xx
        assert [e for e in page.errors if not (e.startswith(refused) and f"{url}v1/" in e)] == []
        page.close()


@pytest.fixture
def page(opened, server):
    server.service.asked.clear()
    found = opened(server.url)
    found.wait(TABS)
    return found


def show(page, name="slice.png", content=None):
    page.drop(name, content or png())
    page.wait(SHOWN)


def ask(page, task, question="", turns=1):
    """Asks in a task's tab, and waits until so many turns are done."""
    page.click(f"#tab-{task}")
    if question:
        page.type("#question", question)
    page.click("#send")
    page.wait(f"document.querySelectorAll('.turn.done').length === {turns}")


def box_of(page, kind):
    """Returns x, y, width and height of the box that is drawn, in pixels of the image."""
    return page.run(
        f"['x','y','width','height'].map(name => +document.querySelector('rect.{kind}:not(.under)')"
        ".getAttribute(name))"
    )


def view_of(page):
    return page.run("document.getElementById('canvas').getAttribute('viewBox').split(' ').map(Number)")


def at(page, x, y):
    """Returns where a pixel of the image is in the window, by what the browser drew."""
    page.middle("#stage")  # in view
    place = page.run(
        f"(() => {{ const p = new DOMPoint({x}, {y}).matrixTransform("
        "document.getElementById('canvas').getScreenCTM()); return [p.x, p.y]; })()"
    )
    return place[0], place[1]


def test_the_page_opens_and_the_model_answers(opened, live):
    page = opened(f"{live.url}/")
    page.wait(TABS)
    ask(page, "qa", "What is red?")
    assert page.text(".turn h3") == "What is red?"
    assert page.run("document.querySelector('.sure b').innerText.endsWith('%')")


@pytest.mark.slow
def test_every_tab_answers_by_the_real_model(opened, live):
    page = opened(f"{live.url}/")
    page.wait(TABS)
    show(page, content=png(20, 16))
    page.click("#tab-identify")
    for name, value in zip(("x0", "y0", "x1", "y1"), (2, 3, 12, 13), strict=True):
        page.type(f"#{name}", str(value))
    for number, task in enumerate(TASKS, 1):
        ask(page, task, {"identify": "", "caption": ""}.get(task, "red square"), number)
    assert page.run("document.querySelectorAll('.turn.failed').length") == 0
    assert page.run("document.querySelectorAll('.turn .sure').length") == len(TASKS)


@pytest.mark.slow
def test_each_tab_sends_its_task_and_shows_the_answer(page, server):
    show(page)
    page.click("#tab-identify")
    page.type("#x0", "8"), page.type("#y0", "6"), page.type("#x1", "40"), page.type("#y1", "30")
    for number, task in enumerate(TASKS, 1):
        question = {"identify": "", "caption": ""}.get(task, f"a <b>{task}</b>")
        ask(page, task, question, number)
        asked = server.service.asked[-1]
        assert (asked.task, len(asked.images)) == (task, task != "qa")
        assert asked.question == ("{<10><10><50><50>}" if task == "identify" else question)
        assert question in ("", page.text(".turn h3"))  # and not as HTML
        shown = page.text(".turn .answer")
        assert shown == ("20, 30 to 60, 60 px" if task == "refer" else SAID[task])
        # A drawn box and an image belong to their tabs.
        assert page.visible("#picture") == (task != "qa")
        assert page.visible("#box-fields") == (task == "identify")


@pytest.mark.slow
def test_a_task_that_was_not_trained_says_so(opened, server, monkeypatch):
    monkeypatch.setattr(server.service, "trained", {"cls", "qa"})
    page = opened(server.url)
    page.wait(TABS)
    first = "document.querySelector('[role=tab][aria-selected=true]').dataset.task"
    assert page.run(first) == "cls" and "not trained" not in page.text("#task-title")
    page.click("#tab-vqa")
    assert "was not trained for it" in page.text("#task-title")


@pytest.mark.slow
def test_a_box_is_drawn_by_mouse_and_by_keys(page, server):
    show(page)
    page.click("#tab-identify")
    page.click("#send")
    assert page.text("#form-trouble").startswith("Draw a box")
    page.drag(at(page, 20, 15), at(page, 30, 25), at(page, 52, 45))
    assert box_of(page, "asked") == [20, 15, 32, 30]
    page.drag(at(page, 52, 45), at(page, 45, 50), at(page, 40, 55))  # a corner
    assert box_of(page, "asked") == [20, 15, 20, 40]
    page.drag(at(page, 30, 30), at(page, 90, 31))  # the whole box, which stays inside
    assert box_of(page, "asked") == [60, 16, 20, 40]
    page.run("document.getElementById('stage').focus()")
    for key, shift in (("ArrowLeft", False), ("ArrowUp", False), ("ArrowUp", True)):
        page.press(key, shift)
    assert box_of(page, "asked") == [59, 15, 20, 39]
    assert page.text("#status") == "Box from 59, 15 to 79, 54"
    ask(page, "identify")
    assert server.service.asked[-1].question == box_to_text((59, 15, 79, 54), WIDTH, HEIGHT)
    assert page.text("text.label") == SAID["identify"]  # beside the box
    page.run("document.getElementById('stage').focus()")
    page.press("Delete")
    assert page.run("document.querySelector('rect.asked') === null")
    assert page.run("document.getElementById('x0').value") == ""
    page.press("ArrowDown")  # begins one in the middle
    assert box_of(page, "asked") == [30, 23, 20, 15]


@pytest.mark.slow
def test_a_found_box_and_the_routing_lie_on_the_image(page):
    show(page)
    page.click("#more summary")
    page.type("#options", "left hippocampus, right hippocampus")
    ask(page, "refer", "left hippocampus")
    assert box_of(page, "found") == [20, 30, 40, 30]
    assert page.text("text.label.found") == "left hippocampus"
    assert page.run("document.querySelectorAll('.compared tbody tr').length") == 2
    assert page.run("document.querySelectorAll('.cell').length") == 0
    page.click(".expert:nth-child(3) input")  # after "No map" and the first
    assert page.run("document.querySelectorAll('.cell').length") == 4
    weights = page.run("[...document.querySelectorAll('text.weight')].map(t => +t.textContent)")
    mean = float(page.text(".expert:nth-child(3) b").split()[0]) / 100
    assert np.mean(weights) == pytest.approx(mean, abs=0.01)
    assert page.run(CELLS.format("document")) == [
        [0, 0, 40, 30],
        [40, 0, 40, 30],
        [0, 30, 40, 30],
        [40, 30, 40, 30],
    ]
    # Zoom and pan: the same point of the image stays under the pointer.
    x, y = at(page, 60, 30)
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-400)
    page.wait("document.getElementById('zoom-level').innerText !== '100\\u00a0%'")
    assert at(page, 60, 30) == pytest.approx((x, y), abs=1)
    before = view_of(page)
    assert before[2] < WIDTH / 2
    page.drag((x, y), (x - 20, y))
    after = view_of(page)
    assert after[0] > before[0] and after[1:] == pytest.approx(before[1:])
    page.run("document.getElementById('stage').focus()")
    page.press("0")
    assert view_of(page) == [0, 0, WIDTH, HEIGHT]
    x, y = at(page, 4, 4)
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-600)
    page.wait("document.getElementById('zoom-level').innerText !== '100\\u00a0%'")
    ask(page, "refer", "right hippocampus", 2)
    assert view_of(page) == [0, 0, WIDTH, HEIGHT]  # a box that is found comes into view
    ask(page, "vqa", "Which plane?", 3)
    assert page.run("document.querySelectorAll('rect.found').length") == 0
    page.click(".turn:nth-child(2) .turn-head button")
    assert box_of(page, "found") == [20, 30, 40, 30]  # and its tab is back
    assert page.run("document.querySelector('[aria-selected=true]').id") == "tab-refer"


@pytest.mark.slow
@pytest.mark.parametrize("fit, first", [("pad", [0, -10, 40, 40]), ("crop", [10, 0, 30, 30])])
def test_the_map_covers_what_the_model_saw(page, fit, first):
    cells = page.run(
        "import('/page/viewer.js').then(({Viewer}) => {"
        "const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');"
        "const viewer = new Viewer(document.createElement('div'), svg);"
        f"viewer.show({{url: '', width: {WIDTH}, height: {HEIGHT}}});"
        f"viewer.setMap([[0, 1], [1, 0]], [0, 1], '{fit}'); return {CELLS.format('svg')}; }})"
    )
    x, y, side, _ = first
    assert cells == [
        first,
        [x + side, y, side, side],
        [x, y + side, side, side],
        [x + side, y + side, side, side],
    ]


@pytest.mark.slow
def test_a_dicom_has_windows_and_frames(page, server):
    show(page, "scan", scan())
    first = page.run(SHOWN)
    assert page.text("#picture-name") == "scan · 32 × 24 · 3 frames"
    assert page.run("document.getElementById('window').options.length") > 3
    page.run("document.getElementById('window').focus()")
    choose = "window.value = 'brain'; window.dispatchEvent(new Event('change'))"
    page.run(f"(window => {{ {choose} }})(document.getElementById('window'))")
    page.wait(f"{SHOWN} !== {first!r}")
    second = page.run(SHOWN)
    page.run("document.getElementById('frame').focus()")
    page.press("ArrowRight")
    page.wait(f"{SHOWN} !== {second!r}")
    assert page.text("#frame-number") == "2 of 3"
    assert page.run("document.getElementById('window').value") == "brain"
    ask(page, "vqa", "Which plane?")
    # The reader and the model see the second frame through that window.
    config, view = server.service.config, ImageConfig(frame=1, window="brain")
    expected = images.read_image(scan(), view)
    shown = Image.open(io.BytesIO(base64.b64decode(page.run(SHOWN).partition(",")[2]))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(shown), expected)
    seen = fitting.fit(expected, config.data.fit, config.model.vision)
    np.testing.assert_array_equal(server.service.asked[-1].images[0], seen)
    assert len(np.unique(seen)) > 2
    # An answer about another frame is no earlier turn of this one.
    assert page.visible("#history-field")
    page.run("document.getElementById('frame').focus()")
    third = page.run(SHOWN)
    page.press("ArrowRight")
    page.wait(f"{SHOWN} !== {third!r}")
    assert not page.visible("#history-field")


@pytest.mark.slow
def test_numbers_that_no_picture_allows_do_not_stop_other_questions(page, server):
    """Nor do those of a closed tab or part of the page, at which a browser could not point."""
    page.click("#tab-identify")
    for name, value in zip(("x0", "y0", "x1", "y1"), ("1.5", "2", "5", "6"), strict=True):
        page.run(
            f"(field => {{ field.value = '{value}'; field.dispatchEvent(new Event('input')) }})"
            f"(document.getElementById('{name}'))"
        )
    show(page)
    page.run("document.getElementById('temperature').value = '0.05'")
    ask(page, "vqa", "Which plane?")
    assert server.service.asked[-1].temperature == 0.05


@pytest.mark.slow
@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_refused_file_is_said_and_the_image_stays(page, server, event):
    show(page)
    before = page.run(SHOWN)
    page.drop("notes.txt", b"no picture at all", event)
    page.wait("document.getElementById('picture-trouble').innerText")
    assert page.text("#picture-trouble").startswith("notes.txt: ")
    assert page.run(SHOWN) == before
    page.drop("huge.png", bytes(BYTES), event)
    page.wait("document.getElementById('picture-trouble').innerText.includes('choose a smaller file')")
    page.drop("good.png", png(40, 30), event)
    page.wait("document.getElementById('picture-name').innerText.includes('40 × 30')")
    assert page.text("#picture-trouble") == ""


@pytest.mark.slow
def test_a_file_is_picked(page, tmp_path):
    (tmp_path / "slice.png").write_bytes(png())
    page.pick("#file", tmp_path / "slice.png")
    page.wait(SHOWN)
    assert page.text("#picture-name") == f"slice.png · {WIDTH} × {HEIGHT}"


@pytest.mark.slow
def test_a_stream_is_stopped_and_refusals_are_said(page, server):
    show(page)
    cancelled = server.service.counts.answers["vqa", "cancelled"]
    page.click("#tab-vqa")
    page.type("#question", SLOW)
    page.press("Enter")
    page.wait("document.querySelector('.turn .answer')?.innerText.split(' ').length > 3")
    assert page.run("document.querySelector('.turn').classList.contains('on-image')")
    assert page.visible("#stop") and page.run("document.querySelector('.turn').ariaBusy") == "true"
    page.click("#stop")
    page.wait("document.querySelector('.turn.stopped')")
    assert "word word" in page.text(".turn") and "You stopped" in page.text(".turn")
    assert not page.visible("#stop") and page.run("document.activeElement.id") == "send"
    page.wait("fetch('health').then(() => true)")
    while server.service.counts.answers["vqa", "cancelled"] == cancelled:
        page.run("new Promise(later => setTimeout(later, 20))")
    page.type("#question", FULL)
    page.press("Enter")
    page.wait("document.querySelector('.turn.failed')")
    assert "The server is full" in page.text(".turn.failed")
    ask(page, "vqa", "Which plane?")  # and it goes on


@pytest.mark.slow
def test_earlier_turns_are_sent_when_asked_for(page, server):
    show(page)
    ask(page, "vqa", "Which plane?")
    ask(page, "vqa", "Which side?", 2)
    assert server.service.asked[-1].history == ()
    page.click("#history")
    ask(page, "vqa", "How large?", 3)
    said = SAID["vqa"]
    assert server.service.asked[-1].history == (("Which plane?", said), ("Which side?", said))
    show(page, "other.png", png(40, 30))
    page.wait("document.getElementById('picture-name').innerText.includes('40 × 30')")
    ask(page, "vqa", "And here?", 4)  # about another image: those turns do not belong to it
    assert server.service.asked[-1].history == ()


@pytest.mark.slow
def test_clear_forgets_everything(page):
    show(page)
    ask(page, "refer", "left hippocampus")
    page.click("#tab-identify")
    page.drag(at(page, 20, 15), at(page, 52, 45))
    page.click("#more summary")
    page.type("#options", "one, two")
    page.click("#tab-vqa")
    page.type("#question", SLOW)
    page.press("Enter")
    page.wait("document.querySelector('.turn.streaming .answer')?.innerText.includes('word')")
    page.click("#clear")
    whole = page.run("document.documentElement.outerHTML")
    for kept in ("hippocampus", "data:image/png", "word word", "slice.png", SLOW):
        assert kept not in whole
    fields = "[...document.querySelectorAll('input:not([type=radio],[type=checkbox]), textarea')]"
    assert page.run(f"{fields}.map(f => f.value).filter(Boolean)") == ["0", "0", "0"]  # as at the start
    for task in TASKS:
        page.click(f"#tab-{task}")
        assert page.run("document.getElementById('question').value") == ""
    assert not page.visible(".turn") and page.visible("#drop") is False  # the last tab is text alone
    page.click("#tab-vqa")
    assert page.visible("#drop")
    page.run("new Promise(later => setTimeout(later, 150))")  # nothing arrives late
    assert page.run("document.querySelectorAll('.turn').length") == 0
    assert page.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert page.run("Promise.all([caches.keys(), indexedDB.databases()]).then(a => a.flat())") == []
    assert page.run("performance.getEntriesByType('resource').every(e => !e.name.startsWith('blob:'))")


@pytest.mark.slow
def test_a_server_with_a_token_asks_for_it(opened, live):
    with PageServer(live.run, "correct-horse-battery") as guarded:
        page = opened(guarded.url)
        page.wait("document.getElementById('gate').checkVisibility()")
        assert page.run("document.activeElement.id") == "token"
        page.type("#token", "another-horse-battery")
        page.press("Enter")
        page.wait("document.getElementById('gate-trouble').innerText.includes('token')")
        page.type("#token", "correct-horse-battery")
        page.press("Enter")
        page.wait(TABS)
        assert page.run("document.getElementById('token').value") == ""
        ask(page, "qa", "Which chapter?")
        page.click("#clear")
        page.wait("document.getElementById('gate').checkVisibility()")  # the token too is forgotten


@pytest.mark.slow
def test_a_phone_shows_it_without_scrolling_sideways(opened, server):
    page = opened(server.url, width=360, height=700)
    page.wait(TABS)
    show(page, "a_file_with_a_rather_long_name_of_no_use_to_anybody.png")
    page.click("#more summary")
    page.type("#options", "one answer that goes on for a while, anotherwithoutanyblankthatcouldbebroken")
    page.click("#tab-identify")
    page.drag(at(page, 20, 15), at(page, 52, 45))
    for number, task in enumerate(TASKS, 1):
        ask(page, task, {"identify": "", "caption": ""}.get(task, "w" * 60), number)
        wide = page.run("[document.documentElement.scrollWidth, innerWidth]")
        assert wide == [360, 360], task
    page.run("scrollTo(0, document.body.scrollHeight)")
    top = page.run("document.elementFromPoint(180, 8).closest('#notice')?.innerText")
    assert top.startswith("Research software, not a medical device.")


@pytest.mark.slow
def test_keys_reach_everything_and_everything_has_a_name(page):
    show(page)
    page.run("document.getElementById('tab-vqa').focus()")
    chosen = "document.activeElement.id + document.querySelector('[aria-selected=true]').id"
    for key, task in (
        ("ArrowLeft", TASKS[-1]),
        ("ArrowRight", TASKS[0]),
        ("End", TASKS[-1]),
        ("Home", TASKS[0]),
    ):
        page.press(key)
        assert page.run(chosen) == f"tab-{task}" * 2
    page.click("#tab-identify")
    page.drag(at(page, 20, 15), at(page, 52, 45))
    ask(page, "identify")
    roles = page.roles()
    named = {"button", "tab", "textbox", "spinbutton", "checkbox", "radio", "combobox", "slider", "link"}
    named |= {"application", "tabpanel", "region", "radiogroup", "tablist", "toolbar", "table"}
    assert [role for role, name in roles if role in named and not name.strip()] == []
    assert [name for role, name in roles if role == "tab"] == [
        page.text(f"#tab-{task} span") for task in TASKS
    ]
    assert page.text("#status") == f"Answer: {SAID['identify']}"
    # Tab alone goes once around, in the order in which things are read.
    page.run("document.getElementById('clear').focus()")
    every = "[...document.querySelectorAll('*')]"
    here = f"(e => [{every}.indexOf(e), e.id || e.name])(document.activeElement)"
    seen = []
    while (place := page.run(here)) not in seen:
        seen.append(place)
        page.press("Tab")
    order = ["clear", "choose-other", "stage", "hand", "zoom-out", "tab-identify", "x0", "y1", "send"]
    assert [name for _, name in seen if name in order] == order

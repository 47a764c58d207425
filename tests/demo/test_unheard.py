"""Which sentences of a DocBook page are read aloud."""

from demo.unheard import sentences

PAGE = """<html><body>
<h3 class="title">The Crop Tool works on all layers.</h3>
<p>
    The Crop Tool is used to crop or clip an image. It works on all the
    layers of the image, visible &amp; invisible. Press the <span class="key">Shift</span> key.
</p>
<p>Type <code class="code">gimp --help</code> to see them. Nothing else <img src="x.png" alt="icon" /> helps here. This stays.</p>
<p><strong>Figure 3.1. Crop tool</strong></p>
<p>Yes. One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty twenty-one words.</p>
<p>The last <kbd>Ctrl</kbd><em>layer</em> is never open"""


def test_what_can_be_said_of_a_page() -> None:
    assert sentences(PAGE) == [
        "The Crop Tool is used to crop or clip an image.",
        "It works on all the layers of the image, visible and invisible.",
        "Press the Shift key.",
    ]


def test_code_hides_no_later_sentence() -> None:
    page = "<p>See <code>a</code>. You can use it now.</p><p>Choose a colour first.</p>"
    assert sentences(page) == ["You can use it now.", "Choose a colour first."]

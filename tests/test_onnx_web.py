"""The page of examples/onnx_web draws what an exported file makes, in headless Chromium, and needs nothing else."""

import functools
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from drifting.generation import Generator
from drifting.hub.exporting import export
from drifting.models import ResidualMLP

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"]
PIXELS = "() => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"


class Handler(SimpleHTTPRequestHandler):
    extensions_map = {
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".html": "text/html",
    }

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the example, with onnxruntime-web from npm, and a model whose image tells class and guidance."""
    pytest.importorskip("onnxscript")
    if shutil.which("npm") is None or CHROMIUM is None:
        pytest.skip("npm or Chromium is not installed")
    folder = tmp_path_factory.mktemp("site") / "onnx_web"
    shutil.copytree(ROOT / "examples" / "onnx_web", folder, ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm cannot install onnxruntime-web: {getattr(error, 'stderr', error)}")
    torch.manual_seed(0)
    names, model = ("black, all of it", "ünïcode", 7), ResidualMLP([3, 2, 3], 3, 4, 8, 1, 8).eval()
    with torch.no_grad():
        for weight in (model.proj.weight, model.proj.bias, model.cond_proj.weight):
            weight.zero_()
        model.cond_proj.bias.copy_(torch.linspace(-1, 1, 18))
    generator = Generator(model, (4,), (3, 2, 3), names, (-1.0, 1.0), cfg_scale=1.5)
    export(generator, folder / "known.onnx", "onnx", torch.float32, {"cfg_scale_range": [1.0, 3.0]})
    model.cond_proj.weight.data.normal_()
    model.proj.weight.data.normal_()
    export(generator, folder / "model.onnx", "onnx", torch.float32, {"cfg_scale_range": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", *(f"--{option}" for option in QUIET)]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def drawn(page) -> list[int]:
    """The values of the canvas, once the page has drawn after the last change."""
    page.wait_for_function("said.textContent.startsWith('one sample in')")
    page.evaluate("said.textContent = ''")
    return page.evaluate(PIXELS)


def test_pixels_are_those_of_the_file(site, page):
    page.goto(f"{site}?model=known.onnx")
    red, green, blue = (torch.linspace(0, 255, 18).view(3, 6)[channel].tolist() for channel in range(3))
    expected = [value for pixel in zip(red, green, blue, [255] * 6, strict=True) for value in pixel]
    assert drawn(page) == pytest.approx(expected, abs=1)
    assert page.evaluate("[canvas.width, canvas.height]") == [3, 2]
    assert page.evaluate("[scale.min, scale.max, scale.value]") == ["1", "3", "1.5"]
    assert page.evaluate("[...label.options].map(option => option.text)") == ["black, all of it", "ünïcode", "7"]


def test_class_guidance_and_seed_make_other_images(site, page):
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(site)
    images = [drawn(page)]
    page.select_option("#label", index=2)
    images.append(drawn(page))
    page.fill("#scale", "3")
    images.append(drawn(page))
    for seed in ("5", "0"):
        page.fill("#seed", seed)
        images.append(drawn(page))
    assert images.pop() == images[2], "the same seed draws the same"
    assert len({tuple(image) for image in images}) == 4 and not errors

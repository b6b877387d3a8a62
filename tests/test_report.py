"""The page of ``drifting.report``: what it tells of whole, begun and damaged runs, and that nothing in it is HTML."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from drifting import report, train
from drifting.cli import run_command
from drifting.config import PretrainConfig, load_config, save_config
from drifting.report import Chart, _thinned, read_run
from drifting.utils.files import write_object
from drifting.utils.images import save_panels

SMALL = ["model.width=8", "model.depth=1", "step.gen_per_label=4", "evaluation.num_samples=20", "train.log_every=1"]


class Page(HTMLParser):
    """The texts of a page, and what it has of each tag; tags that do not match are a mistake."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []

    def after(self, text):
        """The texts that follow this one."""
        return self.texts[self.texts.index(text) + 1 :]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, changes in (("one", []), ("<i>two$", ["seed=3", "loss.feature_extractor=pyramid"])):
        settings = [*SMALL, "train.steps=4", "train.eval_every=2", *changes]
        train.main(["--out", str(folder / name), *settings])
    return folder


def page_of(*paths, out):
    assert report.main([*map(str, paths), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_one_run(runs, tmp_path):
    page = page_of(runs / "one", out=tmp_path / "report.html")
    assert page.after("data")[0] == "digits, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert page.after("steps")[0] == "4 of 4" and page.after("device")[0] == "cpu"
    assert page.after("configuration")[:7] == ["digits", "model.width", "128", "8", "model.depth", "3", "1"]
    assert re.fullmatch(r"[0-9.]+ \(train samples: [0-9.]+\)", page.after("Fréchet distance to the test samples")[0])
    last = json.loads((runs / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    assert page.after("recall")[0].startswith(f"{last['recall']:.1%} ")
    titles = ["λ: mean, and thin of each feature map", "learning rate", "milliseconds of a step by phase"]
    assert all(title in page.texts for title in titles) and "reconstruction loss" not in page.texts
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    assert page.texts[-3:] == ["step 2", "step 4", "real"] and "no " not in " ".join(page.texts[:4])


def test_several_runs(runs, tmp_path):
    page = page_of(runs / "one", runs / "<i>two$", out=tmp_path / "report.html")
    assert page.texts[1:4] == ["one and <i>two$", "one", "<i>two$"][:3] or "<i>two$" in page.texts
    assert page.after("seed")[:3] == ["0", "0", "3"]
    assert page.after("loss.feature_extractor")[:3] == ['["pixels"]', '["pixels"]', '["pyramid"]']
    assert not any(tag == "i" for tag, _ in page.tags)
    assert "milliseconds of a step by phase: <i>two$" in page.texts


def test_a_run_without_configuration_is_left_out_of_the_comparison(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 7}\n', encoding="utf-8")
    alone, beside = (page_of(*paths, out=tmp_path / "a.html") for paths in ([runs / "one"], [bare, runs / "one"] * 2))
    rows = [sum(tag == "tr" for tag, _ in page.tags) for page in (alone, beside)]
    assert rows[0] == rows[1] and beside.after("steps")[0] == "7"


def test_no_other_file_is_asked_for(runs, tmp_path):
    page = page_of(runs / "one", runs / "<i>two$", out=tmp_path / "report.html")
    links = [a[name] for _, a in page.tags for name in ("src", "href", "xlink:href") if name in a]
    assert links and all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "<script" not in text
    assert "#a0b0c" not in text and "prefers-color-scheme: dark" in text


def test_a_hostile_run_is_text(runs, tmp_path):
    evil = "<script>alert('1')</script>"
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    folder.mkdir()
    save_config(load_config("digits"), folder / "config.yaml")
    write_object(folder / "model.json", {"class_names": [evil], "kind": evil, "device": evil})
    record = {"step": 1, "lambda": {evil: {"0.1": 2}}, "lambda_mean": 2, "timing": {"step": 1.0, evil: 1.0}}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    page = page_of(folder, out=tmp_path / "report.html")
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.after("device")[0] == evil and f"digits, 1 classes: {evil}" in page.texts and evil in page.texts


def test_what_is_missing_is_told(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples" / "step_00000001.png").write_text("no picture")
    Image.new("RGB", (1, 9)).save(run / "samples" / "step_00000002.png")
    (run / "config.yaml").write_text("data: [")
    numbers = {"learning_rate": None, "sample_spread": "1", "lambda": [1], "timing": {"step": True, "data": 1e300}}
    lines = [json.dumps({"step": 10**30} | numbers), "[" * 10**5, "[1]", '{"step": "x"}', "{}", '{"step": 2, "lambda_m']
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    page = page_of(run, out=tmp_path / "report.html")
    told = " ".join(page.texts)
    for words in ("run: no model.json", "no configuration (", "5 lines of metrics.jsonl that are no records",
                  "no evaluation yet", "step_00000001.png is no picture", "no weights"):  # fmt: skip
        assert words in told, words
    (run / "metrics.jsonl").unlink()
    assert "run: no metrics yet" in page_of(run, out=tmp_path / "report.html").texts


def test_a_run_of_pretraining(tmp_path):
    run = tmp_path / "mae"
    (run / "samples").mkdir(parents=True)
    save_config(PretrainConfig(), run / "config.yaml")
    records = [{"step": n, "recon_loss": 1 / n, "cls_loss": 2.0, "recon_loss_test": 0.5} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    images = {name: np.zeros((1, 8, 8, 3), np.uint8) for name in ("image", "visible", "reconstruction")}
    save_panels(images, 1, run / "samples" / "step_00000002.png")
    page = page_of(run, out=tmp_path / "report.html")
    assert page.after("recon_loss_test")[0] == "0.5" and page.after("configuration")[0].startswith("mae_")
    assert "reconstruction loss" in page.texts and page.texts[-1] == "step 2"


def test_long_curves_are_thinned():
    assert _thinned([list(range(7)), list(range(7))]) == [list(range(7))] * 2
    (long,) = _thinned([list(range(100_001))])
    assert 250 < len(long) <= 301 and long[-1] == 100_000 and {*np.diff(long)} == {334}


def test_values_that_span_decades_are_on_a_logarithmic_scale():
    for values, scale in (([1.0, 2.0, 50.0], "linear"), ([1e-3, 1.0, 1.0], "log"), ([-1.0, 1.0, 1e4], "linear")):
        chart = Chart()
        chart.plot(([1, 2, 3], values), 0)
        assert chart.html("x").startswith("<figure>") and chart.axes.get_yscale() == scale
    assert Chart().html("x") == ""


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    for arguments, expected in (
        ([tmp_path], "has no config.yaml and no metrics.jsonl: expected a run"),
        ([runs / "one", "--out", runs / "one" / "config.yaml" / "x.html"], "cannot write"),
        ([runs / "one", "--out", runs / "one" / "metrics.jsonl"], "metrics.jsonl, expected a file that ends in .html"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_command(lambda arguments=arguments: report.main(list(map(str, arguments))))
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and expected in error


def test_a_run_that_goes_on_is_read(runs):
    assert len(read_run(runs / "one", "one").records) == 4

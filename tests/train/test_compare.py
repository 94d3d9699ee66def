"""fastib compare: which runs it makes, what it writes, and that it goes on where it was stopped."""

import csv
import json
import statistics

import pytest

from fastib.methods import list_methods
from fastib.train.cli import main
from fastib.train.compare import Comparison, compare, draw, mean_and_error
from fastib.train.errors import ConfigError

SMALL = ["steps=2", "device=cpu", "data.batch_size=32"]


def test_configurations():
    comparison = Comparison("out", options=["optim.lr=0.5", "bootstrap:method.shared=true"])
    assert comparison.methods == ["plain", *(m for m in list_methods() if m != "plain")]
    assert {"dearkd", "co_advise", "aal", "dhvt", "bootstrap"} <= set(comparison.methods)
    for method in comparison.methods:
        full, tenth = (comparison.configure(method, fraction, 1) for fraction in (1.0, 0.1))
        assert full.method.name == method and (full.seed, full.optim.lr) == (1, 0.5)
        assert (full.epochs, tenth.epochs) == (40, 400)  # the epochs of plain/digits
        assert tenth.sched.warmup_epochs == pytest.approx(10 * full.sched.warmup_epochs)
        assert (full.data.train_fraction, tenth.data.train_fraction) == (1.0, 0.1)
        assert tenth.output == f"out/{method}-10-1"
        for teacher in tenth.teachers.values():
            assert teacher.options[:2] == ["epochs=300", "sched.warmup_epochs=30.0"]
    assert comparison.configure("bootstrap", 0.5, 0).method.shared


def test_mean_and_error():
    assert mean_and_error([3.0]) == (3.0, None)
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx(statistics.stdev([1.0, 2.0, 6.0]) / 3**0.5))


def test_picture(tmp_path, monkeypatch):
    """A line for each method: shares in percent from small to large, means, standard errors."""
    from matplotlib.axes import Axes

    lines, original = {}, Axes.errorbar

    def spy(axis, x, y, yerr, label, **style):
        lines[label] = (list(x), list(y), list(yerr), style.get("linestyle"))
        return original(axis, x, y, yerr, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", spy)
    comparison = Comparison(tmp_path, methods=["plain", "aal"], fractions=[1.0, 0.1])
    scores = {("plain", 1.0): {0: 90.0, 1: 94.0}, ("plain", 0.1): {0: 70.0}, ("aal", 0.1): {0: 80.0, 1: 81.0}}
    draw(comparison, scores, tmp_path / "compare.png")
    assert lines["plain"] == ([10.0, 100.0], [70.0, 92.0], [0.0, pytest.approx(2.0)], "--")
    assert lines["aal"] == ([10.0], [80.5], [pytest.approx(0.5)], None)


def test_all_methods_in_small(tmp_path, capsys):
    """Every registered method runs on the digits without further options."""
    output = tmp_path / "out"
    owners = ("aal:teachers.cnn", "co_advise:teachers.cnn", "co_advise:teachers.inn", "dearkd:teachers.cnn")
    words = [*SMALL, *(f"{owner}.options=[steps=1]" for owner in owners)]
    assert main(["compare", *words, "--fractions", "0.5,0.2", "--seeds", "0", "--output", str(output)]) == 0
    table = (output / "compare.md").read_text()
    lines = table.splitlines()
    assert lines[0] == "| method | 50 % | 20 % |" and len(lines) == 2 + len(list_methods())
    assert lines[2].startswith("| plain |") and table in capsys.readouterr().out
    rows = list(csv.DictReader((output / "compare.csv").open()))
    assert len(rows) == 2 * len(list_methods())
    for row in rows:
        percent = f"{100 * float(row['fraction']):g}"
        result = json.loads((output / f"{row['method']}-{percent}-0" / "result.json").read_text())
        assert float(row["seed_0"]) == result["top1"] and float(row["mean"]) == pytest.approx(result["top1"], abs=1e-4)
        assert row["runs"] == "1" and row["standard_error"] == ""
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Finished runs are read, one that was broken off is resumed, and only the others are trained."""
    import fastib.train.compare as module

    comparison = Comparison(tmp_path, methods=["plain"], fractions=[0.2], seeds=[0, 1], options=SMALL)
    calls = []

    def stopped(config):
        calls.append(("train", config.seed))
        if config.seed == 1:
            raise KeyboardInterrupt
        return original(config)

    original, again = module.train, module.resume
    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(comparison)
    assert (tmp_path / "compare.csv").read_text().count("\n") == 2  # what there is, is written
    monkeypatch.setattr(module, "train", lambda config: calls.append(("again", config.seed)) or original(config))
    compare(comparison)
    monkeypatch.setattr(module, "resume", lambda folder: calls.append(("resume", folder.name)) or again(folder))
    (tmp_path / "plain-20-1/result.json").unlink()
    more = Comparison(tmp_path, methods=["plain"], fractions=[0.2], seeds=[0, 1, 2], options=SMALL)
    compare(more)
    assert calls == [("train", 0), ("train", 1), ("again", 1), ("resume", "plain-20-1"), ("again", 2)]
    (row,) = csv.DictReader((tmp_path / "compare.csv").open())
    scores = [float(row[f"seed_{seed}"]) for seed in range(3)]
    mean, error = mean_and_error(scores)
    assert [float(row[name]) for name in ("mean", "standard_error")] == pytest.approx([mean, error], abs=1e-4)
    assert f"{mean:.2f} ± {error:.2f}" in (tmp_path / "compare.md").read_text()
    with pytest.raises(ConfigError, match="holds a comparison with epochs=40, not 3: choose another --output"):
        compare(Comparison(tmp_path, methods=["plain"], epochs=3, options=SMALL))


@pytest.mark.parametrize(("words", "message"), [
    (["nonsense"], "unknown method 'nonsense'"), (["no:steps=1"], "unknown method 'no'"),
    (["--fractions", "0,1"], r"fractions must be in (0, 1], got 0.0"), (["--seeds", "a"], "--seeds: expected numbers"),
    (["--seeds", ""], "at least one fraction and one seed"), (["--epochs", "0"], "epochs must be at least 1, got 0"),
    (["plain", "dhvt", "data.batch_size=200"], "data.batch_size=200 is more than the 143 training images"),
    (["plain", "dhvt", "dhvt:stps=1"], "unknown key stps; did you mean steps"),
])  # fmt: skip
def test_errors(words, message, tmp_path, capsys):
    assert main(["compare", *words, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

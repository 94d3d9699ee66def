"""Teachers that a run trains for itself, and the tables that its method adds to an evaluation."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastib.methods.co_advise import divergence
from fastib.train.build import load_student
from fastib.train.cli import main
from fastib.train.config import load_config, read_config, save_config
from fastib.train.data import build_data
from fastib.train.errors import ConfigError, Stopped
from fastib.train.evaluate import evaluate_run
from fastib.train.loop import Trainer, resume, train
from fastib.train.teachers import own_teachers

STUDENT = ("model.name=cit_tiny_patch16_224", "method.teachers=[own:cnn,own:inn]", "data.augment.mixup=0.2",
           "checkpoint.every_steps=3")  # fmt: skip


@pytest.fixture
def advised(tiny, tmp_path):
    """``advised("epochs=1", output="name")``: a tiny run that trains its two teachers for 6 steps each."""
    recipe = "data: {batch_size: 128, augment: {zoom: 0.3}}\noptim: {lr: 0.004}\nsched: {warmup_epochs: 0}\nsteps: 6\n"
    (tmp_path / "cnn.yaml").write_text(
        "method: {name: plain}\nmodel: {name: digits_cnn, kwargs: {widths: [4, 8]}}\n" + recipe
    )
    (tmp_path / "inn.yaml").write_text(
        "method: {name: plain}\nmodel: {name: digits_inn, kwargs: {layers: [1, 1], widths: [16, 16]}}\n" + recipe
    )
    teachers = [f"teachers.{name}.recipe={tmp_path / name}.yaml" for name in ("cnn", "inn")]

    def make(*overrides: str, output: str = "run"):
        return tiny(*STUDENT, *teachers, *overrides, method="co_advise", output=output)

    return make


def test_teachers_are_trained_first_on_the_same_images(advised, tmp_path, capsys):
    config = advised("epochs=1", "seed=5", "teachers.inn.options=[steps=2,optim.lr=0.01]", "data.split_seed=3")
    result = train(config)
    run = tmp_path / "run"
    assert result["top1"] == json.loads((run / "result.json").read_text())["top1"]
    out = capsys.readouterr().out
    names = [out.index(f"into {run}{end}") for end in ("/teachers/cnn:", "/teachers/inn:", ":")]
    assert names == sorted(names)
    assert out.count("287 training and 360 test images") == 3
    student, cnn, inn = (read_config(run / p / "config.yaml") for p in (".", "teachers/cnn", "teachers/inn"))
    for teacher, steps, lr in ((cnn, 6, 0.004), (inn, 2, 0.01)):
        assert (teacher.seed, teacher.device, teacher.steps, teacher.optim.lr) == (5, "cpu", steps, lr)
        assert (teacher.data.train_fraction, teacher.data.split_seed, teacher.data.img_size) == (0.2, 3, 16)
        assert (teacher.data.batch_size, teacher.data.augment.zoom, teacher.data.augment.mixup) == (128, 0.3, 0.0)
    assert student.method.teachers == [f"run:{run}/teachers/cnn", f"run:{run}/teachers/inn"]
    checkpoint = next((run / "checkpoints").glob("step-*")) / "model.safetensors"
    assert all(name.startswith("student.") for name in load_file(checkpoint))


def test_finished_teachers_are_used_as_they_are(advised, tmp_path):
    train(advised("steps=1", output="first"))
    weights = {n: (tmp_path / "first/teachers" / n / "student.safetensors").read_bytes() for n in ("cnn", "inn")}
    (tmp_path / "second").mkdir()
    (tmp_path / "first/teachers").rename(tmp_path / "second/teachers")
    stamps = {n: (tmp_path / "second/teachers" / n / "student.safetensors").stat().st_mtime_ns for n in weights}
    train(advised("steps=1", "teachers.cnn.options=[steps=99]", output="second"))
    for name, stamp in stamps.items():
        path = tmp_path / "second/teachers" / name / "student.safetensors"
        assert path.stat().st_mtime_ns == stamp and path.read_bytes() == weights[name]
    other = advised("steps=1", f"method.teachers=[run:{tmp_path}/second/teachers/cnn,own:inn]", output="third")
    train(other)
    assert [path.name for path in (tmp_path / "third/teachers").iterdir()] == ["inn"]


def same(run, unbroken) -> None:
    """Metrics and weights of the student and of both teachers are equal."""
    for part in (".", "teachers/cnn", "teachers/inn"):
        ours, theirs = run / part, unbroken / part
        assert (ours / "metrics.csv").read_text() == (theirs / "metrics.csv").read_text()
        ours, theirs = load_file(ours / "student.safetensors"), load_file(theirs / "student.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[key]) for key, value in ours.items()), part


@pytest.mark.parametrize("step", [4, 8])
def test_a_killed_run_ends_as_an_unbroken_one(step, advised, scenario, tmp_path):
    """Step 4 is in the first teacher's run, step 8 in the student's."""
    train(advised(output="unbroken"))
    save_config(advised(output="broken"), tmp_path / "recipe.yaml")
    assert scenario("kill_in_step", tmp_path / "recipe.yaml", step).returncode == -signal.SIGKILL
    broken = tmp_path / "broken"
    assert (broken / "config.yaml").exists() == (step == 8)
    assert (broken / "teachers/cnn/config.yaml").exists()
    if step == 8:
        resume(broken)
    else:
        hint = "its teachers were still in training: give the command that began the run once more, with output="
        with pytest.raises(ConfigError, match=f"cannot resume {broken}: it holds no config.yaml; {hint}{broken}$"):
            resume(broken)
        train(read_config(tmp_path / "recipe.yaml"))
    same(broken, tmp_path / "unbroken")


def test_a_run_that_is_stopped_while_a_teacher_trains_says_how_it_goes_on(advised, monkeypatch, tmp_path):
    def train_step(self, batches):
        self.signals.caught = signal.SIGTERM if self.step == 4 else None
        return original(self, batches)

    original = Trainer._train_step
    monkeypatch.setattr(Trainer, "_train_step", train_step)
    with pytest.raises(Stopped) as stopped:
        train(advised())
    run = tmp_path / "run"
    assert stopped.value.signum == signal.SIGTERM
    assert str(stopped.value).startswith("stopped by SIGTERM after step 5; ")
    assert str(stopped.value).endswith(
        f"go on with --resume {run}/teachers/cnn; then give the command that began the run once more, with output={run}"
    )


def test_teachers_whose_batches_are_too_large_are_named_before_anything_is_made(advised, tmp_path):
    message = r"^teachers\.inn: data\.batch_size=300 is more than the 287 training images$"
    with pytest.raises(ConfigError, match=message):
        train(advised("teachers.inn.options=[data.batch_size=300]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_share_the_folder_and_the_teachers(advised, scenario, tmp_path):
    config = advised("epochs=1")
    config.output = None
    save_config(config, tmp_path / "recipe.yaml")
    done = scenario("whole", tmp_path / "recipe.yaml", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs/co_advise-digits-001"
    assert json.loads((run / "result.json").read_text())["processes"] == 2
    assert sorted(path.name for path in (run / "teachers").iterdir()) == ["cnn", "inn"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["co_advise-digits-001"]


def test_evaluation_prints_table_5(advised, tmp_path, capsys):
    train(advised("epochs=2", "data.eval_batch_size=100"))
    run = tmp_path / "run"
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    shown = capsys.readouterr()
    scores = json.loads(shown.out)
    data = build_data(read_config(run / "config.yaml").data)
    images, labels = data.eval.__getitems__([(0, i, i) for i in range(360)])
    sources = [f"run:{run}/teachers/{name}" for name in ("cnn", "inn")]
    with torch.no_grad():
        tokens = load_student(run / "student.safetensors").eval().token_logits(images)
        teachers = [load_student(run / "teachers" / n / "student.safetensors").eval()(images) for n in ("cnn", "inn")]
    table = scores["divergence"]
    assert list(table) == ["class token", f"token 1 {sources[0]}", f"token 2 {sources[1]}"]
    for row, answer in zip(table.values(), tokens, strict=True):
        for i, target in enumerate(teachers):
            expected = divergence(answer, target).mean().item()
            assert row[f"KL from {i + 1} {sources[i]}"] == pytest.approx(expected, rel=1e-5)
            assert f"{expected:.4g}"[:5] in shown.err
        assert row["top1"] == pytest.approx(100 * (answer.argmax(1) == labels).float().mean().item(), rel=1e-6)
    assert table["class token"]["top1"] == pytest.approx(scores["top1"], rel=1e-9)
    for i, target in enumerate(teachers):
        right = 100 * (target.argmax(1) == labels).float().mean().item()
        assert scores["teachers"][f"{i + 1} {sources[i]}"]["top1"] == pytest.approx(right, rel=1e-6)


def test_evaluation_does_without_teachers_that_are_gone(advised, tmp_path):
    result = train(advised("steps=1"))
    (tmp_path / "run/teachers/inn").rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="the tables of co_advise are left out: teacher run:.*teachers/inn"):
        scores = evaluate_run(tmp_path / "run")
    assert scores["top1"] == result["top1"] and "divergence" not in scores


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.teachers=[own:cnn,own:inv]"], "there is no teacher 'inv' to train for own:inv; teachers: cnn, inn"),
        (["teachers.cnn.recipe=digits"], "teachers.cnn.recipe: expected METHOD/NAME or a YAML file, got 'digits'"),
        (["teachers.cnn.recipe=teacher/mars"], "method 'teacher' has no recipe 'mars'"),
        (["teachers.cnn.options=[stps=1]"], "unknown key stps; did you mean steps"),
        (["method.taus=[1.0]"], "method co_advise: taus: expected 2 numbers, got 1"),
    ],
)
def test_wrong_teachers_are_named_before_any_is_trained(overrides, message, advised, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(advised("teachers.cnn.options=[steps=1]", "teachers.inn.options=[steps=1]", *overrides))
    assert not (tmp_path / "run").exists()


def test_the_digits_recipe_trains_both(tmp_path):
    config = load_config("co_advise", "digits")
    assert config.method.teachers == [f"own:{name}" for name in config.teachers]
    assert [teacher.recipe for teacher in config.teachers.values()] == ["teacher/digits", "teacher/digits_inn"]


def test_a_folder_of_images_has_a_recipe_with_teachers(tmp_path):
    config = load_config("co_advise", data=str(tmp_path / "images"), overrides=["seed=4"])
    cnn, inn = own_teachers(config, tmp_path / "run")
    assert (cnn.model.name, inn.model.name) == ("resnet18", "rednet26")
    for teacher in (cnn, inn):
        assert (teacher.method.name, teacher.data.path, teacher.data.img_size) == ("plain", config.data.path, 224)
        assert (teacher.data.augment.mixup, config.data.augment.mixup) == (0.0, 0.8)
        assert teacher.seed == 4
    assert config.method.teachers == [f"run:{tmp_path}/run/teachers/{name}" for name in ("cnn", "inn")]


def test_a_run_that_exists_is_not_touched(advised, tmp_path):
    train(advised("steps=1"))
    with pytest.raises(ConfigError, match=r"run already holds a run: go on with --resume"):
        train(advised("steps=1"))


@pytest.mark.parametrize(("override", "message"), [
    ("model.name=cit_mars", "timm has no model 'cit_mars'"),
    ("model.kwargs.img_size=24", "the model cit_tiny_patch16_224 does not take images of 1 x 16 x 16: Input height"),
    ("data.batch_size=512", "data.batch_size=512 is more than the 287 training images"),
])  # fmt: skip
def test_what_is_wrong_with_the_student_ends_before_the_teachers(override, message, advised, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(advised(override))
    assert not (tmp_path / "run").exists()

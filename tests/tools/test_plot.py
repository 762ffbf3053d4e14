"""Curves of runs out of their `metrics.jsonl`."""

import json
import math

import pytest
from matplotlib import pyplot
from PIL import Image

from common.errors import UserError
from common.tracking import Tracker
from tools.plot import main, plot, read_run, running_mean


@pytest.fixture
def stages(tmp_path):
    """Two runs as the trainer logs them: the second has no lm flow."""
    for name, flows in (("stage1", ("t2i", "mmu", "lm")), ("stage2", ("t2i", "mmu"))):
        with Tracker("p", name, tmp_path / name, wandb_config={"mode": "disabled"}) as tracker:
            for step in range(10, 210, 10):
                losses = {f"step_loss_{flow}": 3 + math.exp(-step / 50) + index for index, flow in enumerate(flows)}
                tracker.log({**losses, "accuracy/t2i": step / 400, "lr": 1e-3 * step / 200, "data_time": 0.1}, step)
                if step % 50 == 0:
                    tracker.log({"eval_loss_mmu": 4.5, "eval_loss_t2i/mask_0.50": 3.5, "eval_accuracy/mmu": 0.3}, step)
    yield tmp_path
    pyplot.close("all")


@pytest.mark.slow
def test_runs_are_plotted_side_by_side_or_over_each_other(stages, capsys):
    runs = f"runs={stages / 'stage1'},{stages / 'stage2' / 'metrics.jsonl'}"
    main([runs, f"output={stages / 'new' / 'curves.png'}", "title=Stages: {1, 2"])
    image = Image.open(stages / "new" / "curves.png").convert("RGB")
    assert image.width > image.height > 500
    colours = {colour for _, colour in image.getcolors(2**24)}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours  # a thick line of each flow
    assert "stage1, stage2" in capsys.readouterr().out
    figure = plot([read_run(stages / "stage1", "a"), read_run(stages / "stage2", "b")], "overlay", title="Both")
    assert [axes.get_title() for axes in figure.axes[:3]] == ["text to image", "image to text", "text"]
    assert [line.get_color() for line in figure.axes[2].lines] == ["#0072b2"] * 2  # the second run has no lm flow
    assert {line.get_color() for line in figure.axes[0].lines} == {"#0072b2", "#d55e00"}
    assert figure.get_suptitle() == "Both"


def test_a_panel_holds_what_was_logged_its_mean_and_held_out_data(stages):
    figure = plot([read_run(stages / "stage1", "one")], "columns")
    titles = [(axes.get_title(), axes.get_ylabel()) for axes in figure.axes]
    assert titles == [("one", "loss"), ("", "token accuracy"), ("", "learning rate")]
    loss, accuracy, rate = [[list(zip(*line.get_data(), strict=True)) for line in axes.lines] for axes in figure.axes]
    assert loss[0] == [(step, 3 + math.exp(-step / 50)) for step in range(10, 210, 10)]
    assert loss[2] == [(step, 3.5) for step in (50, 100, 150, 200)]  # of the fixed mask ratio
    assert [(step, 4.5) for step in (50, 100, 150, 200)] in loss
    assert any("mask 0.50" in text.get_text() for text in figure.axes[0].texts)
    assert len(accuracy) == 3 and accuracy[0][-1] == (200, 0.5)
    assert len(rate) == 1 and rate[0][0] == (10, 1e-3 * 10 / 200)
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["text to image", "image to text", "text", "as logged", "held out"]


def lines(*values: tuple[int, float]) -> str:
    return "".join(json.dumps({"step": step, "step_loss_lm": value}) + "\n" for step, value in values)


TORN = lines((1, 2.0)) + '{"step": 2, "step_lo{"step": 3}\n\n[1]\n' + lines((3, math.nan), (4, 1.5)) + '{"step": 5, "s'
AGAIN = lines((1, 5.0), (2, 4.0), (3, 9.0), (4, 9.0), (3, 3.0), (5, 2.0))  # after a crash; the last time counts


@pytest.mark.parametrize(
    ("content", "expected"), [(TORN, [(1, 2.0), (4, 1.5)]), (AGAIN, [(1, 5.0), (2, 4.0), (3, 3.0), (5, 2.0)])]
)
def test_logs_of_stopped_runs_are_read(tmp_path, content, expected):
    (tmp_path / "metrics.jsonl").write_text(content)
    run = read_run(tmp_path, "stopped")
    assert run.metrics == {"step_loss_lm": expected}
    figure = plot([run], "columns")  # without accuracies and held-out data
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss"]
    assert "held out" not in [text.get_text() for text in figure.legends[0].texts]
    pyplot.close(figure)


def test_the_running_mean_starts_at_the_first_value_and_follows_slowly():
    smooth = dict(running_mean([(step, 0.0 if step else 10.0) for step in range(400)]))
    assert smooth[0] == 10 and smooth[1] == pytest.approx(9 / 1.9) and smooth[399] < 1e-10
    assert running_mean([(1, 2.0), (2, 4.0)]) == [(1, 2.0), (2, 4.0)]  # too few to smooth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs not given; for example runs=outputs/stage1"),
        (["runs=,"], "runs is empty"),
        (["runs={0}/none"], "runs: .*none does not exist"),
        (["runs={0}"], "metrics.jsonl holds no step_loss_"),
        (["runs={0}/stage1", "output=curves.doc"], r"output=curves.doc must end in one of .*\.png"),
        (["runs={0}/stage1", "layout=rows"], "layout is 'rows'; allowed: columns, overlay"),
        (["runs={0}/stage1", "labels=a,b"], "labels=a,b are 2, but runs are 1"),
        (["runs={0}/stage1", "output={0}/metrics.jsonl/c.png"], "cannot write .*metrics.jsonl"),
        (["runs={0}/stage1", "output={0}/theirs.svg"], "theirs.svg is there and was not written by this command"),
        (["runs={0}/stage1", "output={0}/link.svg"], "link.svg is there and was not written by this command"),
    ],
)
def test_mistakes_are_named(stages, monkeypatch, arguments, message):
    (stages / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    monkeypatch.chdir(stages)
    (stages / "theirs.svg").write_text("<svg/>")
    (stages / "link.svg").symlink_to("theirs.svg")
    with pytest.raises(UserError, match=message):
        main([argument.format(stages) for argument in arguments])
    assert not list(stages.glob("*.png")) and (stages / "theirs.svg").read_text() == "<svg/>"


@pytest.mark.slow
def test_flows_are_those_of_the_log(tmp_path):
    line = {"step": 1, "step_loss_video$^": 2.0, "step_loss_lm": 1.0, "eval_loss_video$^/mask_0.5": 2.5}
    odd = [{"step": 10**400, "step_loss_lm": 1}, {"step": 2, "step_loss_lm": 10**400}, {"step": True}, {"step": "3"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (line, *odd)) + "[" * 9999)
    assert read_run(tmp_path, "own").flows() == ["lm", "video$^"]
    for _ in range(2):  # the second time over its own file
        main([f"runs={tmp_path}", f"output={tmp_path / 'own.SVG'}", "title=a $\\fra$ b", "layout=overlay"])
    assert (tmp_path / "own.SVG").read_text().startswith("<?xml")

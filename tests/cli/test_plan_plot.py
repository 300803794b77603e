"""moreh-plan --plot: the picture of a plan."""

import pytest

from tests.helpers.planner.plan_tool import STEP


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [
        ("best.png", (), b"\x89PNG"),
        ("many.PNG", ("--stages", 2, "--micro-batches", 48), b"\x89PNG"),
        ("asked.svg", ("--explain", "pp4 zero-bubble"), b"<?xml"),
        ("one.pdf", ("--explain", "dp8"), b"%PDF"),
    ],
)
def test_picture_has_the_format_of_its_suffix(plan, plan_json, model, tmp_path, name, options, start):
    path = tmp_path / name
    code, out, err = plan(model, "--accelerator", 4, *STEP, *options, "--plot", path)
    assert (code, err) == (0, "")
    assert out.split()[-1] == str(path)
    assert path.read_bytes().startswith(start)
    assert 5_000 < path.stat().st_size < 1_000_000
    if name.endswith(".png"):
        width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
        assert 1000 < width < 2000
        assert 500 < height < 2000
        assert plan_json(model, "--accelerator", 4, *STEP, "--plot", path)["plot"] == str(path)


def test_picture_that_cannot_be_written_is_refused(plan, model, tmp_path):
    directory = tmp_path / "directory.png"
    directory.mkdir()
    code, out, err = plan(model, *STEP, "--plot", directory)
    assert (code, out, err) == (
        1,
        "",
        f"error: --plot {directory}: it is a directory: give a file in a directory that you may write to\n",
    )
    pytest.importorskip("matplotlib")
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "none" / "x.png")
    code, out, err = plan(model, *STEP, "--plot", link)
    assert code == 1
    assert "| " in out  # the table stands before the drawing fails
    assert err == f"error: --plot {link}: it cannot be written (No such file or directory): give another file\n"

"""Progress: a line for every tenth of the work where there is no terminal."""

from support.progress import Progress


def lines(capsys, total, start=0):
    progress = Progress(total, "work", start)
    for step in range(start, total):
        progress.update(loss=step / 3)
    return capsys.readouterr().err.splitlines()


def test_there_are_ten_lines_at_most(capsys):
    done = [line.split()[1] for line in lines(capsys, 200)]
    assert done == [f"{20 * i}/200" for i in range(1, 11)]


def test_little_work_has_a_line_a_step(capsys):
    assert len(lines(capsys, 3)) == 3


def test_a_resumed_run_counts_what_was_done(capsys):
    assert [line.split()[1] for line in lines(capsys, 20, start=16)] == ["18/20", "20/20"]


def test_numbers_stand_beside_it(capsys):
    assert lines(capsys, 1) == ["work: 1/1  loss 0  0 s"]


def test_nothing_goes_to_stdout(capsys):
    Progress(1, "work").update(loss=1.0)
    assert capsys.readouterr().out == ""

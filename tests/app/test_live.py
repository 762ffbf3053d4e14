"""How work in a thread becomes a stream, and ends when nobody listens."""

import threading

import pytest

pytestmark = pytest.mark.app


def test_values_then_the_error_arrive_in_order():
    from app import live

    def work(show):
        show(1)
        show(2)
        raise ValueError("three")

    values = live(work)
    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(ValueError, match="three"):
        next(values)


def test_work_ends_at_its_next_step_when_the_visitor_leaves():
    from app import live

    steps, go_on = [], threading.Event()

    def work(show):
        for step in range(100):
            steps.append(step)
            show(step)
            go_on.wait()

    values = live(work)
    assert next(values) == 0
    threading.Timer(0.05, go_on.set).start()
    values.close()  # waits for the work, so that the next one has the model alone
    assert steps[-1] < 99

"""Workers stay with what they have loaded, spread over what waits, and do not load what is not worth it."""

from fracbit.sweeps.queue import Queue


def test_a_worker_stays_with_its_source() -> None:
    queue = Queue([("a", "1"), ("b", "2"), ("a", "3"), ("a", "4")])
    taken = [queue.take(0) for _ in range(5)]
    assert taken == [("a", "1"), ("a", "3"), ("a", "4"), ("b", "2"), None]


def test_workers_spread_over_the_sources() -> None:
    queue = Queue([(source, f"{source}{index}") for source in "abc" for index in range(4)])
    first = [queue.take(worker) for worker in range(3)]
    assert {source for source, _ in filter(None, first)} == {"a", "b", "c"}


def test_the_longest_source_is_begun_first() -> None:
    queue = Queue([("small", "1"), ("large", "2")], run_seconds={"small": 1.0, "large": 60.0}.__getitem__)
    assert queue.take(0) == ("large", "2")


def test_a_worker_joins_only_when_the_work_left_outlasts_the_loading() -> None:
    queue = Queue([("a", str(index)) for index in range(10)], load_seconds=lambda _: 4.0)
    assert queue.take(0) == ("a", "0")
    assert queue.take(1) == ("a", "1")  # 9 runs over two workers outlast 4 s
    assert queue.take(2) is None  # 8 over three do not
    assert len(queue) == 8


def test_a_run_given_back_comes_next() -> None:
    queue = Queue([("a", "1"), ("a", "2")])
    queue.take(0)
    queue.leave(0)
    queue.give_back("a", "1")
    assert queue.take(1) == ("a", "1")


def test_a_worker_takes_only_what_fits() -> None:
    queue = Queue(
        [("large", "1"), ("small", "2")], fits=lambda worker, source: worker == 0 or source == "small"
    )
    assert queue.take(1) == ("small", "2")
    assert queue.take(1) is None
    assert queue.take(0) == ("large", "1")


def test_a_source_can_be_dropped() -> None:
    queue = Queue([("a", "1"), ("a", "2"), ("b", "3")])
    assert queue.drop("a") == ["1", "2"]
    assert queue.drop("a") == []
    assert len(queue) == 1

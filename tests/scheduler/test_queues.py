"""Waiting queues: order, removal from anywhere, and that removed requests do not pile up."""

import random

import pytest

from jaxllm.scheduler.queues import FcfsQueue, PriorityQueue, WaitingQueue
from jaxllm.scheduler.request import Request


def request(arrival: int, priority: int = 0) -> Request:
    made = Request(str(arrival), [1], 1, priority)
    made.arrival = arrival
    return made


def drained(queue: WaitingQueue) -> list[int]:
    order = []
    while queue:
        first = queue.peek()
        queue.remove(first)
        order.append(first.arrival)
    return order


def test_fcfs_keeps_the_order_of_arrival() -> None:
    queue = FcfsQueue()
    for arrival, priority in enumerate([5, -5, 0]):
        queue.push(request(arrival, priority))
    assert drained(queue) == [0, 1, 2]


def test_fcfs_takes_preempted_requests_back_at_the_front() -> None:
    queue = FcfsQueue()
    queue.push(request(7))
    for arrival in (6, 5):  # the newest is preempted first
        preempted = request(arrival)
        preempted.num_preemptions = 1
        queue.push(preempted)
    assert drained(queue) == [5, 6, 7]


def test_priority_goes_by_value_then_arrival() -> None:
    queue = PriorityQueue()
    for arrival, priority in [(3, 1), (0, 1), (1, -2), (2, 0), (4, -2)]:
        queue.push(request(arrival, priority))
    assert drained(queue) == [1, 4, 2, 0, 3]


@pytest.mark.parametrize("kind", [FcfsQueue, PriorityQueue])
def test_requests_leave_from_anywhere(kind: type[FcfsQueue] | type[PriorityQueue]) -> None:
    queue, rng = kind(), random.Random(0)
    requests = [request(arrival, arrival % 3) for arrival in range(300)]
    for made in requests:
        queue.push(made)
    expected = drained(queue)
    for made in requests:
        queue.push(made)
    gone = rng.sample(requests, 250)
    for count, made in enumerate(gone, start=1):
        queue.remove(made)
        assert len(queue) == 300 - count
    left = set(range(300)) - {made.arrival for made in gone}
    assert drained(queue) == [arrival for arrival in expected if arrival in left]


@pytest.mark.parametrize("kind", [FcfsQueue, PriorityQueue])
def test_an_empty_queue_says_so(kind: type[FcfsQueue] | type[PriorityQueue]) -> None:
    queue = kind()
    with pytest.raises(IndexError, match="no request waits"):
        queue.peek()
    with pytest.raises(KeyError):
        queue.remove(request(0))


def test_removed_requests_do_not_pile_up_behind_one_that_stays() -> None:
    queue = PriorityQueue()
    queue.push(request(0, priority=-1))
    for arrival in range(1, 1000):
        queue.push(request(arrival))
        queue.remove(request(arrival))
    assert len(queue._heap) <= 3
